"""Tokenizers: round trips, bytes per id, fingerprints, saved copies, and errors."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megatron_steel.text.tokenizer import Tokenizer, build_tokenizer

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "examples" / "data"
BUNDLED = build_tokenizer("HuggingFaceTokenizer", str(DATA / "tokenizer"))
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


def real_texts() -> list[str]:
    """The bundled held-out texts of both languages."""
    lines = [line for name in ("valid_zh", "valid_en") for line in open(DATA / f"{name}.jsonl", encoding="utf-8")]
    return [json.loads(line)["text"] for line in lines]


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import sentencepiece

    folder = tmp_path_factory.mktemp("sentencepiece")
    (folder / "text.txt").write_text("\n".join(real_texts()), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"), model_prefix=str(folder / "tiny"), vocab_size=3000, byte_fallback=True,
        character_coverage=0.98, model_type="bpe", minloglevel=2, num_threads=1, max_sentence_length=100000,
    )  # fmt: skip
    return folder / "tiny.model"


@pytest.fixture(scope="module")
def ranks_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled tokenizer's vocabulary as a tiktoken file: ranks are its ids without the three special tokens."""
    from tokenizers.pre_tokenizers import ByteLevel

    vocabulary = json.loads((DATA / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    letters = sorted(ByteLevel.alphabet())
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]  # GPT-2's byte alphabet: these stand for themselves
    others = [byte for byte in range(256) if byte not in plain]
    byte_of = {chr(byte): byte for byte in plain} | {chr(256 + index): byte for index, byte in enumerate(others)}
    assert sorted(byte_of) == letters
    path = tmp_path_factory.mktemp("tiktoken") / "tiny.tiktoken"
    with open(path, "wb") as stream:
        for piece, index in sorted(vocabulary.items(), key=lambda item: item[1])[3:]:
            token = bytes(byte_of[letter] for letter in piece)
            stream.write(base64.b64encode(token) + f" {index - 3}\n".encode())
    return path


def test_bundled_tokenizer_has_the_promised_ids() -> None:
    assert BUNDLED.vocab_size == 4096
    assert BUNDLED.encode("<|endoftext|><|im_start|><|im_end|>") == [0, 1, 2]
    assert BUNDLED.eod_id == BUNDLED.eos_id == BUNDLED.pad_id == 0
    assert BUNDLED.bos_id is None


@settings(deadline=None)
@given(TEXT)
def test_byte_level_round_trip_and_bytes(text: str) -> None:
    # Typed control tokens become control ids, which stand for no bytes of text.
    assume("<|" not in text)
    ids = BUNDLED.encode(text)
    text = unicodedata.normalize("NFC", text)
    assert BUNDLED.decode(ids) == text
    assert BUNDLED.byte_lengths()[ids].sum(dtype=int) == len(text.encode())


def test_batches_equal_single_texts_on_real_text() -> None:
    texts = real_texts()
    single = [BUNDLED.encode(text) for text in texts]
    assert BUNDLED.encode_batch(texts) == single == BUNDLED.encode_documents(texts)
    assert [BUNDLED.decode(ids) for ids in single] == texts


def test_special_tokens_stand_for_no_text() -> None:
    lengths = BUNDLED.byte_lengths()
    assert lengths.dtype == np.int32 and lengths.shape == (4096,)
    assert not lengths[:3].any() and lengths[3:].min() >= 1


def test_tiktoken_ids_equal_the_same_vocabulary_in_hugging_face(ranks_file: Path) -> None:
    tokenizer = build_tokenizer("TikTokenizer", str(ranks_file))
    assert tokenizer.vocab_size == 4096
    assert tokenizer.eod_id == 4093
    for text in [*real_texts()[:8], *real_texts()[-4:], "e\u0301 12 345\r\n  x", "It's\tDON'T"]:
        normalized = unicodedata.normalize("NFC", text)
        assert tokenizer.encode(text) == [index - 3 for index in BUNDLED.encode(normalized)]
        assert tokenizer.decode(tokenizer.encode(text)) == normalized
        assert tokenizer.byte_lengths()[tokenizer.encode(text)].sum() == len(normalized.encode())
    assert tokenizer.encode("a<|im_end|>") == [tokenizer.encode("a")[0], 4095]


def test_sentencepiece_ids_are_the_librarys(sentencepiece_model: Path) -> None:
    import sentencepiece

    tokenizer = build_tokenizer("SentencePieceTokenizer", str(sentencepiece_model))
    library = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_model))
    texts = [*real_texts()[::5], "", " ", "</s> typed", "\u2603 rare"]
    assert tokenizer.encode_batch(texts) == [library.encode_as_ids(text) for text in texts]
    assert tokenizer.vocab_size == library.get_piece_size() == 3000
    assert tokenizer.eod_id == library.eos_id() == 2 and tokenizer.bos_id == 1 and tokenizer.pad_id is None
    assert 2 not in tokenizer.encode("</s> typed")


