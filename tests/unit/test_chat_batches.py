"""Rows of conversations as batches: what each rank gets, to the number."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_steel.data.chat_batches import ChatBatchBuilder, text_bounds


def row(*lengths: int) -> np.ndarray:
    """Planes of conversations of these lengths: tokens 5, 6, ..; all but the last label trained, with weight 0.5."""
    positions = np.concatenate([np.arange(length) for length in lengths])
    last = np.append(positions[1:] == 0, True)
    tokens = np.arange(5, 5 + len(positions))
    weights = np.where(last, 0, 0.5).astype(np.float32)
    return np.stack([tokens, np.where(last, -1, tokens + 1), weights.view(np.int32), positions]).astype(np.int32)


def builder(**changes: object) -> ChatBatchBuilder:
    options = {"seq_length": 8, "packing": True, "group": None, "device": torch.device("cpu"), "one_shape": False}
    return ChatBatchBuilder(**{**options, "multiple": 1, **changes})  # type: ignore[arg-type]


def batches(rows: list[list[np.ndarray | None]], **changes: object) -> list:
    made = builder(**changes)
    shape = (len(rows), len(rows[0]))
    host = made.read(lambda microbatch, number: rows[microbatch][number], shape)
    return made.build(host, np.zeros(shape, dtype=np.int64), np.ones(shape, dtype=bool))


def test_packed_rows() -> None:
    (batch,) = batches([[row(3, 2), row(8)]])
    assert batch.tokens_BS.tolist() == [[5, 6, 7, 8, 9, 0, 0, 0], [5, 6, 7, 8, 9, 10, 11, 12]]
    assert batch.labels_BS.tolist() == [[6, 7, 0, 9, 0, 0, 0, 0], [6, 7, 8, 9, 10, 11, 12, 0]]
    assert batch.loss_mask_BS.tolist() == [[0.5, 0.5, 0, 0.5, 0, 0, 0, 0], [0.5] * 7 + [0]]
    assert batch.position_ids_BS.tolist() == [[0, 1, 2, 0, 1, 0, 0, 0], list(range(8))]
    assert batch.cu_seqlens is not None and batch.cu_seqlens.tolist() == [0, 3, 5, 8, 16]
    assert (batch.valid_tokens, batch.weight, batch.read_tokens) == (10, 5.0, 13)
    assert batch.cu_seqlens.dtype == torch.int32 and batch.tokens_BS.dtype == torch.int64


def test_a_row_that_is_not_there_is_padding() -> None:
    (batch,) = batches([[row(8), None]])
    assert batch.cu_seqlens is not None and batch.cu_seqlens.tolist() == [0, 8, 16]
    assert (batch.valid_tokens, batch.read_tokens) == (7, 8) and not batch.loss_mask_BS[1].any()
    (nothing,) = batches([[None, None]], packing=False, multiple=2)
    assert nothing.tokens_BS.shape == (2, 2) and nothing.valid_tokens == 0


def test_single_rows_are_as_long_as_the_micro_batch_needs() -> None:
    first, second = batches([[row(3), row(2)], [row(5), row(1)]], packing=False, multiple=4)
    assert first.tokens_BS.shape == (2, 4) and second.tokens_BS.shape == (2, 8)
    assert first.tokens_BS.tolist() == [[5, 6, 7, 0], [5, 6, 0, 0]] and first.cu_seqlens is None
    assert (first.valid_tokens, second.valid_tokens) == (3, 4)
    same = batches([[row(3), row(2)], [row(5), row(1)]], packing=False, multiple=4, one_shape=True)
    assert [batch.tokens_BS.shape for batch in same] == [(2, 8), (2, 8)]


@pytest.mark.parametrize("packing", [True, False])
def test_context_ranks_share_a_row(packing: bool) -> None:
    """Chunks 0 and 3 of four, 1 and 2; the counts are each rank's, the bounds those of whole rows."""
    rows: list[list[np.ndarray | None]] = [[row(3, 5) if packing else row(8)]]
    (whole,) = batches(rows, packing=packing)
    halves = [batches(rows, packing=packing, multiple=4, context_rank=rank, context_size=2)[0] for rank in range(2)]
    for name in ("tokens_BS", "labels_BS", "loss_mask_BS", "position_ids_BS"):
        (full,), (early,), (late,) = (getattr(batch, name) for batch in (whole, *halves))
        assert early.tolist() == full[[0, 1, 6, 7]].tolist() and late.tolist() == full[[2, 3, 4, 5]].tolist()
    assert sum(half.valid_tokens for half in halves) == whole.valid_tokens
    assert sum(half.weight for half in halves) == whole.weight
    assert sum(half.read_tokens for half in halves) == whole.read_tokens == 8
    if packing:
        assert halves[0].cu_seqlens.tolist() == halves[1].cu_seqlens.tolist() == [0, 3, 8]


def test_bounds() -> None:
    assert text_bounds(np.array([[0, 1, 0, -1], [-1, -1, -1, -1], [0, 0, 1, 2]])).tolist() == [0, 2, 3, 4, 8, 9, 12]
