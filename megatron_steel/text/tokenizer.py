"""Tokenizers: text to ids and back, one interface over four kinds. No torch.

The ids are those of Megatron-LM's preprocessing script for the same tokenizer type and files, which is what
makes ``.bin`` files comparable byte for byte. Libraries are imported when a tokenizer is built, never before.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_steel.text.files import write_bytes, write_json

TOKENIZER_TYPES = ("HuggingFaceTokenizer", "SentencePieceTokenizer", "TikTokenizer", "NullTokenizer")
DESCRIPTION_FILE = "steel_tokenizer.json"
SENTENCEPIECE_FILE = "tokenizer.model"
RANKS_FILE = "tokenizer.tiktoken"
TIKTOKEN_SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# How SentencePiece writes a space.
SPACE = "\u2581"
# The split of Qwen's tokenizer (its tokenizer.json, pre_tokenizer): single digits, words with one leading symbol.
TIKTOKEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, slots=True)
class AddedToken:
    """A token that text is searched for before it is split, and so one that a template can write."""

    text: str
    index: int
    control: bool = True
    """Whether it stands for no text."""
    eats_left: bool = False
    """Whether it takes the white space before it."""
    eats_right: bool = False


class Tokenizer(ABC):
    """Text to ids and back.

    ``vocab_size`` is the largest id plus one, added tokens included. ``pad_id`` may equal ``eos_id``: nothing in this
    engine masks by id.
    """

    name: str
    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None

    @property
    def eod_id(self) -> int:
        """End-of-document id (the end-of-sequence token); ``ValueError`` when the tokenizer has none."""
        if self.eos_id is None:
            raise ValueError(f"{self.name}: no end-of-document token; set eos_token in the tokenizer's files")
        return self.eos_id

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Ids of a text without added beginning or end tokens. Control tokens typed in the text become their ids."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """:meth:`encode` of several texts, in one call where the library has one."""
        return [self.encode(text) for text in texts]

    def encode_documents(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids as Megatron-LM's preprocessing stores them: with the tokens a Hugging Face tokenizer itself adds."""
        return self.encode_batch(texts)

    def encode_typed(self, text: str) -> list[int]:
        """:meth:`encode` of what somebody typed: a control token in it stays text."""
        return self.encode(text)

    def added_tokens(self) -> list[AddedToken]:
        """Control tokens, and words that were added to the vocabulary."""
        return []

    def chat_template(self) -> str | None:
        """The Jinja chat template in the tokenizer's own files."""
        return None

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, control tokens included."""

    @abstractmethod
    def byte_lengths(self) -> np.ndarray:
        """int32 (vocab_size,): UTF-8 bytes of text each id stands for; 0 for special tokens and unused ids."""

    def piece(self, index: int) -> str | None:
        """What the tokenizer's files call an id below ``vocab_size``; None for one that is not used."""
        raise ValueError(f"{self.name}: its vocabulary cannot be extended, control tokens come after the last id")

    def parts(self, piece: str) -> list[int]:
        """Ids that a piece of a larger vocabulary of the same kind has here."""
        return self.encode(piece)

    @abstractmethod
    def fingerprint(self) -> str:
        """sha256 hex of what decides ids; the same for a copy anywhere."""

    def quick_key(self) -> str:
        """Something that changes whenever :meth:`fingerprint` does, and perhaps more often; quick to find."""
        return self.fingerprint()

    @abstractmethod
    def save_files(self, directory: Path) -> None:
        """Write the files :func:`build_tokenizer` needs into an existing directory."""

    def save(self, directory: Path) -> None:
        """Write the files :func:`build_tokenizer` loads back, and ``steel_tokenizer.json`` that describes them."""
        directory.mkdir(parents=True, exist_ok=True)
        self.save_files(directory)
        write_json(directory / DESCRIPTION_FILE, self.describe())

    def describe(self) -> dict[str, Any]:
        """Type, sizes, special ids and fingerprint."""
        return {
            "tokenizer_type": self.name,
            "vocab_size": self.vocab_size,
            "bos_id": self.bos_id,
            "eos_id": self.eos_id,
            "eod_id": self.eos_id,
            "pad_id": self.pad_id,
            "fingerprint": self.fingerprint(),
        }


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece ``.model`` file. A control symbol typed in text stays plain text, as in the library."""

    name = "SentencePieceTokenizer"

    def __init__(self, path: Path) -> None:
        import sentencepiece

        self._model = sentencepiece.SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(read_bytes(path, self.name))
        except RuntimeError as error:
            raise ValueError(f"{path}: not a SentencePiece model") from error
        self.vocab_size = self._model.get_piece_size()
        self.bos_id, self.eos_id, self.pad_id = (
            index if index >= 0 else None
            for index in (self._model.bos_id(), self._model.eos_id(), self._model.pad_id())
        )

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self._model.encode(list(texts), num_threads=1)

    def added_tokens(self) -> list[AddedToken]:
        model = self._model
        controls = [index for index in range(self.vocab_size) if model.is_control(index)]
        # The Python module has no name for a user-defined piece; but those have no score, and stand in any text.
        words = [model.piece_to_id(piece) for piece, score in self.normal_pieces() if score == 0 and len(piece) > 2]
        words = [index for index in words if index in model.encode(f"x{model.id_to_piece(index)}x")]
        return [AddedToken(model.id_to_piece(index), index, index in controls) for index in (*controls, *words)]

    def decode(self, ids: Sequence[int]) -> str:
        return self._model.decode([int(index) for index in ids])

    def byte_lengths(self) -> np.ndarray:
        model, lengths = self._model, np.zeros(self.vocab_size, dtype=np.int32)
        for index in range(self.vocab_size):
            if model.is_byte(index):
                lengths[index] = 1
            elif not (model.is_control(index) or model.is_unknown(index) or model.is_unused(index)):
                lengths[index] = len(model.id_to_piece(index).replace(SPACE, " ").encode())
        return lengths

    def piece(self, index: int) -> str | None:
        return None if self._model.is_unused(index) else self._model.id_to_piece(index)

    def normal_pieces(self) -> list[tuple[str, float]]:
        """Pieces that stand for text, but for single bytes, with their scores."""
        model = self._model
        other = (model.is_byte, model.is_control, model.is_unknown, model.is_unused)
        ids = (index for index in range(self.vocab_size) if not any(kind(index) for kind in other))
        return [(model.id_to_piece(index), model.get_score(index)) for index in ids]

    def parts(self, piece: str) -> list[int]:
        text = piece.replace(SPACE, " ")
        ids = self._model.encode(text.removeprefix(" "))
        # The library puts a space before every text, here also before the pieces inside a word.
        begins_word = piece.startswith(SPACE)
        return ids[1:] if not begins_word and ids and self._model.id_to_piece(ids[0]) == SPACE else ids

    def fingerprint(self) -> str:
        return digest(self.name.encode(), self._model.serialized_model_proto())

    def save_files(self, directory: Path) -> None:
        write_bytes(directory / SENTENCEPIECE_FILE, self._model.serialized_model_proto())


class TikTokenizer(Tokenizer):
    """A tiktoken ranks file (lines of base64 token and rank) in Qwen's style.

    Qwen's split pattern, NFC normalisation, and ``<|endoftext|> <|im_start|> <|im_end|>`` right after the ranks: the
    ids of ``qwen.tiktoken`` are those of the Qwen2.5 tokenizer. Special tokens typed in text become their ids, as
    in Megatron-LM.
    """

    name = "TikTokenizer"

    def __init__(self, path: Path) -> None:
        import tiktoken

        self._ranks = read_ranks(path)
        special = {token: len(self._ranks) + index for index, token in enumerate(TIKTOKEN_SPECIAL_TOKENS)}
        self._encoding = tiktoken.Encoding(
            "steel", pat_str=TIKTOKEN_PATTERN, mergeable_ranks=self._ranks, special_tokens=special
        )
        self.vocab_size = len(self._ranks) + len(special)
        self.bos_id, self.eos_id, self.pad_id = None, special["<|endoftext|>"], special["<|endoftext|>"]

    def encode(self, text: str) -> list[int]:
        return self._encoding.encode(unicodedata.normalize("NFC", text), allowed_special="all")

    def encode_typed(self, text: str) -> list[int]:
        return self._encoding.encode_ordinary(unicodedata.normalize("NFC", text))

    def added_tokens(self) -> list[AddedToken]:
        return [AddedToken(text, len(self._ranks) + index) for index, text in enumerate(TIKTOKEN_SPECIAL_TOKENS)]

    def decode(self, ids: Sequence[int]) -> str:
        return self._encoding.decode([int(index) for index in ids])

    def byte_lengths(self) -> np.ndarray:
        lengths = np.zeros(self.vocab_size, dtype=np.int32)
        for token, rank in self._ranks.items():
            lengths[rank] = len(token)
        return lengths

    def _ranks_bytes(self) -> bytes:
        ordered = sorted(self._ranks.items(), key=lambda item: item[1])
        return b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in ordered)

    def fingerprint(self) -> str:
        settings = json.dumps([self.name, TIKTOKEN_PATTERN, TIKTOKEN_SPECIAL_TOKENS]).encode()
        return digest(settings, self._ranks_bytes())

    def save_files(self, directory: Path) -> None:
        write_bytes(directory / RANKS_FILE, self._ranks_bytes())


class NullTokenizer(Tokenizer):
    """Text is integers separated by spaces. ``vocab_size`` counts the ids before end of document, which comes last.

    That is megatron-core 0.16.1's convention: ``--vocab-size 1000`` gives ids 0 to 999, eod 1000 and 1001 rows.
    """

    name = "NullTokenizer"

    def __init__(self, vocab_size: int) -> None:
        if vocab_size < 1:
            raise ValueError(f"{self.name}: --vocab-size must be at least 1, not {vocab_size}")
        self.vocab_size = vocab_size + 1
        self.bos_id, self.eos_id, self.pad_id = None, vocab_size, None

    def encode(self, text: str) -> list[int]:
        try:
            ids = [int(word) for word in text.split()]
        except ValueError as error:
            raise ValueError(f"{self.name}: text must be integers separated by spaces: {error}") from error
        if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            raise ValueError(f"{self.name}: id {max(ids, key=abs)} is outside 0 to {self.vocab_size - 1}")
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(str(int(index)) for index in ids)

    def byte_lengths(self) -> np.ndarray:
        lengths = np.array([len(str(index)) + 1 for index in range(self.vocab_size)], dtype=np.int32)
        lengths[self.eod_id] = 0
        return lengths

    def fingerprint(self) -> str:
        return digest(f"{self.name} {self.vocab_size}".encode())

    def save_files(self, directory: Path) -> None:
        """Nothing beyond ``steel_tokenizer.json`` is needed."""


def build_tokenizer(
    tokenizer_type: str,
    tokenizer_model: str | None,
    vocab_size: int | None = None,
    include_special_tokens: bool = True,
) -> Tokenizer:
    """Load a tokenizer.

    ``tokenizer_model`` is a Hugging Face folder, or a SentencePiece or tiktoken file, or a folder written by
    :meth:`Tokenizer.save`. ``vocab_size`` is for NullTokenizer. ``include_special_tokens`` says whether
    :meth:`Tokenizer.encode_documents` keeps what a Hugging Face tokenizer adds by itself (Llama 2's ``<s>``).
    Raises ``ValueError`` in one line for a missing or unusable tokenizer.
    """
    if tokenizer_type not in TOKENIZER_TYPES:
        raise ValueError(f"--tokenizer-type {tokenizer_type}: must be one of {', '.join(TOKENIZER_TYPES)}")
    path = Path(tokenizer_model) if tokenizer_model else None
    if tokenizer_type == "NullTokenizer":
        if vocab_size is None and path is not None and (path / DESCRIPTION_FILE).is_file():
            vocab_size = json.loads((path / DESCRIPTION_FILE).read_text(encoding="utf-8"))["vocab_size"] - 1
        if vocab_size is None:
            raise ValueError("NullTokenizer: give --vocab-size")
        return NullTokenizer(vocab_size)
    if path is None:
        raise ValueError(f"{tokenizer_type}: give --tokenizer-model")
    if not path.exists():
        raise ValueError(f"--tokenizer-model {path}: no such file or folder (names of online models are not looked up)")
    if tokenizer_type == "HuggingFaceTokenizer":
        from megatron_steel.text.huggingface import HuggingFaceTokenizer

        return HuggingFaceTokenizer(path, include_special_tokens)
    if tokenizer_type == "SentencePieceTokenizer":
        return SentencePieceTokenizer(path / SENTENCEPIECE_FILE if path.is_dir() else path)
    return TikTokenizer(path / RANKS_FILE if path.is_dir() else path)


def read_ranks(path: Path) -> dict[bytes, int]:
    """Token bytes to rank from a tiktoken file; ranks must be 0 to n - 1. ``ValueError`` names the file and line."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(read_bytes(path, "TikTokenizer").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise ValueError(f"{path}:{number}: not a tiktoken ranks line (base64 token, space, rank)") from error
    if not ranks or sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError(f"{path}: ranks must be 0 to {max(len(ranks) - 1, 0)} without gaps, for distinct tokens")
    return ranks


def read_bytes(path: Path, kind: str) -> bytes:
    """The content of a tokenizer file; ``ValueError`` when it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{kind}: {path}: {error.strerror}") from error


def digest(*parts: bytes) -> str:
    """sha256 hex over parts, each preceded by its length so that no two lists of parts collide."""
    total = hashlib.sha256()
    for part in parts:
        total.update(len(part).to_bytes(8, "little"))
        total.update(part)
    return total.hexdigest()
