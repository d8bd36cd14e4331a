"""A device whose memory is full: one line that says in doing what, how much was in use, and what to change."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from megatron_steel.config.schema import Config
from megatron_steel.runtime import device
from megatron_steel.runtime.world import World


class OutOfMemory(RuntimeError):
    """The memory of a device is too small for what was asked; the message is one line with a way out."""


def remedies(config: Config, world: World) -> list[str]:
    """Flags that need less memory and are not used yet, those that cost the least speed first."""
    training, memory, parallel = config.training, config.memory, config.parallel
    divided = parallel.use_distributed_optimizer or parallel.use_torch_fsdp2
    found = []
    if training.micro_batch_size > 1:
        found.append(f"--micro-batch-size below {training.micro_batch_size} (the step stays the same)")
    if memory.cross_entropy_chunk_size in (None, 0):
        found.append("--cross-entropy-chunk-size 512")
    if world.data_size * world.context_size > 1 and not divided:
        found.append("--use-distributed-optimizer")
    if memory.recompute_granularity != "full":
        found.append("--recompute-granularity full")
    if not config.optimizer.optimizer_cpu_offload and not parallel.use_torch_fsdp2:
        found.append("--optimizer-cpu-offload")
    return [*found, "a shorter --seq-length", "more devices (--tensor-model-parallel-size)"]


@contextmanager
def explained(what: str, config: Config, world: World) -> Iterator[None]:
    """Turn PyTorch's error into :class:`OutOfMemory`. ``what``: what is being done, e.g. ``iteration 7``."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        asked = re.search(r"Tried to allocate ([\d.]+ \w+)", str(error))
        more = f" and {asked[1]} more were asked for" if asked else ""
        raise OutOfMemory(
            f"{what}: the memory of {device.device_name()} is full, {device.peak_memory_bytes() / 2**30:.2f} GiB were "
            f"in use at most{more}; try {', '.join(remedies(config, world))}"
        ) from error
