"""Operations whose result does not depend on the order in which threads finish.

On a CPU the runs of one layout are equal to the bit anyway. On a GPU the default kernels of cuBLAS, attention and some
scatters are not, nor are NCCL's sums when it picks an algorithm by size and load.
"""

from __future__ import annotations

import os

import torch

# Read once, by cuBLAS and NCCL when they start.
ENVIRONMENT = {
    # Two buffers of 4 MiB for each stream: cuBLAS's documentation, "Results reproducibility".
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "NCCL_ALGO": "Ring",
}


def make_deterministic() -> None:
    """Choose such kernels for this process; an operation that has none raises from here on.

    Call it before anything runs on the device and before Transformer Engine is imported. What the user has set in the
    environment stays.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # Transformer Engine's permission, which megatron-core refuses beside this mode.
    os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] = "0"
    torch.use_deterministic_algorithms(True)
