"""What a mixture of experts must satisfy before anything starts, and how it is said."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_steel.config.check import check
from megatron_steel.config.load import from_flat

MIXTRAL: dict[str, Any] = {"model_family": "mixtral", "num_experts": 8}


def test_a_mixture_passes() -> None:
    check(from_flat(MIXTRAL))
    sharded = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
    check(from_flat({**MIXTRAL, **sharded, "num_attention_heads": 4, "num_query_groups": 2}), 2)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_experts": 0}, "--num-experts 0"),
        ({"moe_router_topk": 9}, "--moe-router-topk 9 must be between 1 and --num-experts 8"),
        ({"moe_router_topk": 1}, "the weight 1"),
        ({"moe_aux_loss_coeff": -0.1}, "--moe-aux-loss-coeff"),
        ({"moe_ffn_hidden_size": 100}, "--moe-ffn-hidden-size is 100"),
        ({"moe_router_pre_softmax": True}, "--moe-router-pre-softmax"),
        ({"tensor_model_parallel_size": 2}, "needs --sequence-parallel"),
        ({"expert_model_parallel_size": 3}, "--num-experts 8 is not divisible by --expert-model-parallel-size 3"),
        ({"expert_model_parallel_size": 2}, "1 processes are not divisible by --expert-model-parallel-size 2 x"),
        ({"expert_tensor_parallel_size": 3, "ffn_hidden_size": 64}, "divisible by --expert-tensor-parallel-size 3"),
        ({"expert_tensor_parallel_size": 2, "ffn_hidden_size": 99}, "--ffn-hidden-size 99 must be"),
        ({"num_experts": None, "expert_model_parallel_size": 2}, "--expert-model-parallel-size needs --num-experts"),
        ({"num_experts": None, "expert_tensor_parallel_size": 2}, "--expert-tensor-parallel-size needs --num-experts"),
        ({"model_family": "llama"}, "--num-experts is 8"),
        ({"model_family": "llama", "num_experts": None, "moe_router_topk": 3}, "--moe-router-topk needs --num-experts"),
    ],
)
def test_refusals(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError) as caught:
        check(from_flat({**MIXTRAL, **changes}), changes.get("tensor_model_parallel_size", 1))
    assert named in str(caught.value) and "\n" not in str(caught.value)


def test_every_stage_has_experts() -> None:
    model = {**MIXTRAL, "model_family": "qwen3_moe", "moe_router_pre_softmax": True, "qk_layernorm": True}
    flat = {**model, "num_layers": 4, "pipeline_model_parallel_size": 2, "moe_layer_freq": [0, 0, 1, 1]}
    with pytest.raises(ValueError, match="pipeline stage 0 of 2 has no layer with experts"):
        check(from_flat(flat), 2)
    check(from_flat({**flat, "decoder_first_pipeline_num_layers": 3}), 2)


def test_experts_are_spread_over_ranks_of_all_kinds() -> None:
    flat = {**MIXTRAL, "tensor_model_parallel_size": 2, "sequence_parallel": True, "num_attention_heads": 4}
    flat |= {"num_query_groups": 2, "expert_model_parallel_size": 4}
    with pytest.raises(ValueError, match="start a multiple of 8, or set --expert-tensor-parallel-size 1"):
        check(from_flat(flat), 4)
    check(from_flat(flat), 8)
    check(from_flat({**flat, "expert_tensor_parallel_size": 1}), 4)
