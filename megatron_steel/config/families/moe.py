"""Mixtures of experts: Mixtral."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_steel.config.families.llama import (
    OLD_BUFFERS,
    OURS,
    OUTER,
    THEIRS,
    attention,
    common_keys,
    layer_norms,
    read_common,
    read_window,
    write_common,
)
from megatron_steel.config.family import ANY, Family, Key, Tensor, has_experts
from megatron_steel.config.rope import read_rope
from megatron_steel.config.schema import ModelConfig


def experts(prefix: str, gate: str, up: str, down: str) -> tuple[Tensor, ...]:
    """The router, the experts and the norm before both; ``gate``, ``up``, ``down`` name an expert's matrices."""
    one, ours = f"{prefix}experts.{{expert}}.", f"{OURS}mlp.experts.experts."
    both = (f"{one}{gate}.weight", f"{one}{up}.weight")
    return (
        Tensor(f"{OURS}pre_mlp_layernorm.weight", f"{THEIRS}post_attention_layernorm.weight", "H", layers=has_experts),
        Tensor(f"{OURS}mlp.router.weight", f"{prefix}gate.weight", "E H", layers=has_experts),
        Tensor(f"{ours}linear_fc1.weight", both, "M H | M H", "gate_up", layers=has_experts),
        Tensor(f"{ours}linear_fc2.weight", f"{one}{down}.weight", "H M", layers=has_experts),
    )


def expert_dimensions(size: ModelConfig) -> dict[str, int]:
    """E experts of width M."""
    return {"E": size.num_experts or 0, "M": size.moe_ffn_hidden_size or size.ffn_hidden_size}


def without(keys: tuple[Key, ...], *names: str) -> tuple[Key, ...]:
    """The other keys."""
    return tuple(key for key in keys if key.theirs not in names)


def read_mixtral(hf: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """A window in all layers when it is given; the rotary base has a default of its own."""
    window = read_window({**hf, "layer_types": None}, True, lambda layer: True, origin)
    return {**read_common(hf, origin), **read_rope(hf, origin, 1e6), **window}


FAMILIES = (
    Family(
        name="mixtral",
        architecture="MixtralForCausalLM",
        model_type="mixtral",
        keys=(
            *without(common_keys(groups=8), "rms_norm_eps"),
            Key("rms_norm_eps", "norm_epsilon", 1e-5),
            Key("num_local_experts", "num_experts", 8),
            Key("num_experts_per_tok", "moe_router_topk", 2),
        ),
        tensors=(
            *OUTER,
            layer_norms()[0],
            *attention(),
            *experts(f"{THEIRS}block_sparse_moe.", "w1", "w3", "w2"),
        ),
        read=read_mixtral,
        write=lambda size: {**write_common(size), "sliding_window": size.window_size},
        switches={"num_experts": ANY, "window_size": ANY},
        ignore=OLD_BUFFERS,
        dimensions=expert_dimensions,
    ),
)
