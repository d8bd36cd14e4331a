"""The loss scale of fp16 training (Micikevicius et al. 2017, arXiv:1710.03740, section 3.2).

fp16 rounds what is below 6e-8 to 0 and overflows at 65,504. The loss is multiplied by a scale before the backward pass
and the fp32 gradients are divided by it afterwards: megatron-core does both. When to skip and how the scale moves is
decided here, once per step and for the whole model.
"""

from __future__ import annotations

import torch
from megatron.core.optimizer.grad_scaler import ConstantGradScaler, DynamicGradScaler, MegatronGradScaler
from megatron.core.optimizer.optimizer import ChainedOptimizer
from torch import Tensor

from megatron_steel.config.schema import TrainingConfig
from megatron_steel.model.build import Model


class DynamicScale(DynamicGradScaler):
    """megatron-core's rules for a scale that moves, applied once per step to what all ranks and parts agree on.

    The parts of megatron-core's optimizer (dense weights, experts) each have a scale and move it by what they found in
    their own gradients. After the first overflow in one of them alone they divide by different scales, while the loss
    is multiplied by the first part's. Here all of them share this one.
    """

    def update(self, found_inf: bool) -> None:
        """A part says what it found; the other parts and ranks are not known yet, so nothing happens."""

    def move(self, overflow: bool) -> None:
        """Halve or double the scale, or leave it, after a step that did or did not overflow anywhere."""
        super().update(overflow)


def build_scale(training: TrainingConfig) -> MegatronGradScaler:
    """The scale that the options describe."""
    if training.loss_scale is not None:
        return ConstantGradScaler(training.loss_scale)
    return DynamicScale(
        initial_scale=training.initial_loss_scale,
        min_scale=training.min_loss_scale,
        growth_factor=2.0,
        backoff_factor=0.5,
        growth_interval=training.loss_scale_window,
        hysteresis=training.hysteresis,
    )


def add_loss_scale(training: TrainingConfig, optimizer: ChainedOptimizer, model: Model) -> None:
    """Give all parts of an fp16 optimizer one scale and the pipeline's schedule the function that applies it."""
    scale = build_scale(training)
    for part in optimizer.chained_optimizers:
        part.grad_scaler = scale

    def multiply(loss: Tensor) -> Tensor:
        return loss * scale.scale

    model.options.grad_scale_func = multiply


def scale_of(optimizer: ChainedOptimizer) -> MegatronGradScaler | None:
    """The one loss scale of an optimizer; None in other precisions than fp16."""
    scales = {
        id(found): found for part in optimizer.chained_optimizers if (found := getattr(part, "grad_scaler", None))
    }
    assert len(scales) <= 1, "the parts of the optimizer must share one scale"
    return next(iter(scales.values()), None)


def loss_scale(optimizer: ChainedOptimizer) -> float | None:
    """The factor on the next step's loss; None in other precisions than fp16."""
    scale = scale_of(optimizer)
    return float(scale.scale.item()) if scale is not None else None


@torch.no_grad()
def move_scale(optimizer: ChainedOptimizer, overflow: bool) -> None:
    """Tell the scale how a step went; every rank has to say the same."""
    scale = scale_of(optimizer)
    if isinstance(scale, DynamicScale):
        scale.move(overflow)
