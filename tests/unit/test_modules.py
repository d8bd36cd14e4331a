"""Modules against their formulas in float64, whole and in blocks of rows: RMSNorm, SwiGLU, rotation, attention."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_steel.model import blocks
from megatron_steel.model.attention import SplitAndRotate, TorchDotProductAttention, rotary_table
from megatron_steel.model.mlp import SwiGLUFunction
from megatron_steel.model.norms import LayerNorm, RMSNorm, RMSNormFunction, ZeroCentredRMSNorm
from megatron_steel.model.window import causal_attention, window_mask


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


def test_a_wider_weight_multiplies_before_rounding() -> None:
    """Gemma's norm in bf16: one rounding at the end, whereas Llama's rounds before it multiplies."""
    generator = torch.Generator().manual_seed(5)
    x, weight = torch.randn(64, 32, generator=generator).bfloat16(), 0.3 * torch.randn(32, generator=generator)
    norm = ZeroCentredRMSNorm(config(params_dtype=torch.bfloat16), 32, eps=1e-6)
    with torch.no_grad():
        norm.weight.copy_(weight)
    stored = norm.weight.detach().double().numpy()
    exact = torch.from_numpy(exact_norm(x.double().numpy(), 1 + stored, 1e-6))
    ours = norm(x)
    assert ours.dtype == torch.bfloat16 and norm.weight.dtype == torch.bfloat16
    # Only rounding ties may differ from the exact value rounded once.
    assert (ours.detach() == exact.bfloat16()).double().mean() > 0.99
    ours.sum().backward()
    assert norm.weight.grad is not None and norm.weight.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", [LayerNorm, ZeroCentredRMSNorm])
def test_norm_value_and_gradient(kind: type) -> None:
    """Against autograd through the formulas in float64."""
    generator = torch.Generator().manual_seed(6)
    x, weight, bias, up = (torch.randn(shape, generator=generator) for shape in ((3, 5, 16), (16,), (16,), (3, 5, 16)))
    norm = kind(config(), 16, eps=1e-3)
    inputs = [x.clone().requires_grad_(), *norm.parameters()]
    with torch.no_grad():
        for parameter, value in zip(inputs[1:], (weight, bias), strict=False):
            parameter.copy_(value)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    if kind is LayerNorm:
        centred = exact[0] - exact[0].mean(-1, keepdim=True)
        theirs = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + 1e-3) * exact[1] + exact[2]
    else:
        theirs = exact[0] * torch.rsqrt(exact[0].square().mean(-1, keepdim=True) + 1e-3) * (1 + exact[1])
    ours = norm(inputs[0])
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=2e-6)
    (ours * up).sum().backward()
    (theirs * up.double()).sum().backward()
    for mine, reference in zip(inputs, exact, strict=True):
        assert mine.grad is not None and reference.grad is not None
        torch.testing.assert_close(mine.grad.double(), reference.grad, rtol=2e-5, atol=5e-6)


def test_layer_norm_marks_its_parameters_for_sequence_parallelism() -> None:
    split = LayerNorm(config(tensor_model_parallel_size=2, sequence_parallel=True), 32)
    assert split.weight.sequence_parallel is True and split.bias.sequence_parallel is True


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


@pytest.mark.parametrize("turned", [8, 4, 2])
def test_split_and_rotate_value_and_gradient(turned: int) -> None:
    """Two groups of three queries, a key and a value; the first channels rotated by position as complex numbers are."""
    generator = torch.Generator().manual_seed(4)
    sequence, batch, groups, per_group, width = 7, 3, 2, 3, 8
    mixed = torch.randn(sequence, batch, groups * (per_group + 2) * width, generator=generator)
    grad = torch.randn(mixed.numel(), generator=generator)
    angles = torch.arange(sequence)[:, None] * 10.0 ** -torch.arange(turned // 2)
    cos, sin = rotary_table(torch.cat((angles, angles), -1)[:, None, None], torch.float32)
    ours, exact = mixed.clone().requires_grad_(), mixed.double().requires_grad_()
    parts = exact.view(sequence, batch, groups, per_group + 2, width)
    turn = torch.polar(torch.ones_like(angles).double(), angles.double())[:, None, None, None]
    rotated = torch.complex(parts[..., : turned // 2], parts[..., turned // 2 : turned]) * turn
    rotated = torch.cat((rotated.real, rotated.imag, parts[..., turned:]), -1)
    expected = [rotated[:, :, :, :per_group].flatten(2, 3), rotated[:, :, :, per_group], parts[:, :, :, per_group + 1]]
    check_against_float64([ours, *SplitAndRotate.apply(ours, cos, sin, groups, width)], [exact, *expected], grad)


def exact_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, causal: bool, window: int | None = None
) -> torch.Tensor:
    """softmax(Q K^T / sqrt(d)) V in float64; each group of query heads uses one key and value head."""
    length, batch, heads, width = query.shape
    share = heads // key.shape[2]
    out = torch.zeros(length, batch, heads, width, dtype=torch.float64)
    for head in range(heads):
        q, k, v = query[:, :, head], key[:, :, head // share], value[:, :, head // share]
        scores = torch.einsum("sbd,tbd->bst", q, k) / math.sqrt(width)
        if causal:
            scores += torch.full((length, key.shape[0]), -math.inf, dtype=torch.float64).triu(1)
        if window is not None:  # the query is the last of the keys when there is a cache
            scores += torch.full_like(scores[0], -math.inf).tril(key.shape[0] - length - window)
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


@pytest.mark.parametrize("queries", [1, 3, 4, 256])
@pytest.mark.parametrize(("mask", "length"), [(AttnMaskType.causal, 13), (AttnMaskType.no_mask, 1)])
@pytest.mark.parametrize("window", [1, 4, 12, 13, 50])
def test_windowed_attention(
    window: int, mask: AttnMaskType, length: int, queries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole and in pieces of queries, with a cache, against a dense mask in float64."""
    monkeypatch.setattr("megatron_steel.model.window.QUERIES", queries)
    generator = torch.Generator().manual_seed(window)
    inputs = [torch.randn(n, 2, heads, 8, generator=generator) for n, heads in ((length, 4), (13, 2), (13, 2))]
    inputs = [tensor.requires_grad_() for tensor in inputs]
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    options = config(attention_dropout=0.0, window_size=(window - 1, 0), window_attn_skip_freq=[1])
    core = TorchDotProductAttention(options, 1, AttnMaskType.causal, "self")
    ours = core(*inputs, attention_mask=None, attn_mask_type=mask)
    theirs = exact_attention(*exact, causal=mask == AttnMaskType.causal, window=window)
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=2e-6)
    up = torch.randn(ours.shape, generator=generator)
    (ours * up).sum().backward()
    (theirs * up.double()).sum().backward()
    for mine, reference in zip(inputs, exact, strict=True):
        assert mine.grad is not None and reference.grad is not None
        torch.testing.assert_close(mine.grad.double(), reference.grad, rtol=1e-4, atol=5e-6)


def test_layers_have_a_window_or_none() -> None:
    options = config(num_layers=3, window_size=(4, 0), window_attn_skip_freq=[1, 0, 1])
    cores = [TorchDotProductAttention(options, layer, AttnMaskType.causal, "self") for layer in (1, 2, 3)]
    assert [core.window for core in cores] == [5, None, 5]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 9), st.integers(1, 9), st.integers(0, 9), st.integers(1, 9), st.integers(1, 9) | st.none())
def test_window_mask_is_its_definition(first: int, queries: int, begin: int, keys: int, window: int | None) -> None:
    places = range(first, first + queries), range(begin, begin + keys)
    mask = window_mask(*places, window, torch.device("cpu"))
    for row, query in enumerate(places[0]):
        for column, key in enumerate(places[1]):
            assert bool(mask[row, column]) == (key <= query and (window is None or query - key < window))


def test_no_window_is_the_plain_kernel() -> None:
    """A sequence that fits into the window takes the kernel without a mask: equal bits."""
    tensor = torch.randn(2, 4, 9, 8)
    assert torch.equal(
        causal_attention(tensor, tensor, tensor, 9, 0.0, None),
        causal_attention(tensor, tensor, tensor, None, 0.0, None),
    )


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
