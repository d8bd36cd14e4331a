"""Modules against their formulas in float64, whole and in blocks of rows: RMSNorm, SwiGLU, rotation, attention."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_steel.model import blocks
from megatron_steel.model.attention import SplitAndRotate, TorchDotProductAttention, rotary_table
from megatron_steel.model.mlp import SwiGLUFunction
from megatron_steel.model.norms import RMSNorm, RMSNormFunction


@pytest.fixture(autouse=True, params=[blocks.CACHED_ELEMENTS, 1, 100], ids=["whole", "rows", "blocks"])
def elements_per_block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test with one block, with a block for each row, and with blocks that do not divide the rows."""
    monkeypatch.setattr(blocks, "CACHED_ELEMENTS", request.param)


def config(**changes: object) -> TransformerConfig:
    values = {"num_layers": 1, "hidden_size": 32, "num_attention_heads": 4, "num_query_groups": 2, **changes}
    return TransformerConfig(**values)  # type: ignore[arg-type]


def exact_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt(np.mean(np.square(x), -1, keepdims=True) + eps) * weight


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1.6e-2)])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_rms_norm_value(dtype: torch.dtype, tolerance: float, scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(3, 5, 32, generator=generator) * scale).to(dtype)
    norm = RMSNorm(config(params_dtype=dtype), 32, eps=1e-5)
    with torch.no_grad():
        norm.weight.copy_(1 + 0.3 * torch.randn(32, generator=generator))
    exact = exact_norm(x.double().numpy(), norm.weight.detach().double().numpy(), 1e-5)
    ours = norm(x)
    assert ours.dtype == dtype
    np.testing.assert_allclose(ours.detach().double().numpy(), exact, rtol=tolerance, atol=tolerance * 0.1)


def test_rms_norm_gradient_is_autograds() -> None:
    """Against autograd through the formula in float64 (our function computes in fp32)."""
    generator = torch.Generator().manual_seed(1)
    x, weight, up = (torch.randn(shape, generator=generator) for shape in ((2, 3, 16), (16,), (2, 3, 16)))
    ours = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    (RMSNormFunction.apply(*ours, 1e-6) * up).sum().backward()
    exact = [x.double().requires_grad_(), weight.double().requires_grad_()]
    normed = exact[0] * torch.rsqrt(exact[0].square().mean(-1, keepdim=True) + 1e-6) * exact[1]
    (normed * up.double()).sum().backward()
    for mine, theirs in zip(ours, exact, strict=True):
        assert mine.grad is not None and theirs.grad is not None
        torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=2e-5, atol=2e-6)


