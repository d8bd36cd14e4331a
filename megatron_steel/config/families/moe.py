"""Mixtures of experts: Mixtral, and Qwen 3 with experts in all layers or in some."""

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
    dense_mlp,
    head_norms,
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


def named_experts(hf: Mapping[str, Any]) -> int:
    """The number of experts under the name that transformers 4 has for it."""
    return int(hf.get("num_experts", 128))


def dense(size: ModelConfig, layer: int) -> bool:
    """Whether a layer has no experts."""
    return not has_experts(size, layer)


def read_qwen(hf: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """Which layers have experts, and whether the weights of those a token goes to sum to one."""
    step, plain = hf.get("decoder_sparse_step", 1), hf.get("mlp_only_layers") or []
    frequency = [int(i not in plain and step > 0 and (i + 1) % step == 0) for i in range(hf["num_hidden_layers"])]
    if hf.get("num_local_experts", named_experts(hf)) < 1 or not any(frequency):
        raise ValueError(f"{origin}: a qwen3_moe without experts is not supported; its model_type is qwen3")
    used = bool(hf.get("use_sliding_window", False))
    return {
        **read_common(hf, origin),
        **read_window({**hf, "layer_types": None}, used, lambda layer: True, origin, 4096),
        "qk_layernorm": True,
        "moe_layer_freq": [] if all(frequency) else frequency,
        "moe_router_pre_softmax": not hf.get("norm_topk_prob", False),
    }


def write_qwen(size: ModelConfig) -> dict[str, Any]:
    """The keys of :func:`read_qwen`; layers without experts are listed."""
    return {
        **write_common(size),
        "num_experts": size.num_experts,
        "moe_intermediate_size": size.moe_ffn_hidden_size or size.ffn_hidden_size,
        "attention_bias": False,
        "sliding_window": size.window_size,
        "use_sliding_window": size.window_size is not None,
        "norm_topk_prob": not size.moe_router_pre_softmax,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [layer for layer in range(size.num_layers) if dense(size, layer)],
    }


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
    Family(
        name="qwen3_moe",
        architecture="Qwen3MoeForCausalLM",
        model_type="qwen3_moe",
        keys=(
            *common_keys(groups=4),
            Key("num_local_experts", "num_experts", named_experts),
            Key("num_experts_per_tok", "moe_router_topk", 8),
            Key("moe_intermediate_size", "moe_ffn_hidden_size", 768),
        ),
        tensors=(
            *OUTER,
            layer_norms()[0],
            *attention(),
            *head_norms(),
            layer_norms(layers=dense)[1],
            *dense_mlp(layers=dense),
            *experts(f"{THEIRS}mlp.", "gate_proj", "up_proj", "down_proj"),
        ),
        read=read_qwen,
        write=write_qwen,
        accepts={"attention_bias": (False, None)},
        switches={
            "qk_layernorm": (True,), "window_size": ANY, "num_experts": ANY, "moe_layer_freq": ANY,
            "moe_ffn_hidden_size": ANY, "moe_router_pre_softmax": ANY,
        },
        ignore=OLD_BUFFERS,
        dimensions=expert_dimensions,
    ),
)  # fmt: skip
