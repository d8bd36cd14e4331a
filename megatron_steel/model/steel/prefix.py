"""Experts over prefix means, the costly half of the causal soft mixture, as one autograd function.

Slot k of token t is a mean over the tokens up to t, and an expert's first matrix is linear: tokens are projected first,
by one matrix product for all experts, and the means are taken of the projections P:

    U_tk = (sum over i <= t of a_ik P_ik) / M_tk
    y_t  = sum over k of C_tk E2_k(silu(U_gate) * U_up)

with a the weight of a token in a slot, M the sum of weights so far, C the weight of a slot in a token's output, and E2
the second half of an expert: V -> silu(V_gate) * V_up (double SwiGLU) or just the projection V (SwiGLU).

Shapes: S sequence, B micro-batch, T = S * B, n experts (of this rank), f expert width, H hidden, O outputs of the
second matrix, 2 H or H.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 32
"""Tokens whose prefix sums are one matrix product; sums of earlier chunks are carried."""
ROWS = 512
"""Tokens an expert works on at a time on a CPU: few enough to stay in the cache, enough for a matrix product."""


def spans(bounds: Sequence[int]) -> Iterator[tuple[int, int, bool]]:
    """(begin, end, whether a document begins there) of chunks in order; ``bounds`` are beginnings of documents and S."""
    for begin, end in itertools.pairwise(bounds):
        for start in range(begin, end, CHUNK):
            yield start, min(start + CHUNK, end), start == begin


def by_expert(x: Tensor) -> Tensor:
    """[c, B, n, width] -> [B * n, c, width], a view."""
    return x.flatten(1, 2).transpose(0, 1)


def prefix_totals(weights: Tensor, bounds: Sequence[int]) -> Tensor:
    """Sums of the weights [S, B, n] up to each token, within each document."""
    lengths = [end - begin for begin, end in itertools.pairwise(bounds)]
    return torch.cat([part.cumsum(0) for part in weights.split(lengths)]) if len(lengths) > 1 else weights.cumsum(0)


def prefix_means(
    projected: Tensor, weights: Tensor, totals: Tensor, bounds: Sequence[int], before: tuple[Tensor, Tensor] | None
) -> Tensor:
    """P [S, B, n, 2 f], a and M [S, B, n] -> U [S, B, n, 2 f].

    ``before``: the last mean [B, n, 2 f] and total [B, n] of tokens that came earlier, when there are any.
    """
    means = torch.empty_like(projected)
    carry, total = (None, None) if before is None else (by_expert(before[0].unsqueeze(0)), before[1])
    for begin, end, fresh in spans(bounds):
        if fresh and (begin > 0 or before is None):
            carry = None
        a, m = (part[begin:end].permute(1, 2, 0) for part in (weights, totals))
        shares = (a.unsqueeze(2) / m.unsqueeze(3)).tril_().flatten(0, 1)
        part = by_expert(projected[begin:end]).to(weights.dtype)
        if carry is None:
            wide = torch.bmm(shares, part)
        else:
            assert total is not None
            wide = torch.baddbmm((total.unsqueeze(-1) / m).flatten(0, 1).unsqueeze(-1) * carry, shares, part)
        by_expert(means[begin:end]).copy_(wide)
        carry, total = wide[:, -1:], totals[end - 1]
    return means


def prefix_means_backward(
    grad: Tensor, projected: Tensor, weights: Tensor, totals: Tensor, means: Tensor, bounds: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of P, a and M. That of a prefix sum is a suffix sum: q_i = sum over t >= i of dU_t / M_t.

    dP_i = a_i q_i, da_i = P_i . q_i, dM_t = - dU_t . U_t / M_t.
    """
    grad_projected, grad_weights, grad_totals = (torch.empty_like(x) for x in (projected, weights, totals))
    carry: Tensor | None = None
    for begin, end, fresh in reversed(list(spans(bounds))):
        part, given, mean, out = (by_expert(x[begin:end]) for x in (projected, grad, means, grad_projected))
        part, given, mean = (x.to(weights.dtype) for x in (part, given, mean))
        a, m = (x[begin:end].permute(1, 2, 0).flatten(0, 1) for x in (weights, totals))
        inverse = m.reciprocal().unsqueeze(1)
        later = inverse.expand(-1, inverse.shape[2], -1).triu()
        suffix = torch.bmm(later, given) if carry is None else torch.baddbmm(carry, later, given)
        shape = (*weights.shape[1:], end - begin)
        grad_weights[begin:end] = torch.linalg.vecdot(suffix, part).view(shape).permute(2, 0, 1)
        grad_totals[begin:end] = -(torch.linalg.vecdot(given, mean) / m).view(shape).permute(2, 0, 1)
        carry = None if fresh else suffix[:, :1].clone()
        out.copy_(suffix.mul_(a.unsqueeze(-1)))
    return grad_projected, grad_weights, grad_totals


