"""Loss and metrics of preferences on held-out pairs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from megatron_steel.data.batch import Batch
from megatron_steel.model.build import Model
from megatron_steel.objective.language import BY_SAMPLE, Objective, run_micro_batches, sum_over_ranks
from megatron_steel.runtime.world import World


def evaluate_objective(
    model: Model, steps: Iterable[list[Batch]], objective: Objective, world: World
) -> dict[str, Any]:
    """Means over all pairs or answers of a validation loader, named as in metrics.jsonl; the same on every rank."""
    sums = torch.zeros(len(BY_SAMPLE) + len(objective.metric_names), dtype=torch.float64, device=world.device)
    for chunk in model.chunks:
        chunk.eval()
    with torch.no_grad():
        for batches in steps:
            objective.begin_step(model, batches, world)
            for output in run_micro_batches(model, batches, 1.0, forward_only=True, share=objective.share):
                totals = [output[name].double().sum() for name in BY_SAMPLE]
                sums += torch.cat([torch.stack(totals), output["metrics"].double()])
    for chunk in model.chunks:
        chunk.train()
    loss, weight, trained, *metrics = sum_over_ranks(world, sums).tolist()
    named = zip(objective.metric_names, metrics, strict=True)
    means = {name: value / max(weight, 1.0) for name, value in named}
    return {"loss": loss / max(weight, 1.0), **means, objective.counted: round(weight), "tokens": int(trained)}
