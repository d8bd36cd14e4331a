"""Causal attention inside each of several documents that lie end to end in one row (megatron-core's ``thd`` format).

Shapes: T tokens of all documents, N query heads, G key/value heads, D head width.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_steel.model.window import causal_attention


@dataclass
class PackedDocuments(PackedSeqParams):
    """Where documents begin, as megatron-core wants it on the device, and for who needs it on the host."""

    bounds: list[int] | None = None
    """`cu_seqlens_q`."""


def host_bounds(packed: PackedSeqParams) -> list[int]:
    """``packed.cu_seqlens_q``; waits for the device only where the host was not told."""
    known = getattr(packed, "bounds", None)
    return packed.cu_seqlens_q.tolist() if known is None else known


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packed: PackedSeqParams,
    dropout: float,
    scale: float | None,
    window: int | None = None,
) -> Tensor:
    """query [T, N, D], key and value [T, G, D] -> [T, N, D]; no token sees another document or a later token.

    ``packed.cu_seqlens_q`` holds the beginning of each document and T, int32 (documents + 1,). With a ``window`` a
    token sees itself and the ``window - 1`` tokens before it.
    """
    kernel = None if query.is_cpu or query.dtype == torch.float32 or dropout else varlen_kernel()
    if kernel is None:
        return document_attention(query, key, value, host_bounds(packed), dropout, scale, window)
    return kernel(
        query,
        key,
        value,
        packed.cu_seqlens_q,
        packed.cu_seqlens_kv,
        packed.max_seqlen_q,
        packed.max_seqlen_kv,
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),  # tokens before (all for -1) and after this one
        enable_gqa=query.shape[1] != key.shape[1],
    )


@functools.cache
def varlen_kernel() -> Callable[..., Tensor] | None:
    """PyTorch's flash attention over documents of different lengths; None where it is not in its form of 2.11."""
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return None
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters
    return varlen_attn if {"window_size", "enable_gqa", "scale"} <= set(known) else None


def equal_runs(bounds: list[int]) -> Iterator[tuple[int, int]]:
    """(documents, length) of neighbours with the same length, in order: one call computes them all."""
    lengths = (after - begin for begin, after in itertools.pairwise(bounds))
    for length, run in itertools.groupby(lengths):
        yield sum(1 for _ in run), length


def document_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: list[int],
    dropout: float,
    scale: float | None,
    window: int | None = None,
    attend: Callable[..., Tensor] = causal_attention,
) -> Tensor:
    """One call of ``attend`` for each run of equally long documents; shapes as above."""
    runs = list(equal_runs(bounds))
    sizes = [documents * length for documents, length in runs]
    outputs = []
    parts = zip(query.split(sizes), key.split(sizes), value.split(sizes), runs, strict=True)
    for q, k, v, (documents, length) in parts:
        heads_first = (x.unflatten(0, (documents, length)).transpose(1, 2) for x in (q, k, v))
        out = attend(*heads_first, window, dropout, scale)
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)
