"""From blocks of raw text to token arrays: the part of preprocessing that runs in worker processes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import orjson

from megatron_steel.data.letters import letters_of
from megatron_steel.data.readers import Block
from megatron_steel.text.fast import TextEncoder

REJECTED_CHARACTERS = 200
SURROGATE = re.compile("[\\ud800-\\udfff]")


@dataclass
class KeyTokens:
    """Documents of one JSON key in a block: ids back to back, lengths of sequences, sequences per document.

    ``text_bytes`` counts their UTF-8 bytes, ``letters`` their characters as :func:`count_letters` does.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    sequences: np.ndarray
    text_bytes: int
    letters: np.ndarray


@dataclass(frozen=True)
class Reject:
    """A line that gives no document: its number in the task, why, and how it begins."""

    line: int
    reason: str
    text: str


@dataclass
class Encoded:
    """What becomes of a block. ``dropped`` rows are left out by the rule of a source format."""

    by_key: dict[str, KeyTokens] = field(default_factory=dict)
    documents: int = 0
    lines: int = 0
    blank_lines: int = 0
    dropped: int = 0
    rejects: list[Reject] = field(default_factory=list)


@dataclass(slots=True)
class Row:
    """A document: its line in the task and the texts under each key."""

    line: int
    texts: list[list[str]]


@dataclass
class Encoder:
    """Encodes blocks: the same settings in every process.

    ``convert`` makes ``{"text": ...}`` of a row of a named source format, or None to leave it out; ``split`` cuts a
    text into sentences.
    """

    text_encoder: TextEncoder
    json_keys: Sequence[str]
    eod: int | None
    dtype: np.dtype[Any]
    convert: Callable[[dict[str, Any]], dict[str, Any] | None] | None = None
    split: Callable[[str], list[str]] | None = None

    def encode(self, block: Block) -> Encoded:
        """Encode a block; lines that cannot be used end up in ``Encoded.rejects``."""
        result = Encoded()
        if (plain := self._plain(block)) is not None:
            result.by_key = {self.json_keys[0]: plain}
            result.documents = result.lines = len(plain.sequences)
            return result
        rows = self.rows(block, result)
        try:
            result.by_key = self._encode_rows(rows)
        except (ValueError, TypeError):  # the tokenizer objects: one by one to find the line
            rows = [row for row in rows if self._encodable(row, result)]
            result.rejects.sort(key=lambda reject: reject.line)
            result.by_key = self._encode_rows(rows)
        result.documents = len(rows)
        return result

    def _plain(self, block: Block) -> KeyTokens | None:
        """Ids of a block in which every line is one document with one text; None for any other block.

        A third of the work outside the tokenizer is going through lines one by one with care.
        """
        if block.reason or block.rows is not None or self.convert or self.split or len(self.json_keys) > 1:
            return None
        key, lines = self.json_keys[0], block.data.removesuffix(b"\n").split(b"\n")
        try:
            texts = [orjson.loads(line)[key] for line in lines]
            return self._encode_texts(texts, np.arange(1, len(texts) + 1)) if set(map(type, texts)) == {str} else None
        except (ValueError, TypeError, LookupError):
            return None

    def rows(self, block: Block, result: Encoded) -> list[Row]:
        """The documents of a block; everything else is counted in ``result``."""
        if block.reason:
            result.lines += 1
            result.rejects.append(Reject(block.first_line, block.reason, ""))
            return []
        items: Sequence[Any] = block.data.split(b"\n") if block.rows is None else block.rows
        count = len(items) - (block.rows is None and not items[-1])
        result.lines += count
        rows = []
        for index in range(count):
            item = items[index]
            line = block.first_line + index
            try:
                if isinstance(item, bytes):
                    if not item or item.isspace():
                        result.blank_lines += 1
                        continue
                    item = parse_line(item)
                elif item is None:
                    result.blank_lines += 1
                    continue
                if self.convert and (item := self.convert(item)) is None:
                    result.dropped += 1
                    continue
                rows.append(Row(line, [self._texts(item, key) for key in self.json_keys]))
            except ValueError as error:
                result.rejects.append(Reject(line, str(error), beginning(items[index])))
        return rows

    def _texts(self, row: dict[str, Any], key: str) -> list[str]:
        """The text under a key in the pieces that become sequences."""
        text = row.get(key)
        # Whether it is text at all is found out for the whole block at once, when it becomes bytes.
        texts = [text] if type(text) is str else row_texts(row, key)
        return [piece for text in texts for piece in self.split(text)] if self.split else texts

    def _encode_rows(self, rows: list[Row]) -> dict[str, KeyTokens]:
        return {key: self._encode_key([row.texts[at] for row in rows]) for at, key in enumerate(self.json_keys)}

    def _encode_key(self, documents: list[list[str]]) -> KeyTokens:
        """Ids of one key of every row: sentence by sentence where a row has several, as Megatron-LM does."""
        texts = [text for document in documents for text in document]
        return self._encode_texts(texts, np.cumsum(np.fromiter(map(len, documents), np.int64, len(documents))))

    def _encode_texts(self, texts: list[str], ends: np.ndarray) -> KeyTokens:
        """Ids of texts; ``ends`` int64 (documents,) counts the texts up to the end of each document."""
        data = "".join(texts).encode()
        ids, sizes = self.text_encoder.encode(texts)
        # Where each document ends: counted in texts, then in sequences (texts that have ids) and in ids.
        sequence_ends = np.concatenate(([0], np.cumsum(sizes > 0)))[ends] if len(ends) else ends
        sequences = np.diff(sequence_ends, prepend=0)
        lengths = sizes[sizes > 0]
        tokens = ids.astype(self.dtype)
        if self.eod is not None:
            filled = sequences > 0
            tokens = np.insert(tokens, np.concatenate(([0], np.cumsum(sizes)))[ends[filled]], self.eod)
            lengths[sequence_ends[filled] - 1] += 1
        return KeyTokens(tokens, lengths.astype(np.int32), sequences.astype(np.int32), len(data), letters_of(data))

    def _encodable(self, row: Row, result: Encoded) -> bool:
        """Whether the tokenizer takes a document; if not, it is rejected."""
        try:
            self._encode_rows([row])
        except (ValueError, TypeError) as error:
            reason = str(error)
            for key, texts in zip(self.json_keys, row.texts, strict=True):
                if any(SURROGATE.search(text) for text in texts):
                    reason = f"{key!r} holds half of a surrogate pair, which is not text"
                    break
            text = "".join(row.texts[0])[:REJECTED_CHARACTERS]
            result.rejects.append(Reject(row.line, reason, text.encode(errors="replace").decode()))
            return False
        return True


