"""Whether a tensor goes through a Triton kernel, and how kernels see tensors. Imports no Triton."""

from __future__ import annotations

import functools
import importlib.util

from torch import Tensor


@functools.cache
def has_triton() -> bool:
    """Whether Triton is installed; PyTorch's CUDA builds for Linux bring it."""
    return importlib.util.find_spec("triton") is not None


def takes_kernel(tensor: Tensor) -> bool:
    """Whether ``tensor`` is on a device that Triton compiles for."""
    return not (tensor.is_cpu or tensor.is_meta) and has_triton()


def rows_of(tensor: Tensor) -> Tensor:
    """[..., width] -> [rows, width] with neighbours in the last axis; a view where strides allow one."""
    rows = tensor.reshape(-1, tensor.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def last_contiguous(tensor: Tensor) -> Tensor:
    """The tensor, copied only if neighbours in its last axis are not neighbours in memory."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def warps_of(elements: int) -> int:
    """Warps of a program that holds so many elements at once: eight for each thread, 4 to 16."""
    return min(max(elements // 256, 4), 16)
