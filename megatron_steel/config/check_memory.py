"""Rules about what the forward pass keeps for the backward pass."""

from __future__ import annotations

from megatron_steel.config.families.steel import is_soft
from megatron_steel.config.family import has_experts
from megatron_steel.config.pipeline import layers_by_stage
from megatron_steel.config.schema import Config, ModelConfig

# Defaults of --cross-entropy-chunk-size: bytes of logits above which they are computed in parts, tokens of a part.
# Parts take a third more work in the head, and a few hundred MiB for a vocabulary of 150,000.
LARGE_LOGITS = 4 * 2**30
CHUNK = 512
# Where a GPU's kernel reads logits as they are and overwrites them with their gradient: 28,000 tokens in 16 bits, and
# parts that keep its matrix units busy, 1.2 GB each.
LARGE_IN_PLACE = 8 * 2**30
CHUNK_IN_PLACE = 4096
MODULES = ("core_attn", "mlp", "moe", "shared_experts", "mla_up_proj")
# megatron-core has these too.
REFUSED = {
    "layernorm": "megatron-core recomputes a norm only with Transformer Engine, which has it in a linear layer instead",
    "moe_act": "it needs grouped products of experts",
}


def recomputed_modules(config: Config) -> list[str]:
    """What each layer computes once more in the backward pass, short of the whole layer."""
    memory = config.memory
    return (memory.recompute_modules or ["core_attn"]) if memory.recompute_granularity == "selective" else []


def layers_of_chunks(config: Config) -> list[int]:
    """Decoder layers of a model chunk on each pipeline stage."""
    chunk = config.parallel.num_layers_per_virtual_pipeline_stage
    return [min(chunk or len(layers), len(layers)) for layers in layers_by_stage(config)]


def tokens_at_once(chunk: int | None, tokens: int, rows: int, in_place: int | None = None) -> int:
    """Of ``tokens`` in a micro-batch, those whose logits exist at once, with ``rows`` of the vocabulary on a rank.

    ``in_place``: bytes of a logit where nothing but logits is kept; None where they are widened to fp32.
    """
    if chunk is None:
        return tokens if tokens <= most_whole(rows, in_place) else min(tokens, CHUNK_IN_PLACE if in_place else CHUNK)
    return min(chunk, tokens) or tokens


def most_whole(rows: int, in_place: int | None = None) -> int:
    """Most tokens of a micro-batch whose logits are not computed in parts by themselves; arguments as above."""
    return LARGE_IN_PLACE // (in_place * rows) if in_place else LARGE_LOGITS // (4 * rows)


def missing_module(size: ModelConfig, name: str) -> str | None:
    """What a model would need for a module to be there; None where it is."""
    experts = [has_experts(size, layer) for layer in range(size.num_layers)]
    if name == "mlp" and all(experts):
        return "a layer without experts"
    if name == "moe" and not any(experts):
        return "--num-experts"
    if name == "shared_experts" and (size.moe_shared_expert_intermediate_size is None or not any(experts)):
        return "--moe-shared-expert-intermediate-size"
    if name == "mla_up_proj" and not size.multi_latent_attention:
        return "--multi-latent-attention"
    return None


def check_memory(config: Config) -> None:
    """What is recomputed must exist and be divisible; completes the options of full recomputation in place."""
    memory = config.memory
    if memory.cross_entropy_chunk_size is not None and memory.cross_entropy_chunk_size < 0:
        raise ValueError(f"--cross-entropy-chunk-size must be 0 or more, not {memory.cross_entropy_chunk_size}")
    if memory.recompute_granularity == "full":
        check_full(config)
    elif memory.recompute_granularity == "selective":
        check_selective(config)
    else:
        for name in ("recompute_method", "recompute_num_layers", "recompute_modules"):
            if getattr(memory, name):
                raise ValueError(f"--{name.replace('_', '-')} needs --recompute-granularity")


def check_full(config: Config) -> None:
    """Whole layers: units of equal size, or some layers of each chunk."""
    memory, chunks = config.memory, layers_of_chunks(config)
    if memory.recompute_modules:
        raise ValueError("--recompute-modules needs --recompute-granularity selective; full recomputes whole layers")
    memory.recompute_method = memory.recompute_method or "uniform"
    number = memory.recompute_num_layers = 1 if memory.recompute_num_layers is None else memory.recompute_num_layers
    if not 1 <= number <= max(chunks):
        raise ValueError(f"--recompute-num-layers {number} must be 1 to {max(chunks)}, the layers of a model chunk")
    uneven = next((layers for layers in chunks if layers % number), None)
    if memory.recompute_method == "uniform" and uneven is not None:
        raise ValueError(
            f"{uneven} layers of a model chunk are not divisible by --recompute-num-layers {number}, which "
            f"--recompute-method uniform needs; use block, or a divisor"
        )


def check_selective(config: Config) -> None:
    """Only modules that the model has and that our layers can compute once more."""
    memory, size = config.memory, config.size
    for name in ("recompute_method", "recompute_num_layers"):
        if getattr(memory, name):
            raise ValueError(f"--{name.replace('_', '-')} needs --recompute-granularity full")
    if size.decoder_layer is not None:
        raise ValueError("--recompute-granularity selective does not know the parts of --decoder-layer; use full")
    for name in memory.recompute_modules:
        if name in REFUSED:
            raise ValueError(f"--recompute-modules {name} is not there: {REFUSED[name]}; use {', '.join(MODULES)}")
        if name not in MODULES:
            raise ValueError(f"--recompute-modules has no {name}; use {', '.join(MODULES)}")
        if missing := missing_module(size, name):
            raise ValueError(f"--recompute-modules {name} needs {missing}")
    if size.add_bias_linear and "mlp" in memory.recompute_modules:
        # Its second output is the bias itself, which the recomputation would turn into a result of its own backward.
        raise ValueError("--recompute-modules mlp does not go with --add-bias-linear; use --recompute-granularity full")
    ours = size.parallel_residual or size.norm_placement != "pre" or is_soft(size)
    if config.training.fp8_format and ours and "mlp" in memory.recompute_modules:
        raise ValueError(f"--recompute-modules mlp does not go with --fp8-format in {size.model_family}; use full")