def parse_line(line: bytes) -> dict[str, Any]:
    """The object on a line; ``ValueError`` says why for anything that is not one JSON object in UTF-8."""
    try:
        row = orjson.loads(line)
    except ValueError:
        row = parse_leniently(line)
    if not isinstance(row, dict):
        raise ValueError(f"each line must be a JSON object, not {type(row).__name__}")
    return row


def parse_leniently(line: bytes) -> Any:
    """What Python's own parser makes of a line: it takes more than the standard (NaN), and says where it stops."""
    if b"\0" in line:
        raise ValueError(f"holds a NUL byte (byte {line.index(0) + 1} of the line)")
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte {error.start + 1} of the line)") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"malformed JSON: {error.msg} at column {error.colno}") from error
    except RecursionError as error:
        raise ValueError("malformed JSON: nested too deep") from error


def row_texts(row: dict[str, Any], key: str) -> list[str]:
    """The text under a key as a list of one, or the list of sentences it holds. ``ValueError`` says what is there."""
    if key not in row:
        there = ", ".join(map(repr, row)) or "none"
        raise ValueError(f"no key {key!r}; its keys are {there} (choose with --json-keys)")
    texts = row[key] if isinstance(row[key], list) else [row[key]]
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(f"{key!r} must be text or a list of texts, not {type(text).__name__}")
    return texts


def beginning(item: Any) -> str:
    """The first characters of a rejected line or row."""
    if isinstance(item, bytes):
        return item[: 4 * REJECTED_CHARACTERS].decode("utf-8", "replace")[:REJECTED_CHARACTERS]
    return json.dumps(item, ensure_ascii=False, default=str)[:REJECTED_CHARACTERS].encode(errors="replace").decode()
