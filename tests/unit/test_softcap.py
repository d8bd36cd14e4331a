"""Attention with a softcap against the formula in float64: blocks, groups, windows, packed documents, decoding."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_steel.model import attention_math
from megatron_steel.model.attention_math import SoftcapAttention, softcap
from megatron_steel.model.embedding import add_embedding_scale

CAP, SCALE = 1.5, 0.4


def core(window: int | None = None) -> SoftcapAttention:
    """Attention of a layer with 4 query heads over 2 key heads."""
    config = TransformerConfig(
        num_layers=1, hidden_size=32, num_attention_heads=4, num_query_groups=2, attention_dropout=0.0,
        window_size=None if window is None else (window - 1, 0), use_cpu_initialization=True,
    )  # fmt: skip
    return SoftcapAttention(config, 1, AttnMaskType.causal, "self", softmax_scale=SCALE, cap=CAP)


def inputs(length: int, batch: int) -> list[Tensor]:
    """Queries, keys and values, large enough to be bent."""
    generator = torch.Generator().manual_seed(length)
    shapes = [(length, batch, 4, 8), (length, batch, 2, 8), (length, batch, 2, 8)]
    return [(1.5 * torch.randn(shape, generator=generator)).requires_grad_() for shape in shapes]


def formula(query: Tensor, key: Tensor, value: Tensor, window: int | None) -> Tensor:
    """[S, B, N, D], [S, B, G, D] -> [S, B, N * D], head by head and query by query, float64."""
    length, batch, heads, _ = query.shape
    rows = []
    for q in range(length):
        first = 0 if window is None else max(0, q - window + 1)
        for b in range(batch):
            for n in range(heads):
                g = n // (heads // key.shape[2])
                scores = CAP * torch.tanh(SCALE * (key[first : q + 1, b, g] @ query[q, b, n]) / CAP)
                rows.append(scores.softmax(0) @ value[first : q + 1, b, g])
    return torch.stack(rows).reshape(length, batch, -1)


def close(ours: Tensor, exact: Tensor) -> None:
    torch.testing.assert_close(ours, exact.float(), rtol=0, atol=3e-6)


@pytest.mark.parametrize("window", [None, 3, 100])
@pytest.mark.parametrize("block", [4, 256])
def test_forward_and_gradients(monkeypatch: pytest.MonkeyPatch, window: int | None, block: int) -> None:
    monkeypatch.setattr(attention_math, "QUERIES", block)
    tensors = inputs(11, 2)
    doubles = [tensor.detach().double().requires_grad_() for tensor in tensors]
    ours, exact = core(window)(*tensors, None), formula(*doubles, window)
    close(ours, exact)
    grad = torch.randn(ours.shape, generator=torch.Generator().manual_seed(0))
    for mine, wanted in zip(
        torch.autograd.grad(ours, tensors, grad), torch.autograd.grad(exact, doubles, grad.double()), strict=True
    ):
        close(mine, wanted)
    with torch.no_grad():  # without a graph nothing is kept for a second pass
        assert torch.equal(core(window)(*tensors, None), ours)


@pytest.mark.parametrize("window", [None, 3])
def test_a_new_token_against_a_cache(window: int | None) -> None:
    query, key, value = (tensor.detach() for tensor in inputs(9, 2))
    step = core(window)(query[-1:], key, value, None, attn_mask_type=AttnMaskType.no_mask)
    close(step, formula(query.double(), key.double(), value.double(), window)[-1:])


@pytest.mark.parametrize("window", [None, 3])
def test_documents_see_themselves_only(window: int | None) -> None:
    query, key, value = (tensor.detach()[:, 0] for tensor in inputs(12, 1))
    bounds = [0, 4, 8, 9, 12]
    edges = torch.tensor(bounds, dtype=torch.int32)
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=edges, cu_seqlens_kv=edges, max_seqlen_q=4, max_seqlen_kv=4)
    ours = core(window)(query, key, value, None, packed_seq_params=packed)
    for begin, end in zip(bounds, bounds[1:], strict=False):
        parts = (tensor[begin:end].unsqueeze(1).double() for tensor in (query, key, value))
        close(ours[begin:end], formula(*parts, window)[:, 0])


@settings(max_examples=50)
@given(st.floats(-1e4, 1e4), st.floats(0.1, 1e3))
def test_softcap_keeps_order_sign_and_bound(x: float, cap: float) -> None:
    y = softcap(torch.tensor(x, dtype=torch.float64), cap).item()
    assert abs(y) <= cap and abs(y) <= abs(x) + 1e-9 and y * x >= 0
    if abs(x) < cap / 100:
        assert y == pytest.approx(x, rel=1e-4)


def test_embeddings_are_scaled_in_the_precision_of_the_weight() -> None:
    """As transformers does: 45.25 instead of 45.2548 in bf16; the weight, which a tied head uses, stays."""
    for dtype, scale in ((torch.bfloat16, 45.25), (torch.float32, 2048**0.5)):
        words = torch.nn.Embedding(3, 2048, dtype=dtype)
        before, ids = words.weight.detach().clone(), torch.tensor([[2, 0]])
        add_embedding_scale(SimpleNamespace(embedding=SimpleNamespace(word_embeddings=words)), 2048)  # type: ignore
        assert torch.equal(words(ids), before[ids] * torch.tensor(scale, dtype=dtype))
        assert torch.equal(words.weight, before)
