"""Configuration of Steel models: Qwen2's, and the kind of feed-forward."""

from __future__ import annotations

from transformers import Qwen2Config


class SteelConfig(Qwen2Config):
    """FFN_type: raw, softmoe_v1, softmoe_v2, softmoe_v3 (Steel-LLM's) or softmoe_causal; mlp_type: raw or senet.

    n_experts experts of slots_per_expert slots are each mlp_div_ratio times narrower than intermediate_size.
    """

    model_type = "steel"
    base_model_tp_plan = None
    FFN_type: str = "raw"
    mlp_type: str = "raw"
    n_experts: int = 6
    slots_per_expert: int = 1
    mlp_div_ratio: int = 1
    head_dim: int | None = None
