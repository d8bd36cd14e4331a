"""Statistics of indexed datasets and of raw text: lengths, empty and repeated documents, tokens per character."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np

from megatron_steel.data.indexed import IndexedReader, read_sidecar
from megatron_steel.data.letters import SCRIPTS, count_letters, main_script, no_letters
from megatron_steel.data.progress import ByteProgress
from megatron_steel.data.raw_rows import RawRow

PERCENTILES = (1, 5, 25, 50, 75, 95, 99)


class Decoder(Protocol):
    """What is needed of a tokenizer (text/tokenizer.py)."""

    eos_id: int | None

    def decode(self, ids: Sequence[int]) -> str: ...


class Hashes:
    """64-bit hashes of many texts, to count repetitions in 8 bytes each."""

    def __init__(self) -> None:
        self._values = array("Q")

    def add(self, data: bytes) -> None:
        """One text."""
        self._values.append(int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little"))

    def repeated(self) -> int:
        """How many had been there before."""
        values = np.frombuffer(self._values, dtype=np.uint64)
        return len(values) - len(np.unique(values))


def describe_lengths(lengths: np.ndarray) -> dict[str, Any]:
    """Sum, mean, extremes, percentiles and cumulative distribution of int64 lengths, at least one.

    A percentile p is the smallest length that at least p% of the documents do not exceed. The distribution has the
    share of documents of at most 1, 2, 4, ... up to the first power of two that holds all.
    """
    ordered = np.sort(lengths)
    count = len(ordered)
    ranks = [-(-count * percent // 100) - 1 for percent in PERCENTILES]
    limits = [1 << power for power in range(int(ordered[-1]).bit_length() + 1)]
    limits = limits[: next(i for i, limit in enumerate(limits) if limit >= ordered[-1]) + 1]
    return {
        "sum": int(ordered.sum(dtype=np.int64)),
        "mean": float(ordered.mean(dtype=np.float64)),
        "min": int(ordered[0]),
        "max": int(ordered[-1]),
        "percentiles": {str(p): int(ordered[max(rank, 0)]) for p, rank in zip(PERCENTILES, ranks, strict=True)},
        "cdf": {str(limit): float(np.searchsorted(ordered, limit, side="right") / count) for limit in limits},
    }


def document_lengths(reader: IndexedReader) -> np.ndarray:
    """Tokens of each document, int64."""
    ends = np.concatenate([[0], np.cumsum(reader.sequence_lengths, dtype=np.int64)])
    return np.diff(ends[reader.document_indices])


def valid_ratio(lengths: np.ndarray, seq_length: int) -> dict[str, float]:
    """Which share of the positions of rows of ``seq_length`` holds tokens, and which share of the tokens is in a row.

    ``one_per_row``: each document cut to one row and padded. ``packed``: windows over the stream of all documents, as
    training cuts them (neighbours share one token), without padding.
    """
    total, kept = int(lengths.sum(dtype=np.int64)), int(np.minimum(lengths, seq_length).sum(dtype=np.int64))
    rows = int(np.count_nonzero(lengths))
    packed = max(total - 1, 0) // seq_length * seq_length
    return {
        "one_per_row_valid": kept / (rows * seq_length) if rows else 0.0,
        "one_per_row_kept": kept / total if total else 0.0,
        "packed_kept": packed / total if total else 0.0,
    }


def dataset_stats(
    prefix: str, seq_length: int | None = None, tokenizer: Decoder | None = None, sample: int = 2000
) -> dict[str, Any]:
    """Statistics of an indexed dataset, as JSON values.

    With a tokenizer up to ``sample`` documents, evenly spread (0: all), are decoded for tokens per character by
    language; without, the sidecar's counts are used where there is one. Raises ``ValueError`` for a damaged dataset.
    """
    reader = IndexedReader(prefix)
    lengths = document_lengths(reader)
    hashes = Hashes()
    progress = ByteProgress(f"stats {prefix}", reader.num_tokens * reader.dtype.itemsize)
    for number in np.flatnonzero(lengths).tolist():
        data = reader.document(number).tobytes()
        hashes.add(data)
        progress.add(len(data))
    result: dict[str, Any] = {
        "prefix": prefix,
        "documents": reader.num_documents,
        "sequences": len(reader),
        "tokens": reader.num_tokens,
        "dtype": str(reader.dtype),
        "empty_documents": int(np.count_nonzero(lengths == 0)),
        "duplicate_documents": hashes.repeated(),
        "lengths": describe_lengths(lengths),
    }
    if seq_length is not None:
        if seq_length < 1:
            raise ValueError(f"--seq-length {seq_length}: must be at least 1")
        result |= {"seq_length": seq_length, "valid_tokens": valid_ratio(lengths, seq_length)}
    sidecar = read_sidecar(prefix) or {}
    if isinstance(sidecar.get("text_bytes"), int) and sidecar["text_bytes"]:
        result["tokens_per_text_byte"] = reader.num_tokens / sidecar["text_bytes"]
    if "language_shares" in sidecar:
        result["language_shares"] = sidecar["language_shares"]
    if tokenizer is not None:
        result["languages"] = language_stats(reader, lengths, tokenizer, sample)
    return result


def language_stats(
    reader: IndexedReader, lengths: np.ndarray, tokenizer: Decoder, sample: int
) -> dict[str, dict[str, float]]:
    """Documents, tokens, characters and tokens per character by language, over decoded documents.

    The language of a document is the script that most of its letters belong to; the end-of-document id does not count.
    """
    if sample < 0:
        raise ValueError(f"--decode-documents {sample}: must be 0 (all) or more")
    numbers = np.flatnonzero(lengths)
    if sample and len(numbers) > sample:
        numbers = numbers[np.linspace(0, len(numbers) - 1, sample).astype(np.int64)]
    counts = {name: [0, 0, 0] for name in SCRIPTS}
    for number in numbers.tolist():
        ids = reader.document(number)
        ids = ids[:-1] if ids[-1] == tokenizer.eos_id else ids
        text = tokenizer.decode(ids.tolist())
        counts_here = counts[main_script(text)]
        for place, value in enumerate((1, len(ids), len(text))):
            counts_here[place] += value
    return {
        name: {
            "documents": documents,
            "tokens": tokens,
            "characters": characters,
            "tokens_per_character": tokens / characters if characters else 0.0,
        }
        for name, (documents, tokens, characters) in counts.items()
        if documents
    }


def raw_stats(rows: Iterable[RawRow], key: str) -> dict[str, Any]:
    """Statistics of the text under ``key`` of raw rows, as JSON values.

    Rows that are no object or lack the text are counted as ``unusable_rows``. ``duplicate_lines`` counts the lines of
    the texts, without blank ones and the white space around them, that were there before.
    """
    lengths, letters, unusable, empty, lines = array("q"), no_letters(), 0, 0, 0
    texts, line_hashes = Hashes(), Hashes()
    for row in rows:
        text = text_of(row, key)
        if text is None:
            unusable += 1
            continue
        lengths.append(len(text))
        if not text.strip():
            empty += 1
            continue
        letters += count_letters(text)
        texts.add(text.encode("utf-8", "surrogatepass"))
        for line in filter(None, map(str.strip, text.split("\n"))):
            lines += 1
            line_hashes.add(line.encode("utf-8", "surrogatepass"))
    if not lengths:
        raise ValueError(f"no row has text under the key {key!r} ({unusable} rows); choose with --text-key")
    total = max(int(letters[1:].sum()), 1)
    return {
        "documents": len(lengths),
        "unusable_rows": unusable,
        "characters": sum(lengths),
        "empty_documents": empty,
        "duplicate_documents": texts.repeated(),
        "lines": lines,
        "duplicate_lines": line_hashes.repeated(),
        "language_shares": {name: int(n) / total for name, n in zip(SCRIPTS, letters[1:], strict=True)},
        "lengths": describe_lengths(np.frombuffer(lengths, dtype=np.int64)),
    }


def text_of(row: RawRow, key: str) -> str | None:
    """The text of a row: under ``key``, the lines of a list joined; None when there is none."""
    value = row.value.get(key) if isinstance(row.value, dict) else None
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        return "\n".join(value)
    return value if isinstance(value, str) else None


def table(stats: dict[str, Any]) -> list[str]:
    """Lines for a person: names on the left, nested values indented, numbers with separators and four digits."""
    lines: list[str] = []
    for key, value in stats.items():
        name = key.replace("_", " ")
        if not isinstance(value, dict):
            lines.append(f"{name:<24} {readable(value)}")
        elif any(isinstance(inner, dict) for inner in value.values()):
            lines.append(name)
            lines += [f"  {line}" for line in table(value)]
        else:
            mark = {"percentiles": "p", "cdf": "<="}.get(key, "")
            parts = (f"{mark}{inner.replace('_', ' ')} {readable(number)}" for inner, number in value.items())
            lines.append(f"{name:<24} " + "  ".join(parts))
    return lines


def readable(value: Any) -> str:
    """A number with separators, a share with four digits, anything else as it is."""
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
