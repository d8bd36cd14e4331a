"""Log-probabilities of all conversations of a data set under a model."""

from __future__ import annotations

import time

import numpy as np
import torch

from megatron_steel.data.batch import Builder
from megatron_steel.data.loader import BatchLayout
from megatron_steel.data.pair_dataset import PairDataset, Role
from megatron_steel.model.build import Model
from megatron_steel.objective.language import run_micro_batches, sum_over_ranks
from megatron_steel.objective.texts import TextLogps
from megatron_steel.runtime.world import World

SECONDS_BETWEEN_LINES = 30.0


@torch.no_grad()
def score_texts(model: Model, dataset: PairDataset, layout: BatchLayout, builder: Builder, world: World) -> np.ndarray:
    """Log-probability of the trained tokens of each conversation, nats, float32 (conversations,), on every rank.

    The first rank says twice a minute how far it is.
    """
    begun = said = time.monotonic()
    for chunk in model.chunks:
        chunk.eval()
    share = TextLogps(world.context_group).share
    sums = torch.zeros(len(dataset.store), dtype=torch.float64, device=world.device)
    reports = world.pipeline_rank == world.pipeline_size - 1 and world.context_rank == 0
    for first in range(0, len(dataset), layout.global_batch_size):
        now = time.monotonic()
        if world.rank == 0 and now - said >= SECONDS_BETWEEN_LINES:
            left = (now - begun) * (len(dataset) - first) / first
            print(f"{dataset.name}: reference of {first:,} of {len(dataset):,} rows, {left:.0f} s left", flush=True)
            said = now
        windows = first + layout.offsets()
        present = windows < len(dataset)

        def fetch(
            microbatch: int, row: int, windows: np.ndarray = windows, present: np.ndarray = present
        ) -> np.ndarray | None:
            return dataset.read(int(windows[microbatch, row]), 0) if present[microbatch, row] else None

        host = builder.read(fetch, windows.shape)
        batches = builder.build(host, np.full(windows.shape, -1), present)
        outputs = run_micro_batches(model, batches, 1.0, forward_only=True, share=share)
        if not reports:
            continue
        for number, (batch, output) in enumerate(zip(batches, outputs, strict=True)):
            rows = windows[number][present[number]]
            if len(rows):
                assert batch.texts is not None
                texts = torch.from_numpy(np.concatenate([dataset.texts(int(row)) for row in rows])).to(world.device)
                real = torch.from_numpy(batch.texts.roles_T != Role.PADDING).to(world.device)
                sums[texts] = output["logps"][real].double()
    for chunk in model.chunks:
        chunk.train()
    return sum_over_ranks(world, sums).float().cpu().numpy()
