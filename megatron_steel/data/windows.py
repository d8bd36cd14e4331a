"""Windows: fixed-length training samples cut from the documents of one indexed file.

The documents of a range are put in a shuffled order and read as one stream of tokens; window i holds tokens
[i * seq_length, (i + 1) * seq_length] of it. Neighbours share one token: the last label of one is the first input of
the next, so every token but the first of the stream is a label exactly once. What does not fill a window is dropped.
Windows that never cross a document are in data/document_windows.py.
"""

from __future__ import annotations

import hashlib
import math
import threading
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import numpy as np

from megatron_steel.config.schema import SequenceMode
from megatron_steel.data.index_cache import IndexCache
from megatron_steel.data.indexed import IndexedReader
from megatron_steel.data.shuffle import permute, round_keys

INT32_MAX = int(np.iinfo(np.int32).max)


@dataclass(frozen=True)
class Limit:
    """A part of the windows of a source: the first of its shuffled documents, up to so many samples, tokens, or share.

    The order of the documents depends on the seed of the run, so this is a random choice that the seed repeats.
    """

    kind: Literal["max_samples", "max_tokens", "fraction"]
    value: Fraction

    def windows(self, total: int, seq_length: int) -> int:
        """Return how many of `total` windows are used; a share is rounded to the nearest, half up."""
        if self.kind == "fraction":
            return math.floor(self.value * total + Fraction(1, 2))
        return min(total, math.floor(self.value / (seq_length if self.kind == "max_tokens" else 1)))

    def __str__(self) -> str:
        """As it is written after a path."""
        return f"{self.kind}={self.value}"


class WindowedDataset:
    """The windows of documents [first, last) of the indexed file `prefix`.

    The order of the documents depends on nothing but `seed` and the content of the file, so window i is the same in
    every segment of a run and on every machine. `shuffle_documents=False` keeps the order of the file (validation).
    Raises ValueError if the range is not in the file or holds less than one window.

    fingerprint: names file content, range and document order, wherever the file lies (str, 64 hex digits); from the
    fast key of the file, unless data/identity.py knows more.
    limit: use only the first of its windows; part of the fingerprint where it leaves any out.
    num_tokens: tokens in the range. all_windows: windows in the range; len() is how many of them are used.
    dropped_tokens: tokens of the range that no window holds, used or not (in "sample": in one epoch).
    """

    sequence_mode: SequenceMode = "concat"
    index_cache: IndexCache | None = None
    """Where the index is kept between runs."""

    def __init__(
        self,
        prefix: str,
        seq_length: int,
        document_range: tuple[int, int | None] = (0, None),
        seed: int = 0,
        shuffle_documents: bool = True,
        reader: IndexedReader | None = None,
        limit: Limit | None = None,
    ) -> None:
        assert seq_length > 0
        self.prefix = prefix
        self.seq_length = seq_length
        self.reader = IndexedReader(prefix) if reader is None else reader
        first, last = document_range
        last = self.reader.num_documents if last is None else last
        if not 0 <= first <= last <= self.reader.num_documents:
            raise ValueError(f"{prefix}: documents [{first}, {last}) are not in a file of {self.reader.num_documents}")
        if last - first > INT32_MAX:
            raise ValueError(f"{prefix}: more than {INT32_MAX} documents; split the file")
        content = self.reader.fingerprint()
        order_name = f"seed {seed}" if shuffle_documents else "file order"
        self._description = f"{content}|{first}|{last}|{order_name}"
        self._range = (first, last)
        self._lock = threading.Lock()
        self._made_index: tuple[np.ndarray, np.ndarray] | None = None
        self._order_keys = round_keys("documents", seed, content) if shuffle_documents else None
        self._crop_name = (seed, content)
        counts = self.reader.count(f"{self.sequence_mode}|{seq_length}|{first}|{last}", self._count)
        self.num_tokens, self.all_windows, self.dropped_tokens, self.num_labels = counts
        self._windows = self.all_windows if limit is None else limit.windows(self.all_windows, seq_length)
        if not self._windows:
            raise ValueError(f"{prefix}:{limit} leaves none of {self.all_windows} windows; raise it, or leave it out")
        if self.sequence_mode != "concat":
            self._description += f"|{self.sequence_mode}"
        if self._windows < self.all_windows:
            self._description += f"|first {self._windows} windows"
        self.fingerprint = self.content_name(None)

    def content_name(self, bin_sha256: str | None) -> str:
        """Return the fingerprint by the fast key alone (None), or by it and the sha256 of the .bin file."""
        version = "windows 1" if bin_sha256 is None else f"windows 2|{bin_sha256}"
        return hashlib.sha256(f"{version}|{self._description}".encode()).hexdigest()

    def __len__(self) -> int:
        return self._windows

    def __getitem__(self, window: int) -> np.ndarray:
        """Return the window as the first epoch reads it."""
        return self.read(window, 0)

    def describe(self) -> str:
        """Return for the log which part of the file is used; empty if all of it is, joined end to end."""
        return f"of {self.all_windows:,}" if self._windows < self.all_windows else ""

    def prepare(self) -> tuple[np.ndarray, np.ndarray]:
        """Documents in their order (documents,), and where windows begin in it; int32 or int64.

        That is int32 (windows + 1, 2) here: place of the document, and offset in it.

        Made when the first window is read: a run with hundreds of sources starts after the few that its first batch
        needs, and the thread that reads ahead makes the rest. May be called on any thread.
        """
        with self._lock:
            if self._made_index is None:
                cache, name = self.index_cache, self._index_name
                self._made_index = cache.index(name, self.reader, self._make_index) if cache else self._make_index()
            return self._made_index

    def prepared(self) -> bool:
        """Whether the index need not be made; one in the cache is mapped."""
        with self._lock:
            if self._made_index is None and self.index_cache is not None:
                self._made_index = self.index_cache.find(self._index_name, self.reader)
            return self._made_index is not None

    @property
    def _index_name(self) -> str:
        """All that decides the index, for the file that the reader has open."""
        return f"{self._description}|{self.seq_length}"

    def _make_index(self) -> tuple[np.ndarray, np.ndarray]:
        """What `prepare` returns."""
        documents = self._document_order()
        # Document ids are relative to the range here, so that the C++ helper sees only the lengths it needs.
        starts = _window_starts(self._document_lengths(), documents, self.seq_length, self.num_tokens)
        assert len(starts) == self.all_windows + 1
        return documents + self._range[0], starts

    def _document_order(self) -> np.ndarray:
        """Documents in their order, counted from the first of the range, int64 (documents,)."""
        count = self._range[1] - self._range[0]
        documents = np.arange(count, dtype=np.int64)
        return documents if self._order_keys is None else permute(documents, count, self._order_keys)

    def read(self, window: int, epoch: int) -> np.ndarray:
        """Return tokens int64 (seq_length + 1,): inputs are all but the last, labels all but the first.

        Joined documents are the same in every epoch.
        """
        documents, starts = self._index_of(window)
        (place, offset), (last_place, last_offset) = starts[window : window + 2].tolist()
        parts = []
        while place < last_place:
            parts.append(self.reader.document(int(documents[place]))[offset:])
            place, offset = place + 1, 0
        parts.append(self.reader.document(int(documents[place]))[offset : last_offset + 1])
        tokens = np.concatenate(parts, dtype=np.int64)
        assert tokens.shape == (self.seq_length + 1,)
        return tokens

    def _index_of(self, window: int) -> tuple[np.ndarray, np.ndarray]:
        """What `prepare` returns, for a window that must be there."""
        if not 0 <= window < len(self):
            raise IndexError(f"{self.prefix}: window {window} is not in [0, {len(self)})")
        return self.prepare()

    def _count(self) -> tuple[int, int, int, int]:
        """Tokens, windows, dropped tokens and labels in windows of the range."""
        self.num_tokens = self._count_tokens()
        return self.num_tokens, *self._count_windows()

    def _count_windows(self) -> tuple[int, int, int]:
        """Windows in the range, tokens in none of them, labels in them; raises ValueError if there is no window."""
        if self.num_tokens <= self.seq_length:
            raise ValueError(
                f"{self.prefix}: documents [{self._range[0]}, {self._range[1]}) hold {self.num_tokens} tokens, less "
                f"than one window of seq_length {self.seq_length} + 1; add documents or lower --seq-length"
            )
        windows, rest = divmod(self.num_tokens - 1, self.seq_length)
        return windows, rest, windows * self.seq_length

    def _count_tokens(self) -> int:
        """Tokens in the range, from where its first and last sequence begin."""
        first, last = self.reader.document_indices[list(self._range)].tolist()
        size, pointers = self.reader.dtype.itemsize, self.reader.sequence_pointers
        begin, end = (
            int(pointers[at]) // size if at < len(pointers) else self.reader.num_tokens for at in (first, last)
        )
        return end - begin

    def _document_lengths(self) -> np.ndarray:
        """Tokens of each document of the range, int32 (sentence-split files have several sequences per document)."""
        first, last = self._range
        bounds = np.asarray(self.reader.document_indices[first : last + 1])
        sizes = np.asarray(self.reader.sequence_lengths[bounds[0] : bounds[-1]])
        if len(sizes) == len(bounds) - 1 and (np.diff(bounds) == 1).all():
            return np.ascontiguousarray(sizes, dtype=np.int32)
        ends = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
        lengths = np.diff(ends[bounds - bounds[0]])
        if lengths.size and lengths.max() > INT32_MAX:
            raise ValueError(f"{self.prefix}: a document of {lengths.max()} tokens is too long; split it")
        return lengths.astype(np.int32)