def test_sentencepiece_bytes_add_up_to_the_text_and_its_dummy_prefix(sentencepiece_model: Path) -> None:
    tokenizer = build_tokenizer("SentencePieceTokenizer", str(sentencepiece_model))
    lengths = tokenizer.byte_lengths()
    for text in ("one two three", "\u5200\u6768\u9f98\u9f89\u864e", "mixed \u4e09\u56fd \u2603!"):
        assert lengths[tokenizer.encode(text)].sum() == len(text.encode()) + 1
    assert not lengths[[0, 1, 2]].any()


def test_null_tokenizer_counts_eod_as_megatron_core_does() -> None:
    tokenizer = build_tokenizer("NullTokenizer", None, vocab_size=1000)
    assert (tokenizer.vocab_size, tokenizer.eod_id) == (1001, 1000)
    assert tokenizer.encode("0 17 999") == [0, 17, 999]
    assert tokenizer.decode([0, 17, 999]) == "0 17 999"
    with pytest.raises(ValueError, match="outside 0 to 1000"):
        tokenizer.encode("1001")
    with pytest.raises(ValueError, match="integers separated by spaces"):
        tokenizer.encode("1 two")


def every_kind(sentencepiece_model: Path, ranks_file: Path) -> list[Tokenizer]:
    """One tokenizer of each type."""
    return [
        BUNDLED,
        build_tokenizer("SentencePieceTokenizer", str(sentencepiece_model)),
        build_tokenizer("TikTokenizer", str(ranks_file)),
        build_tokenizer("NullTokenizer", None, 50),
    ]


def test_a_saved_copy_is_the_same_tokenizer(sentencepiece_model: Path, ranks_file: Path, tmp_path: Path) -> None:
    for tokenizer in every_kind(sentencepiece_model, ranks_file):
        tokenizer.save(tmp_path / tokenizer.name)
        tokenizer.save(tmp_path / tokenizer.name)
        copy = build_tokenizer(tokenizer.name, str(tmp_path / tokenizer.name))
        assert copy.describe() == tokenizer.describe()
        assert json.loads((tmp_path / tokenizer.name / "steel_tokenizer.json").read_text()) == tokenizer.describe()
        text = "1 2 3" if tokenizer.name == "NullTokenizer" else real_texts()[0]
        assert copy.encode(text) == tokenizer.encode(text)
        assert not list((tmp_path / tokenizer.name).glob("*.tmp"))


def test_fingerprints_differ_between_kinds_and_survive_rewriting(
    sentencepiece_model: Path, ranks_file: Path, tmp_path: Path
) -> None:
    prints = [tokenizer.fingerprint() for tokenizer in every_kind(sentencepiece_model, ranks_file)]
    assert len(set(prints)) == 4
    shutil.copytree(DATA / "tokenizer", tmp_path / "compact")
    path = tmp_path / "compact" / "tokenizer.json"
    state = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(state), encoding="utf-8")
    assert build_tokenizer("HuggingFaceTokenizer", str(path.parent)).fingerprint() == prints[0]
    state["model"]["merges"][10], state["model"]["merges"][11] = (
        state["model"]["merges"][11],
        state["model"]["merges"][10],
    )
    path.write_text(json.dumps(state), encoding="utf-8")
    assert build_tokenizer("HuggingFaceTokenizer", str(path.parent)).fingerprint() != prints[0]


def test_a_tokenizer_without_eod_says_so_when_asked(tmp_path: Path) -> None:
    shutil.copytree(DATA / "tokenizer", tmp_path / "bare")
    config = json.loads((tmp_path / "bare" / "tokenizer_config.json").read_text(encoding="utf-8"))
    del config["eos_token"]
    (tmp_path / "bare" / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    tokenizer = build_tokenizer("HuggingFaceTokenizer", str(tmp_path / "bare"))
    assert tokenizer.eos_id is None and tokenizer.pad_id == 0
    with pytest.raises(ValueError, match="no end-of-document token"):
        _ = tokenizer.eod_id


@pytest.mark.parametrize(
    ("kind", "content", "message"),
    [
        ("HuggingFaceTokenizer", None, "no such file or folder"),
        ("SentencePieceTokenizer", b"not a model", "not a SentencePiece model"),
        ("TikTokenizer", b"IQ== 0\nIg== x\n", ":2: not a tiktoken ranks line"),
        ("TikTokenizer", b"IQ== 0\nIg== 2\n", "without gaps"),
        ("WordTokenizer", b"", "must be one of HuggingFaceTokenizer"),
    ],
)
def test_unusable_tokenizers_are_one_line(kind: str, content: bytes | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "model").write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        build_tokenizer(kind, str(tmp_path / "model"))
    assert "\n" not in str(caught.value)


def test_damaged_hugging_face_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no tokenizer.json"):
        build_tokenizer("HuggingFaceTokenizer", str(tmp_path))
    shutil.copytree(DATA / "tokenizer", tmp_path / "cut")
    (tmp_path / "cut" / "tokenizer.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match="tokenizer.json: not a tokenizers file"):
        build_tokenizer("HuggingFaceTokenizer", str(tmp_path / "cut"))


def test_loading_the_bundled_tokenizer_needs_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from megatron_steel.text.tokenizer import build_tokenizer; "
        f"build_tokenizer('HuggingFaceTokenizer', {str(DATA / 'tokenizer')!r}).encode('x'); "
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
