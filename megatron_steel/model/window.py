"""Causal attention through PyTorch's kernels, within a window where there is one.

Shapes: B batch, N query heads, G key/value heads, S sequence, D head width, W window.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

QUERIES = 256
"""Queries at a time at least: fewer would cost more calls than they save keys."""


def window_mask(queries: range, keys: range, window: int | None, device: torch.device) -> Tensor:
    """bool [queries, keys], true where the query's position sees the key's: itself and the window - 1 before it."""
    query = torch.arange(queries.start, queries.stop, device=device).unsqueeze(1)
    key = torch.arange(keys.start, keys.stop, device=device).unsqueeze(0)
    seen = key <= query
    return seen if window is None else seen & (key > query - window)


def causal_attention(
    query: Tensor, key: Tensor, value: Tensor, window: int | None, dropout: float, scale: float | None
) -> Tensor:
    """query [B, N, S, D], key and value [B, G, S, D] -> [B, N, S, D].

    The kernels know no window, and a mask over the whole sequence would cost S * S: a few queries at a time see no more
    keys than that and the window. A sequence no longer than the window is plain causal attention.
    """
    length, options = query.shape[2], {"scale": scale, "enable_gqa": query.shape[1] != key.shape[1]}
    if window is None or length <= window:
        return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True, **options)
    outputs = []
    step = max(window, QUERIES)
    for begin in range(0, length, step):
        queries = range(begin, min(begin + step, length))
        keys = range(max(0, begin - window + 1), queries.stop)
        seen = window_mask(queries, keys, window, query.device)
        part = slice(keys.start, keys.stop)
        outputs.append(
            F.scaled_dot_product_attention(
                query[:, :, begin : queries.stop],
                key[:, :, part],
                value[:, :, part],
                attn_mask=seen,
                dropout_p=dropout,
                **options,
            )
        )
    return torch.cat(outputs, 2)
