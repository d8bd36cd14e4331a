"""Causal attention through PyTorch's kernels, within a window where there is one.

Shapes: B batch, N query heads, G key/value heads, S sequence, D head width, W window.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from megatron_steel.model.varlen import fits_varlen, varlen_kernel

QUERIES = 256
"""Queries at a time at least: fewer would cost more calls than they save keys."""


def window_mask(queries: range, keys: range, window: int | None, device: torch.device) -> Tensor:
    """bool [queries, keys], true where the query's position sees the key's: itself and the window - 1 before it."""
    query = torch.arange(queries.start, queries.stop, device=device).unsqueeze(1)
    key = torch.arange(keys.start, keys.stop, device=device).unsqueeze(0)
    seen = key <= query
    return seen if window is None else seen & (key > query - window)


def seen_keys(queries: range, keys: range, window: int | None, padding: Tensor | None, device: torch.device) -> Tensor:
    """:func:`window_mask`; with ``padding`` bool [B, all keys], keys that nobody sees, [B, 1, queries, keys].

    A query sees itself in any case: padding too has to become numbers.
    """
    seen = window_mask(queries, keys, window, device)
    if padding is None:
        return seen
    itself = seen.triu(queries.start - keys.start)
    return itself | (seen & ~padding[:, None, None, keys.start : keys.stop])


def one_for_each(x: Tensor, heads: int) -> Tensor:
    """[B, G, K, D] -> [B, N, K, D]: with fp32 or a mask, a GPU's only kernel for groups keeps all Q * K scores."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def window_attention(query: Tensor, key: Tensor, value: Tensor, window: int | None, scale: float | None) -> Tensor:
    """:func:`causal_attention` with a window, on a GPU: every sample is a text of the same length."""
    kernel = varlen_kernel()
    assert kernel is not None and window is not None
    samples, lengths = query.shape[0], (query.shape[2], key.shape[2])
    numbers = torch.arange(samples + 1, dtype=torch.int32, device=query.device)
    out = kernel(
        *(x.transpose(1, 2).flatten(0, 1) for x in (query, key, value)),
        *(numbers * length for length in lengths),
        *lengths,
        scale=scale,
        window_size=(window - 1, 0),
    )
    return out.unflatten(0, (samples, -1)).transpose(1, 2)


def causal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: int | None,
    dropout: float,
    scale: float | None,
    padding: Tensor | None = None,
) -> Tensor:
    """query [B, N, Q, D], key and value [B, G, K, D] -> [B, N, Q, D]; the queries are the last Q of K positions.

    Nobody sees keys of ``padding`` bool [B, K]. On a GPU flash attention over texts of different lengths knows windows.
    The other kernels know none, and a mask over the whole sequence would cost Q * K: a few queries at a time see no
    more keys than those up to themselves and the window. A sequence no longer than the window is plain causal
    attention.
    """
    windowed = window is not None and key.shape[2] > window
    if windowed and padding is None and fits_varlen(query, value, dropout) and varlen_kernel() is not None:
        return window_attention(query, key, value, window, scale)
    if not query.is_cpu and (query.dtype == torch.float32 or padding is not None or windowed):
        key, value = (one_for_each(x, query.shape[1]) for x in (key, value))
    length, before = query.shape[2], key.shape[2] - query.shape[2]
    options = {"dropout_p": dropout, "scale": scale, "enable_gqa": query.shape[1] != key.shape[1]}
    if padding is None and (window is None or key.shape[2] <= window):
        if before == 0:
            return F.scaled_dot_product_attention(query, key, value, is_causal=True, **options)
        if not query.is_cpu:
            seen: Tensor = causal_lower_right(length, key.shape[2])
            return F.scaled_dot_product_attention(query, key, value, attn_mask=seen, **options)
        window = None
    outputs = []
    step = max(window or 0, QUERIES)
    for begin in range(0, length, step):
        end = min(begin + step, length)
        queries = range(before + begin, before + end)
        keys = range(0 if window is None else max(0, queries.start - window + 1), queries.stop)
        part = slice(keys.start, keys.stop)
        outputs.append(
            F.scaled_dot_product_attention(
                query[:, :, begin:end],
                key[:, :, part],
                value[:, :, part],
                attn_mask=seen_keys(queries, keys, window, padding, query.device),
                **options,
            )
        )
    return torch.cat(outputs, 2)
