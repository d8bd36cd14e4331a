"""Rules of reward models, whose output is one number per token."""

from __future__ import annotations

from megatron_steel.config.families import FAMILIES
from megatron_steel.config.schema import Config


def check_score(config: Config) -> None:
    """A reward model must be one that transformers can load."""
    size = config.size
    if not size.score_head:
        return
    if FAMILIES[size.model_family].scoring_architecture is None or size.decoder_layer is not None:
        what = "--decoder-layer" if size.decoder_layer is not None else f"--model-family {size.model_family}"
        raise ValueError(f"--score-head does not go with {what}: transformers has no sequence classification for it")
    if config.memory.cross_entropy_chunk_size is not None:
        raise ValueError("--score-head leaves no logits for --cross-entropy-chunk-size; remove it")
    for name in ("freeze_extra_modules", "lora_modules_to_save"):
        if "lm_head" in getattr(config.lora, name):
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} lm_head: a reward model has none; its score is always trained")


def refuse_score(config: Config, entry: str) -> None:
    """``ValueError`` for a reward model where next tokens are trained; once sizes of a checkpoint are known."""
    if config.size.score_head:
        raise ValueError(f"{entry} trains language models; this is a reward model (--score-head), without logits")
