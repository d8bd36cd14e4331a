"""silu(gate) * up in one pass over memory forward and one backward (Shazeer 2020, eq. 6, without the projections).

Shapes: F the width of gate and of up.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_steel.model.kernels.choice import rows_of, warps_of
from megatron_steel.runtime import device

COLUMNS = 2048
"""Columns of one program at most."""


@triton.jit
def forward_kernel(
    x_ptr: tl.tensor, out_ptr: tl.tensor, width: int, stride: int, blocks: int, BLOCK: tl.constexpr
) -> None:
    """BLOCK columns of one row of the product, computed in fp32 and rounded once."""
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(x_ptr + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * stride + width + column, mask=inside, other=0.0).to(tl.float32)
    out = gate * tl.sigmoid(gate) * up
    tl.store(out_ptr + row * width + column, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def backward_kernel(
    x_ptr: tl.tensor,
    grad_ptr: tl.tensor,
    grad_x_ptr: tl.tensor,
    width: int,
    stride: int,
    grad_stride: int,
    blocks: int,
    BLOCK: tl.constexpr,
) -> None:
    """The same columns of both halves' gradients."""
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(x_ptr + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * stride + width + column, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + row * grad_stride + column, mask=inside, other=0.0).to(tl.float32)
    share = tl.sigmoid(gate)
    grad_gate = grad * up * share * (1.0 + gate * (1.0 - share))
    grad_up = grad * gate * share
    out_ptr = grad_x_ptr + row * 2 * width + column
    tl.store(out_ptr, grad_gate.to(grad_x_ptr.dtype.element_ty), mask=inside)
    tl.store(out_ptr + width, grad_up.to(grad_x_ptr.dtype.element_ty), mask=inside)


def blocks_of(width: int) -> tuple[int, int]:
    """Columns of a program, a power of two, and programs of a row."""
    block = min(triton.next_power_of_2(width), COLUMNS)
    return block, triton.cdiv(width, block)


class SwiGLUKernel(torch.autograd.Function):
    """As :class:`~megatron_steel.model.mlp.SwiGLUFunction`; what is 16 bits wide is rounded once, not twice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """x [..., 2 F] -> [..., F]; keeps x only."""
        ctx.save_for_backward(x)
        rows_x, width = rows_of(x), x.shape[-1] // 2
        out = torch.empty(*x.shape[:-1], width, dtype=x.dtype, device=x.device)
        block, blocks = blocks_of(width)
        with device.of(x):
            forward_kernel[(rows_x.shape[0] * blocks,)](
                rows_x, out, width, rows_x.stride(0), blocks, BLOCK=block, num_warps=warps_of(block)
            )
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        """Both halves of the gradient are written where they belong, so nothing is joined afterwards."""
        (x,) = ctx.saved_tensors
        rows_x, rows_grad, width = rows_of(x), rows_of(grads[0]), x.shape[-1] // 2
        grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        block, blocks = blocks_of(width)
        with device.of(x):
            backward_kernel[(rows_x.shape[0] * blocks,)](
                rows_x, rows_grad, grad_x, width, rows_x.stride(0), rows_grad.stride(0), blocks,
                BLOCK=block, num_warps=warps_of(block),
            )  # fmt: skip
        return grad_x
