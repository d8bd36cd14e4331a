"""The families, by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_steel.config.families import bloom, deepseek, gemma, gpt, llama, moe, olmo, open_llama, smollm, steel
from megatron_steel.config.family import Family

GROUPS = (deepseek, llama, open_llama, smollm, gemma, olmo, gpt, bloom, moe, steel)
FAMILIES: dict[str, Family] = {family.name: family for group in GROUPS for family in group.FAMILIES}


def detect(hf: Mapping[str, Any], origin: str) -> Family:
    """The family of a ``config.json``; ``ValueError`` for one that is not supported."""
    if steel.describes_steel(hf):
        return FAMILIES["steel"]
    for family in FAMILIES.values():
        if family.model_type == hf.get("model_type"):
            return family
    known = ", ".join(family.model_type for family in FAMILIES.values())
    raise ValueError(f"{origin}: model_type {hf.get('model_type')!r} is not supported; known: {known}")
