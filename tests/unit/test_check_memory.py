"""Rules about recomputation."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_steel.config.check import check
from megatron_steel.config.check_memory import recomputed_modules
from megatron_steel.config.load import from_flat

FULL: dict[str, Any] = {"recompute_granularity": "full"}
SELECTIVE: dict[str, Any] = {"recompute_granularity": "selective"}
PIPELINE: dict[str, Any] = {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 4}
UNEVEN: dict[str, Any] = {"pipeline_model_parallel_size": 2, "decoder_last_pipeline_num_layers": 10}
EXPERTS: dict[str, Any] = {"model_family": "mixtral", "num_experts": 4}
GPT: dict[str, Any] = {
    "model_family": "gpt_neox",
    "num_query_groups": None,
    "normalization": "LayerNorm",
    "activation": "gelu",
    "gated_linear_unit": False,
    "add_bias_linear": True,
    "untie_embeddings_and_output_weights": True,
}
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"recompute_method": "block"}, "--recompute-method needs --recompute-granularity"),
    ({"recompute_num_layers": 2}, "--recompute-num-layers needs --recompute-granularity"),
    ({"recompute_modules": ["mlp"]}, "--recompute-modules needs --recompute-granularity"),
    ({**FULL, "recompute_modules": ["mlp"]}, "--recompute-modules needs --recompute-granularity selective"),
    ({**FULL, "recompute_num_layers": 0}, "--recompute-num-layers 0 must be 1 to 24"),
    ({**FULL, "recompute_num_layers": 5}, "24 layers of a model chunk are not divisible by --recompute-num-layers 5"),
    ({**FULL, **PIPELINE, "recompute_num_layers": 5}, "--recompute-num-layers 5 must be 1 to 4"),
    ({**FULL, **UNEVEN, "recompute_num_layers": 4}, "14 layers of a model chunk are not divisible by"),
    ({**SELECTIVE, "recompute_method": "block"}, "--recompute-method needs --recompute-granularity full"),
    ({**SELECTIVE, "recompute_num_layers": 1}, "--recompute-num-layers needs --recompute-granularity full"),
    ({**SELECTIVE, "recompute_modules": ["attention"]}, "--recompute-modules has no attention; use core_attn, mlp"),
    ({**SELECTIVE, "recompute_modules": ["layernorm"]}, "--recompute-modules layernorm is not there"),
    ({**SELECTIVE, "recompute_modules": ["moe"]}, "--recompute-modules moe needs --num-experts"),
    ({**SELECTIVE, "recompute_modules": ["mlp"], **EXPERTS}, "--recompute-modules mlp needs a layer without experts"),
    ({**SELECTIVE, "recompute_modules": ["shared_experts"], **EXPERTS}, "--moe-shared-expert-intermediate-size"),
    ({**SELECTIVE, "recompute_modules": ["mla_up_proj"]}, "--multi-latent-attention"),
    ({**SELECTIVE, "recompute_modules": ["mlp"], **GPT}, "mlp does not go with --add-bias-linear"),
    ({**SELECTIVE, "decoder_layer": "a.b:c"}, "--recompute-granularity selective does not know the parts of"),
]


def changed(values: dict[str, Any]) -> dict[str, Any]:
    return {"num_layers": 24, "global_batch_size": 8, **values}


@pytest.mark.parametrize(("values", "message"), WRONG, ids=[message for _, message in WRONG])
def test_refusals_name_the_option(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as refused:
        check(from_flat(changed(values)), world_size=2)
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_full_is_completed() -> None:
    config = from_flat(changed(FULL))
    assert check(config) == []
    assert (config.memory.recompute_method, config.memory.recompute_num_layers) == ("uniform", 1)
    assert recomputed_modules(config) == []


def test_selective_means_attention() -> None:
    config = from_flat(changed(SELECTIVE))
    assert check(config) == [] and recomputed_modules(config) == ["core_attn"]
