"""Means over all tokens up to each one: what makes a soft mixture of experts causal.

Slot k of token t holds a mean over the tokens up to t, and an expert's first matrix is linear: tokens are projected
first, by one matrix product for all experts, and the means are taken of the projections P:

    U_tk = (sum over i <= t of a_ik P_ik) / M_tk

with a the weight of a token in a slot and M the sum of weights so far.

Shapes: S sequence, B micro-batch, n experts (of this rank), f expert width.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

CHUNK = 32
"""Tokens whose prefix sums are one matrix product; sums of earlier chunks are carried."""


def spans(bounds: Sequence[int]) -> Iterator[tuple[int, int, bool]]:
    """(begin, end, whether a document begins there) of chunks in order; ``bounds``: beginnings of documents, and S."""
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
) -> tuple[Tensor, Tensor]:
    """P [S, B, n, 2 f], a and M [S, B, n] -> U [S, B, n, 2 f], and the last mean [B, n, 2 f] in a's precision.

    ``before``: the last mean and total [B, n] of tokens that came earlier, when there are any; M counts them.
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
    assert carry is not None
    return means, carry.view(*weights.shape[1:], -1)


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


class PrefixMeans(torch.autograd.Function):
    """:func:`prefix_means` for training; keeps P and U."""

    @staticmethod
    def forward(ctx: Any, projected: Tensor, weights: Tensor, totals: Tensor, bounds: Sequence[int]) -> Tensor:
        """P [S, B, n, 2 f], a and M [S, B, n] -> U [S, B, n, 2 f]; ``bounds`` as :func:`spans` has them."""
        means, _ = prefix_means(projected, weights, totals, bounds, None)
        ctx.save_for_backward(projected, weights, totals, means)
        ctx.bounds = bounds
        return means

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Suffix sums, chunk by chunk from the end."""
        return (*prefix_means_backward(grads[0], *ctx.saved_tensors, ctx.bounds), None)
