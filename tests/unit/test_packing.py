"""Packing samples into rows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_steel.data.packing import fill, one_each, pack


def test_the_vector_of_llama_factory() -> None:
    lengths = [5, 4, 3, 3, 2]
    rows = pack(lengths, 8)
    assert [[lengths[sample] for sample in rows[row]] for row in range(len(rows))] == [[5, 3], [4, 3], [2]]
    assert fill(rows, np.array(lengths), 8) == 17 / 24


def test_the_fullest_row_with_room_is_taken() -> None:
    rows = pack([6, 5, 3, 2], 8)  # 3 fits behind 5 exactly; 2 behind 6
    assert [rows[row].tolist() for row in range(len(rows))] == [[0, 3], [1, 2]]


def test_without_samples() -> None:
    assert len(pack([], 8)) == 0 and len(one_each(0)) == 0
    assert fill(pack([], 8), np.array([]), 8) == 0.0


def test_one_row_for_each() -> None:
    rows = one_each(3)
    assert [rows[row].tolist() for row in range(3)] == [[0], [1], [2]]


@pytest.mark.parametrize(("lengths", "where"), [([3, 9], "sample 1 has 9"), ([3, 0], "sample 1 has 0")])
def test_a_sample_that_fits_no_row(lengths: list[int], where: str) -> None:
    with pytest.raises(ValueError, match=f"{where} tokens, a row has room for 1 to 8"):
        pack(lengths, 8)


def best_fit_decreasing(lengths: list[int], capacity: int) -> list[list[int]]:
    """Best fit in the plainest words: look at every row."""
    rows: list[list[int]] = []
    for length in sorted(lengths, reverse=True):
        fitting = [row for row in rows if sum(row) + length <= capacity]
        if fitting:
            max(fitting, key=sum).append(length)
        else:
            rows.append([length])
    return rows


@given(lengths=st.lists(st.integers(1, 40), max_size=60), capacity=st.integers(40, 90))
def test_every_sample_once_and_as_full_as_by_hand(lengths: list[int], capacity: int) -> None:
    rows = pack(lengths, capacity)
    assert sorted(rows.samples.tolist()) == list(range(len(lengths)))
    sums = [sum(lengths[sample] for sample in rows[row]) for row in range(len(rows))]
    assert all(0 < total <= capacity for total in sums)
    # At most one row is half empty, or two would have been one.
    assert sum(2 * total <= capacity for total in sums) <= 1
    assert sorted(sums) == sorted(map(sum, best_fit_decreasing(lengths, capacity)))
