"""How a sample is cut over context-parallel ranks.

It has 2 C chunks for C ranks; rank r holds chunks r and 2 C - 1 - r. Under a causal mask a later chunk has more keys to
look at: with one from each end every rank has the same work. megatron-core and Transformer Engine cut the same way.
"""

from __future__ import annotations

import torch


def chunk_numbers(rank: int, size: int) -> tuple[int, int]:
    """The two chunks of a rank among ``size``, the earlier one first."""
    return rank, 2 * size - 1 - rank


def cut(whole: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """A rank's share [..., S / size] of ``whole`` [..., S], its two chunks one behind the other."""
    if size == 1:
        return whole
    chunks = whole.unflatten(-1, (2 * size, -1))
    first, second = chunk_numbers(rank, size)
    return torch.cat((chunks[..., first, :], chunks[..., second, :]), -1)