def test_rms_norm_gradcheck() -> None:
    """Finite differences, with the step and tolerance that fp32 statistics allow."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, 8, generator=generator).double().requires_grad_()
    weight = torch.randn(8, generator=generator).double().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda a, b: RMSNormFunction.apply(a, b, 1e-6), (x, weight), eps=1e-3, atol=2e-3, rtol=2e-3
    )


def test_rms_norm_marks_its_weight_for_sequence_parallelism() -> None:
    assert RMSNorm(config(), 32).weight.sequence_parallel is False
    split = config(tensor_model_parallel_size=2, sequence_parallel=True)
    assert RMSNorm(split, 32).weight.sequence_parallel is True


def check_against_float64(ours: list[torch.Tensor], exact: list[torch.Tensor], grad: torch.Tensor) -> None:
    """Outputs, and the gradients of the first tensor of each list, which is the leaf they were computed from."""
    (mine, *outputs), (leaf, *expected) = ours, exact
    for output, value in zip(outputs, expected, strict=True):
        torch.testing.assert_close(output.double(), value, rtol=1e-5, atol=1e-6)
    for results in (outputs, expected):
        sums = [(result.flatten() * grad[: result.numel()].to(result.dtype)).sum() for result in results]
        torch.stack(sums).sum().backward()
    assert mine.grad is not None and leaf.grad is not None
    torch.testing.assert_close(mine.grad.double(), leaf.grad, rtol=1e-5, atol=1e-6)


def test_swiglu_value_and_gradient() -> None:
    generator = torch.Generator().manual_seed(3)
    x, grad = torch.randn(7, 2, 24, generator=generator), torch.randn(7 * 2 * 12, generator=generator)
    ours, exact = x.clone().requires_grad_(), x.double().requires_grad_()
    gate, up = exact[..., :12], exact[..., 12:]
    check_against_float64([ours, SwiGLUFunction.apply(ours)], [exact, gate / (1 + torch.exp(-gate)) * up], grad)


def test_split_and_rotate_value_and_gradient() -> None:
    """Two groups of three queries, a key and a value; each rotated by its position as a complex number is."""
    generator = torch.Generator().manual_seed(4)
    sequence, batch, groups, per_group, width = 7, 3, 2, 3, 8
    mixed = torch.randn(sequence, batch, groups * (per_group + 2) * width, generator=generator)
    grad = torch.randn(mixed.numel(), generator=generator)
    angles = torch.arange(sequence)[:, None] * 10.0 ** -torch.arange(width // 2)
    cos, sin = rotary_table(torch.cat((angles, angles), -1)[:, None, None], torch.float32)
    ours, exact = mixed.clone().requires_grad_(), mixed.double().requires_grad_()
    parts = exact.view(sequence, batch, groups, per_group + 2, width)
    turn = torch.polar(torch.ones_like(angles).double(), angles.double())[:, None, None, None]
    turned = torch.complex(parts[..., : width // 2], parts[..., width // 2 :]) * turn
    rotated = torch.cat((turned.real, turned.imag), -1)
    expected = [rotated[:, :, :, :per_group].flatten(2, 3), rotated[:, :, :, per_group], parts[:, :, :, per_group + 1]]
    check_against_float64([ours, *SplitAndRotate.apply(ours, cos, sin, groups)], [exact, *expected], grad)


def exact_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, causal: bool) -> torch.Tensor:
    """softmax(Q K^T / sqrt(d)) V in float64; each group of query heads uses one key and value head."""
    length, batch, heads, width = query.shape
    share = heads // key.shape[2]
    out = torch.zeros(length, batch, heads, width, dtype=torch.float64)
    for head in range(heads):
        q, k, v = query[:, :, head], key[:, :, head // share], value[:, :, head // share]
        scores = torch.einsum("sbd,tbd->bst", q, k) / math.sqrt(width)
        if causal:
            scores += torch.full((length, key.shape[0]), -math.inf, dtype=torch.float64).triu(1)
        out[:, :, head] = torch.einsum("bst,tbd->sbd", scores.softmax(-1), v)
    return out.flatten(2)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(("mask", "length"), [(AttnMaskType.causal, 9), (AttnMaskType.no_mask, 1)])
def test_attention_value_and_gradient(groups: int, mask: AttnMaskType, length: int) -> None:
    generator = torch.Generator().manual_seed(groups)
    shapes = ((length, 2, 4, 8), (9, 2, groups, 8), (9, 2, groups, 8))
    inputs = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    core = TorchDotProductAttention(config(attention_dropout=0.0), 1, AttnMaskType.causal, "self")
    ours = core(*inputs, attention_mask=None, attn_mask_type=mask)
    theirs = exact_attention(*exact, causal=mask == AttnMaskType.causal)
    assert ours.shape == (length, 2, 32)
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=2e-6)
    up = torch.randn(ours.shape, generator=generator)
    (ours * up).sum().backward()
    (theirs * up.double()).sum().backward()
    for mine, reference in zip(inputs, exact, strict=True):
        assert mine.grad is not None and reference.grad is not None
        torch.testing.assert_close(mine.grad.double(), reference.grad, rtol=1e-4, atol=5e-6)


def test_attention_dropout_acts_in_training_only() -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(9, 2, 4, 8), torch.randn(9, 2, 4, 8), torch.randn(9, 2, 4, 8)
    core = TorchDotProductAttention(config(attention_dropout=0.5), 1, AttnMaskType.causal, "self")
    exact = exact_attention(query.double(), key.double(), value.double(), causal=True).float()
    assert not torch.allclose(core(query, key, value, None), exact, atol=1e-2)
    torch.testing.assert_close(core.eval()(query, key, value, None), exact, rtol=1e-5, atol=2e-6)


def test_a_mask_that_would_be_ignored_is_refused() -> None:
    core = TorchDotProductAttention(config(), 1, AttnMaskType.causal, "self")
    tensor = torch.randn(4, 1, 4, 8)
    with pytest.raises(AssertionError):
        core(tensor, tensor, tensor, attention_mask=torch.ones(1, 1, 4, 4, dtype=torch.bool))
