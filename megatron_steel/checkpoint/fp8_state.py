"""Scales and histories of FP8's delayed recipe, by name as plain tensors: Transformer Engine would pickle them.

A rank has those of its own layers; they are the same on all replicas, which agree on the largest values.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core.fp8_utils import get_fp8_recipe
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_steel.model.build import Model

# Transformer Engine's names of what belongs to the forward and the backward pass, and of its parts.
PASSES = ("scaling_fwd", "scaling_bwd")
PARTS = ("scale", "amax_history")
# Tensors of a product whose scales are kept: input, weight and output.
OF_PRODUCT = 3


def fp8_file(rank: int) -> str:
    """Name of a rank's scales inside a checkpoint."""
    return f"fp8_{rank:05d}.safetensors"


def keeps_history(model: Model) -> bool:
    """Whether the model has what this module saves."""
    return model.options.fp8 is not None and model.options.fp8_recipe == "delayed"


def fp8_modules(model: Model) -> Iterator[tuple[str, Any]]:
    """Transformer Engine's layers that multiply in FP8, with their names on this rank."""
    for number, chunk in enumerate(model.language_models()):
        for name, module in chunk.named_modules():
            if isinstance(getattr(module, "fp8_meta", None), dict):
                yield f"{number}.{name}", module


def fp8_state(model: Model) -> dict[str, Tensor]:
    """Scales and histories of this rank's layers on the host; empty where no step has been taken."""
    return {
        f"{name}.{which}.{part}": getattr(module.fp8_meta[which], part).detach().cpu().clone()
        for name, module in fp8_modules(model)
        for which in PASSES
        if which in module.fp8_meta
        for part in PARTS
    }


@torch.no_grad()
def set_fp8_state(model: Model, state: dict[str, Tensor]) -> None:
    """Put scales and histories back before the first step. ``ValueError`` when they are another recipe's."""
    recipe = get_fp8_recipe(model.options)
    for name, module in fp8_modules(model):
        saved = {(which, part): state.get(f"{name}.{which}.{part}") for which in PASSES for part in PARTS}
        first = saved[PASSES[0], PARTS[1]]
        if first is None:
            continue
        if len(first) != model.options.fp8_amax_history_len:
            raise ValueError(
                f"the checkpoint's histories have {len(first)} steps, --fp8-amax-history-len is "
                f"{model.options.fp8_amax_history_len}; resume with the same"
            )
        module.fp8_meta["num_gemms"] = first.shape[1] // OF_PRODUCT
        module.fp8_meta["recipe"] = recipe
        module.init_fp8_meta_tensors(recipe)
        for (which, part), value in saved.items():
            if value is not None:
                getattr(module.fp8_meta[which], part).copy_(value)


def save_fp8(model: Model, folder: Path, rank: int) -> None:
    """Write this rank's scales and histories into a checkpoint, where there are any."""
    if keeps_history(model) and (state := fp8_state(model)):
        save_file(state, folder / fp8_file(rank))


def load_fp8(model: Model, folder: Path, rank: int) -> None:
    """Take them from a checkpoint of the same layout; without a file they begin anew."""
    path = folder / fp8_file(rank)
    if keeps_history(model) and path.is_file():
        set_fp8_state(model, load_file(path))
