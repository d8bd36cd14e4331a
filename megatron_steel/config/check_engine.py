"""Rules about what only Transformer Engine's layers have: grouped experts and CUDA graphs (FP8: check_precision.py)."""

from __future__ import annotations

from megatron_steel.config.check_context import packs
from megatron_steel.config.families.steel import is_soft
from megatron_steel.config.schema import Config

GRAPHS = "--cuda-graph-impl local"


def engine_only(config: Config) -> list[tuple[str, bool]]:
    """Flags that need Transformer Engine, and whether they are given."""
    return [
        ("--fp8-format", config.training.fp8_format is not None),
        ("--moe-grouped-gemm", config.parallel.moe_grouped_gemm),
        (GRAPHS, config.training.cuda_graph_impl != "none"),
    ]


def check_engine(config: Config) -> None:
    """Layers that have what is asked for; raises ``ValueError`` like check.py."""
    chosen = config.parallel.transformer_impl
    for flag, given in engine_only(config)[1:]:
        if given and chosen in ("torch", "local"):
            raise ValueError(
                f"{flag} needs Transformer Engine; use --transformer-impl transformer_engine, not {chosen}"
            )
    if config.parallel.moe_grouped_gemm:
        check_grouped(config)
    if config.training.cuda_graph_impl != "none":
        check_graphs(config)


def check_grouped(config: Config) -> None:
    """Grouped experts are experts, each on one rank, without biases."""
    if config.size.num_experts is None:
        raise ValueError("--moe-grouped-gemm needs --num-experts")
    if config.size.add_bias_linear:
        raise ValueError("--moe-grouped-gemm does not go with --add-bias-linear; remove it")


def check_graphs(config: Config) -> None:
    """A layer is recorded once: it must launch the same kernels on tensors of the same shapes each time."""
    size, parallel, memory = config.size, config.parallel, config.memory
    reasons = [
        (bool(config.chat.train_data), "--train-data, whose rows have other lengths each time"),
        (packs(config), "packed documents, whose bounds change"),
        (size.num_experts is not None, "--num-experts, which get other numbers of tokens each time"),
        (size.decoder_layer is not None, "--decoder-layer, of which it knows nothing"),
        (is_soft(size), f"--ffn-type {size.ffn_type}"),
        (memory.recompute_granularity is not None, "--recompute-granularity"),
        (parallel.pipeline_model_parallel_size > 1, "--pipeline-model-parallel-size 2 or more"),
        (parallel.context_parallel_size > 1, "--context-parallel-size 2 or more"),
        (parallel.overlap_param_gather, "--overlap-param-gather"),
        (config.training.fp8_recipe == "delayed" and config.training.fp8_format is not None, "--fp8-recipe delayed"),
    ]
    for given, what in reasons:
        if given:
            raise ValueError(f"{GRAPHS} does not go with {what}; remove one of them")
