"""Split tensors into blocks of rows that stay in the cache of a CPU core over several elementwise operations."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

CACHED_ELEMENTS = 524_288
"""2 MiB of fp32: the second-level caches of the cores that share the block, two or more."""


def row_blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views of all ``tensors`` over the same rows of their first axis, a block at a time.

    On a CPU a block of the first tensor has at most :data:`CACHED_ELEMENTS` elements (one row at least): PyTorch makes
    one pass over memory per operation, and the second one then finds its operands in the cache. On other devices
    there is one block, the whole.
    """
    first = tensors[0]
    rows = max(1, CACHED_ELEMENTS // max(1, first[0].numel())) if first.is_cpu else max(1, first.shape[0])
    return zip(*(tensor.split(rows) for tensor in tensors), strict=True)
