"""What latent attention must satisfy before anything starts, and how it is said."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_steel.config.check import check
from megatron_steel.config.load import from_flat

DEEPSEEK: dict[str, Any] = {
    "model_family": "deepseek_v3",
    "multi_latent_attention": True,
    "num_experts": 8,
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
}
TP2 = {"tensor_model_parallel_size": 2}


def test_deepseek_passes() -> None:
    check(from_flat(DEEPSEEK))
    check(from_flat({**DEEPSEEK, "moe_router_num_groups": 4, "moe_router_group_topk": 2, "moe_router_topk": 3}))
    check(from_flat({**DEEPSEEK, **TP2, "sequence_parallel": True}), 2)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"multi_latent_attention": False}, "needs --multi-latent-attention"),
        ({"kv_lora_rank": 0}, "--kv-lora-rank must be greater than 0"),
        ({"qk_pos_emb_head_dim": 7}, "--qk-pos-emb-head-dim 7 is odd"),
        ({"kv_channels": 32}, "--kv-channels"),
        ({"num_query_groups": 2}, "--num-query-groups"),
        ({"norm_epsilon": 1e-5}, "--norm-epsilon 1e-05"),
        ({"use_rope_scaling": True}, "--rope-scaling-type llama3"),
        (TP2, "needs --sequence-parallel"),
        ({"reset_position_ids": True}, "needs --reset-attention-mask"),
        ({"model_family": "mixtral"}, "--model-family mixtral"),
        ({"moe_router_num_groups": 3, "moe_router_group_topk": 1}, "not divisible by --moe-router-num-groups 3"),
        ({"moe_router_num_groups": 4, "moe_router_group_topk": 1, "moe_router_topk": 3}, "leaves too few"),
        ({"moe_router_num_groups": 4}, "need each other"),
        ({"moe_router_score_function": "softmax"}, "--moe-router-score-function is softmax"),
    ],
)
def test_refusals(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError) as caught:
        check(from_flat({**DEEPSEEK, **changes}), changes.get("tensor_model_parallel_size", 1))
    assert named in str(caught.value) and "\n" not in str(caught.value)


def test_widths_of_latents_need_latent_attention() -> None:
    with pytest.raises(ValueError, match="--v-head-dim needs --multi-latent-attention"):
        check(from_flat({"v_head_dim": 64}))
