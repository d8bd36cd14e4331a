"""Soft mixtures and the double SwiGLU against numpy float64: values, gradients, causality, streaming."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core import parallel_state
from soft_mixture_reference import mixture
from torch import Tensor

from megatron_steel.config.schema import ModelConfig
from megatron_steel.model.steel import experts, prefix, soft_mixture
from megatron_steel.model.steel.experts import ExpertOutputs
from megatron_steel.model.steel.prefix import PrefixMeans, prefix_totals
from megatron_steel.model.steel.soft_mixture import SoftMixture

FORMS = ("softmoe_v1", "softmoe_v2", "softmoe_v3", "softmoe_causal")
CAUSAL = ("softmoe_v1", "softmoe_causal")


class OneRank:
    """A process group of one."""

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel_state, "get_tensor_model_parallel_group", OneRank)
    for name in ("copy_to_tensor_model_parallel_region", "reduce_from_tensor_model_parallel_region"):
        monkeypatch.setattr(soft_mixture, name, lambda x, group: x)


@pytest.fixture(params=[3, 32], ids=["chunks", "chunk"])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(prefix, "CHUNK", request.param)
    return request.param


def build(form: str, slots: int = 2, mlp_type: str = "senet", dtype: torch.dtype = torch.float64) -> SoftMixture:
    """A mixture of 4 experts of width 3 on 6 channels with random weights, scale not 1 and biases not 0."""
    size = ModelConfig(
        hidden_size=6, ffn_hidden_size=12, mlp_div_ratio=4, soft_experts=4, slots_per_expert=slots,
        ffn_type=form, mlp_type=mlp_type,  # type: ignore[arg-type]
    )  # fmt: skip
    options: Any = SimpleNamespace(hidden_size=6, params_dtype=dtype, sequence_parallel=False)
    module = SoftMixture(options, size)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(torch.tensor([1.7]) if name == "scale" else noise)
    return module


def weights(module: SoftMixture) -> dict[str, np.ndarray]:
    return {name: parameter.detach().numpy() for name, parameter in module.named_parameters()}


def tokens(length: int, batch: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(length, batch, 6, generator=torch.Generator().manual_seed(1), dtype=dtype)


@pytest.mark.parametrize("mlp_type", ["senet", "swiglu"])
@pytest.mark.parametrize("slots", [1, 2])
@pytest.mark.parametrize("form", FORMS)
def test_values_are_those_of_the_formulas(form: str, slots: int, mlp_type: str, chunk: int) -> None:
    module, x = build(form, slots, mlp_type), tokens(7)
    y, bias = module(x)
    assert y.shape == x.shape and y.dtype == x.dtype and bias is None
    for row in range(2):
        wanted = mixture(form, x[:, row].numpy(), weights(module), mlp_type == "senet")
        np.testing.assert_allclose(y[:, row].detach().numpy(), wanted, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("mlp_type", ["senet", "swiglu"])
@pytest.mark.parametrize("form", FORMS)
def test_gradients_of_every_input_and_weight(form: str, mlp_type: str, chunk: int) -> None:
    module, x = build(form, 2, mlp_type), tokens(5).requires_grad_()
    names = [name for name, _ in module.named_parameters()]

    def run(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(module, dict(zip(names, values, strict=True)), (x,))[0]

    assert torch.autograd.gradcheck(run, (x, *module.parameters()), fast_mode=True)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("double", [False, True])
def test_gradients_of_the_second_halves(monkeypatch: pytest.MonkeyPatch, double: bool, recompute: bool) -> None:
    """Also with several blocks of rows, whose parts of the weights' gradients add up."""
    monkeypatch.setattr(experts, "LEAST_ROWS", 3)
    monkeypatch.setattr(experts, "CACHED_ELEMENTS", 1)
    make = torch.Generator().manual_seed(0)
    means, combine, second = (
        torch.randn(shape, generator=make, dtype=torch.float64, requires_grad=True)
        for shape in ((7, 2, 6), (7, 2), (2, 8, 3))
    )
    assert torch.autograd.gradcheck(lambda *x: ExpertOutputs.apply(*x, double, recompute), (means, combine, second))


@pytest.mark.parametrize("form", FORMS)
def test_only_v2_and_v3_let_a_token_reach_earlier_ones(form: str) -> None:
    module, x = build(form), tokens(70)
    changed = x.clone()
    changed[50] += 1.0
    before, after = module(x)[0], module(changed)[0]
    assert not torch.equal(before[50:], after[50:])
    assert torch.equal(before[:50], after[:50]) == (form in CAUSAL)
    if form not in CAUSAL:
        assert (before[:50] - after[:50]).abs().max() > 1e-4


