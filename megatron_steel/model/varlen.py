"""PyTorch's flash attention over texts of different lengths that lie end to end, on a GPU.

Shapes: T tokens of all texts, N query heads, G key/value heads, D head width.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
from collections.abc import Callable

import torch
from torch import Tensor


@functools.cache
def varlen_kernel() -> Callable[..., Tensor] | None:
    """``varlen_attn``, which also takes fewer key than query heads; None where it is older than PyTorch 2.11."""
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return None
    from torch.nn.attention.varlen import varlen_attn

    known = set(inspect.signature(varlen_attn).parameters)
    if not {"window_size", "scale"} <= known:
        return None
    # PyTorch 2.11 compares no numbers of heads and has no option for it: its kernel takes groups as they are.
    return functools.partial(varlen_attn, enable_gqa=True) if "enable_gqa" in known else varlen_attn


def fits_varlen(query: Tensor, value: Tensor, dropout: float) -> bool:
    """Whether the kernel computes attention of these [..., D]: 16 bits, no dropout, a width that it has."""
    width = query.shape[-1]
    shapes = width == value.shape[-1] and width % 8 == 0 and width <= 256
    return not query.is_cpu and query.dtype in (torch.bfloat16, torch.float16) and not dropout and shapes
