"""Windows: fixed-length training samples cut from the documents of one indexed file.

The documents of a range are put in a shuffled order and read as one stream of tokens; window i holds tokens
[i * seq_length, (i + 1) * seq_length] of it. Neighbours share one token: the last label of one is the first input of
the next, so every token but the first of the stream is a label exactly once. What does not fill a window is dropped.
"""

from __future__ import annotations

import hashlib
import math
import threading

import numpy as np

from megatron_steel.data.indexed import IndexedReader
from megatron_steel.data.shuffle import permute, round_keys

INT32_MAX = int(np.iinfo(np.int32).max)


class WindowedDataset:
    """The windows of documents [first, last) of the indexed file `prefix`.

    The order of the documents depends on nothing but `seed` and the content of the file, so window i is the same in
    every segment of a run and on every machine. `shuffle_documents=False` keeps the order of the file (validation).
    Raises ValueError if the range is not in the file or holds less than one window.

    fingerprint: names file content, range and document order, wherever the file lies (str, 64 hex digits); from the
    fast key of the file, unless data/identity.py knows more.
    num_tokens: tokens in the range. dropped_tokens: those at the end of the stream that are in no window.
    """

    def __init__(
        self,
        prefix: str,
        seq_length: int,
        document_range: tuple[int, int | None] = (0, None),
        seed: int = 0,
        shuffle_documents: bool = True,
        reader: IndexedReader | None = None,
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
        self.fingerprint = self.content_name(None)
        self._range = (first, last)
        self._lock = threading.Lock()
        self._made_index: tuple[np.ndarray, np.ndarray] | None = None
        self._order_keys = round_keys("documents", seed, content) if shuffle_documents else None
        self.num_tokens = self._count_tokens()
        if self.num_tokens <= seq_length:
            raise ValueError(
                f"{prefix}: documents [{first}, {last}) hold {self.num_tokens} tokens, less than one window of "
                f"seq_length {seq_length} + 1; add documents or lower --seq-length"
            )
        self.dropped_tokens = self.num_tokens - len(self) * seq_length - 1

    def content_name(self, bin_sha256: str | None) -> str:
        """Return the fingerprint by the fast key alone (None), or by it and the sha256 of the .bin file."""
        version = "windows 1" if bin_sha256 is None else f"windows 2|{bin_sha256}"
        return hashlib.sha256(f"{version}|{self._description}".encode()).hexdigest()

    def __len__(self) -> int:
        return (self.num_tokens - 1) // self.seq_length

    def prepare(self) -> tuple[np.ndarray, np.ndarray]:
        """Documents in their order, int64 (documents,), and starts of windows in it, int32 (windows + 1, 2).

        Made when the first window is read: a run with hundreds of sources starts after the few that its first batch
        needs, and the thread that reads ahead makes the rest. May be called on any thread.
        """
        with self._lock:
            if self._made_index is None:
                self._made_index = self._make_index()
            return self._made_index

    def _make_index(self) -> tuple[np.ndarray, np.ndarray]:
        """What `prepare` returns."""
        first, last = self._range
        documents = np.arange(last - first, dtype=np.int64)
        if self._order_keys is not None:
            documents = permute(documents, last - first, self._order_keys)
        # Document ids are relative to the range here, so that the C++ helper sees only the lengths it needs.
        starts = _window_starts(self._document_lengths(), documents, self.seq_length, self.num_tokens)
        assert len(starts) == len(self) + 1
        documents += first
        return documents, starts

    def __getitem__(self, window: int) -> np.ndarray:
        """Return tokens int64 (seq_length + 1,): inputs are all but the last, labels all but the first."""
        if not 0 <= window < len(self):
            raise IndexError(f"{self.prefix}: window {window} is not in [0, {len(self)})")
        documents, starts = self.prepare()
        (place, offset), (last_place, last_offset) = starts[window : window + 2].tolist()
        parts = []
        while place < last_place:
            parts.append(self.reader.document(int(documents[place]))[offset:])
            place, offset = place + 1, 0
        parts.append(self.reader.document(int(documents[place]))[offset : last_offset + 1])
        tokens = np.concatenate(parts, dtype=np.int64)
        assert tokens.shape == (self.seq_length + 1,)
        return tokens

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
    total = float(np.sum(np.array(shares)))
    bounds = [0.0]
    for share in [*shares, 0.0, 0.0][:3]:
        bounds.append(bounds[-1] + share / total)
    cuts = [int(round(bound * float(num_documents))) for bound in bounds]
    return list(zip(cuts[:-1], cuts[1:], strict=True))
