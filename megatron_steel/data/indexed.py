"""Megatron-LM's indexed datasets: ``PREFIX.bin`` (token ids back to back) and ``PREFIX.idx`` (where each begins).

Layout of the index, little-endian (``megatron/core/datasets/indexed_dataset.py``, ``_IndexWriter``): magic
``MMIDIDX\\0\\0``, version uint64 = 1, dtype code uint8, sequence count uint64, document-index count uint64, sequence
lengths int32, byte offsets int64, document indices int64 (first sequence of each document, then the sequence count).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import struct
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megatron_steel.data.opened import Opened, mapped, stamp_of
from megatron_steel.text.files import sync, write_json

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
# Token ids are stored as one of these; the other codes of the format (floats, signed bytes) are not token data.
TOKEN_DTYPES: dict[int, np.dtype[Any]] = {4: np.dtype(np.int32), 5: np.dtype(np.int64), 8: np.dtype(np.uint16)}
# Megatron-LM's limit (DType.optimal_dtype), a little under 2**16.
UINT16_VOCABULARY = 65500
FINGERPRINT_WINDOW = 1 << 16
CHECK_CHUNK = 1 << 16
COPY_BYTES = 1 << 22


def optimal_dtype(vocab_size: int) -> np.dtype[Any]:
    """Storage of ids below ``vocab_size``: uint16 where Megatron-LM uses it, else int32."""
    return np.dtype(np.uint16) if vocab_size < UINT16_VOCABULARY else np.dtype(np.int32)


def content_fingerprint(prefix: str, window: int = FINGERPRINT_WINDOW) -> str:
    """sha256 hex over both sizes and the first and last ``window`` bytes of each file of a dataset.

    Independent of name and place, quick for any size. A change further inside than ``window`` is not seen.
    """
    total = hashlib.sha256()
    for path in (Path(f"{prefix}.idx"), Path(f"{prefix}.bin")):
        size = path.stat().st_size
        total.update(size.to_bytes(8, "little"))
        with open(path, "rb") as stream:
            total.update(stream.read(window))
            stream.seek(max(0, size - window))
            total.update(stream.read())
    return total.hexdigest()


class IndexedReader:
    """A memory-mapped dataset whose two files have been checked against each other.

    ``sequence_lengths`` int32 (sequences,), ``document_indices`` int64 (documents + 1,). Raises ``ValueError`` naming
    the file for anything missing, foreign, inconsistent or cut short.

    opened: what an earlier opening of the very same files found (the caller has compared the stamps). They are then
    not looked at before something of them is needed.
    """

    def __init__(self, prefix: str, opened: Opened | None = None) -> None:
        self.prefix = str(prefix)
        self._vouched = opened
        self.counts: dict[str, list[int]] = {} if opened is None else opened.counts
        if opened is not None:
            self.stamp = opened.stamp
            self.dtype, self.num_tokens = np.dtype(opened.dtype), opened.num_tokens
            self.num_documents = opened.num_documents
            return
        for path in (self.idx_path, self.bin_path):
            if not path.is_file():
                raise ValueError(f"{path}: no such file; {self.prefix} must be the prefix of a .bin and an .idx file")
        # Before anything is read: a file that is replaced in between must not be vouched for.
        self.stamp = stamp_of(self.prefix)
        self._check_documents()
        self._check_pointers()
        self.num_tokens = self._check_data_size()
        self.num_documents = len(self.document_indices) - 1

    def opened(self) -> Opened:
        """What this opening found, for a later one."""
        if self._vouched is not None:
            return self._vouched
        known = (self.dtype.name, self.num_tokens, len(self), self.num_documents, self.fingerprint(), self.sidecar)
        return Opened(self.stamp, *known, self.counts)

    def count(self, name: str, make: Callable[[], Sequence[int]]) -> list[int]:
        """Return make(): numbers that follow from the index and `name` alone, remembered with the file."""
        if name not in self.counts:
            self.counts[name] = list(make())
        return self.counts[name]

    @cached_property
    def sidecar(self) -> dict[str, Any] | None:
        """``PREFIX.json``; see :func:`read_sidecar`."""
        return read_sidecar(self.prefix) if self._vouched is None else self._vouched.sidecar

    @cached_property
    def bin_path(self) -> Path:
        """The file of the ids."""
        return Path(f"{self.prefix}.bin")

    @cached_property
    def idx_path(self) -> Path:
        """The file of the index."""
        return Path(f"{self.prefix}.idx")

    @cached_property
    def _tokens(self) -> np.ndarray:
        """The ids of the file, mapped when the first of them is read."""
        return np.frombuffer(mapped(self.bin_path, self.stamp[3:6]), dtype=self.dtype)

    @cached_property
    def sequence_lengths(self) -> np.ndarray:
        """Tokens of each sequence, int32 (sequences,)."""
        return self._index[0]

    @cached_property
    def sequence_pointers(self) -> np.ndarray:
        """Bytes before each sequence, int64 (sequences,)."""
        return self._index[1]

    @cached_property
    def document_indices(self) -> np.ndarray:
        """First sequence of each document, and the number of sequences, int64 (documents + 1,)."""
        return self._index[2]

    @cached_property
    def _index(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The three arrays of the index, mapped after the header and the file's size agree."""
        path, size = self.idx_path, self.idx_path.stat().st_size
        with open(path, "rb") as stream:
            head = stream.read(HEADER.size)
        if head[: len(MAGIC)] != MAGIC[: len(head)] or not head:
            raise ValueError(f"{path}: not an indexed dataset (it does not begin with {MAGIC[:7].decode()})")
        if len(head) < HEADER.size:
            raise ValueError(f"{path}: truncated inside its {HEADER.size}-byte header ({size} bytes)")
        _, version, code, sequences, boundaries = HEADER.unpack(head)
        if version != VERSION:
            raise ValueError(f"{path}: version {version} of the format; only version {VERSION} exists")
        if code not in TOKEN_DTYPES:
            raise ValueError(f"{path}: dtype code {code} is not one of token ids ({sorted(TOKEN_DTYPES)})")
        expected = HEADER.size + 12 * sequences + 8 * boundaries
        if size != expected:
            raise ValueError(
                f"{path}: {size} bytes, but {sequences} sequences and {boundaries} document boundaries need "
                f"{expected}; the file is truncated or damaged"
            )
        if sequences == 0:
            raise ValueError(f"{path}: holds no sequences")
        self.dtype = TOKEN_DTYPES[code]
        raw = mapped(path, self.stamp[:3])
        pointers, documents = HEADER.size + 4 * sequences, HEADER.size + 12 * sequences
        return (
            np.frombuffer(raw, np.int32, sequences, HEADER.size),
            np.frombuffer(raw, np.int64, sequences, pointers),
            np.frombuffer(raw, np.int64, boundaries, documents),
        )

    def _check_documents(self) -> None:
        """Document boundaries rise from 0 to the number of sequences; equal neighbours are empty documents."""
        bounds, sequences = self.document_indices, len(self.sequence_lengths)
        if len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != sequences or np.any(bounds[1:] < bounds[:-1]):
            raise ValueError(f"{self.idx_path}: document boundaries do not rise from 0 to {sequences}; it is damaged")

    def _check_pointers(self) -> None:
        """Each sequence begins where the one before it ends; checked in chunks that stay in the cache."""
        lengths, pointers = self.sequence_lengths, self.sequence_pointers
        end = 0
        for start in range(0, len(lengths), CHECK_CHUNK):
            sizes = np.multiply(lengths[start : start + CHECK_CHUNK], self.dtype.itemsize, dtype=np.int64)
            begins = pointers[start : start + CHECK_CHUNK]
            fits = begins[0] == end and sizes.min() >= 0 and np.array_equal(begins[1:] - begins[:-1], sizes[:-1])
            if not fits:
                ends = end + np.cumsum(sizes)
                wrong = np.flatnonzero((sizes < 0) | (begins != np.concatenate(([end], ends[:-1]))))
                raise ValueError(f"{self.idx_path}: sequence {start + wrong[0]} has a wrong length or offset; damaged")
            end = int(begins[-1] + sizes[-1])
        self._data_bytes = end

    def _check_data_size(self) -> int:
        size = self.bin_path.stat().st_size
        if size != self._data_bytes:
            state = "truncated" if size < self._data_bytes else "longer than its index, or of another dataset"
            raise ValueError(f"{self.bin_path}: {size} bytes, {self.idx_path} describes {self._data_bytes}: {state}")
        if size == 0:
            raise ValueError(f"{self.bin_path}: holds no tokens")
        return len(self._tokens)

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self.sequence_lengths) if self._vouched is None else self._vouched.num_sequences

    def sequence(self, i: int, offset: int = 0, length: int | None = None) -> np.ndarray:
        """Tokens ``offset`` to ``offset + length`` (to the end when None) of sequence ``i``; a view of the file."""
        available = int(self.sequence_lengths[i])
        length = available - offset if length is None else length
        assert 0 <= offset <= offset + length <= available, f"tokens {offset}+{length} of a sequence of {available}"
        first = int(self.sequence_pointers[i]) // self.dtype.itemsize + offset
        return self._tokens[first : first + length]

    def document(self, i: int) -> np.ndarray:
        """All tokens of document ``i``, whose sequences lie next to each other."""
        first, last = int(self.document_indices[i]), int(self.document_indices[i + 1])
        if first == last:
            return self._tokens[:0]
        start = int(self.sequence_pointers[first]) // self.dtype.itemsize
        return self._tokens[start : start + int(self.sequence_lengths[first:last].sum(dtype=np.int64))]

    def fingerprint(self) -> str:
        """Content fingerprint for telling datasets apart; see :func:`content_fingerprint`."""
        return content_fingerprint(self.prefix) if self._vouched is None else self._vouched.fingerprint


