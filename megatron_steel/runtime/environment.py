"""Environment variables that CUDA, NCCL and PyTorch's allocator read when they start, by what a layout needs.

What the user has set stays. Where communication is to run beside computation of the same layer (tensor and context
parallelism), megatron-core relies on the order of launches, which only a single hardware queue keeps; everywhere else
one queue would make independent streams wait for each other (FSDP2 gathers weights in one). Matrix products of fp32
matrices stay fp32, also in containers that switch TF32 on for all programs.
"""

from __future__ import annotations

import os

import torch

# Two names of one variable; the shorter one is for all kinds of devices (PyTorch 2.9).
ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")


def variables(single_queue: bool) -> dict[str, str]:
    """What a run should have. ``single_queue``: its layout has tensor or context parallelism."""
    wanted = {
        # Segments that grow leave no gaps between micro-batches of different sizes.
        ALLOCATOR[0]: "expandable_segments:True",
        # NCCL must not register such memory for CUDA graphs (megatron-core refuses graphs without this).
        "NCCL_GRAPH_REGISTER": "0",
    }
    if single_queue:
        wanted["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    return wanted


def prepare(single_queue: bool) -> None:
    """Set what is not set yet; before anything runs on a GPU."""
    for name, value in variables(single_queue).items():
        if name != ALLOCATOR[0] or not any(other in os.environ for other in ALLOCATOR):
            os.environ.setdefault(name, value)
    torch.set_float32_matmul_precision("highest")


def one_line(single_queue: bool) -> str:
    """What a run has now, for the log: also what the user has chosen."""
    names = [*variables(single_queue), *ALLOCATOR, "CUDA_DEVICE_MAX_CONNECTIONS"]
    found = {name: os.environ[name] for name in names if name in os.environ}
    return "environment: " + ", ".join(f"{name}={value}" for name, value in found.items())
