"""How a sample is cut over context-parallel ranks, and what the rules refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention.bias import causal_lower_right

from megatron_steel.config.check import check
from megatron_steel.config.check_context import check_context, check_context_backend
from megatron_steel.config.load import from_flat
from megatron_steel.data.context import cut
from megatron_steel.model.context import in_order, pieces
from megatron_steel.model.window import causal_attention


@given(size=st.integers(2, 5), half=st.integers(1, 4), rows=st.integers(1, 3))
def test_shares_are_those_of_megatron_core_and_make_the_whole(size: int, half: int, rows: int) -> None:
    whole = torch.arange(rows * 2 * size * half).view(rows, -1)
    shares = [cut(whole, rank, size) for rank in range(size)]
    for rank, share in enumerate(shares):
        # What get_batch_on_this_cp_rank of megatron-core selects.
        chunks = whole.view(rows, 2 * size, half)[:, torch.tensor([rank, 2 * size - 1 - rank])]
        assert torch.equal(share, chunks.reshape(rows, -1))
    assert torch.equal(in_order(torch.stack([share.T for share in shares])).T, whole)


@given(lengths=st.lists(st.integers(1, 6), min_size=1, max_size=6), data=st.data())
def test_pieces_are_the_tokens_with_what_is_before_them_in_their_document(
    lengths: list[int], data: st.DataObject
) -> None:
    bounds = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    begin = data.draw(st.integers(0, bounds[-1] - 1))
    end = data.draw(st.integers(begin + 1, bounds[-1]))
    seen = [(token, first) for query, first, last in pieces(bounds, begin, end) for token in range(query, last)]
    documents = [first for first, length in zip(bounds, lengths, strict=False) for _ in range(length)]
    assert seen == [(token, documents[token]) for token in range(begin, end)]


@pytest.mark.parametrize("window", [None, 3, 300])
def test_queries_may_be_the_last_of_the_positions(window: int | None) -> None:
    """Against the rows of plain attention over all positions, more than one block of queries."""
    query, key, value = torch.randn(3, 2, 4, 700, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    whole = causal_attention(query, key[:, :2], value[:, :2], window, 0.0, None)
    later = causal_attention(query[:, :, 100:], key[:, :2], value[:, :2], window, 0.0, None)
    torch.testing.assert_close(later, whole[:, :, 100:], rtol=1e-12, atol=1e-12)


def test_the_mask_that_gpus_get_is_ours() -> None:
    """Queries are the last positions for PyTorch's lower-right mask too, not the first as for ``is_causal``."""
    query, key, value = (torch.randn(1, heads, length, 8) for heads, length in ((4, 5), (2, 9), (2, 9)))
    theirs = F.scaled_dot_product_attention(query, key, value, attn_mask=causal_lower_right(5, 9), enable_gqa=True)
    torch.testing.assert_close(causal_attention(query, key, value, None, 0.0, None), theirs)


def build(**changes: Any) -> Any:
    return from_flat({"seq_length": 64, "max_position_embeddings": 64, "context_parallel_size": 2, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context_parallel_size": 3}, "--seq-length 64 is not divisible by 2 x --context-parallel-size 3; use 60"),
        (
            {"seq_length": 60, "tensor_model_parallel_size": 2, "sequence_parallel": True},
            "2 x --context-parallel-size 2 x --tensor-model-parallel-size 2; use 56",
        ),
        ({"context_parallel_size": 0}, "--context-parallel-size must be greater than 0"),
        ({"transformer_impl": "local"}, "--transformer-impl local has no --context-parallel-size 2"),
    ],
)
def test_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(build(**changes), 12)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ffn_type": "softmoe_causal"}, "does not go with --ffn-type softmoe_causal, which mixes tokens"),
        ({"multi_latent_attention": True, "reset_attention_mask": True}, "takes no --reset-attention-mask"),
    ],
)
def test_what_cannot_be_cut(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_context(build(**changes))


def test_what_transformer_engine_would_compute_otherwise() -> None:
    check_context_backend(build(reset_attention_mask=True), "torch")
    check_context_backend(build(), "transformer_engine")
    for change in ({"reset_attention_mask": True}, {"window_size": 8}):
        with pytest.raises(ValueError, match="does not go with Transformer Engine; use --transformer-impl torch"):
            check_context_backend(build(**change), "transformer_engine")


def test_replicas_are_what_context_parallel_ranks_leave() -> None:
    config = build(use_distributed_optimizer=True, micro_batch_size=3)
    assert not any("shards nothing" in note for note in check(config, 2))
    assert config.training.global_batch_size == 3
    with pytest.raises(ValueError, match="x --context-parallel-size 2 = 2"):
        check(build(), 3)
