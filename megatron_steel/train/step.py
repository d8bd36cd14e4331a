"""One optimizer step, in execution order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from megatron.core.optimizer.optimizer import ChainedOptimizer
from torch import Tensor

from megatron_steel.data.batch import Batch
from megatron_steel.model.build import Model
from megatron_steel.model.moe import prepare_balance
from megatron_steel.objective.language import BY_SAMPLE, Objective, run_micro_batches, sum_over_ranks
from megatron_steel.optim.loss_scale import loss_scale
from megatron_steel.optim.optimizer import set_rates, update
from megatron_steel.runtime.device import upload
from megatron_steel.runtime.world import World


@dataclass(kw_only=True, slots=True)
class StepResult:
    """What one optimizer step did; the same on every rank. What is a tensor is on the device: reading it waits."""

    loss_sums: Tensor
    """Weighted sum of the loss, sum of the weights and trained labels of each source, [sources, 3] float64 on the
    device."""
    grad_norm: Tensor
    """Global gradient norm before clipping, a float64 scalar."""
    updated: Tensor
    """Whether the gradient was finite; where it was not, the weights were left alone. A bool scalar."""
    metric_sums: Tensor
    """What the objective reports, summed over the step, float64."""
    loss_scale: float | None
    """What the loss is multiplied by from here on; None in other precisions than fp16."""


def sum_losses(world: World, outputs: Sequence[dict[str, Tensor]], batches: Sequence[Batch], sources: int) -> Tensor:
    """`StepResult.loss_sums` of the whole step, on every rank."""
    sums = torch.zeros(sources, 3, dtype=torch.float64, device=world.device)
    if outputs:
        rows = [torch.stack([output[name].double() for name in BY_SAMPLE], -1) for output in outputs]
        numbers = upload(torch.from_numpy(np.concatenate([batch.sources_B for batch in batches])), world.device)
        sums.index_add_(0, numbers, torch.cat(rows))
    return sum_over_ranks(world, sums)


def sum_metrics(world: World, outputs: Sequence[dict[str, Tensor]], count: int) -> Tensor:
    """The ``count`` metrics of an objective, summed over the whole step, float64 on every rank."""
    sums = torch.zeros(count, dtype=torch.float64, device=world.device)
    for output in outputs if count else ():
        sums += output["metrics"].double()
    return sum_over_ranks(world, sums) if count else sums


def train_step(
    model: Model,
    optimizer: ChainedOptimizer,
    batches: Sequence[Batch],
    objective: Objective,
    step_weight: float,
    world: World,
    lr: float,
    weight_decay: float,
    clip_grad: float,
    sources: int,
) -> StepResult:
    """Forward, backward, reduce, clip, update.

    ``step_weight`` is the weight of all labels of the step over all replicas (their number, if all count the same); it
    is known before the first forward pass, so the gradient is that of the mean over them whatever the micro-batches
    and replicas. ``sources`` is the number of data sources the losses are told apart by.
    """
    for chunk in model.chunks:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    objective.begin_step(model, batches, world)
    if model.options.num_moe_experts is not None:
        prepare_balance(model.chunks, len(batches))
    outputs = run_micro_batches(model, batches, step_weight, forward_only=False, share=objective.share)
    set_rates(optimizer, lr, weight_decay)
    grad_norm, updated = update(optimizer, clip_grad)
    loss_sums = sum_losses(world, outputs, batches, sources)
    return StepResult(
        loss_sums=loss_sums,
        grad_norm=grad_norm,
        updated=updated,
        metric_sums=sum_metrics(world, outputs, len(objective.metric_names)),
        loss_scale=loss_scale(optimizer),
    )
