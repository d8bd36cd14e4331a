"""Packing: whole samples of different lengths into rows of one length, with as little empty as possible."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Rows:
    """Which samples are in which row. Row r holds ``samples[begins[r] : begins[r + 1]]``, in this order."""

    samples: np.ndarray
    """int64, every sample once."""
    begins: np.ndarray
    """int64 (rows + 1,)."""

    def __len__(self) -> int:
        return len(self.begins) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        return self.samples[self.begins[row] : self.begins[row + 1]]


def pack(lengths: Sequence[int] | np.ndarray, capacity: int) -> Rows:
    """Best-fit decreasing: the longest sample first, each into the fullest row that has room for it.

    At most 11/9 of the fewest rows, plus 4 (Johnson 1974). Of rows with equal room the newest is taken, of samples of
    equal length the first. O(n log n + n * capacity / 64). Raises ``ValueError`` for a sample that fits no row.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if len(lengths) and (lengths.max() > capacity or lengths.min() < 1):
        worst = int(lengths.argmax() if lengths.max() > capacity else lengths.argmin())
        raise ValueError(f"sample {worst} has {lengths[worst]} tokens, a row has room for 1 to {capacity}")
    order = np.argsort(-lengths, kind="stable")
    rows: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    # Bit r says that a row with room for r tokens exists: the lowest one at or above a length is the best fit.
    rooms = 0
    for sample, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
            rows[row].append(sample)
        else:
            room, row = capacity, len(rows)
            rows.append([sample])
        left = room - length
        if left:
            by_room[left].append(row)
            rooms |= 1 << left
    begins = np.cumsum([0, *(len(row) for row in rows)], dtype=np.int64)
    flat = [sample for row in rows for sample in row]
    return Rows(samples=np.array(flat, dtype=np.int64), begins=begins)


def one_each(count: int) -> Rows:
    """A row for each sample."""
    return Rows(samples=np.arange(count), begins=np.arange(count + 1))


def fill(rows: Rows, lengths: np.ndarray, capacity: int) -> float:
    """Share of the rows' tokens that samples fill."""
    return float(lengths.sum() / (len(rows) * capacity)) if len(rows) else 0.0
