"""gigatoken's ids are the tokenizer's for every kind of vocabulary that is let through, and only for those."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_steel.text import fast
from megatron_steel.text.fast import FastEncoder, IdsDiffer, ReferenceEncoder, fast_encoder
from megatron_steel.text.huggingface import HuggingFaceTokenizer
from megatron_steel.text.tokenizer import NullTokenizer, TikTokenizer

DATA = Path(__file__).resolve().parents[2] / "examples" / "data"
GPT2 = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
PIECES = [
    "a", "word ", "DON'T", "'s", "'LL", "'\u017f", "123", "4567", " ", "  ", "\n", "\r\n", "\t", "\u00a0", "\u3000",
    "\u4e2d\u6587", "\u3002", "\uff01", "\u00e9", "e\u0301", "\u1100\u1161", "\u0661", "\u2160", "\u00b2", "\u212a",
    "\U0001f600", "\u200d", "\ufeff", "\x00", "\x85", "\u2028", "<|im_start|>", "<|endoftext|>", "<|im_end", "_", "...",
]  # fmt: skip
TEXTS = st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=4)), max_size=12).map("".join)


def state_of(folder: Path = DATA / "tokenizer") -> dict[str, Any]:
    return json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))


def tokenizer_of(state: dict[str, Any], folder: Path) -> HuggingFaceTokenizer:
    """The bundled tokenizer with another ``tokenizer.json``."""
    config = (DATA / "tokenizer" / "tokenizer_config.json").read_text(encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(config, encoding="utf-8")
    (folder / "tokenizer.json").write_text(json.dumps(state), encoding="utf-8")
    return HuggingFaceTokenizer(folder)


def variants() -> dict[str, dict[str, Any]]:
    """Every kind that is let through: tested pre-tokenizers, with and without NFC and ``ignore_merges``."""
    found = {}
    for normalizer in (None, {"type": "NFC"}):
        for ignore_merges in (False, True):
            for name, pattern in {"gpt2": None, **dict(enumerate(fast.TESTED_PATTERNS))}.items():
                state = state_of()
                state["normalizer"], state["model"]["ignore_merges"] = normalizer, ignore_merges
                if pattern is None:
                    state["pre_tokenizer"] = GPT2
                else:
                    state["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = pattern
                found[f"{name}-{normalizer is None}-{ignore_merges}"] = state
    return found


VARIANTS = variants()


@pytest.mark.parametrize("name", VARIANTS)
def test_ids_equal_the_reference_for_every_kind_let_through(name: str, tmp_path: Path) -> None:
    encoder = fast_encoder(tokenizer_of(VARIANTS[name], tmp_path), [])
    assert isinstance(encoder, FastEncoder), encoder

    @settings(max_examples=25, deadline=None, derandomize=True)
    @given(st.lists(TEXTS, min_size=1, max_size=20))
    def check(texts: list[str]) -> None:
        encoder.compare(texts)

    check()


def test_ids_of_a_ranks_file_equal_tiktokens(tmp_path: Path) -> None:
    alphabet = {index: base64.b64encode(bytes([index])) for index in range(256)}
    merged = [b"th", b"the", b"\xe4\xb8", b"\xe4\xb8\xad", b" t", b"in", b"ing", b"12"]
    lines = [*(b"%s %d" % (piece, rank) for rank, piece in alphabet.items())]
    lines += [b"%s %d" % (base64.b64encode(piece), 256 + rank) for rank, piece in enumerate(merged)]
    (tmp_path / "x.tiktoken").write_bytes(b"\n".join(lines))
    encoder = fast_encoder(TikTokenizer(tmp_path / "x.tiktoken"), [])
    assert isinstance(encoder, FastEncoder), encoder

    @settings(max_examples=50, deadline=None, derandomize=True)
    @given(st.lists(TEXTS, min_size=1, max_size=20))
    def check(texts: list[str]) -> None:
        encoder.compare(texts)

    check()


def test_a_ranks_file_gigatoken_cannot_load_is_left_to_the_reference(tmp_path: Path) -> None:
    pieces = [bytes([index]) for index in range(256)] + [b"abc"]  # no pair gives the last one
    lines = [b"%s %d" % (base64.b64encode(piece), rank) for rank, piece in enumerate(pieces)]
    (tmp_path / "x.tiktoken").write_bytes(b"\n".join(lines))
    assert fast_encoder(TikTokenizer(tmp_path / "x.tiktoken"), []) == "gigatoken cannot load this vocabulary"


def llama(state: dict[str, Any]) -> None:
    state["model"]["byte_fallback"] = True


def other_pattern(state: dict[str, Any]) -> None:
    state["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\w+|\W+"


def prefix_space(state: dict[str, Any]) -> None:
    state["pre_tokenizer"] = GPT2 | {"add_prefix_space": True}


def lowercase(state: dict[str, Any]) -> None:
    state["normalizer"] = {"type": "Lowercase"}


def stripped_token(state: dict[str, Any]) -> None:
    state["added_tokens"][1]["lstrip"] = True


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (llama, "not byte-level BPE"),
        (other_pattern, "pre-tokenizer is not a tested one"),
        (prefix_space, "pre-tokenizer is not a tested one"),
        (lowercase, "normalizer is not a tested one"),
        (stripped_token, "'<|im_start|>' takes its surroundings into account"),
    ],
)
def test_other_kinds_are_left_to_the_reference(change: Any, reason: str, tmp_path: Path) -> None:
    state = state_of()
    change(state)
    found = fast_encoder(tokenizer_of(state, tmp_path), [])
    assert isinstance(found, str) and reason in found and "\n" not in found


def test_a_tokenizer_without_text_is_left_to_the_reference() -> None:
    assert fast_encoder(NullTokenizer(9), []) == "NullTokenizer is not a byte-level BPE vocabulary"


class OneWrong:
    """A backend that gives a wrong id for one text."""

    def __init__(self, backend: Any, text: str) -> None:
        self.backend, self.text = backend, text

    def encode_batch(self, texts: list[str], parallel: bool) -> Any:
        return self.backend.encode_batch([text + "x" if text == self.text else text for text in texts], parallel=False)


def test_a_difference_in_a_checked_text_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = HuggingFaceTokenizer(DATA / "tokenizer")
    good = fast_encoder(tokenizer, ["text"])
    assert isinstance(good, FastEncoder)
    picked = next(text for text in (f"text number {index}" for index in range(10_000)) if fast.is_checked(text))
    wrong = FastEncoder(lambda: OneWrong(good._backend, picked), ReferenceEncoder(tokenizer), None)
    texts: Sequence[str] = ["one", picked, "three"]
    good.encode(texts)
    with pytest.raises(IdsDiffer, match=picked):
        wrong.encode(texts)


def test_what_the_library_remembers_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = fast_encoder(HuggingFaceTokenizer(DATA / "tokenizer"), [])
    assert isinstance(encoder, FastEncoder)
    expected, backend = encoder.encode(["some text"])[0].tolist(), encoder._backend
    assert encoder._backend is backend
    monkeypatch.setattr(fast, "CACHE_BYTES", -(1 << 40))
    assert encoder.encode(["some text"])[0].tolist() == expected
    assert encoder._backend is not backend


def test_a_process_that_has_grown_is_worn(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = fast_encoder(HuggingFaceTokenizer(DATA / "tokenizer"), [])
    assert isinstance(encoder, FastEncoder)
    encoder.encode(["some text"])
    assert not encoder.worn()
    monkeypatch.setattr(fast, "WORN_BYTES", -(1 << 40))
    assert encoder.worn()
    assert not ReferenceEncoder(encoder._reference.tokenizer).worn()


def test_about_one_text_in_two_hundred_is_checked_and_long_ones_in_part() -> None:
    share = sum(fast.is_checked(f"document {index} says something") for index in range(40_000)) / 40_000
    assert share == pytest.approx(1 / fast.CHECK_SHARE, rel=0.2)
    long = "".join(map(str, range(20_000)))
    assert len(fast.check_window(long)) == fast.CHECK_WINDOW and fast.check_window(long) in long
    assert fast.check_window(long[:100]) == long[:100]


def test_both_encoders_give_arrays_of_the_same_form() -> None:
    tokenizer = HuggingFaceTokenizer(DATA / "tokenizer")
    quick = fast_encoder(tokenizer, [])
    assert isinstance(quick, FastEncoder)
    for texts in ([], [""], ["", "a b", "", "\u4e2d\u6587"]):
        for encoder in (quick, ReferenceEncoder(tokenizer)):
            ids, lengths = encoder.encode(texts)
            assert lengths.dtype == np.int64 and len(lengths) == len(texts) and lengths.sum() == len(ids)
            assert ids.tolist() == [index for text in texts for index in tokenizer.encode(text)]