def test_the_last_token_of_the_causal_form_gets_what_v3_gives_it() -> None:
    causal, released, x = build("softmoe_causal"), build("softmoe_v3"), tokens(40)
    released.load_state_dict(causal.state_dict())
    torch.testing.assert_close(causal(x)[0][-1], released(x)[0][-1], rtol=1e-12, atol=1e-13)
    assert (causal(x)[0][:-1] - released(x)[0][:-1]).abs().max() > 1e-2
    # With a cache, one token at a time, the released form sees that token alone: cached decoding is another model.
    torch.testing.assert_close(causal(x[:1])[0], released(x[:1])[0], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("pieces", [[1] * 40, [33, 1, 1, 5], [40]])
@pytest.mark.parametrize("form", CAUSAL)
def test_cached_decoding_is_the_full_forward(form: str, pieces: list[int], dtype: torch.dtype) -> None:
    module, x = build(form, dtype=dtype), tokens(40, dtype=dtype)
    module.set_layer_number(3)
    cache = SimpleNamespace(key_value_memory_dict={}, sequence_len_offset=0)
    outputs = []
    with torch.no_grad():
        for part in x.split(pieces):
            outputs.append(module(part, inference_context=cache)[0])
            cache.sequence_len_offset += len(part)
        whole = module(x)[0]
    torch.testing.assert_close(torch.cat(outputs), whole, rtol=1e-5, atol=1e-5 if dtype == torch.float32 else 1e-12)
    sizes = sum(part.numel() for state in cache.key_value_memory_dict.values() for part in state)
    assert sizes == (2 * 2 * 4 * (6 + 1) if form == "softmoe_causal" else 0), "the state does not grow with tokens"
    # A cache that starts anew forgets: the same first piece gives the same output.
    cache.sequence_len_offset = 0
    with torch.no_grad():
        assert torch.equal(module(x[: pieces[0]], inference_context=cache)[0], outputs[0])


def test_packed_documents_do_not_see_each_other(chunk: int) -> None:
    module, x = build("softmoe_causal"), tokens(20, 1).requires_grad_()
    bounds = [0, 4, 5, 13, 20]
    packed: Any = SimpleNamespace(cu_seqlens_q=torch.tensor(bounds, dtype=torch.int32))
    joined = module(x, packed_seq_params=packed)[0]
    alone = torch.cat([module(part)[0] for part in x.split(np.diff(bounds).tolist())])
    torch.testing.assert_close(joined, alone, rtol=1e-12, atol=1e-13)
    (of_joined,) = torch.autograd.grad(joined.square().sum(), x)
    (of_alone,) = torch.autograd.grad(alone.square().sum(), x)
    torch.testing.assert_close(of_joined, of_alone, rtol=1e-11, atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(1, 8), st.integers(1, 3))
def test_prefix_means_are_means_of_what_came_before(lengths: list[int], chunk: int, batch: int) -> None:
    """For any documents and chunks; weights that are all 1 give plain means."""
    total, before = sum(lengths), prefix.CHUNK
    p = torch.randn(total, batch, 2, 4, dtype=torch.float64)
    a = torch.rand(total, batch, 2, dtype=torch.float64) + 0.1
    bounds = np.cumsum([0, *lengths]).tolist()
    prefix.CHUNK = chunk
    try:
        means = PrefixMeans.apply(p, a, prefix_totals(a, bounds), bounds)
    finally:
        prefix.CHUNK = before
    for begin, end in zip(bounds, bounds[1:], strict=False):
        for t in range(begin, end):
            part = slice(begin, t + 1)
            wanted = (a[part, ..., None] * p[part]).sum(0) / a[part].sum(0)[..., None]
            torch.testing.assert_close(means[t], wanted, rtol=1e-10, atol=1e-12)


def test_a_large_scale_stays_finite() -> None:
    """exp(Z - |scale|) of tokens that point away from a slot would vanish: their mean must not become 0 / 0."""
    module, x = build("softmoe_causal", dtype=torch.float32), tokens(9, dtype=torch.float32)
    with torch.no_grad():
        module.scale.fill_(-500.0)
    x.requires_grad_()
    y = module(x)[0]
    y.sum().backward()
    assert y.isfinite().all() and x.grad is not None and x.grad.isfinite().all()


def test_bfloat16_is_close_and_keeps_its_type() -> None:
    exact, rough = build("softmoe_causal", 1), build("softmoe_causal", 1, dtype=torch.bfloat16)
    x = tokens(100, dtype=torch.bfloat16)
    y = rough(x)[0]
    wanted = exact(x.double())[0]
    assert y.dtype == torch.bfloat16
    assert (y - wanted).abs().max() < 0.06 * wanted.abs().max()
