"""Texts to arrays of ids: through gigatoken where its ids are those of the reference, else through the reference.

gigatoken encodes byte-level BPE one to two orders of magnitude faster than ``tokenizers``, but its ids are not always
equal. So it is used only for kinds of vocabularies the tests compare, after a comparison on special tokens, odd text
and a sample of the input; and during the run documents picked by their content are encoded by both.
"""

from __future__ import annotations

import itertools
import os
import tempfile
import unicodedata
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_steel.text.tokenizer import RANKS_FILE, TIKTOKEN_SPECIAL_TOKENS, TikTokenizer, Tokenizer

CHECK_SHARE = 200
# How much a process may grow by what the library remembers: then it makes way for a fresh one after its work, or,
# when a single piece of work is that large, loads the vocabulary again.
WORN_BYTES, CACHE_BYTES = 32 << 20, 192 << 20
LONG_DOCUMENT = 8192
CHECK_WINDOW = 2048
# Split patterns whose ids are compared with the reference in the tests: Qwen 2 and 2.5; Llama 3 and cl100k.
TESTED_PATTERNS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
)
ODD_TEXTS = (
    "",
    " \t\r\n\n  x",
    "don't DON'T 12345 3.14 x=1;\r\n\r\n\r\n\ty",
    "e\u0301\u0323 \ufb01 \u212b \u0661\u0662 \u00b2 \u2160 \u1100\u1161 \u0e33",
    "\u4e2d\u6587\u3002\u300c\u6587\u300d\uff01\uff11\u3000x \U00020000",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \ufeff \u2028 \x00 \x85 \u00a0",
)


class IdsDiffer(Exception):
    """The fast encoder and the reference disagree about a text."""


class TextEncoder(ABC):
    """Encodes several texts at once, each as Megatron-LM's preprocessing stores it."""

    @abstractmethod
    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """All ids back to back, and int64 (texts,) how many belong to each text."""

    def worn(self) -> bool:
        """Whether this process has come to hold much that a fresh one would not."""
        return False


