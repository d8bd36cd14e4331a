"""Products that add to a main gradient, against float64; and which layers use them."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import megatron.core
import pytest
import torch
from megatron.core.tensor_parallel import layers

from megatron_steel.model import weight_gradients
from megatron_steel.model.output import OutputLayer
from megatron_steel.model.weight_gradients import add_weight_gradient, fuse_weight_gradients, widens

FP32, BF16 = torch.float32, torch.bfloat16


@pytest.mark.parametrize(
    ("compute", "main", "tolerance"), [(FP32, FP32, 1e-6), (BF16, FP32, 5e-3), (BF16, BF16, 1e-2), (FP32, BF16, 1e-2)]
)
def test_product_is_added(compute: torch.dtype, main: torch.dtype, tolerance: float) -> None:
    """bf16 products on a CPU are rounded before they are added; a GPU adds them up in fp32."""
    generator = torch.Generator().manual_seed(0)
    flat = torch.randn(3 * 5 * 7 + 9, generator=generator).to(main)
    before = flat.clone()
    # A piece of a flat buffer, as data parallelism holds it.
    gradient = flat[4 : 4 + 5 * 7].view(5, 7)
    inputs, grads = (torch.randn(11, width, generator=generator).to(compute) for width in (7, 5))
    exact = gradient.double() + grads.double().t() @ inputs.double()
    add_weight_gradient(inputs, grads, gradient)
    assert (gradient.double() - exact).abs().max() < tolerance * exact.abs().max()
    assert torch.equal(flat[:4], before[:4]) and torch.equal(flat[39:], before[39:])


def test_no_tokens_add_nothing() -> None:
    """An expert may get none."""
    gradient = torch.ones(5, 7)
    add_weight_gradient(torch.empty(0, 7), torch.empty(0, 5), gradient)
    assert torch.equal(gradient, torch.ones(5, 7))


def test_wide_sums_of_narrow_products_need_a_gpu_and_torch_2_10(monkeypatch: pytest.MonkeyPatch) -> None:
    for version, kind, expected in [
        ("2.11.0+cu130", "gpu", True),
        ("2.10.1", "gpu", True),
        ("2.9.1+cu128", "gpu", False),
        ("2.13.0", "cpu", False),
    ]:
        monkeypatch.setattr(torch, "__version__", version)
        widens.cache_clear()
        assert widens(kind) == expected, version
    widens.cache_clear()
    schema = str(torch.ops.aten.addmm.dtype_out._schema)
    assert "ScalarType out_dtype" in schema and "Tensor(a!) out" in schema


def test_all_layers_but_the_output_layer_are_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "_grad_accum_fusion_available", False)
    monkeypatch.setattr(layers, "fused_weight_gradient_mlp_cuda", None, raising=False)
    linear, output, other = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    linear.gradient_accumulation_fusion = output.gradient_accumulation_fusion = False
    other.fuse_wgrad_accumulation = False
    output.__class__ = OutputLayer
    options = SimpleNamespace(gradient_accumulation_fusion=False)
    fuse_weight_gradients(options, [torch.nn.ModuleList([linear, other]), output])  # type: ignore[arg-type]
    assert linear.gradient_accumulation_fusion and other.fuse_wgrad_accumulation
    assert not output.gradient_accumulation_fusion and options.gradient_accumulation_fusion
    assert layers.fused_weight_gradient_mlp_cuda is weight_gradients


def test_upstream_calls_these_names() -> None:
    source = (Path(megatron.core.__file__).parent / "tensor_parallel/layers.py").read_text()
    called = set(re.findall(r"fused_weight_gradient_mlp_cuda\.(\w+)\(", source))
    assert called == {"wgrad_gemm_accum_fp32", "wgrad_gemm_accum_fp16"}
    assert all(callable(getattr(weight_gradients, name)) for name in called)
    # Inputs first, then gradients of outputs, then the sum.
    assert "total_input, grad_output, weight.main_grad" in source
