"""How decoder layers are dealt to pipeline stages: evenly, or with another number on the first and last stage."""

from __future__ import annotations

from itertools import accumulate

from megatron_steel.config.schema import Config

FIRST, LAST = "--decoder-first-pipeline-num-layers", "--decoder-last-pipeline-num-layers"


def is_uneven(config: Config) -> bool:
    """Whether the first or last stage has a number of layers of its own."""
    parallel = config.parallel
    return (parallel.decoder_first_pipeline_num_layers, parallel.decoder_last_pipeline_num_layers) != (None, None)


def layers_by_stage(config: Config) -> list[range]:
    """Layers of each pipeline stage of a checked configuration (without interleaving), counted from 0."""
    parallel = config.parallel
    first, last = parallel.decoder_first_pipeline_num_layers, parallel.decoder_last_pipeline_num_layers
    ends = [] if last is None else [last]
    counts = [] if first is None else [first]
    between = parallel.pipeline_model_parallel_size - len(counts) - len(ends)
    rest = config.size.num_layers - sum(counts) - sum(ends)
    counts += [rest // max(between, 1)] * between + ends
    return [range(stop - count, stop) for count, stop in zip(counts, accumulate(counts), strict=True)]


def check_uneven(config: Config) -> None:
    """What the first and last stage leave must be divisible by the stages between them."""
    parallel, layers = config.parallel, config.size.num_layers
    stages = parallel.pipeline_model_parallel_size
    given = [
        (flag, count)
        for flag, count in (
            (FIRST, parallel.decoder_first_pipeline_num_layers),
            (LAST, parallel.decoder_last_pipeline_num_layers),
        )
        if count is not None
    ]
    shown = " and ".join(f"{flag} {count}" for flag, count in given)
    if stages == 1:
        raise ValueError(f"{shown}: needs --pipeline-model-parallel-size 2 or more")
    if parallel.num_layers_per_virtual_pipeline_stage is not None:
        raise ValueError(f"{shown} does not go with --num-layers-per-virtual-pipeline-stage; remove one of them")
    between, rest = stages - len(given), layers - sum(count for _, count in given)
    if between == 0 and rest:
        raise ValueError(f"{shown} must make up --num-layers {layers} on {stages} stages; change one by {abs(rest)}")
    if between and (rest < between or rest % between):
        raise ValueError(
            f"{shown} leaves {rest} of --num-layers {layers} for {between} other stages of "
            f"--pipeline-model-parallel-size {stages}; leave a multiple of {between}"
        )
