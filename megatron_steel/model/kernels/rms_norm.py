"""RMSNorm in one pass over memory forward and one backward (Zhang and Sennrich 2019, eq. 4).

Shapes: H the width of the last axis.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_steel.model.kernels.choice import rows_of, warps_of
from megatron_steel.runtime import device

PROGRAMS = 528
"""Programs of the backward pass at most: four for each of a Hopper GPU's 132 multiprocessors.

A constant, so that the sums over rows have the same order on every GPU.
"""
TILE = 2048
"""Elements of a program at least: several rows where they are narrow."""


@triton.jit
def forward_kernel(
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    y_ptr: tl.tensor,
    inverse_ptr: tl.tensor,
    rows: int,
    width: int,
    stride: int,
    eps: float,
    ROUND: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """ROWS rows of y and of 1 / rms; ``ROUND``: to y's type before the weight multiplies."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    x = tl.load(x_ptr + row[:, None] * stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=column < width, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(x * x, 1) / width + eps)
    y = x * inverse[:, None]
    if ROUND:
        y = y.to(y_ptr.dtype.element_ty).to(tl.float32)
    y = (y * weight[None, :]).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + row[:, None] * width + column[None, :], y, mask=inside)
    tl.store(inverse_ptr + row, inverse, mask=row < rows)


@triton.jit
def backward_kernel(
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    inverse_ptr: tl.tensor,
    grad_ptr: tl.tensor,
    grad_x_ptr: tl.tensor,
    partial_ptr: tl.tensor,
    rows: int,
    width: int,
    stride: int,
    grad_stride: int,
    each: int,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """The gradient of ``each`` rows, and their part of the weight's gradient, fp32 [programs, H]."""
    first = tl.program_id(0).to(tl.int64) * each
    column = tl.arange(0, BLOCK)
    weight = tl.load(weight_ptr + column, mask=column < width, other=0.0).to(tl.float32)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for begin in range(0, each, ROWS):
        row = first + begin + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (column < width)[None, :]
        x = tl.load(x_ptr + row[:, None] * stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + row[:, None] * grad_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
        inverse = tl.load(inverse_ptr + row, mask=row < rows, other=0.0)
        normed = x * inverse[:, None]
        total += grad * normed
        inner = grad * weight[None, :]
        shared = tl.sum(inner * normed, 1) / width
        out = ((inner - normed * shared[:, None]) * inverse[:, None]).to(grad_x_ptr.dtype.element_ty)
        tl.store(grad_x_ptr + row[:, None] * width + column[None, :], out, mask=inside)
    out_ptr = partial_ptr + tl.program_id(0).to(tl.int64) * width + column
    tl.store(out_ptr, tl.sum(total, 0), mask=column < width)


def tile(width: int) -> tuple[int, int]:
    """Rows and columns, powers of two, that a program holds at once."""
    block = triton.next_power_of_2(width)
    return max(1, TILE // block), block


class RMSNormKernel(torch.autograd.Function):
    """As :class:`~megatron_steel.model.norms.RMSNormFunction`: statistics in fp32, x and 1 / rms of each row kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x [..., H], weight [H] -> [..., H] in x's dtype."""
        rows_x = rows_of(x)
        (rows, width), (per_program, block) = rows_x.shape, tile(x.shape[-1])
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        inverse = torch.empty(rows, dtype=torch.float32, device=x.device)
        with device.of(x):
            forward_kernel[(triton.cdiv(rows, per_program),)](
                rows_x, weight.contiguous(), y, inverse, rows, width, rows_x.stride(0), eps,
                ROUND=weight.dtype == x.dtype, ROWS=per_program, BLOCK=block, num_warps=warps_of(per_program * block),
            )  # fmt: skip
        ctx.save_for_backward(x, weight, inverse)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        """As there; the weight's gradient is summed in fp32, in an order that never changes."""
        x, weight, inverse = ctx.saved_tensors
        rows_x, rows_grad = rows_of(x), rows_of(grads[0])
        (rows, width), (per_program, block) = rows_x.shape, tile(x.shape[-1])
        tiles = triton.cdiv(rows, per_program)
        each = max(1, triton.cdiv(tiles, PROGRAMS)) * per_program
        programs = triton.cdiv(rows, each)
        grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        partial = torch.empty(programs, width, dtype=torch.float32, device=x.device)
        with device.of(x):
            backward_kernel[(programs,)](
                rows_x, weight.contiguous(), inverse, rows_grad, grad_x, partial, rows, width,
                rows_x.stride(0), rows_grad.stride(0), each,
                ROWS=per_program, BLOCK=block, num_warps=warps_of(per_program * block),
            )  # fmt: skip
        return grad_x, partial.sum(0).to(weight.dtype), None
