"""Options about training a part of a model: adapters of low rank, some layers, or the embeddings alone."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(kw_only=True)
class LoraConfig:
    """Which weights are trained; all of them unless something is said here."""

    lora_rank: int | None = None
    """Train adapters of this rank beside frozen linear layers (LoRA) instead of the weights."""
    lora_alpha: float | None = None
    """An adapter's output counts alpha / rank; twice the rank when unset."""
    lora_dropout: float = 0.0
    """Dropout of an adapter's input."""
    lora_target_modules: list[str] = field(default_factory=list)
    """Linear layers with adapters by their Hugging Face names, such as q_proj v_proj; all of them when empty."""
    lora_modules_to_save: list[str] = field(default_factory=list)
    """Trained whole, beside the adapters: embed_tokens, lm_head."""
    use_rslora: bool = False
    """An adapter's output counts alpha / sqrt(rank)."""
    use_dora: bool = False
    """Adapters change the direction of a weight's rows; their lengths are trained apart (DoRA)."""
    freeze_trainable_layers: int | None = None
    """Train the last N layers alone, or the first -N when negative; everything else is frozen."""
    freeze_extra_modules: list[str] = field(default_factory=list)
    """Trained beside the layers of --freeze-trainable-layers: embed_tokens, lm_head, norm (the last one)."""
    train_embeddings_only: bool = False
    """Train the embedding, and the output layer where it has a weight of its own; everything else is frozen."""
