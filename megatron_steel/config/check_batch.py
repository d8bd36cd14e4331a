"""Rules about how many samples a step has, and how they are dealt to ranks and micro-batches."""

from __future__ import annotations

import math

from megatron_steel.config.schema import Config


def check_batch(config: Config, replicas: int, interleaved: bool = False) -> None:
    """global batch = micro batch x replicas x accumulation, exactly, at every step; fills in the global batch.

    ``interleaved`` schedules need the accumulation to be a multiple of the pipeline stages.
    """
    training = config.training
    per_pass = training.micro_batch_size * replicas
    if training.global_batch_size is None:
        training.global_batch_size = per_pass
    if training.global_batch_size % per_pass:
        above = math.ceil(training.global_batch_size / per_pass) * per_pass
        near = f"{above - per_pass} or {above}" if above > per_pass else str(above)
        raise ValueError(
            f"--global-batch-size {training.global_batch_size} is not --micro-batch-size {training.micro_batch_size} "
            f"x {replicas} data-parallel ranks x a whole number; use {near}"
        )
    stages, accumulation = config.parallel.pipeline_model_parallel_size, training.global_batch_size // per_pass
    if interleaved and accumulation % stages:
        raise ValueError(
            f"{accumulation} micro-batches per step are not divisible by --pipeline-model-parallel-size {stages}, "
            f"which interleaving needs; use --global-batch-size {per_pass * stages * math.ceil(accumulation / stages)}"
        )
    check_rampup(config, per_pass * stages if interleaved else per_pass)
    tensor = config.parallel.tensor_model_parallel_size
    if config.parallel.sequence_parallel and training.seq_length % tensor:
        raise ValueError(
            f"--seq-length {training.seq_length} is not divisible by --tensor-model-parallel-size {tensor}, "
            f"which --sequence-parallel needs; use {max(1, training.seq_length // tensor) * tensor}"
        )


def check_rampup(config: Config, unit: int) -> None:
    """Each batch size of the ramp must be a multiple of ``unit`` samples, and the last one the global batch."""
    values, final = config.training.rampup_batch_size, config.training.global_batch_size
    if not values:
        return
    assert final is not None
    given = f"--rampup-batch-size {' '.join(map(str, values))}"
    if len(values) != 3 or min(values) <= 0:
        raise ValueError(f"{given} must be three numbers above 0: START INCREMENT SAMPLES")
    start, increment, _ = values
    if start >= final:
        raise ValueError(f"{given} starts at {start}, which is not below --global-batch-size {final}")
    if start % unit or increment % unit:
        raise ValueError(f"{given}: START and INCREMENT must be multiples of {unit}, which one pass of all ranks has")
    if (final - start) % increment:
        below = final - (final - start) % increment
        raise ValueError(
            f"{given} does not reach --global-batch-size {final} in whole steps; use --global-batch-size {below} or "
            f"{below + increment}, or an increment that divides {final - start}"
        )
