"""Steel-LLM: Qwen2's attention with a double SwiGLU or a soft mixture of experts as feed-forward."""

from __future__ import annotations

from megatron_steel.config.model_schema import ModelConfig


def is_soft(size: ModelConfig) -> bool:
    """Whether the feed-forward is a soft mixture of experts."""
    return size.ffn_type != "dense"


def expert_width(size: ModelConfig) -> int:
    """Inner width of one expert, or of the double SwiGLU that stands alone: mlp_div_ratio times narrower."""
    return size.ffn_hidden_size // (size.mlp_div_ratio if is_soft(size) or size.mlp_type == "senet" else 1)
