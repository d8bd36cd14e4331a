"""Facts about the device a rank computes on. With ``cpu.py`` the only file that names a device API."""

from __future__ import annotations

import ctypes
import functools
import platform
import resource
import sys
import time
from contextlib import AbstractContextManager

import torch

# Dense bf16 FLOP/s by a part of the device name; NVIDIA's data sheets, halved where they state the sparse rate.
# The first match counts, so special versions stand before the plain name.
BF16_PEAKS: tuple[tuple[str, float], ...] = (
    ("GB200", 2500e12),
    ("B200", 2250e12),
    ("GH200", 989.4e12),
    ("H200", 989.4e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989.4e12),
    ("H800", 989.4e12),
    ("H20", 148e12),
    ("A100", 312e12),
    ("A800", 312e12),
    ("A40", 149.7e12),
    ("A30", 165e12),
    ("A10G", 70e12),
    ("A10", 125e12),
    ("L40S", 362e12),
    ("L40", 181e12),
    ("L4", 121e12),
    ("RTX 4090", 165.2e12),
    ("RTX 3090", 71e12),
)


def has_gpu() -> bool:
    """Whether this process can use a CUDA device."""
    return torch.cuda.is_available()


def device() -> torch.device:
    """The device of this rank; after :func:`bind` the bound one."""
    return torch.device("cuda", torch.cuda.current_device()) if has_gpu() else torch.device("cpu")


def bind(local_rank: int) -> torch.device:
    """Make GPU ``local_rank`` of this machine the device of this process. ``ValueError`` when there is no such GPU."""
    if not has_gpu():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise ValueError(
            f"local rank {local_rank} has no GPU, this machine shows {count}: start at most {count} per node"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def backend() -> str:
    """Collective library of the device: ``nccl`` or ``gloo``."""
    return "nccl" if has_gpu() else "gloo"


def synchronize() -> None:
    """Wait until the device has done all work given to it."""
    if has_gpu():
        torch.cuda.synchronize()


def upload(values: torch.Tensor, where: torch.device) -> torch.Tensor:
    """Copy a small host tensor to the device of this rank without waiting for what the device still has to do.

    From ordinary memory a copy waits for all work before it. PyTorch keeps pinned memory and gives it out anew only
    when the copy from it has ended.
    """
    return values if where.type == "cpu" else values.pin_memory().to(where, non_blocking=True)


def of(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """A context in which the device of ``tensor`` is the current one: Triton's kernels start there."""
    return torch.cuda.device_of(tensor)


def empty_cache() -> None:
    """Give cached device memory back."""
    if has_gpu():
        torch.cuda.empty_cache()


def keep_freed_memory() -> bool:
    """Make the C library keep what a training step frees for the next one; returns whether it could be told.

    glibc gives large blocks back at once and gets them anew, page by page, in the next step. Both settings are those
    of mallopt(3): no block has a mapping of its own, and the heap never shrinks. The peak stays what it was.
    """
    m_trim_threshold, m_mmap_max = -1, -4
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    return mallopt is not None and bool(mallopt(m_mmap_max, 0)) and bool(mallopt(m_trim_threshold, -1))


def peak_memory_bytes() -> int:
    """Most memory in use so far: allocated tensors on a GPU, resident memory of the process on a CPU."""
    if has_gpu():
        return torch.cuda.max_memory_allocated()
    # ru_maxrss is in KiB on Linux and in bytes on macOS (getrusage(2)).
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def device_name() -> str:
    """Name for logs, e.g. ``NVIDIA H100 80GB HBM3`` or ``cpu (x86_64)``."""
    return torch.cuda.get_device_name() if has_gpu() else f"cpu ({platform.machine()})"


def supports_bf16() -> bool:
    """Whether bfloat16 matrix products run here."""
    return torch.cuda.is_bf16_supported() if has_gpu() else True


def get_rng_state() -> torch.Tensor | None:
    """State of the GPU's random generator (uint8), or None without a GPU."""
    return torch.cuda.get_rng_state() if has_gpu() else None


def set_rng_state(state: torch.Tensor) -> None:
    """Set the GPU's random generator."""
    torch.cuda.set_rng_state(state)


def peak_flops(dtype: torch.dtype) -> tuple[float, str]:
    """Highest dense FLOP/s of one device for ``dtype``, and how it is known: ``data sheet`` or ``measured``."""
    # fp16 runs at the rate of bf16.
    if dtype in (torch.bfloat16, torch.float16) and has_gpu():
        name = device_name()
        for part, peak in BF16_PEAKS:
            if part in name:
                return peak, f"data sheet of {part}"
    return measured_flops(dtype), f"measured {str(dtype).removeprefix('torch.')} matmul"


@functools.cache
def measured_flops(dtype: torch.dtype, seconds: float = 0.3) -> float:
    """Best FLOP/s of a square matrix product within about ``seconds``; measured once per process.

    On a CPU it depends on the threads of this process, so call it after they are set.
    """
    size = 4096 if has_gpu() else 1024
    a, b = (torch.randn(size, size, device=device(), generator=generator()).to(dtype) for _ in range(2))
    a @ b
    best, deadline = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < deadline:
        synchronize()
        start = time.perf_counter()
        a @ b
        synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def generator() -> torch.Generator:
    """A generator of its own on the device, so that measuring does not disturb the run's random numbers."""
    return torch.Generator(device=device()).manual_seed(0)