def _window_starts(lengths: np.ndarray, order: np.ndarray, seq_length: int, num_tokens: int) -> np.ndarray:
    """Place in `order` and offset in that document of the first token of each window and of one past the last.

    Returns int32 (windows + 1, 2), from megatron-core's C++ helper as its GPTDataset calls it for one epoch. The helper
    takes document numbers and lengths as int32, so its 64-bit variant could never be needed here.
    """
    # Imported late: runtime/ must have prepared a CPU-only machine before anything of megatron.core is loaded.
    from megatron.core.datasets.helpers_cpp import build_sample_idx_int32

    return build_sample_idx_int32(lengths, order.astype(np.int32), seq_length, 1, num_tokens, True, 1)


def split_documents(split: str, num_documents: int) -> list[tuple[int, int]]:
    """Return the document ranges [first, last) of training, validation and test for `split` (such as "969,30,1").

    Shares are scaled to a sum of 1, and bounds are rounded half to even, as megatron-core does.
    Raises ValueError for anything but one to three numbers that are not negative and not all 0.
    """
    try:
        shares = [float(part) for part in split.split(",")]
    except ValueError:
        shares = []
    if not 1 <= len(shares) <= 3 or min(shares) < 0 or not 0 < sum(shares) < math.inf:
        raise ValueError(f"--split {split!r} is not one to three shares such as 969,30,1")
    total = float(sum(shares))
    bounds = [0.0]
    for share in [*shares, 0.0, 0.0][:3]:
        bounds.append(bounds[-1] + share / total)
    cuts = [int(round(bound * float(num_documents))) for bound in bounds]
    return list(zip(cuts[:-1], cuts[1:], strict=True))
