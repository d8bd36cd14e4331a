"""Which weights are trained: frozen ones have no gradient and no optimizer state, and keep their bits."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt import GPTModel

from megatron_steel.config.adapters import WHOLE, trains_part
from megatron_steel.config.family import SCORE
from megatron_steel.config.schema import Config
from megatron_steel.model.initialize import model_wide_name
from megatron_steel.model.lora import ADAPTERS

LAYERS = "decoder.layers."


def is_trained(config: Config, name: str) -> bool:
    """Whether a parameter is trained, by its name in the whole model: the score of a reward model always is."""
    if name == SCORE:
        return True
    lora = config.lora
    if lora.lora_rank is not None:
        return ADAPTERS in name or name in [WHOLE[module] for module in lora.lora_modules_to_save]
    if lora.train_embeddings_only:
        return name in (WHOLE["embed_tokens"], WHOLE["lm_head"])
    count = lora.freeze_trainable_layers
    if count is None:
        return True
    if not name.startswith(LAYERS):
        stems = [WHOLE[module].removesuffix("weight") for module in lora.freeze_extra_modules]
        return any(name.startswith(stem) for stem in stems)
    layer = int(name.removeprefix(LAYERS).split(".")[0])
    return layer >= config.size.num_layers - count if count > 0 else layer < -count


def choose_trained(config: Config, model: GPTModel) -> None:
    """Freeze what a run does not train; before data parallelism and the optimizer, which take what is trained."""
    if not trains_part(config.lora):
        return
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_trained(config, model_wide_name(model, name)))
    if model.pre_process and config.memory.recompute_granularity is not None:
        # megatron-core computes no gradient of a recomputed part that is not asked for that of its input.
        model.embedding.register_forward_hook(ask_for_gradient)


def ask_for_gradient(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> None:
    """A hook that makes a module's output need a gradient even if its weights are frozen."""
    if torch.is_grad_enabled():
        output.requires_grad_(True)
