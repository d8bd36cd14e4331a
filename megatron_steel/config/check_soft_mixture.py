"""Rules of the feed-forwards of Steel-LLM."""

from __future__ import annotations

from megatron_steel.config.model_schema import FeedForwardSizes
from megatron_steel.config.schema import Config


def check_soft_mixture(config: Config) -> None:
    """Experts must be divisible, and a language model must not see the tokens it is asked for.

    Raises ``ValueError`` like check.py.
    """
    size, tensor = config.size, config.parallel.tensor_model_parallel_size
    if size.model_family != "steel":
        for name in ("soft_experts", "slots_per_expert", "mlp_div_ratio"):
            if getattr(size, name) != getattr(FeedForwardSizes(), name):
                raise ValueError(f"--{name.replace('_', '-')} is for --model-family steel, this is {size.model_family}")
    if size.ffn_type == "dense" and size.mlp_type != "senet":
        return
    if size.ffn_hidden_size % size.mlp_div_ratio:
        raise ValueError(
            f"--ffn-hidden-size {size.ffn_hidden_size} is not divisible by --mlp-div-ratio {size.mlp_div_ratio}; "
            f"use {size.ffn_hidden_size // size.mlp_div_ratio * size.mlp_div_ratio} or another multiple"
        )
    divided = ("soft-experts", size.soft_experts)
    if size.ffn_type == "dense":
        divided = ("ffn-hidden-size / mlp-div-ratio", size.ffn_hidden_size // size.mlp_div_ratio)
    if divided[1] % tensor:
        raise ValueError(f"--{divided[0]} {divided[1]} is not divisible by --tensor-model-parallel-size {tensor}")
    if size.ffn_type not in ("softmoe_v2", "softmoe_v3"):
        return
    if not config.training.allow_non_causal_softmoe:
        raise ValueError(
            f"--ffn-type {size.ffn_type} shows every token the later ones it is to predict; train --ffn-type "
            f"softmoe_causal, which takes the weights of softmoe_v3, or give --allow-non-causal-softmoe"
        )
    for name in ("reset_attention_mask", "reset_position_ids"):
        if getattr(config.data, name):
            raise ValueError(
                f"--{name.replace('_', '-')} does not go with --ffn-type {size.ffn_type}, whose slots mix the "
                f"documents of a row; use softmoe_causal"
            )
