"""Rows of an extended vocabulary, against numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megatron_steel.checkpoint.vocabulary import METHODS, Method, extended_rows


def noise(shape: list[int]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3)) * 0.001


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, int, int, dict[int, list[int]]]:
    """(old rows, all rows, ids of the old tokenizer, new ids with their spelling)."""
    known = draw(st.integers(1, 12))
    old_rows = known + draw(st.integers(0, 4))
    rows = old_rows + draw(st.integers(0, 6))
    kind = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    ids = draw(st.lists(st.integers(known, rows - 1), unique=True)) if rows > known else []
    spelling = st.lists(st.integers(0, known - 1), max_size=4)
    old = torch.randn(old_rows, 3, generator=torch.Generator().manual_seed(known)).to(kind)
    return old, rows, known, {index: draw(spelling) for index in ids}


@given(cases(), st.sampled_from(METHODS))
def test_rows_are_what_the_rule_says(case: tuple[Tensor, int, int, dict[int, list[int]]], method: Method) -> None:
    old, rows, known, new = case
    found = extended_rows(old, rows, known, new, method, noise)
    assert found.shape == (rows, 3) and found.dtype == old.dtype
    kept = [index for index in range(old.shape[0]) if index not in new]
    assert torch.equal(found[kept], old[kept])
    exact = old.double().numpy()
    for place, index in enumerate(sorted(new)):
        ids = new[index] if method == "sub-pieces" and new[index] else range(known)
        wanted = torch.from_numpy(np.mean([exact[i] for i in ids], axis=0)).to(old.dtype)
        if method == "random":
            wanted = noise([len(new), 3])[place].to(old.dtype)
        assert torch.equal(found[index], wanted) or torch.allclose(found[index], wanted, rtol=1e-7, atol=0)
    nobodys = [index for index in range(old.shape[0], rows) if index not in new]
    assert not found[nobodys].any()


def test_mean_leaves_rows_out_that_no_token_had() -> None:
    """A row the old tokenizer never used is not trained: it is no part of the mean, and a new token replaces it."""
    old = torch.tensor([[1.0], [3.0], [1000.0]])
    assert extended_rows(old, 4, 2, {2: [], 3: []}, "mean", noise).flatten().tolist() == [1.0, 3.0, 2.0, 2.0]


@pytest.mark.parametrize("spelling", [[0, 0, 1], [1]])
def test_sub_pieces_count_as_often_as_they_occur(spelling: list[int]) -> None:
    old = torch.tensor([[3.0], [9.0]])
    found = extended_rows(old, 3, 2, {2: spelling}, "sub-pieces", noise)
    assert found[2].item() == np.mean([[3.0, 9.0][index] for index in spelling])
