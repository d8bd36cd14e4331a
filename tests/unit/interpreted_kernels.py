"""Our Triton kernels on a CPU; test_kernels.py runs this where TRITON_INTERPRET is set before Triton is imported."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import Draw, check_cross_entropy, check_rms_norm, check_rotate, check_swiglu

from megatron_steel.model import attention, cross_entropy, mlp, norms, output
from megatron_steel.model.attention import SplitAndRotate, rotary_table, split_and_rotate
from megatron_steel.model.kernels import choice
from megatron_steel.model.kernels import rms_norm as rms_kernel

few = settings(max_examples=12)
draws = st.builds(Draw, st.integers(0, 99), st.sampled_from([torch.float32, torch.bfloat16]), st.just("cpu"))


@few
@given(rows=st.integers(1, 9), width=st.integers(1, 70), draw=draws, strided=st.booleans(), centred=st.booleans())
def test_rms_norm(rows: int, width: int, draw: Draw, strided: bool, centred: bool) -> None:
    check_rms_norm(rows, width, draw, strided, centred)


@pytest.mark.parametrize(("rows", "width"), [(9, 1500), (70, 3), (3, 4096)])
def test_rms_norm_of_several_tiles(rows: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program with several tiles of rows, the last one not full; one row in a tile."""
    monkeypatch.setattr(rms_kernel, "PROGRAMS", 2)
    monkeypatch.setattr(rms_kernel, "TILE", 16)
    check_rms_norm(rows, width, Draw(0, torch.float32, "cpu"))


@few
@given(rows=st.integers(1, 9), width=st.integers(1, 70), draw=draws, strided=st.booleans())
def test_swiglu(rows: int, width: int, draw: Draw, strided: bool) -> None:
    check_swiglu(rows, width, draw, strided)


def test_a_weight_of_the_same_type_multiplies_what_is_rounded() -> None:
    """As in Llama; a wider one before. The interpreter cuts bf16 off where a GPU rounds."""
    draw = Draw(0, torch.bfloat16, "cpu")
    x, weight = draw.normal(6, 64), draw.normal(64)
    normed = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)

    def cut(wide: torch.Tensor) -> torch.Tensor:
        return (wide.contiguous().view(torch.int32) & -65536).view(torch.float32)

    for kind, wanted in ((torch.bfloat16, cut(cut(normed) * weight.float())), (torch.float32, cut(normed * weight))):
        ours = rms_kernel.RMSNormKernel.apply(x, weight.to(kind), 1e-6).float()
        assert (ours == wanted).float().mean() > 0.99, "sums in another order may end on the other side of a cut"


def test_swiglu_of_several_blocks() -> None:
    check_swiglu(3, 4500, Draw(0, torch.float32, "cpu"))


@few
@given(
    sizes=st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)),
    half=st.integers(1, 5),
    rest=st.sampled_from([0, 0, 1, 6]),
    draw=draws,
    strided=st.booleans(),
)
def test_rotate(sizes: tuple[int, int, int, int], half: int, rest: int, draw: Draw, strided: bool) -> None:
    check_rotate(*sizes, 2 * half + rest, 2 * half, draw, strided)


def test_rotate_of_several_blocks_of_heads() -> None:
    check_rotate(2, 1, 5, 9, 128, 64, Draw(0, torch.float32, "cpu"))


@few
@given(
    rows=st.integers(1, 6), width=st.integers(1, 40), padding=st.integers(0, 30), shares=st.integers(1, 2), draw=draws
)
def test_cross_entropy(rows: int, width: int, padding: int, shares: int, draw: Draw) -> None:
    """Padding may fill the whole share of the last rank."""
    check_cross_entropy(rows, width, max(1, shares * width - padding), draw, shares)


def test_cross_entropy_of_several_blocks() -> None:
    check_cross_entropy(2, 9000, 8500, Draw(0, torch.bfloat16, "cpu"))


def test_extreme_logits() -> None:
    """Far apart, as small as the type has, and not finite: the loss is exact or says that it is not finite."""
    labels = torch.tensor([0])
    for row, wanted in (
        ([-60000.0, 0.0, 60000.0], 120000.0),
        ([-torch.inf, 3.0, -torch.inf], torch.inf),
        ([3.0, -torch.inf, -torch.inf], 0.0),
    ):
        assert kernel_loss(torch.tensor([row]), labels).item() == wanted
    for bad in (torch.nan, torch.inf):
        assert kernel_loss(torch.tensor([[1.0, bad, 2.0]]), labels).isfinite().logical_not().all()


def kernel_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Losses [T] of logits [T, V]."""
    from megatron_steel.model.kernels.cross_entropy import read_sums

    target, total, _ = read_sums(logits, labels, logits.shape[-1], 0, None)
    return (total.log() - target).squeeze(-1)


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors on a CPU take the kernels, as those on a GPU do."""
    for module in (attention, cross_entropy, mlp, norms, output):
        monkeypatch.setattr(module, "takes_kernel", lambda _: True)


def both(function: object, plain: object, *inputs: torch.Tensor, near: float = 1e-5) -> None:
    """The layers' way through the kernel against the function that the CPU has; results and gradients."""
    results = []
    for run in (function, plain):
        leaves = [x.clone().requires_grad_() for x in inputs]
        outputs = run(*leaves)  # type: ignore[operator]
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        grads = [torch.linspace(0.5, 1.5, out.numel()).view(out.shape).to(out.dtype) for out in outputs]
        results.append([*outputs, *torch.autograd.grad(outputs, leaves, grads)])
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=near, atol=near)


def test_layers_take_the_kernels(everywhere: None, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(3, 2, 10, generator=generator), torch.randn(10, generator=generator)
    both(lambda a, b: norms.rms_norm(a, b, 1e-6), lambda a, b: norms.RMSNormFunction.apply(a, b, 1e-6), x, weight)
    both(mlp.swiglu, mlp.SwiGLUFunction.apply, x)
    cos, sin = rotary_table(torch.randn(3, 1, 1, 2, generator=generator).repeat(1, 1, 1, 2), torch.float32)
    mixed = torch.randn(3, 2, 2 * 4 * 5, generator=generator)
    both(lambda a: split_and_rotate(a, cos, sin, 2, 5), lambda a: SplitAndRotate.apply(a, cos, sin, 2, 5), mixed)


@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_through_the_kernel(everywhere: None, dtype: torch.dtype, cap: float | None) -> None:
    generator = torch.Generator().manual_seed(1)
    hidden, weight = (torch.randn(rows, 8, generator=generator).to(dtype) for rows in (11, 23))
    labels = torch.randint(20, (11,), generator=generator)

    def whole(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return cross_entropy.cross_entropy(output.capped(hidden @ weight.t(), cap), labels, 20, None)

    def parts(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return output.ChunkedCrossEntropy.apply(hidden, weight, labels, 4, 20, cap, None)

    def plain(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        logits = output.capped(hidden @ weight.t(), cap)
        return cross_entropy.VocabParallelCrossEntropy.apply(logits, labels, 20, None)

    near = 1e-5 if dtype == torch.float32 else 2e-2
    both(whole, plain, hidden, weight, near=near)
    both(parts, plain, hidden, weight, near=near)


def test_nothing_to_do() -> None:
    """No rows at all: results and gradients of their shapes."""
    draw = Draw(0, torch.float32, "cpu")
    check_rms_norm(0, 8, draw)
    check_swiglu(0, 8, draw)
    check_rotate(0, 2, 1, 2, 4, 4, draw)


def test_triton_is_installed() -> None:
    assert choice.has_triton() and not choice.takes_kernel(torch.empty(1))
