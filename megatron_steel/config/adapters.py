"""What adapters of low rank are attached to, from the declaration of a family."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from megatron_steel.config.families import FAMILIES
from megatron_steel.config.lora import LoraConfig
from megatron_steel.config.schema import ModelConfig

LINEAR = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
# Transforms under which the rows of a projection are rows of ours.
BY_ROWS = ("copy", "qkv", "gate_up")
# What --freeze-extra-modules and --lora-modules-to-save name, and the parameters they stand for.
WHOLE = {
    "embed_tokens": "embedding.word_embeddings.weight",
    "lm_head": "output_layer.weight",
    "norm": "decoder.final_layernorm.weight",
}
# Options that decide which weights are trained and what adapters compute: a run goes on with the same.
IDENTITY: dict[str, Any] = {
    "lora_rank": None,
    "lora_alpha": None,
    "lora_target_modules": [],
    "lora_modules_to_save": [],
    "use_rslora": False,
    "use_dora": False,
    "freeze_trainable_layers": None,
    "freeze_extra_modules": [],
    "train_embeddings_only": False,
}


def projections(size: ModelConfig) -> dict[str, tuple[str, ...]]:
    """Names of Hugging Face's linear layers inside each of ours, with ``{layer}``: those that may have adapters."""
    found = {}
    for tensor in FAMILIES[size.model_family].tensors:
        part = tensor.ours.removeprefix("decoder.layers.{layer}.").removesuffix(".weight")
        if part in LINEAR and tensor.when(size) and tensor.how in BY_ROWS:
            found[part] = tuple(name.removesuffix(".weight") for name in tensor.sources)
    return found


def short(name: str) -> str:
    """Name of a linear layer within its module: q_proj."""
    return name.rsplit(".", 1)[-1]


def targets(lora: LoraConfig, size: ModelConfig) -> dict[str, tuple[str, ...]]:
    """Short names of the projections with an adapter, for each of our linear layers that has any."""
    wanted = set(lora.lora_target_modules)
    every = not wanted or wanted == {"all-linear"}
    chosen = {
        part: tuple(short(name) for name in names if every or short(name) in wanted)
        for part, names in projections(size).items()
    }
    return {part: names for part, names in chosen.items() if names}


def scaling(lora: LoraConfig) -> float:
    """What an adapter's output is multiplied by (Hu et al. 2021, 4.1; rsLoRA: Kalajdzievski 2023, theorem 3.2)."""
    assert lora.lora_rank is not None
    alpha = 2.0 * lora.lora_rank if lora.lora_alpha is None else lora.lora_alpha
    return alpha / (math.sqrt(lora.lora_rank) if lora.use_rslora else lora.lora_rank)


def trains_part(lora: LoraConfig) -> bool:
    """Whether some weights are frozen."""
    return lora.lora_rank is not None or lora.freeze_trainable_layers is not None or lora.train_embeddings_only


def identity(values: Mapping[str, Any]) -> dict[str, Any]:
    """The options of :data:`IDENTITY` among flat ones, with defaults filled in, so that equal ones compare equal."""
    found = {name: values.get(name, default) for name, default in IDENTITY.items()}
    rank = found["lora_rank"]
    if rank is not None and found["lora_alpha"] is None:
        found["lora_alpha"] = 2.0 * rank
    for name in ("lora_target_modules", "lora_modules_to_save", "freeze_extra_modules"):
        found[name] = sorted(set(found[name]) - {"all-linear"})
    return found
