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
    if training.pure_bf16 and not training.bf16:
        raise ValueError("--pure-bf16 needs --bf16")
    if training.pure_bf16 and config.parallel.use_distributed_optimizer:
        raise ValueError(
            "--pure-bf16 does not go with --use-distributed-optimizer, which shards fp32 weights and moments; on 8 or "
            "more replicas --use-distributed-optimizer alone takes less memory, and loses nothing"
        )
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


def precision_notes(config: Config) -> list[str]:
    """A warning about what pure bf16 loses, and one line for each option of the loss scale that changes nothing."""
    training = config.training
    notes = []
    if training.pure_bf16:
        notes.append("--pure-bf16: updates below 1/256 of a weight are lost; the loss falls more slowly, then no more")
    if training.fp16 and training.loss_scale is None:
        return notes
    reason = "with --loss-scale, which never changes" if training.fp16 else "without --fp16"
    defaults = {item.name: item.default for item in dataclasses.fields(TrainingConfig)}
    changed = (name for name in DYNAMIC if getattr(training, name) != defaults[name])
    return notes + [f"--{name.replace('_', '-')} has no effect {reason}" for name in changed]


def state_kind(options: dict[str, Any]) -> str:
    """What an unsharded optimizer keeps, by the flags that decide it: fp32 weights of its own, or only moments."""
    if options.get("pure_bf16"):
        return "--bf16 --pure-bf16"
    return "--bf16 or --fp16" if options.get("bf16") or options.get("fp16") else "no --bf16 or --fp16"


def check_same_precision(saved: dict[str, Any], config: Config, origin: str) -> None:
    """Whether this run can take the optimizer state of a checkpoint; ``saved`` are the flat options it was saved with.

    Sharded state holds fp32 weights in every precision.
    """
    before = state_kind(saved)
    if before != state_kind(dataclasses.asdict(config.training)) and not config.parallel.use_distributed_optimizer:
        raise ValueError(
            f"{origin} was saved with {before}, its optimizer state is of another kind; resume with the same, "
            f"or pass --finetune to start from the weights"
        )