class IndexedWriter:
    """Streams documents into ``PREFIX.bin`` and, on :meth:`commit`, writes ``PREFIX.idx``.

    Everything grows on disk under temporary names (``.bin.tmp``, ``.idx.tmp`` and the two parts of the index) and gets
    its own only in :meth:`commit`, the index last: a dataset with an index is complete, and memory does not grow with
    it. Use as a context manager: leaving without commit aborts.
    """

    def __init__(self, prefix: str, dtype: np.dtype[Any]) -> None:
        assert np.dtype(dtype) in TOKEN_DTYPES.values(), f"{dtype} is not a token dtype"
        self.prefix, self.dtype = str(prefix), np.dtype(dtype)
        self._bin_path, self._idx_path = Path(f"{self.prefix}.bin"), Path(f"{self.prefix}.idx")
        names = ("bin", "idx", "lengths", "documents")
        self._temporary = {name: Path(f"{self.prefix}.{name}.tmp") for name in names}
        self._streams: dict[str, BinaryIO] = {}
        try:
            self._bin_path.parent.mkdir(parents=True, exist_ok=True)
            for name in ("bin", "lengths", "documents"):  # closed by commit or abort
                self._streams[name] = open(self._temporary[name], "w+b")
        except OSError as error:
            self.abort()
            raise ValueError(f"{self._bin_path}: cannot be written: {error.strerror}") from error
        self._hash = hashlib.sha256()
        self.num_tokens = self.num_documents = self.num_sequences = 0
        self._bounded = 0  # sequences of the documents noted so far
        self._streams["documents"].write(np.int64(0).tobytes())

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.abort()

    def add_document(self, ids: np.ndarray | Sequence[int], lengths: Sequence[int] | None = None) -> None:
        """Append one document of one sequence, or of sequences of the given lengths. No ids is an empty document."""
        tokens = np.asarray(ids)
        if lengths is None:
            lengths = [len(tokens)] if len(tokens) else []
        if sum(lengths) != len(tokens):
            raise ValueError(f"{self.prefix}: sequence lengths sum to {sum(lengths)}, the document has {len(tokens)}")
        limits = np.iinfo(self.dtype)
        if len(tokens) and not limits.min <= tokens.min() <= tokens.max() <= limits.max:
            raise ValueError(f"{self.prefix}: ids {tokens.min()} to {tokens.max()} do not fit {self.dtype}")
        self.add_documents(tokens.astype(self.dtype), lengths, [len(lengths)])

    def add_documents(
        self, tokens: np.ndarray, lengths: Sequence[int] | np.ndarray, sequences: Sequence[int] | np.ndarray
    ) -> None:
        """Append several documents at once: their ids in the writer's dtype, all lengths, sequences per document."""
        assert tokens.dtype == self.dtype
        self._write_tokens(tokens.tobytes())
        self._write_lengths(np.asarray(lengths, np.int32))
        self._write_documents(np.asarray(sequences, np.int64))

    def add_parts(self, tokens: BinaryIO, lengths: BinaryIO, sequences: BinaryIO) -> None:
        """Append the documents of three files: ids in the writer's dtype, int32 lengths, int32 sequences each."""
        while block := tokens.read(COPY_BYTES):
            self._write_tokens(block)
        while block := lengths.read(COPY_BYTES):
            self._write_lengths(np.frombuffer(block, np.int32))
        while block := sequences.read(COPY_BYTES):
            self._write_documents(np.frombuffer(block, np.int32).astype(np.int64))

    def merge(self, other_prefix: str) -> None:
        """Append every document of another dataset of the same dtype."""
        other = IndexedReader(other_prefix)
        if other.dtype != self.dtype:
            raise ValueError(f"{other_prefix}: its ids are {other.dtype}, those of {self.prefix} are {self.dtype}")
        with open(other.bin_path, "rb") as stream:
            while block := stream.read(COPY_BYTES):
                self._write_tokens(block)
        for start in range(0, len(other), CHECK_CHUNK):
            self._write_lengths(other.sequence_lengths[start : start + CHECK_CHUNK])
        for start in range(0, other.num_documents, CHECK_CHUNK):
            self._write_documents(np.diff(other.document_indices[start : start + CHECK_CHUNK + 1]))

    def _write_tokens(self, data: bytes) -> None:
        self._streams["bin"].write(data)
        self._hash.update(data)
        self.num_tokens += len(data) // self.dtype.itemsize

    def _write_lengths(self, lengths: np.ndarray) -> None:
        self._streams["lengths"].write(lengths.tobytes())
        self.num_sequences += len(lengths)

    def _write_documents(self, sequences: np.ndarray) -> None:
        """Note documents of so many sequences each."""
        if len(sequences):
            ends = self._bounded + np.cumsum(sequences)
            self._streams["documents"].write(ends.tobytes())
            self._bounded = int(ends[-1])
            self.num_documents += len(sequences)

    def bin_sha256(self) -> str:
        """sha256 hex of the tokens written so far."""
        return self._hash.hexdigest()

    def commit(self, sidecar: dict[str, Any] | None = None) -> None:
        """Finish the dataset. ``ValueError`` without tokens.

        sidecar: what to write to ``PREFIX.json``; ``idx_sha256``, the hash of the index, is added to it.
        """
        if self.num_tokens == 0:
            self.abort()
            raise ValueError(f"{self.prefix}: nothing to write, there are no tokens")
        close_synced(self._streams["bin"])
        with open(self._temporary["idx"], "w+b") as stream:
            self._write_index(stream)
            stream.flush()
            os.fsync(stream.fileno())
            if sidecar is not None:
                stream.seek(0)
                sidecar["idx_sha256"] = hashlib.file_digest(stream, "sha256").hexdigest()
        # An index of an earlier run must not describe the new data, not even for a moment.
        self._idx_path.unlink(missing_ok=True)
        os.replace(self._temporary["bin"], self._bin_path)
        if sidecar is not None:
            write_sidecar(self.prefix, sidecar)
        os.replace(self._temporary["idx"], self._idx_path)
        sync(self._idx_path.parent)
        self.abort()

    def _write_index(self, stream: BinaryIO) -> None:
        assert self._bounded == self.num_sequences, "every sequence belongs to a document"
        code = next(code for code, dtype in TOKEN_DTYPES.items() if dtype == self.dtype)
        stream.write(HEADER.pack(MAGIC, VERSION, code, self.num_sequences, self.num_documents + 1))
        lengths, documents = self._streams["lengths"], self._streams["documents"]
        lengths.seek(0)
        shutil.copyfileobj(lengths, stream, COPY_BYTES)
        lengths.seek(0)
        end = 0
        while block := lengths.read(COPY_BYTES):
            sizes = np.frombuffer(block, dtype=np.int32).astype(np.int64) * self.dtype.itemsize
            ends = end + np.cumsum(sizes)
            stream.write((ends - sizes).tobytes())
            end = int(ends[-1])
        documents.seek(0)
        shutil.copyfileobj(documents, stream, COPY_BYTES)

    def abort(self) -> None:
        """Remove what is unfinished or only needed on the way; does nothing more after commit."""
        for stream in self._streams.values():
            with contextlib.suppress(OSError):  # on a full disk closing cannot write out what is about to be removed
                stream.close()
        for path in self._temporary.values() if self._streams else ():
            path.unlink(missing_ok=True)


def close_synced(stream: BinaryIO) -> None:
    """Flush a file to the disk and close it."""
    stream.flush()
    os.fsync(stream.fileno())
    stream.close()


def read_sidecar(prefix: str) -> dict[str, Any] | None:
    """``PREFIX.json`` as written by preprocessing, or None when there is none (a dataset from Megatron-LM)."""
    path = Path(f"{prefix}.json")
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: must be a JSON object")
    return value


def write_sidecar(prefix: str, value: dict[str, Any]) -> None:
    """Write ``PREFIX.json`` atomically."""
    write_json(Path(f"{prefix}.json"), value)
