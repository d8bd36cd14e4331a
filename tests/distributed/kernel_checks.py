"""Each Triton kernel against a float64 formula on any device: in Triton's interpreter on a CPU, compiled on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_steel.model.kernels import cross_entropy as kernel
from megatron_steel.model.kernels.rms_norm import RMSNormKernel
from megatron_steel.model.kernels.rotate import SplitAndRotateKernel
from megatron_steel.model.kernels.swiglu import SwiGLUKernel

# Largest difference to float64, as a share of the largest value: of one rounding, of two, or of sums in fp32.
SHARE = {torch.float32: 2e-6, torch.float16: 1.1e-3, torch.bfloat16: 8.5e-3}
EPS = 1e-6


class Draw:
    """Random tensors of one type on one device."""

    def __init__(self, seed: int, dtype: torch.dtype, device: str) -> None:
        self.generator = torch.Generator(device).manual_seed(seed)
        self.dtype, self.device = dtype, device
        # The interpreter cuts bf16 off where a GPU rounds.
        self.share = SHARE[dtype] * (2 if dtype == torch.bfloat16 and device == "cpu" else 1)

    def normal(self, *shape: int, strided: bool = False, away: bool = False) -> Tensor:
        """``strided``: neighbours of the last axis are not neighbours in memory; ``away`` from 0 by 1."""
        made = torch.randn(shape, generator=self.generator, device=self.device)
        made = (made + made.sign() if away else made).to(self.dtype)
        return made.unsqueeze(-1).repeat_interleave(2, -1)[..., 0] if strided else made

    def labels(self, *shape: int, below: int) -> Tensor:
        return torch.randint(below, shape, generator=self.generator, device=self.device)


def close(ours: Tensor, exact: Tensor, share: float, what: str) -> None:
    """Every element within a share of the largest, or of 0.1 where all cancel; the same shape."""
    assert ours.shape == exact.shape, f"{what}: {tuple(ours.shape)} is not {tuple(exact.shape)}"
    if exact.numel():
        wrong, scale = (ours.double() - exact).abs().max().item(), exact.abs().max().item()
        assert wrong <= share * max(scale, 0.1), f"{what}: off by {wrong:.3g} of {scale:.3g}"


def compare(
    ours: Callable[..., Sequence[Tensor]],
    exact: Callable[..., Sequence[Tensor]],
    inputs: Sequence[Tensor],
    draw: Draw,
    strided: bool = False,
) -> None:
    """Results and gradients of all inputs, for random incoming gradients."""
    leaves, wide = ([x.to(kind).detach().requires_grad_() for x in inputs] for kind in (draw.dtype, torch.float64))
    results, truth = ours(*leaves), exact(*wide)
    share = draw.share
    grads = [draw.normal(*result.shape, strided=strided) for result in results]
    for number, (result, wanted) in enumerate(zip(results, truth, strict=True)):
        assert result.dtype == draw.dtype
        close(result, wanted.detach(), share, f"result {number}")
    found = torch.autograd.grad(results, leaves, grads)
    wanted = torch.autograd.grad(truth, wide, [grad.double() for grad in grads])
    for number, (mine, theirs) in enumerate(zip(found, wanted, strict=True)):
        assert mine.dtype == draw.dtype
        close(mine, theirs, share, f"gradient {number}")


def check_rms_norm(rows: int, width: int, draw: Draw, strided: bool = False, centred: bool = False) -> None:
    """``centred``: the weight is 1 + what is stored, in fp32."""
    # A row of tiny numbers is divided by its own tiny size, and its gradient is a difference of large ones.
    x, weight = draw.normal(rows, 1, width, strided=strided, away=True), draw.normal(width)

    def ours(x: Tensor, weight: Tensor) -> list[Tensor]:
        return [RMSNormKernel.apply(x, 1.0 + weight.float() if centred else weight, EPS)]

    def exact(x: Tensor, weight: Tensor) -> list[Tensor]:
        scale = 1.0 + weight if centred else weight
        return [x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * scale]

    compare(ours, exact, (x, weight), draw, strided)


def check_swiglu(rows: int, width: int, draw: Draw, strided: bool = False) -> None:
    def exact(x: Tensor) -> list[Tensor]:
        gate, up = x.chunk(2, -1)
        return [gate / (1 + torch.exp(-gate)) * up]

    inputs = (draw.normal(rows, 1, 2 * width, strided=strided),)
    compare(lambda x: [SwiGLUKernel.apply(x)], exact, inputs, draw, strided)


def turn(x: Tensor, angles: Tensor) -> Tensor:
    """x [S, B, heads, D] with pairs (i, i + R / 2) as complex numbers times exp(i angle); angles [S, R / 2]."""
    half = angles.shape[-1]
    turned = torch.complex(x[..., :half], x[..., half : 2 * half])
    turned = turned * torch.polar(torch.ones_like(angles), angles)[:, None, None]
    return torch.cat([turned.real, turned.imag, x[..., 2 * half :]], -1)


def check_rotate(
    sequence: int, batch: int, groups: int, each: int, width: int, turned: int, draw: Draw, strided: bool = False
) -> None:
    """``each`` query heads for one of the ``groups`` key heads; the first ``turned`` channels of ``width``."""
    angles = torch.randn(sequence, turned // 2, generator=draw.generator, device=draw.device).double()
    # Angles whose cosine and sine the type has: their rounding is not what is checked.
    if draw.dtype != torch.float32:
        angles = (angles > 0) * torch.pi / 2
    cos, sin = angles.cos(), angles.sin()
    cos, sin = (x[:, None, None, None].to(draw.dtype) for x in (torch.cat([cos, cos], -1), sin))

    def exact(mixed: Tensor) -> list[Tensor]:
        heads = mixed.view(sequence, batch, groups, each + 2, width)
        query, key, value = heads[..., :-2, :].flatten(2, 3), heads[..., -2, :], heads[..., -1, :]
        return [turn(query, angles), turn(key, angles), value]

    mixed = draw.normal(sequence, batch, groups * (each + 2) * width, strided=strided)
    results = SplitAndRotateKernel.apply(mixed, cos, sin, groups, width)
    assert all(result.is_contiguous() for result in results)
    compare(lambda x: SplitAndRotateKernel.apply(x, cos, sin, groups, width), exact, (mixed,), draw, strided)


def check_cross_entropy(rows: int, width: int, valid: int, draw: Draw, shares: int = 1) -> None:
    """``shares`` parts of ``width`` rows each, of which the first ``valid`` are no padding; as the ranks merge them."""
    logits, labels = 4 * draw.normal(rows, shares * width), draw.labels(rows, below=valid)
    wide = logits.double().requires_grad_()
    losses = F.cross_entropy(wide[:, :valid], labels, reduction="none")
    grad = torch.rand(rows, generator=draw.generator, device=draw.device)
    losses.backward(grad.double())
    parts = [part.contiguous() for part in logits.chunk(shares, -1)]
    before = [part.clone() for part in parts]
    sums = [kernel.local_sums(part, labels, valid, width * number) for number, part in enumerate(parts)]
    assert all(map(torch.equal, parts, before)), "the forward pass only reads"
    peak = torch.stack([each[2] for each in sums]).amax(0)
    target = sum(each[0] for each in sums) - peak
    total = sum(each[1] * (each[2] - peak).exp() for each in sums)
    close(total.log() - target, losses.detach(), SHARE[torch.float32], "losses")
    assert wide.grad is not None
    for number, part in enumerate(parts):
        out = kernel.overwrite(part, labels, total, peak, grad, valid, width * number)
        assert out.data_ptr() == part.data_ptr() and out.dtype == draw.dtype
        close(out, wide.grad[:, width * number : width * (number + 1)], draw.share, f"gradient of share {number}")
        assert not out[:, max(valid - width * number, 0) :].any(), "padding has no gradient"
