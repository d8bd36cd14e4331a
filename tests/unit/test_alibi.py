"""ALiBi: slopes of the paper and of transformers, and attention against a dense bias in float64."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from transformers.models.bloom.modeling_bloom import build_alibi_tensor

from megatron_steel.model.alibi import DistanceAttention, key_channels, query_channels, slopes

CPU = torch.device("cpu")


def make(
    heads: int = 4, rank: int = 0, ranks: int = 1, scale: float | None = None, **changes: Any
) -> DistanceAttention:
    """The attention of one tensor-parallel rank, with heads of 8 channels."""
    values = {"num_layers": 1, "hidden_size": 8 * heads, "num_attention_heads": heads, "attention_dropout": 0.0}
    options = TransformerConfig(**{**values, **changes})  # type: ignore[arg-type]
    groups: Any = SimpleNamespace(tp=SimpleNamespace(rank=lambda: rank, size=lambda: ranks))
    return DistanceAttention(options, 1, AttnMaskType.causal, "self", softmax_scale=scale, pg_collection=groups)


def dense(
    query: Tensor, key: Tensor, value: Tensor, falls: list[float], window: int | None = None, scale: float | None = None
) -> Tensor:
    """The definition: scores plus slope * (key's place - query's); the last query is the last key."""
    length, total, heads = query.shape[0], key.shape[0], query.shape[2]
    distance = torch.arange(total) - torch.arange(total - length, total).unsqueeze(1)
    seen = (distance <= 0) & (distance > -(window or total + 1))
    out = torch.empty_like(query)
    for head in range(heads):
        k, v = (x[:, :, head * key.shape[2] // heads] for x in (key, value))
        scores = torch.einsum("sbd,tbd->bst", query[:, :, head], k) * (scale or 1 / math.sqrt(query.shape[-1]))
        scores = (scores + falls[head] * distance).masked_fill(~seen, -math.inf)
        out[:, :, head] = torch.einsum("bst,tbd->sbd", scores.softmax(-1), v)
    return out.flatten(2)


def inputs(
    length: int, total: int, heads: int = 4, groups: int = 2, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(length)
    shapes = ((length, 2, heads, 8), (total, 2, groups, 8), (total, 2, groups, 8))
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def test_slopes_of_the_paper() -> None:
    """Section 3: for 8 heads 1/2, 1/4, ..., 1/256; for 16 the geometric means in between."""
    assert slopes(8) == [2.0**-i for i in range(1, 9)]
    assert slopes(16)[1::2] == slopes(8)
    assert all(b / a == pytest.approx(2**-0.5) for a, b in zip(slopes(16)[:-1], slopes(16)[1:], strict=True))
    assert slopes(12) == slopes(8) + slopes(16)[0:8:2]
    assert slopes(1) == [2.0**-8]


@pytest.mark.parametrize("heads", range(1, 40))
def test_slopes_are_those_of_transformers(heads: int) -> None:
    theirs = build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)[:, 0, 1]
    torch.testing.assert_close(torch.tensor(slopes(heads)), theirs, rtol=1e-6, atol=0)


@pytest.mark.parametrize("scale", [None, 0.2])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(("mask", "length"), [(AttnMaskType.causal, 13), (AttnMaskType.no_mask, 1)])
def test_attention_and_gradients(
    mask: AttnMaskType, length: int, groups: int, window: int | None, scale: float | None
) -> None:
    changes = {} if window is None else {"window_size": (window - 1, 0), "window_attn_skip_freq": [1]}
    core = make(num_query_groups=groups, scale=scale, **changes)
    mine = [x.requires_grad_() for x in inputs(length, 13, groups=groups)]
    exact = [x.detach().double().requires_grad_() for x in mine]
    ours = core(*mine, attention_mask=None, attn_mask_type=mask)
    theirs = dense(*exact, slopes(4), window, scale)
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=3e-6)
    up = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1))
    (ours * up).sum().backward()
    (theirs * up.double()).sum().backward()
    for tensor, reference in zip(mine, exact, strict=True):
        assert tensor.grad is not None and reference.grad is not None
        torch.testing.assert_close(tensor.grad.double(), reference.grad, rtol=1e-4, atol=1e-5)


def test_ranks_have_their_heads_slopes() -> None:
    whole = make(heads=6)
    parts = [make(heads=6, rank=rank, ranks=2).factors for rank in range(2)]
    assert parts[0] + parts[1] == whole.factors and len(parts[0]) == 3
    assert whole.factors == pytest.approx([slope * math.sqrt(8) for slope in slopes(6)], rel=1e-12)


def test_packed_documents_are_as_if_alone() -> None:
    core, lengths = make(), [5, 5, 1, 12]
    query, key, value = (x[:, 0] for x in inputs(23, 23))
    bounds = torch.tensor([0, 5, 10, 11, 23], dtype=torch.int32)
    packed = PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds, max_seqlen_q=12, max_seqlen_kv=12
    )
    together = core(query, key, value, None, packed_seq_params=packed)
    parts = zip(*(x.split(lengths) for x in (query, key, value)), strict=True)
    alone = torch.cat([core(*(x.unsqueeze(1) for x in part), None).squeeze(1) for part in parts])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
def test_long_sequences(dtype: torch.dtype, bound: float) -> None:
    """2,048 tokens; in bf16 within what rounding the inputs and the output costs without any bias."""
    mine = [x[:, :1] for x in inputs(2048, 2048, dtype=dtype)]
    ours = make(num_query_groups=2)(*mine, None)
    theirs = dense(*(x.double() for x in mine), slopes(4))
    assert ours.dtype == dtype
    assert (ours.double() - theirs).abs().max() < bound


@settings(max_examples=200)
@given(st.integers(0, 2**24 - 1), st.integers(1, 64))
def test_bf16_holds_positions_exactly_and_slopes_closely(position: int, heads: int) -> None:
    factors = tuple(slopes(heads))
    columns = key_channels(torch.tensor([position]), torch.bfloat16).double()
    assert columns[0, :3].sum() == columns[0, 3:6].sum() == position and not columns[0, 6:].any()
    rows = query_channels(factors, torch.bfloat16, CPU).double()
    torch.testing.assert_close(
        (rows @ columns[0]) / max(position, 1), torch.tensor(factors).double() * (position > 0), rtol=2e-5, atol=0
    )
