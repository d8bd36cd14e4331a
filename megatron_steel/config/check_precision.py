"""Rules about the numbers a run computes in, and what follows from them."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from megatron_steel.config.family import group_count, head_width
from megatron_steel.config.load import to_flat
from megatron_steel.config.schema import Config, TrainingConfig

SCALE_OPTIONS = ("loss_scale", "initial_loss_scale", "min_loss_scale", "loss_scale_window", "hysteresis")
# Those of a scale that moves.
DYNAMIC = SCALE_OPTIONS[1:]
# Those of FP8's delayed recipe, and how many layers stay in bf16.
HISTORY = ("fp8_margin", "fp8_amax_history_len", "fp8_amax_compute_algo")
ENDS = ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16")


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
    check_fp8(config)
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


def fp8_unit(config: Config) -> int:
    """What sizes of matrices, and so tokens too, are divisible by: 1 without FP8."""
    training = config.training
    if training.fp8_format is None:
        return 1
    if training.fp8_recipe == "blockwise" and config.parallel.sequence_parallel:
        return 128  # Transformer Engine gathers whole blocks.
    return 32 if training.fp8_recipe == "mxfp8" else 16


def check_fp8(config: Config) -> None:
    """FP8 products come on top of bf16, and their sizes are multiples of :func:`fp8_unit`."""
    training, size, tensor = config.training, config.size, config.parallel.tensor_model_parallel_size
    if training.fp8_format is None:
        return
    if not training.bf16:
        raise ValueError("--fp8-format needs --bf16, in which everything but matrix products computes")
    if config.parallel.transformer_impl in ("torch", "local"):
        raise ValueError(
            f"--fp8-format needs Transformer Engine, --transformer-impl {config.parallel.transformer_impl} has no FP8; "
            f"use --transformer-impl transformer_engine"
        )
    check_recipe(training, size.num_layers)
    unit = fp8_unit(config)
    tokens = training.micro_batch_size * training.seq_length
    width = head_width(size)
    for what, number in (
        ("--hidden-size", size.hidden_size),
        ("--ffn-hidden-size / --tensor-model-parallel-size", size.ffn_hidden_size // tensor),
        ("heads x width / --tensor-model-parallel-size", size.num_attention_heads * width // tensor),
        ("key heads x width / --tensor-model-parallel-size", group_count(size) * width // tensor),
        ("--micro-batch-size x --seq-length", tokens // (tensor if config.parallel.sequence_parallel else 1)),
    ):
        if number % unit:
            raise ValueError(f"--fp8-recipe {training.fp8_recipe}: {what} must be divisible by {unit}, not {number}")


def check_recipe(training: TrainingConfig, layers: int) -> None:
    """The options of a recipe, and which layers take it."""
    if training.fp8_margin < 0:
        raise ValueError(f"--fp8-margin must be 0 or more, not {training.fp8_margin}")
    if training.fp8_amax_history_len < 1:
        raise ValueError(f"--fp8-amax-history-len must be 1 or more, not {training.fp8_amax_history_len}")
    if not training.first_last_layers_bf16:
        return
    if training.fp8_recipe == "delayed":
        raise ValueError(
            "--first-last-layers-bf16 does not go with --fp8-recipe delayed, whose scaling factors are updated for all "
            "layers at once; use --fp8-recipe tensorwise"
        )
    first, last = training.num_layers_at_start_in_bf16, training.num_layers_at_end_in_bf16
    if min(first, last) < 0 or first + last >= layers:
        raise ValueError(
            f"--num-layers-at-start-in-bf16 {first} and --num-layers-at-end-in-bf16 {last} leave none of the "
            f"{layers} layers to FP8"
        )


def fp8_notes(training: TrainingConfig) -> list[str]:
    """One line for each option of FP8 that changes nothing."""
    defaults = {item.name: item.default for item in dataclasses.fields(TrainingConfig)}
    needs = [
        ("fp8_recipe", "--fp8-format", training.fp8_format is not None),
        ("first_last_layers_bf16", "--fp8-format", training.fp8_format is not None),
        *((name, "--fp8-recipe delayed", training.fp8_recipe == "delayed") for name in HISTORY),
        *((name, "--first-last-layers-bf16", training.first_last_layers_bf16) for name in ENDS),
    ]
    return [
        f"--{name.replace('_', '-')} has no effect without {needed}"
        for name, needed, there in needs
        if not there and getattr(training, name) != defaults[name]
    ]


def precision_notes(config: Config) -> list[str]:
    """A warning about what pure bf16 loses, and one line for each option of the loss scale that changes nothing."""
    training = config.training
    notes = []
    if training.pure_bf16:
        notes.append("--pure-bf16: updates below 1/256 of a weight are lost; the loss falls more slowly, then no more")
    notes += fp8_notes(training)
    if training.fp16 and training.loss_scale is None:
        return notes
    reason = "with --loss-scale, which never changes" if training.fp16 else "without --fp16"
    defaults = {item.name: item.default for item in dataclasses.fields(TrainingConfig)}
    changed = (name for name in DYNAMIC if getattr(training, name) != defaults[name])
    return notes + [f"--{name.replace('_', '-')} has no effect {reason}" for name in changed]


def state_kind(options: dict[str, Any]) -> str:
    """What an optimizer that is not sharded by --use-distributed-optimizer keeps, by the flags that decide it."""
    if options.get("pure_bf16"):
        return "moments of bf16 weights"
    narrow = (options.get("bf16") or options.get("fp16")) and not options.get("use_torch_fsdp2")
    return "fp32 copies of 16-bit weights" if narrow else "moments of fp32 weights"


def check_same_precision(saved: dict[str, Any], config: Config, origin: str) -> None:
    """Whether this run can take the optimizer state of a checkpoint; ``saved`` are the flat options it was saved with.

    State sharded by --use-distributed-optimizer is the same in every precision.
    """
    before, now = state_kind(saved), state_kind(to_flat(config))
    if before != now and not config.parallel.use_distributed_optimizer:
        raise ValueError(
            f"{origin} holds {before} as optimizer state, this run has {now}; resume with the same precision, "
            f"or pass --finetune to start from the weights"
        )
