"""Attention under context parallelism: each rank has the queries of its two chunks and gathers everybody's keys.

Shapes: C ranks, S tokens of a sample, B samples, N query heads, G key/value heads, D head width (heads per rank), T
tokens of all samples joined to one row (T = B * S).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_steel.data.context import chunk_numbers, cut
from megatron_steel.model.packed import host_bounds

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Causal attention of query [B, N, Q, D], the last Q of K positions, to key and value [B, G, K, D]."""


def in_order(by_rank: Tensor) -> Tensor:
    """[C, S / C, ...], the shares of all ranks, as one sequence [S, ...]."""
    first, second = by_rank.chunk(2, 1)
    return torch.cat((first, second.flip(0))).flatten(0, 1)


class GatherSequence(torch.autograd.Function):
    """Everybody's share of a sequence, in its order; gradients of all ranks are summed and each gets its share."""

    @staticmethod
    def forward(ctx: Any, share: Tensor, group: dist.ProcessGroup) -> Tensor:
        """share [S / C, ...] -> [S, ...]."""
        ctx.group = group
        by_rank = share.new_empty(group.size() * len(share), *share.shape[1:])
        dist.all_gather_into_tensor(by_rank, share.contiguous(), group=group)
        return in_order(by_rank.unflatten(0, (group.size(), -1)))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """grad [S, ...] -> this rank's share of the sum over ranks."""
        (grad,), group = grads, ctx.group
        rows = grad.movedim(0, -1)
        by_rank = torch.stack([cut(rows, rank, group.size()) for rank in range(group.size())]).movedim(-1, 1)
        by_rank = by_rank.contiguous()
        if grad.is_cpu:  # gloo has no reduce-scatter for all types
            dist.all_reduce(by_rank, group=group)
            return by_rank[group.rank()], None
        share = torch.empty_like(by_rank[0])
        dist.reduce_scatter_tensor(share, by_rank.flatten(0, 1), group=group)
        return share, None


def gather_pair(key: Tensor, value: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """[S / C, B, G, D] of both -> [S, B, G, D] of both, in one message."""
    both = GatherSequence.apply(torch.cat((key, value), -1), group)
    whole_key, whole_value = both.split((key.shape[-1], value.shape[-1]), -1)
    return whole_key, whole_value


def context_attention(query: Tensor, key: Tensor, value: Tensor, group: dist.ProcessGroup, attend: Attend) -> Tensor:
    """Causal attention to the whole sequence: query [S / C, B, N, D], key and value [S / C, B, G, D] -> as query."""
    key, value = gather_pair(key, value, group)
    outputs = []
    for chunk, part in zip(chunk_numbers(group.rank(), group.size()), query.chunk(2), strict=True):
        end = (chunk + 1) * len(part)
        outputs.append(attend(*(x.permute(1, 2, 0, 3) for x in (part, key[:end], value[:end]))))
    return torch.cat(outputs, 2).permute(2, 0, 1, 3)


def pieces(bounds: Sequence[int], begin: int, end: int) -> list[tuple[int, int, int]]:
    """Documents in tokens [begin, end) of the joined rows: (first query, first key, behind the last of both)."""
    documents = itertools.pairwise(bounds)
    return [(max(first, begin), first, min(last, end)) for first, last in documents if first < end and last > begin]


def packed_context_attention(
    query: Tensor, key: Tensor, value: Tensor, packed: PackedSeqParams, group: dist.ProcessGroup, attend: Attend
) -> Tensor:
    """Each token attends within its document: query [T / C, N, D], key and value [T / C, G, D] -> as query.

    ``packed.cu_seqlens_q`` are the bounds in whole rows, ``packed.max_seqlen_q`` is the length of one.
    """
    length, bounds = packed.max_seqlen_q, host_bounds(packed)
    share = length // group.size()
    rows_second = (x.unflatten(0, (-1, share)).transpose(0, 1) for x in (key, value))
    whole_key, whole_value = (x.transpose(0, 1).flatten(0, 1) for x in gather_pair(*rows_second, group))
    half, taken, outputs = share // 2, 0, []
    for row in range(len(query) // share):
        for chunk in chunk_numbers(group.rank(), group.size()):
            begin = row * length + chunk * half
            for first_query, first_key, end in pieces(bounds, begin, begin + half):
                part, taken = query[taken : taken + end - first_query], taken + end - first_query
                seen = slice(first_key, end)
                heads_first = (x.transpose(0, 1).unsqueeze(0) for x in (part, whole_key[seen], whole_value[seen]))
                outputs.append(attend(*heads_first).squeeze(0).transpose(0, 1))
    return torch.cat(outputs)
