"""Windows that never cross a document: each document split, truncated or sampled (--sequence-mode).

A window of a document has up to seq_length + 1 tokens; the loader fills it up with padding that has no loss. A window
and the next one of the same document share a token, as windows of joined documents do: its last label is the next one's
first input. Documents of less than two tokens have no label and are in no window.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from megatron_steel.config.schema import SequenceMode
from megatron_steel.data.indexed import IndexedReader
from megatron_steel.data.shuffle import round_keys
from megatron_steel.data.windows import Limit, WindowedDataset


class SplitDocuments(WindowedDataset):
    """Each document in windows of its own: all of its tokens, the last window as long as the rest."""

    sequence_mode: SequenceMode = "split"

    def describe(self) -> str:
        """Return for the log how documents are cut, how much of the windows is padding, and which part is used."""
        padding = 1 - self.num_labels / (self.all_windows * self.seq_length)
        text = f"({self.sequence_mode}, {padding:.1%} padding, {self.dropped_tokens:,} tokens left out)"
        part = super().describe()
        return f"{part} {text}" if part else text

    def read(self, window: int, epoch: int) -> np.ndarray:
        """Return 2 to seq_length + 1 tokens of one document, int64: inputs are all but the last."""
        documents, ends = self._index_of(window)
        place = int(np.searchsorted(ends, window, side="right"))
        piece = window - (int(ends[place - 1]) if place else 0)
        tokens = self.reader.document(int(documents[place]))
        start = self._start(len(tokens), window, piece, epoch)
        return tokens[start : start + self.seq_length + 1].astype(np.int64)

    def _start(self, length: int, window: int, piece: int, epoch: int) -> int:
        """First token of a window in its document of `length` tokens, whose window number `piece` it is."""
        return piece * self.seq_length

    def _windows_of(self, lengths: np.ndarray) -> np.ndarray:
        """Windows of documents of these lengths, int64."""
        return np.maximum(-(-(lengths.astype(np.int64) - 1) // self.seq_length), 0)

    def _labels_of(self, lengths: np.ndarray) -> np.ndarray:
        """Labels of documents of these lengths, int64."""
        return np.maximum(lengths.astype(np.int64) - 1, 0)

    def _count_windows(self) -> tuple[int, int, int]:
        """Windows in the range, tokens in none of them, labels in them; raises ValueError if there is no window."""
        lengths = self._document_lengths()
        windows = int(self._windows_of(lengths).sum())
        if not windows:
            first, last = self._range
            raise ValueError(f"{self.prefix}: no document of [{first}, {last}) has two tokens; add documents")
        labels = self._labels_of(lengths)
        total = int(labels.sum())
        # A document with labels has one token more than labels.
        return windows, self.num_tokens - total - int((labels > 0).sum()), total

    def _make_index(self) -> tuple[np.ndarray, np.ndarray]:
        """Documents in their order, and the number of windows up to the end of each, both int64 (documents,)."""
        documents = self._document_order()
        ends = np.cumsum(self._windows_of(self._document_lengths()[documents]))
        return documents + self._range[0], ends


class TruncatedDocuments(SplitDocuments):
    """The first window of each document."""

    sequence_mode: SequenceMode = "truncate"

    def _windows_of(self, lengths: np.ndarray) -> np.ndarray:
        """One window for each document that has a label."""
        return (lengths > 1).astype(np.int64)

    def _labels_of(self, lengths: np.ndarray) -> np.ndarray:
        """Those of its one window."""
        return np.minimum(super()._labels_of(lengths), self.seq_length)


class SampledDocuments(TruncatedDocuments):
    """One window of each document, another one in each epoch (Rae et al. 2021, "Gopher", on long documents).

    A document that fits is read whole. Of a longer one the window begins with its first token with probability 1/4,
    else at a place that is drawn uniformly from all where it fits. The draw is a pure function of the seed of the
    order, the content of the file, the window and the epoch.
    """

    sequence_mode: SequenceMode = "sample"

    def _start(self, length: int, window: int, piece: int, epoch: int) -> int:
        """0 for a document that fits; else drawn."""
        places = length - self.seq_length
        if places <= 1:
            return 0
        drawn = round_keys("crop", *self._crop_name, window, epoch)
        return 0 if int(drawn[0]) % 4 == 0 else int(drawn[1]) % places


def open_windows(
    mode: SequenceMode,
    reader: IndexedReader,
    seq_length: int,
    documents: tuple[int, int],
    seed: int,
    limit: Limit | None,
) -> WindowedDataset:
    """Return the training windows of documents [first, last) of an open file, cut as `mode` says.

    Raises ValueError if there is none.
    """
    kinds: dict[SequenceMode, Callable[..., WindowedDataset]] = {
        "concat": WindowedDataset,
        "split": SplitDocuments,
        "truncate": TruncatedDocuments,
        "sample": SampledDocuments,
    }
    return kinds[mode](reader.prefix, seq_length, documents, seed, reader=reader, limit=limit)
