"""Uneven pipeline stages: who has which layers, what is refused, what a rank needs."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megatron_steel.config.check import check
from megatron_steel.config.load import from_flat
from megatron_steel.config.pipeline import layers_by_stage
from megatron_steel.config.schema import Config
from megatron_steel.model.families import transformer_config
from megatron_steel.plan import estimate

FIRST, LAST = "decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers"
STAGES = "pipeline_model_parallel_size"
SIZES: dict[str, Any] = {"hidden_size": 64, "ffn_hidden_size": 128, "num_attention_heads": 4, "num_query_groups": 2}
SIZES |= {"seq_length": 16, "max_position_embeddings": 16}
WRONG: list[tuple[dict[str, Any], str]] = [
    ({FIRST: 3}, "--decoder-first-pipeline-num-layers 3: needs --pipeline-model-parallel-size 2 or more"),
    ({FIRST: 0, STAGES: 2}, "--decoder-first-pipeline-num-layers"),
    ({FIRST: 8, STAGES: 2}, "8 leaves 0 of --num-layers 8 for 1 other stages .* leave a multiple of 1"),
    ({LAST: 9, STAGES: 2}, "leaves -1 of --num-layers 8"),
    ({FIRST: 3, STAGES: 4}, "3 leaves 5 of --num-layers 8 for 3 other stages .* leave a multiple of 3"),
    ({FIRST: 3, LAST: 4, STAGES: 2}, "must make up --num-layers 8 on 2 stages; change one by 1"),
    ({FIRST: 2, STAGES: 2, "num_layers_per_virtual_pipeline_stage": 1}, "does not go with .*; remove one of them"),
    (
        {FIRST: 3, STAGES: 2, "recompute_granularity": "full", "recompute_num_layers": 2},
        "3 layers .* not divisible",
    ),
]


def build(**changes: Any) -> Config:
    return from_flat({"num_layers": 8, **SIZES, **changes})


@pytest.mark.parametrize(("changes", "message"), WRONG)
def test_refused_in_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        check(build(**changes), changes.get(STAGES, 1))
    assert "\n" not in str(caught.value)


@given(st.integers(2, 5), st.integers(1, 4), st.none() | st.integers(1, 4), st.none() | st.integers(1, 4))
def test_stages_are_those_of_megatron_core(stages: int, each: int, first: int | None, last: int | None) -> None:
    ends = [count for count in (first, last) if count is not None]
    layers = sum(ends) + each * (stages - len(ends))
    config = build(num_layers=layers, **{STAGES: stages, FIRST: first, LAST: last})
    check(config, stages)
    options = transformer_config(config)
    theirs = []
    for stage in range(stages):
        begin = get_transformer_layer_offset(options, None, stage)
        theirs.append(range(begin, begin + get_num_layers_to_build(options, None, stage)))
    assert layers_by_stage(config) == theirs
    assert [layer for stage in theirs for layer in stage] == list(range(layers))


def test_estimate_counts_the_layers_of_each_stage() -> None:
    """A layer of Llama: 2 norms, Q and output 64 x 64, K and V 32 x 64, three matrices of 64 x 128."""
    config = build(**{STAGES: 3, FIRST: 1, LAST: 2})
    check(config, 3)
    layer = 2 * 64 + 2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128
    table = 128 * 64
    tied = [table + layer, 5 * layer, 2 * layer + table + 64]
    assert [estimate.stage_parameters(config, 128, stage).dense for stage in range(3)] == tied
    assert [estimate.layers_in_flight(config, 16, stage) for stage in range(3)] == [3 * 1, 2 * 5, 1 * 2]
