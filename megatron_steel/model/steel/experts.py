"""The second half of experts and their sum, the costly part of soft mixtures, as one autograd function.

    y_t = sum over k of C_tk E2_k(silu(U_gate) * U_up)

with U the outputs of an expert's first matrix, C the weight of an expert in a token's output, and E2 the second half of
an expert: the projection V, or silu(V_gate) * V_up of it (double SwiGLU).

Shapes: T tokens, n experts (of this rank), f expert width, H hidden, O outputs of the second matrix, 2 H or H.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from megatron_steel.model.blocks import CACHED_ELEMENTS

LEAST_ROWS = 64
"""Rows a matrix product needs to be worth its call."""


def row_ranges(tokens: int, width: int, on_cpu: bool) -> Iterator[slice]:
    """Ranges of rows: on a CPU as many as keep an expert's output of this width in the cache, elsewhere all."""
    step = max(LEAST_ROWS, CACHED_ELEMENTS // width) if on_cpu else max(1, tokens)
    return (slice(start, min(start + step, tokens)) for start in range(0, tokens, step))


def gated(both: Tensor, out: Tensor) -> Tensor:
    """silu(gate) * up of [gate | up] [..., 2 w] into ``out`` [..., w], which is returned."""
    gate, up = both.chunk(2, -1)
    return torch.ops.aten.silu.out(gate, out=out).mul_(up)


def gated_backward(grad: Tensor, both: Tensor, out: Tensor, scratch: Tensor) -> None:
    """Gradient of :func:`gated` [rows, w] into ``out`` [rows, 2 w], which may be ``both``.

    The first row of ``scratch`` [3, rows, w] becomes grad * gated. With s = sigmoid(gate): silu' = s + silu - silu * s,
    one exponential for all.
    """
    gate, up = both.chunk(2, -1)
    out_gate, out_up = out.chunk(2, -1)
    active, outer, slope = scratch.unbind()
    torch.sigmoid(gate, out=slope)
    torch.mul(slope, gate, out=active)
    torch.mul(grad, up, out=outer)
    torch.mul(active, grad, out=out_up)
    slope.addcmul_(active, slope, value=-1.0).add_(active)
    active.mul_(outer)
    torch.mul(outer, slope, out=out_gate)


def second_half(means: Tensor, combine: Tensor, second: Tensor, double: bool, kept: Tensor | None = None) -> Tensor:
    """U [T, n, 2 f], C [T, n], second matrices [n, O, f] -> y [T, H]; V goes into ``kept`` [n, T, O] if given."""
    tokens, outputs = means.shape[0], second.shape[1]
    hidden = outputs // 2 if double else outputs
    y = means.new_zeros(tokens, hidden)
    for rows in row_ranges(tokens, outputs, means.is_cpu):
        count = rows.stop - rows.start
        inner, product = means.new_empty(count, second.shape[2]), means.new_empty(count, hidden)
        v = means.new_empty(count, outputs)
        for expert, matrix in enumerate(second):
            v = v if kept is None else kept[expert, rows]
            torch.mm(gated(means[rows, expert], inner), matrix.t(), out=v)
            y[rows].addcmul_(gated(v, product) if double else v, combine[rows, expert, None])
    return y


def second_half_backward(
    grad: Tensor, means: Tensor, combine: Tensor, second: Tensor, double: bool, kept: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of U, C and the second matrices; without ``kept`` V is computed again.

    C is a factor of each row: it goes into the narrow sides of the products instead of into gradients of V. Scratch is
    made once for many operations: fresh memory costs a CPU more than an operation in its cache.
    """
    outputs, width = second.shape[1:]
    grad_means, grad_combine, grad_second = (torch.empty_like(x) for x in (means, combine, second))
    for rows in row_ranges(len(means), outputs, means.is_cpu):
        given = grad[rows]
        count, hidden = given.shape
        inner, grad_inner, buffer = (means.new_empty(count, w) for w in (width, width, outputs))
        scratch, narrow = means.new_empty(3, count, hidden), means.new_empty(3, count, width)
        for expert, matrix in enumerate(second):
            share, both = combine[rows, expert, None], grad_second[expert]
            gated(means[rows, expert], inner)
            v = torch.mm(inner, matrix.t(), out=buffer) if kept is None else kept[expert, rows]
            if double:
                gated_backward(given, v, buffer, scratch)
                grad_v = buffer
            else:
                torch.mul(v, given, out=scratch[0])
                grad_v = given
            grad_combine[rows, expert] = scratch[0].sum(-1)
            torch.addmm(both, grad_v.t(), inner.mul_(share), beta=0 if rows.start == 0 else 1, out=both)
            torch.mm(grad_v, matrix, out=grad_inner).mul_(share)
            gated_backward(grad_inner, means[rows, expert], grad_means[rows, expert], narrow)
    return grad_means, grad_combine, grad_second


class ExpertOutputs(torch.autograd.Function):
    """U, C and the second matrices -> y.

    With ``recompute`` only U is kept, half as much as a SwiGLU of equal size keeps; without, also V, four times U.
    """

    @staticmethod
    def forward(ctx: Any, means: Tensor, combine: Tensor, second: Tensor, double: bool, recompute: bool) -> Tensor:
        """U [T, n, 2 f], C [T, n], [n, O, f] -> [T, H]; ``double``: the second half is gated too."""
        kept = None if recompute else means.new_empty(second.shape[0], means.shape[0], second.shape[1])
        y = second_half(means, combine, second, double, kept)
        ctx.save_for_backward(means, combine, second, kept)
        ctx.double = double
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Expert by expert on blocks of rows."""
        means, combine, second, kept = ctx.saved_tensors
        return (*second_half_backward(grads[0], means, combine, second, ctx.double, kept), None, None)
