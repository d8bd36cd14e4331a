"""Settings of the rotary embedding, to and from both generations of Hugging Face's format."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_steel.config.schema import ModelConfig

DEFAULT_ROPE_THETA = 10000.0


def read_rope(hf: Mapping[str, Any], origin: str, default_theta: float = DEFAULT_ROPE_THETA) -> dict[str, Any]:
    """Fields of the rotary embedding; ``ValueError`` for a scaling that is not supported."""
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    theta = float(rope.get("rope_theta", hf.get("rope_theta", default_theta)))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return {"rotary_base": theta, "use_rope_scaling": False}
    fixed = (rope.get("low_freq_factor"), rope.get("high_freq_factor"), rope.get("original_max_position_embeddings"))
    if kind != "llama3" or fixed != (1.0, 4.0, 8192) or "factor" not in rope:
        raise ValueError(f"{origin}: rope scaling {rope} is not supported; only Llama 3's with factors 1, 4, 8192 is")
    return {"rotary_base": theta, "use_rope_scaling": True, "rope_scaling_factor": float(rope["factor"])}


def write_rope(size: ModelConfig) -> dict[str, Any]:
    """The keys of ``config.json``, in the present spelling and in the older one."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": size.rotary_base}
    if size.use_rope_scaling:
        rope.update(
            rope_type="llama3",
            factor=size.rope_scaling_factor,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=8192,
        )
    return {
        "rope_parameters": rope,
        "rope_theta": size.rotary_base,
        "rope_scaling": rope if size.use_rope_scaling else None,
    }
