"""Rules about the numbers a run computes in, and what follows from them."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from megatron_steel.config.schema import Config, TrainingConfig

SCALE_OPTIONS = ("loss_scale", "initial_loss_scale", "min_loss_scale", "loss_scale_window", "hysteresis")
# Those of a scale that moves.
DYNAMIC = SCALE_OPTIONS[1:]


def compute_type(training: TrainingConfig) -> Literal["float32", "bfloat16", "float16"]:
    """torch's name of the type that weights are multiplied in."""
    if training.fp16:
        return "float16"
    return "bfloat16" if training.bf16 else "float32"


def check_precision(config: Config) -> None:
    """One precision, and a loss scale that can move."""
    training = config.training
    if training.fp16 and training.bf16:
        raise ValueError("give --bf16 or --fp16, not both")
    for name in SCALE_OPTIONS:
        value = getattr(training, name)
        if value is not None and not value > 0:
            raise ValueError(f"--{name.replace('_', '-')} must be greater than 0, not {value}")
    if training.min_loss_scale > training.initial_loss_scale:
        raise ValueError(
            f"--min-loss-scale {training.min_loss_scale:g} is above "
            f"--initial-loss-scale {training.initial_loss_scale:g}"
        )
    if training.loss_scale is not None and not training.fp16:
        raise ValueError("--loss-scale needs --fp16; bf16 and fp32 hold small gradients without one")


def precision_without_effect(config: Config) -> list[str]:
    """One line for each option of the loss scale that was changed and changes nothing."""
    training = config.training
    reason = "without --fp16" if not training.fp16 else "with --loss-scale, which never changes"
    if training.fp16 and training.loss_scale is None:
        return []
    defaults = {item.name: item.default for item in dataclasses.fields(TrainingConfig)}
    return [
        f"--{name.replace('_', '-')} has no effect {reason}"
        for name in DYNAMIC
        if getattr(training, name) != defaults[name]
    ]


def check_same_precision(saved: dict[str, Any], config: Config, origin: str) -> None:
    """Whether this run can take the optimizer state of a checkpoint; ``saved`` are the flat options it was saved with.

    Sharded state holds fp32 weights in every precision; else only a 16-bit run has them beside the model's.
    """
    before, now = saved.get("bf16") or saved.get("fp16"), config.training.bf16 or config.training.fp16
    if bool(before) != now and not config.parallel.use_distributed_optimizer:
        was = "--fp16" if saved.get("fp16") else "--bf16" if saved.get("bf16") else "no --bf16 or --fp16"
        raise ValueError(
            f"{origin} was saved with {was}, its optimizer state is of another kind; resume with the same precision, "
            f"or pass --finetune to start from the weights"
        )