class ReferenceEncoder(TextEncoder):
    """The tokenizer's own library."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        documents = self.tokenizer.encode_documents(texts)
        lengths = np.fromiter(map(len, documents), np.int64, len(documents))
        ids = np.fromiter(itertools.chain.from_iterable(documents), np.int64, int(lengths.sum()))
        return ids, lengths


class FastEncoder(TextEncoder):
    """gigatoken, with about one text in ``CHECK_SHARE`` encoded by the reference too.

    Which texts depends on their content alone, so that any split of the work finds the same difference.
    """

    def __init__(
        self, load: Callable[[], Any], reference: ReferenceEncoder, normalise: Callable[[str], str] | None
    ) -> None:
        self._load, self._reference, self._normalise = load, reference, normalise
        self._backend = load()
        self._process, self._resident = 0, 0

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Raises :class:`IdsDiffer` at a checked text whose ids differ."""
        ids, lengths = self.encode_unchecked(texts)
        picked = [position for position, text in enumerate(texts) if is_checked(text)]
        if picked:
            self.compare([check_window(texts[position]) for position in picked])
        return ids, lengths

    def encode_unchecked(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """The ids of gigatoken."""
        given = list(map(self._normalise, texts)) if self._normalise else list(texts)
        if not given:
            return np.empty(0, np.uint32), np.empty(0, np.int64)
        # On this thread: the library's thread pool does not survive a fork, and --workers says how many cores are used.
        self._bound_memory()
        rows = self._backend.encode_batch(given, parallel=False).layout
        bounds = np.asarray(rows.offsets.data)
        return np.asarray(rows.content.data)[bounds[0] : bounds[-1]], np.diff(bounds)

    def worn(self) -> bool:
        return self._process == os.getpid() and resident_bytes() - self._resident > WORN_BYTES

    def _bound_memory(self) -> None:
        """Load the vocabulary again when what the library remembers of the text, without end, has become large."""
        if self._process != os.getpid():
            self._process, self._resident = os.getpid(), resident_bytes()
        elif resident_bytes() - self._resident > CACHE_BYTES:
            self._backend = None
            self._backend = self._load()

    def compare(self, texts: Sequence[str]) -> None:
        """Raise :class:`IdsDiffer` unless both give the same ids for every text."""
        (ours, our_lengths), (ids, lengths) = self.encode_unchecked(texts), self._reference.encode(texts)
        if np.array_equal(our_lengths, lengths) and np.array_equal(ours, ids):
            return
        ours_each = np.split(ours, np.cumsum(our_lengths)[:-1])
        for text, mine, other in zip(texts, ours_each, np.split(ids, np.cumsum(lengths)[:-1]), strict=True):
            if not np.array_equal(mine, other):
                raise IdsDiffer(f"gigatoken and the tokenizer give different ids for {ascii(text[:60])}")


def resident_bytes() -> int:
    """Memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def is_checked(text: str) -> bool:
    """Whether a text is among those that are encoded twice: a hash of its beginning and length says so."""
    return zlib.crc32(text[:64].encode(), len(text)) % CHECK_SHARE == 0


def check_window(text: str) -> str:
    """What of a picked text is compared: all of it, or of a long one a stretch at a place its content decides."""
    if len(text) <= LONG_DOCUMENT:
        return text
    start = zlib.crc32(text[:256].encode()) % (len(text) - CHECK_WINDOW)
    return text[start : start + CHECK_WINDOW]


def fast_encoder(tokenizer: Tokenizer, sample: Sequence[str]) -> FastEncoder | str:
    """gigatoken for this tokenizer, or in one line why the reference has to do it."""
    from megatron_steel.text.huggingface import HuggingFaceTokenizer

    reference = ReferenceEncoder(tokenizer)
    try:
        if isinstance(tokenizer, HuggingFaceTokenizer):
            encoder, special = from_hugging_face(tokenizer, reference)
        elif isinstance(tokenizer, TikTokenizer):
            encoder, special = from_ranks(tokenizer, reference)
        else:
            return f"{tokenizer.name} is not a byte-level BPE vocabulary"
        typed = [f"a {token}b{token}{token} \u4e2d{token}\n" for token in special]
        encoder.compare([*special, *typed, *ODD_TEXTS, *sample])
    except ImportError:
        return "gigatoken is not installed"
    except (ValueError, IdsDiffer) as error:
        return " ".join(str(error).split())
    return encoder


def from_hugging_face(tokenizer: Any, reference: ReferenceEncoder) -> tuple[FastEncoder, list[str]]:
    """The encoder and the added tokens. ``ValueError`` for a vocabulary that is not of a tested kind."""
    steps = tokenizer.steps()
    if reason := untested(steps):
        raise ValueError(reason)
    if tokenizer.adds_tokens():
        raise ValueError("the tokenizer adds tokens to every text")
    import gigatoken

    text = tokenizer.backend_text()
    encoder = FastEncoder(lambda: loaded(lambda: gigatoken.Tokenizer.from_json(text).backend), reference, None)
    return encoder, [token["content"] for token in steps["added_tokens"]]


def from_ranks(tokenizer: TikTokenizer, reference: ReferenceEncoder) -> tuple[FastEncoder, list[str]]:
    """The encoder of a tiktoken ranks file, which has Qwen's pattern and normalisation here."""
    import gigatoken

    special = {token: tokenizer.encode(token)[0] for token in TIKTOKEN_SPECIAL_TOKENS}

    def load() -> Any:
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_files(Path(folder))
            path = Path(folder) / RANKS_FILE
            return loaded(lambda: gigatoken.Tokenizer.from_tiktoken(path, "qwen2", special).backend)

    return FastEncoder(load, reference, lambda text: unicodedata.normalize("NFC", text)), list(special)


def loaded(load: Callable[[], Any]) -> Any:
    """A vocabulary as gigatoken loads it; ``ValueError`` when it cannot."""
    try:
        return load()
    except BaseException as error:  # of some vocabularies it tells by a Rust panic, which is no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise ValueError("gigatoken cannot load this vocabulary") from error


def untested(state: dict[str, Any]) -> str | None:
    """Why the steps of a ``tokenizer.json`` are not of a kind whose ids are known to be equal, or None if they are."""
    model = state["model"]
    plain = not any(model.get(key) for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"))
    if model.get("type") != "BPE" or model.get("byte_fallback") or model.get("unk_token") or not plain:
        return "the vocabulary is not byte-level BPE"
    if state.get("normalizer") not in (None, {"type": "NFC"}):
        return "its normalizer is not a tested one"
    if not tested_split(state.get("pre_tokenizer")):
        return "its pre-tokenizer is not a tested one"
    for token in state["added_tokens"]:
        if any(token.get(key) for key in ("single_word", "lstrip", "rstrip", "normalized")):
            return f"its added token {token['content']!r} takes its surroundings into account"
    return None


def tested_split(step: dict[str, Any] | None) -> bool:
    """Whether a pre-tokenizer is GPT-2's, or a split by a tested pattern followed by the byte-level alphabet."""
    steps = (step or {}).get("pretokenizers", [step]) if step else []
    kinds = [item["type"] for item in steps]
    if kinds == ["ByteLevel"]:
        return bool(steps[0].get("use_regex", True)) and not steps[0].get("add_prefix_space", True)
    if kinds != ["Split", "ByteLevel"]:
        return False
    split, alphabet = steps
    isolated = split["behavior"] == "Isolated" and not split["invert"]
    plain = not alphabet.get("use_regex", True) and not alphabet.get("add_prefix_space", True)
    return isolated and plain and split["pattern"].get("Regex") in TESTED_PATTERNS
