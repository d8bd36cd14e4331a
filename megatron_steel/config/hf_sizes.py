"""Sizes to and from a Hugging Face ``config.json``, as plain dictionaries.

Only what decides the numbers of the model is read; anything this engine would compute differently is refused by name.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_steel.config.schema import ModelConfig

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)
# Values transformers assumes when the key is absent (its configuration classes); the rest is the same in all families.
DEFAULT_ROPE_THETA = 10000.0
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128},
}


def read_sizes(path: Path) -> dict[str, Any]:
    """Flags for a ``config.json``; ``ValueError`` names the file when it cannot be read or is not supported."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: must hold a JSON object")
    return sizes_from_hf(values, str(path))


def sizes_from_hf(hf: dict[str, Any], origin: str) -> dict[str, Any]:
    """Flags for a Hugging Face configuration.

    Raises ``ValueError`` naming the key for a family or a setting that is not supported.
    """
    family = hf.get("model_type")
    if family not in ARCHITECTURES:
        raise ValueError(f"{origin}: model_type {family!r} is not supported; known: {', '.join(ARCHITECTURES)}")
    for key in REQUIRED:
        if hf.get(key) is None:
            raise ValueError(f"{origin}: {key} is missing")
    hf = {**DEFAULTS[family], **hf}
    refuse_unsupported(hf, family, origin)
    heads, hidden = hf["num_attention_heads"], hf["hidden_size"]
    theta, factor = rope_settings(hf, origin)
    return {
        "model_family": family,
        "num_layers": hf["num_hidden_layers"],
        "hidden_size": hidden,
        "ffn_hidden_size": hf["intermediate_size"],
        "num_attention_heads": heads,
        "num_query_groups": hf.get("num_key_value_heads") or heads,
        "kv_channels": hf.get("head_dim") or hidden // heads,
        "max_position_embeddings": hf["max_position_embeddings"],
        "rotary_base": theta,
        "use_rope_scaling": factor is not None,
        "rope_scaling_factor": factor or 8.0,
        "norm_epsilon": hf.get("rms_norm_eps", 1e-6),
        "qk_layernorm": family == "qwen3",
        "add_qkv_bias": family == "qwen2",
        "untie_embeddings_and_output_weights": not hf.get("tie_word_embeddings", False),
        "init_method_std": hf.get("initializer_range", 0.02),
        "vocab_size": hf["vocab_size"],
    }


def refuse_unsupported(hf: dict[str, Any], family: str, origin: str) -> None:
    """``ValueError`` for settings that would change the numbers without a word."""
    if hf.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ValueError(f"{origin}: hidden_act {hf['hidden_act']!r} is not supported; only silu is")
    for key in ("attention_bias", "mlp_bias"):
        if hf.get(key):
            raise ValueError(f"{origin}: {key} is not supported for {family}")
    window = hf.get("sliding_window")
    used = hf.get("use_sliding_window", family == "mistral")
    if window and used and window < hf["max_position_embeddings"]:
        raise ValueError(
            f"{origin}: sliding_window {window} is not supported; set it to null in config.json if the sequences you "
            f"use are at most {window} tokens long"
        )


def rope_settings(hf: dict[str, Any], origin: str) -> tuple[float, float | None]:
    """(theta, Llama 3 scaling factor or None) from either generation of the configuration format."""
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    theta = float(rope.get("rope_theta", hf.get("rope_theta", DEFAULT_ROPE_THETA)))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    fixed = (rope.get("low_freq_factor"), rope.get("high_freq_factor"), rope.get("original_max_position_embeddings"))
    if kind != "llama3" or fixed != (1.0, 4.0, 8192) or "factor" not in rope:
        raise ValueError(f"{origin}: rope scaling {rope} is not supported; only Llama 3's with factors 1, 4, 8192 is")
    return theta, float(rope["factor"])


def hf_from_sizes(model: ModelConfig, vocab_size: int, token_ids: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The ``config.json`` of a model: everything ``transformers`` needs to build it.

    ``vocab_size`` is the number of rows written (padding trimmed); ``token_ids`` holds bos/eos/pad ids or None.
    """
    family = model.model_family
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": model.rotary_base}
    if model.use_rope_scaling:
        rope.update(
            rope_type="llama3",
            factor=model.rope_scaling_factor,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=8192,
        )
    values: dict[str, Any] = {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "vocab_size": vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_query_groups or model.num_attention_heads,
        "head_dim": model.kv_channels or model.hidden_size // model.num_attention_heads,
        "hidden_act": "silu",
        "max_position_embeddings": model.max_position_embeddings,
        "initializer_range": model.init_method_std,
        "rms_norm_eps": model.norm_epsilon,
        "rope_parameters": rope,
        # The older spelling of the same facts, for readers of the previous format.
        "rope_theta": model.rotary_base,
        "rope_scaling": rope if model.use_rope_scaling else None,
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
        "attention_dropout": 0.0,
        "use_cache": True,
        "dtype": dtype,
        "torch_dtype": dtype,
        **token_ids,
    }
    if family in ("llama", "qwen3"):
        values["attention_bias"] = False
    if family == "llama":
        values["mlp_bias"] = False
    if family in ("mistral", "qwen2", "qwen3"):
        values["sliding_window"] = None
    if family in ("qwen2", "qwen3"):
        values["use_sliding_window"] = False
    return values
