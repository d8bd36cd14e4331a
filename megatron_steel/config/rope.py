"""Settings of the rotary embedding, to and from both generations of Hugging Face's format."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_steel.config.schema import ModelConfig

DEFAULT_ROPE_THETA = 10000.0
# By kind of scaling: our fields beside the factor, transformers' names, and what it takes an absent key for.
SCALINGS: dict[str, tuple[tuple[str, str, float | None], ...]] = {
    "linear": (),
    "dynamic": (),
    "llama3": (
        ("rope_low_freq_factor", "low_freq_factor", None),
        ("rope_high_freq_factor", "high_freq_factor", None),
    ),
    "yarn": (
        ("rope_beta_fast", "beta_fast", 32.0),
        ("rope_beta_slow", "beta_slow", 1.0),
        ("rope_attention_factor", "attention_factor", None),
        ("rope_mscale", "mscale", None),
        ("rope_mscale_all_dim", "mscale_all_dim", None),
    ),
}
# The scalings that start from a length of their own; dynamic starts from max_position_embeddings, linear from none.
FROM_LENGTH = ("llama3", "yarn")


def read_rope(
    hf: Mapping[str, Any], origin: str, default_theta: float = DEFAULT_ROPE_THETA, partial: bool = False
) -> dict[str, Any]:
    """Fields of the rotary embedding; ``ValueError`` for a scaling that is not supported.

    ``partial``: the family reads the share of a head that is rotated by itself; otherwise it must be all of it.
    """
    rope = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    theta = float(rope.get("rope_theta", hf.get("rope_theta", default_theta)))
    share = rope.get("partial_rotary_factor", hf.get("partial_rotary_factor"))
    if not partial and share not in (None, 1.0):
        raise ValueError(f"{origin}: partial_rotary_factor {share} is not supported for {hf.get('model_type')}")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return {"rotary_base": theta, "use_rope_scaling": False}
    if kind not in SCALINGS:
        raise ValueError(f"{origin}: rope scaling {kind!r} is not supported; {', '.join(SCALINGS)} are")
    return {"rotary_base": theta, "use_rope_scaling": True, **read_scaling(hf, rope, kind, origin)}


def read_scaling(hf: Mapping[str, Any], rope: Mapping[str, Any], kind: str, origin: str) -> dict[str, Any]:
    """What belongs to one kind of scaling; ``ValueError`` for a key that is missing."""
    longest, found = hf.get("max_position_embeddings"), dict[str, Any](rope_scaling_type=kind)
    factor = rope.get("factor")
    if kind in FROM_LENGTH:
        # Some files have it outside, where transformers looks first.
        original = hf.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings") or longest
        if original is None:
            raise ValueError(f"{origin}: rope scaling {kind} needs original_max_position_embeddings")
        found["rope_original_max_position_embeddings"] = int(original)
        if kind == "yarn" and factor is None and longest is not None and "factor" in rope:
            factor = longest / original
    if factor is None:
        raise ValueError(f"{origin}: rope scaling {kind} needs factor")
    found["rope_scaling_factor"] = float(factor)
    for ours, theirs, default in SCALINGS[kind]:
        value = rope.get(theirs)
        if not value and kind == "llama3":
            raise ValueError(f"{origin}: rope scaling {kind} needs {theirs}")
        found[ours] = float(value) if value else default
    if kind == "yarn":
        found["rope_truncate"] = rope.get("truncate", True) is not False
    return found


def write_rope(size: ModelConfig) -> dict[str, Any]:
    """The keys of ``config.json``, in the present spelling and in the older one."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": size.rotary_base}
    if size.use_rope_scaling:
        kind = size.rope_scaling_type
        rope |= {"rope_type": kind, "factor": size.rope_scaling_factor}
        rope |= {theirs: getattr(size, ours) for ours, theirs, _ in SCALINGS[kind] if getattr(size, ours) is not None}
        if kind in FROM_LENGTH:
            rope["original_max_position_embeddings"] = size.rope_original_max_position_embeddings
        if kind == "yarn" and not size.rope_truncate:
            rope["truncate"] = False
    return {
        "rope_parameters": rope,
        "rope_theta": size.rotary_base,
        "rope_scaling": rope if size.use_rope_scaling else None,
    }


def longest_sequence(size: ModelConfig) -> int:
    """Positions a model can be used with: dynamic scaling begins behind those it is declared for."""
    if size.use_rope_scaling and size.rope_scaling_type == "dynamic":
        return int(size.max_position_embeddings * size.rope_scaling_factor)
    return size.max_position_embeddings
