"""What only Transformer Engine's layers have is refused elsewhere, in one line."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_steel.config.check_engine import check_engine
from megatron_steel.config.load import from_flat, parse
from megatron_steel.model.backends import check_engine_only
from megatron_steel.model.families import transformer_config

EXPERTS = {"num_experts": 4, "moe_grouped_gemm": True}
GRAPHS = {"cuda_graph_impl": "local"}


@pytest.mark.parametrize("backend", ["torch", "local"])
@pytest.mark.parametrize(("flags", "flag"), [(EXPERTS, "--moe-grouped-gemm"), (GRAPHS, "--cuda-graph-impl local")])
def test_other_backends_lack_it(flags: dict[str, Any], flag: str, backend: str) -> None:
    with pytest.raises(ValueError, match=f"^{flag} needs Transformer Engine; use .*, not {backend}$"):
        check_engine(from_flat({**flags, "transformer_impl": backend}))
    config = from_flat(flags)
    check_engine(config)
    check_engine_only(config, "transformer_engine", "")
    with pytest.raises(ValueError, match=f"^{flag} needs Transformer Engine, this run takes {backend} layers: no GPU$"):
        check_engine_only(config, backend, "no GPU")


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        ({"reset_attention_mask": True}, "packed documents"),
        ({"train_data": ["chats.jsonl"]}, "--train-data"),
        ({"num_experts": 4}, "--num-experts"),
        ({"recompute_granularity": "full"}, "--recompute-granularity"),
        ({"pipeline_model_parallel_size": 2}, "--pipeline-model-parallel-size"),
        ({"context_parallel_size": 2}, "--context-parallel-size"),
        ({"overlap_param_gather": True}, "--overlap-param-gather"),
        ({"ffn_type": "softmoe_v1"}, "--ffn-type softmoe_v1"),
        ({"decoder_layer": "mine:layer"}, "--decoder-layer"),
        ({"bf16": True, "fp8_format": "hybrid", "fp8_recipe": "delayed"}, "--fp8-recipe delayed"),
    ],
)
def test_graphs_need_the_same_work_in_each_step(flags: dict[str, Any], what: str) -> None:
    with pytest.raises(ValueError, match=f"^--cuda-graph-impl local does not go with {what}.*; remove one of them$"):
        check_engine(from_flat({**GRAPHS, **flags}))


def test_grouped_experts_are_experts_without_biases() -> None:
    with pytest.raises(ValueError, match="^--moe-grouped-gemm needs --num-experts$"):
        check_engine(from_flat({"moe_grouped_gemm": True}))
    with pytest.raises(ValueError, match="--add-bias-linear"):
        check_engine(from_flat({**EXPERTS, "add_bias_linear": True}))


def test_its_cross_entropy_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="--cross-entropy-fusion-impl .*Transformer Engine's is refused"):
        parse(["--cross-entropy-fusion-impl", "te"])


def test_options_reach_megatron_core() -> None:
    config = transformer_config(
        from_flat(
            {
                "bf16": True,
                "fp8_format": "hybrid",
                "fp8_recipe": "delayed",
                "fp8_margin": 2,
                "fp8_amax_history_len": 16,
                "fp8_amax_compute_algo": "max",
            }  # fmt: skip
        )
    )
    assert (config.fp8_recipe, config.fp8_margin) == ("delayed", 2)
    assert (config.fp8_amax_history_len, config.fp8_amax_compute_algo) == (16, "max")
    ends = {"bf16": True, "fp8_format": "e4m3", "first_last_layers_bf16": True, "num_layers_at_end_in_bf16": 0}
    config = transformer_config(from_flat(ends))
    assert config.first_last_layers_bf16
    assert (config.num_layers_at_start_in_bf16, config.num_layers_at_end_in_bf16) == (1, 0)
    assert transformer_config(from_flat(EXPERTS)).moe_grouped_gemm
    config = transformer_config(from_flat(GRAPHS))
    assert config.cuda_graph_impl == "local" and config.use_te_rng_tracker
    assert not config.apply_rope_fusion, "other backends rotate by themselves"
