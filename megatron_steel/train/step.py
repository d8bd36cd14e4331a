"""One optimizer step, in execution order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from megatron.core.optimizer.optimizer import ChainedOptimizer
from torch import Tensor

from megatron_steel.data.loader import Batch
from megatron_steel.model.build import Model
from megatron_steel.objective.language import run_micro_batches, sum_over_ranks
from megatron_steel.optim.optimizer import set_rates, update
from megatron_steel.runtime.world import World


@dataclass(kw_only=True, slots=True)
class StepResult:
    """What one optimizer step did; the same on every rank."""

    loss: Tensor
    """Mean loss per token of the step (0-dim, fp32, on the device)."""
    grad_norm: float
    """Global gradient norm before clipping."""
    updated: bool
    """False when the gradient was not finite and the weights were left alone."""


def mean_loss(world: World, outputs: Sequence[dict[str, Tensor]], step_tokens: int) -> Tensor:
    """The step's mean loss per token on every rank, from the last stage's sums."""
    total = torch.zeros((), device=world.device)
    for output in outputs:
        total += output["loss_sum"]
    return sum_over_ranks(world, total) / step_tokens


def train_step(
    model: Model,
    optimizer: ChainedOptimizer,
    batches: Sequence[Batch],
    step_tokens: int,
    world: World,
    lr: float,
    weight_decay: float,
    clip_grad: float,
) -> StepResult:
    """Forward, backward, reduce, clip, update.

    ``step_tokens`` counts the tokens of the whole step over all replicas; it is known before the first forward pass,
    so the gradient is that of the mean over them whatever the micro-batches and replicas.
    """
    for chunk in model.chunks:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    outputs = run_micro_batches(model, batches, step_tokens, batches[0].tokens_BS.shape[1], forward_only=False)
    set_rates(optimizer, lr, weight_decay)
    grad_norm, updated = update(optimizer, clip_grad)
    return StepResult(loss=mean_loss(world, outputs, step_tokens), grad_norm=grad_norm, updated=updated)