def row_ranges(like: Tensor) -> Iterator[slice]:
    """Ranges of rows of a [T, ...] tensor, :data:`ROWS` long on a CPU and all of them elsewhere."""
    step = ROWS if like.is_cpu else max(1, like.shape[0])
    return (slice(start, start + step) for start in range(0, like.shape[0], step))


def gated(both: Tensor, out: Tensor | None = None) -> Tensor:
    """silu(gate) * up of [gate | up] [..., 2 w] -> [..., w]."""
    gate, up = both.chunk(2, -1)
    result = torch.empty_like(gate, memory_format=torch.contiguous_format) if out is None else out
    torch.ops.aten.silu.out(gate, out=result)
    return result.mul_(up)


def gated_backward(grad: Tensor, both: Tensor, out: Tensor) -> None:
    """Gradient of :func:`gated` into ``out``, which may be ``both``; overwrites ``grad``."""
    gate, up = both.chunk(2, -1)
    out_gate, out_up = out.chunk(2, -1)
    active = F.silu(gate) * grad
    torch.ops.aten.silu_backward(grad.mul_(up), gate, grad_input=out_gate)
    out_up.copy_(active)


def second_half(means: Tensor, combine: Tensor, second: Tensor, double: bool) -> Tensor:
    """U [T, n, 2 f], C [T, n], second matrices [n, O, f] -> y [T, H]."""
    outputs = second.shape[1]
    y = means.new_zeros(means.shape[0], outputs // 2 if double else outputs)
    for rows in row_ranges(means):
        for expert, matrix in enumerate(second):
            v = gated(means[rows, expert]) @ matrix.t()
            y[rows].addcmul_(gated(v) if double else v, combine[rows, expert, None])
    return y


def second_half_backward(
    grad: Tensor, means: Tensor, combine: Tensor, second: Tensor, double: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of U, C and the second matrices; V is computed again, since it is the widest tensor of the layer."""
    grad_means, grad_combine, grad_second = (torch.empty_like(means), torch.empty_like(combine), torch.zeros_like(second))
    for rows in row_ranges(means):
        given = grad[rows]
        for expert, matrix in enumerate(second):
            inner = gated(means[rows, expert])
            v = inner @ matrix.t()
            share = given * combine[rows, expert, None]
            if double:
                grad_combine[rows, expert] = torch.linalg.vecdot(gated(v), given)
                gated_backward(share, v, v)
                grad_v = v
            else:
                grad_combine[rows, expert] = torch.linalg.vecdot(v, given)
                grad_v = share
            grad_second[expert].addmm_(grad_v.t(), inner)
            gated_backward(grad_v @ matrix, means[rows, expert], grad_means[rows, expert])
    return grad_means, grad_combine, grad_second


class PrefixExperts(torch.autograd.Function):
    """P, a, M, C and the second matrices -> y; keeps P and U, as much as a SwiGLU of equal size keeps."""

    @staticmethod
    def forward(
        ctx: Any,
        projected: Tensor,
        weights: Tensor,
        totals: Tensor,
        combine: Tensor,
        second: Tensor,
        double: bool,
        bounds: Sequence[int],
    ) -> Tensor:
        """P [S, B, n, 2 f], a and M and C [S, B, n], [n, O, f] -> [S, B, H]; ``bounds`` as :func:`spans` has them."""
        means = prefix_means(projected, weights, totals, bounds, None)
        ctx.save_for_backward(projected, weights, totals, combine, second, means)
        ctx.double, ctx.bounds = double, bounds
        y = second_half(means.flatten(0, 1), combine.flatten(0, 1), second, double)
        return y.view(*projected.shape[:2], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The second halves of the experts, then the means."""
        projected, weights, totals, combine, second, means = ctx.saved_tensors
        flat = (x.flatten(0, 1) for x in (grads[0], means, combine))
        grad_means, grad_combine, grad_second = second_half_backward(*flat, second, ctx.double)
        parts = prefix_means_backward(grad_means.view_as(means), projected, weights, totals, means, ctx.bounds)
        return (*parts, grad_combine.view_as(combine), grad_second, None, None)
