"""OLMo2: norms on what attention and feed-forward add, and on all queries and all keys before they are heads."""

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
    read_common,
    write_common,
)
from megatron_steel.config.family import Family, Key, Tensor
from megatron_steel.config.schema import ModelConfig

# What transformers takes absent keys for, where it is not what Llama has.
DEFAULTS = {"rms_norm_eps": 1e-5, "max_position_embeddings": 2048}


def olmo_keys() -> tuple[Key, ...]:
    """Llama's keys with other defaults."""
    return tuple(Key(key.theirs, key.ours, DEFAULTS.get(key.theirs, key.default), key.null) for key in common_keys())


def read_olmo2(hf: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """Llama's settings and the two switches."""
    return {**read_common(hf, origin), "norm_placement": "post", "qk_layernorm_full": True}


def write_olmo2(size: ModelConfig) -> dict[str, Any]:
    """What transformers wants besides the plain keys."""
    return {**write_common(size), "attention_bias": False}


TENSORS = (
    *OUTER,
    *attention(),
    Tensor(f"{OURS}self_attention.q_layernorm.weight", f"{THEIRS}self_attn.q_norm.weight", "Q"),
    Tensor(f"{OURS}self_attention.k_layernorm.weight", f"{THEIRS}self_attn.k_norm.weight", "K"),
    Tensor(f"{OURS}post_self_attn_layernorm.weight", f"{THEIRS}post_attention_layernorm.weight", "H"),
    *dense_mlp(),
    Tensor(f"{OURS}post_mlp_layernorm.weight", f"{THEIRS}post_feedforward_layernorm.weight", "H"),
)
FAMILIES = (
    Family(
        name="olmo2",
        architecture="Olmo2ForCausalLM",
        model_type="olmo2",
        keys=olmo_keys(),
        tensors=TENSORS,
        read=read_olmo2,
        write=write_olmo2,
        accepts={"attention_bias": (False, None)},
        switches={"norm_placement": ("post",), "qk_layernorm_full": (True,)},
        ignore=OLD_BUFFERS,
    ),
)
