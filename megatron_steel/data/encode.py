"""From raw JSON lines to token arrays: the part of preprocessing that runs in worker processes."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megatron_steel.text.tokenizer import Tokenizer

SCRIPTS = ("zh", "en", "other")
ASTRAL_HAN = 0x20000


@dataclass(frozen=True)
class Block:
    """Consecutive whole lines of one input file."""

    path: str
    first_line: int
    data: bytes


@dataclass
class KeyTokens:
    """Documents of one JSON key in a block: ids back to back, lengths of sequences, sequences per document.

    ``text_bytes`` counts their UTF-8 bytes, ``letters`` their characters as :func:`count_letters` does.
    """

    tokens: np.ndarray
    lengths: list[int]
    sequences: list[int]
    text_bytes: int
    letters: np.ndarray


@dataclass
class Encoded:
    """What a worker makes of a block. ``error`` is the first user error in it, with file and line."""

    by_key: dict[str, KeyTokens] = field(default_factory=dict)
    documents: int = 0
    blank_lines: int = 0
    error: str | None = None


class Encoder:
    """Encodes blocks with one tokenizer; built once per process."""

    def __init__(self, tokenizer: Tokenizer, json_keys: Sequence[str], append_eod: bool, dtype: np.dtype[Any]) -> None:
        self.tokenizer, self.json_keys, self.dtype = tokenizer, tuple(json_keys), dtype
        self.eod = [tokenizer.eod_id] if append_eod else []

    def encode(self, block: Block) -> Encoded:
        """Encode a block; a user error ends up in ``Encoded.error`` so that the caller meets errors in file order."""
        result = Encoded()
        try:
            rows = self._rows(block, result)
            for key in self.json_keys:
                result.by_key[key] = self._encode_key(block, rows, key)
        except ValueError as error:
            result.error = str(error)
        return result

    def _rows(self, block: Block, result: Encoded) -> list[tuple[int, dict[str, Any]]]:
        """Line numbers and objects of the lines that are not blank."""
        rows = []
        lines = block.data.split(b"\n")
        if not lines[-1]:
            lines.pop()
        for number, line in enumerate(lines, start=block.first_line):
            if line.strip():
                rows.append((number, parse_line(line, f"{block.path}:{number}")))
            else:
                result.blank_lines += 1
        result.documents = len(rows)
        return rows

    def _encode_key(self, block: Block, rows: list[tuple[int, dict[str, Any]]], key: str) -> KeyTokens:
        """Ids of one key of every row: sentences one by one where a row has a list, as Megatron-LM does."""
        sentences: list[str] = []
        counts: list[int] = []
        origins: list[int] = []
        for number, row in rows:
            texts = row_texts(row, key, f"{block.path}:{number}")
            sentences += texts
            counts.append(len(texts))
            origins += [number] * len(texts)
        parts: list[Sequence[int]] = []
        lengths: list[int] = []
        sequences: list[int] = []
        position = 0
        encoded = self._encode_texts(sentences, origins, block.path)
        for count in counts:
            document = [ids for ids in encoded[position : position + count] if len(ids)]
            position += count
            parts += document
            lengths += [len(ids) for ids in document]
            sequences.append(len(document))
            if document and self.eod:
                parts.append(self.eod)
                lengths[-1] += 1
        arrays = [np.asarray(ids, dtype=self.dtype) for ids in parts]
        tokens = np.concatenate(arrays) if arrays else np.empty(0, dtype=self.dtype)
        letters = sum((count_letters(text) for text in sentences), no_letters())
        return KeyTokens(tokens, lengths, sequences, sum(len(text.encode()) for text in sentences), letters)

    def _encode_texts(self, texts: list[str], origins: list[int], path: str) -> list[list[int]]:
        """One call for all texts; only when the tokenizer objects, one by one to find the line."""
        try:
            return self.tokenizer.encode_documents(texts)
        except (ValueError, TypeError):
            for text, number in zip(texts, origins, strict=True):
                try:
                    self.tokenizer.encode_documents([text])
                except (ValueError, TypeError) as error:
                    raise ValueError(f"{path}:{number}: {error}") from error
            raise


def parse_line(line: bytes, place: str) -> dict[str, Any]:
    """The object on a line; ``ValueError`` with file:line for anything that is not one JSON object in UTF-8."""
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{place}: not UTF-8 (byte {error.start + 1} of the line)") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: malformed JSON: {error.msg} at column {error.colno}") from error
    except RecursionError as error:
        raise ValueError(f"{place}: malformed JSON: nested too deep") from error
    if not isinstance(row, dict):
        raise ValueError(f"{place}: each line must be a JSON object, not {type(row).__name__}")
    return row


def row_texts(row: dict[str, Any], key: str, place: str) -> list[str]:
    """The text under a key as a list of one, or the list of sentences it holds. ``ValueError`` says what is there."""
    if key not in row:
        there = ", ".join(map(repr, row)) or "none"
        raise ValueError(f"{place}: no key {key!r}; its keys are {there} (choose with --json-keys)")
    texts = row[key] if isinstance(row[key], list) else [row[key]]
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(f"{place}: {key!r} must be text or a list of texts, not {type(text).__name__}")
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise ValueError(f"{place}: {key!r} holds half of a surrogate pair, which is not text") from error
    return texts


@functools.cache
def script_table() -> np.ndarray:
    """For every code point below 0x20000: 0 not a letter, else 1 + the index in ``SCRIPTS``."""
    table = np.zeros(ASTRAL_HAN + 1, dtype=np.uint8)
    for code in range(ASTRAL_HAN):
        if chr(code).isalpha():
            table[code] = 3
    for first, last in ((0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF)):
        table[first : last + 1] = 1
    for first, last in ((ord("A"), ord("Z")), (ord("a"), ord("z"))):
        table[first : last + 1] = 2
    table[ASTRAL_HAN] = 1
    return table


def no_letters() -> np.ndarray:
    """Zero counts in the form of :func:`count_letters`."""
    return np.zeros(len(SCRIPTS) + 1, dtype=np.int64)


def count_letters(text: str) -> np.ndarray:
    """int64 (4,): characters that are no letters, Chinese characters, ASCII letters, letters of other scripts."""
    codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    return np.bincount(script_table()[np.minimum(codes, ASTRAL_HAN)], minlength=len(SCRIPTS) + 1)
