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
        ({"model_family": "llama"}, "--num-experts is 8"),
        ({"model_family": "llama", "num_experts": None, "moe_router_topk": 3}, "--moe-router-topk needs --num-experts"),
    ],
)
def test_refusals(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError) as caught:
        check(from_flat({**MIXTRAL, **changes}), changes.get("tensor_model_parallel_size", 1))
    assert named in str(caught.value) and "\n" not in str(caught.value)
