"""One pass over the widest micro-batch before the first step: what does not fit shows at once, not hours later."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch

from megatron_steel.data.chat_dataset import ChatDataset
from megatron_steel.model.build import Model
from megatron_steel.model.moe import prepare_balance, take_balance
from megatron_steel.objective.language import run_micro_batches
from megatron_steel.runtime import device
from megatron_steel.runtime import world as runtime
from megatron_steel.train.loop import Session
from megatron_steel.train.out_of_memory import explained


def preflight(session: Session, datasets: Mapping[str, ChatDataset]) -> str:
    """Forward and backward over the longest conversations of all sources; returns a line for the log.

    Weights, optimizer and random state are what they were before. Raises :class:`OutOfMemory` where the memory of the
    device is too small.
    """
    model, layout, builder = session.model, session.loader.layout, session.loader.builder
    # A pipeline is full with one micro-batch for each stage; the schedule of a step takes a multiple of it.
    shape = (min(session.world.pipeline_size, layout.num_microbatches), layout.micro_batch_size)
    rows = longest_rows(list(datasets.values()), shape[0] * shape[1])

    def fetch(microbatch: int, row: int) -> np.ndarray:
        dataset, window = rows[(microbatch * shape[1] + row) % len(rows)]
        return dataset.read(window, 0)

    batches = builder.build(builder.read(fetch, shape), np.zeros(shape, dtype=np.int64), np.ones(shape, dtype=bool))
    begun = time.monotonic()
    with unchanged(model):
        for chunk in model.chunks:
            chunk.zero_grad_buffer()
        if model.options.num_moe_experts is not None:
            prepare_balance(model.chunks, len(batches))
        widest = f"the widest micro-batch ({describe(batches[0].tokens_BS, session)})"
        with explained(widest, session.config, session.world):
            run_micro_batches(model, batches, 1.0, forward_only=False)
        take_balance(model.chunks, session.world.device)
    peak = device.peak_memory_bytes()
    return (
        f"preflight: widest micro-batch {describe(batches[0].tokens_BS, session)}, "
        f"{time.monotonic() - begun:.2f} s, {peak / 1e9:.2f} GB at most"
    )


def describe(tokens_BS: torch.Tensor, session: Session) -> str:
    """Size of a micro-batch over the ranks that share it."""
    rows, length = tokens_BS.shape
    return f"{rows} x {length * session.world.context_size} tokens"


def longest_rows(datasets: list[ChatDataset], count: int) -> list[tuple[ChatDataset, int]]:
    """The rows with the most tokens among all sources, at least one and at most ``count``."""
    found = [(int(length), number, row) for number, data in enumerate(datasets) for length, row in data.longest(count)]
    return [(datasets[number], row) for _, number, row in sorted(found, key=lambda item: -item[0])[:count]]


@contextmanager
def unchanged(model: Model) -> Iterator[None]:
    """Put back random state and counters of routers afterwards."""
    random_state = runtime.rng_state()
    buffers = [(buffer, buffer.clone()) for part in model.language_models() for buffer in part.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        runtime.set_rng_state(random_state)
