"""Causal attention inside each of several documents that lie end to end in one row (megatron-core's ``thd`` format).

Shapes: T tokens of all documents, N query heads, G key/value heads, D head width.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_steel.data.batch import Seen
from megatron_steel.model.varlen import fits_varlen, varlen_kernel
from megatron_steel.model.window import causal_attention


@dataclass
class PackedDocuments(PackedSeqParams):
    """Where documents begin, as megatron-core wants it on the device, and for who needs it on the host."""

    bounds: list[int] | None = None
    """`cu_seqlens_q`."""
    seen: Seen | None = None
    """Where documents go on from the beginning of others; the bounds are those of their own tokens."""


def host_bounds(packed: PackedSeqParams) -> list[int]:
    """``packed.cu_seqlens_q``; waits for the device only where the host was not told."""
    known = getattr(packed, "bounds", None)
    return packed.cu_seqlens_q.tolist() if known is None else known


def seen_before(packed: PackedSeqParams) -> list[int] | None:
    """Of each document, how many tokens at the beginning of the one before it it sees too; None: none does."""
    seen: Seen | None = getattr(packed, "seen", None)
    return None if seen is None else seen.before


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
    token sees itself and the ``window - 1`` tokens before it. A document that goes on from another sees its beginning.
    """
    kernel = varlen_kernel() if fits_varlen(query, value, dropout) else None
    if kernel is None:
        bounds, before = host_bounds(packed), seen_before(packed)
        return document_attention(query, key, value, bounds, dropout, scale, window, before=before)
    seen, cu_seqlens_kv = getattr(packed, "seen", None), packed.cu_seqlens_kv
    if seen is not None:
        # Where a document has fewer queries than keys, the kernel takes them for the last ones.
        key, value = (x.index_select(0, seen.keys) for x in (key, value))
        cu_seqlens_kv = seen.cu_seqlens
    return kernel(
        query,
        key,
        value,
        packed.cu_seqlens_q,
        cu_seqlens_kv,
        packed.max_seqlen_q,
        packed.max_seqlen_kv,
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),  # tokens before (all for -1) and after this one
    )


def equal_runs(bounds: list[int], before: list[int]) -> Iterator[tuple[int, int, int]]:
    """(documents, length, tokens before) of neighbours that one call computes, in order: those of equal length.

    A document that goes on from another is on its own.
    """
    documents = zip(itertools.pairwise(bounds), before, strict=True)
    kinds = ((end - begin, count, number if count else -1) for number, ((begin, end), count) in enumerate(documents))
    for (length, count, _), run in itertools.groupby(kinds):
        yield sum(1 for _ in run), length, count


def prefixes(tensor: Tensor, bounds: list[int], before: list[int]) -> Iterator[Tensor]:
    """The tokens that documents see of the ones before them, of those that see any, in order.

    One split, whose gradient is one pass over the tensor, however many documents there are.
    """
    spans = [(bounds[number - 1], count) for number, count in enumerate(before) if count]
    edges = [edge for begin, count in spans for edge in (begin, begin + count)]
    sizes = [after - edge for edge, after in itertools.pairwise([0, *edges, len(tensor)])]
    yield from tensor.split(sizes)[1::2]


def document_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: list[int],
    dropout: float,
    scale: float | None,
    window: int | None = None,
    attend: Callable[..., Tensor] = causal_attention,
    before: list[int] | None = None,
) -> Tensor:
    """One call of ``attend`` for each run of equally long documents; shapes as above.

    before: see :func:`seen_before`.
    """
    runs = list(equal_runs(bounds, before or [0] * (len(bounds) - 1)))
    sizes = [documents * length for documents, length, _ in runs]
    first_keys, first_values = (prefixes(x, bounds, before or []) for x in (key, value))
    outputs = []
    parts = zip(query.split(sizes), key.split(sizes), value.split(sizes), runs, strict=True)
    for q, k, v, (documents, _, count) in parts:
        if count:
            k, v = torch.cat([next(first_keys), k]), torch.cat([next(first_values), v])
        heads_first = (x.unflatten(0, (documents, -1)).transpose(1, 2) for x in (q, k, v))
        out = attend(*heads_first, window, dropout, scale)
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)
