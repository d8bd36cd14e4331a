"""SmolLM3: Llama with layers that have no rotary embedding. SmolLM 1 and 2 are Llama."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_steel.config.families.llama import (
    DENSE,
    OLD_BUFFERS,
    common_keys,
    read_common,
    read_window,
    write_common,
    write_layer_types,
)  # fmt: skip
from megatron_steel.config.family import ANY, Family
from megatron_steel.config.schema import ModelConfig

THETA = 2_000_000.0


def rotated_layers(hf: Mapping[str, Any]) -> list[int]:
    """1 for a layer with rotary embedding, 0 for one without; every fourth has none unless the file says so."""
    layers, interval = int(hf["num_hidden_layers"]), int(hf.get("no_rope_layer_interval", 4))
    given = hf.get("no_rope_layers")
    return list(given)[:layers] if given is not None else [int((i + 1) % interval != 0) for i in range(layers)]


def read_smollm3(hf: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """Rotary settings by layer; a window, where it is on, is in the layers without rotary embedding."""
    rotated = rotated_layers(hf)
    return {
        **read_common({"tie_word_embeddings": True, "rope_theta": THETA, **hf}, origin),
        **read_window(hf, bool(hf.get("use_sliding_window", False)), lambda layer: not rotated[layer], origin),
        "no_rope_layers": [layer for layer, turned in enumerate(rotated) if not turned],
    }


def write_smollm3(size: ModelConfig) -> dict[str, Any]:
    """What transformers wants besides the plain keys."""
    return {
        **write_common(size),
        **write_layer_types(size),
        "no_rope_layers": [int(layer not in size.no_rope_layers) for layer in range(size.num_layers)],
        "attention_bias": False,
        "mlp_bias": False,
    }


FAMILIES = (
    Family(
        name="smollm3",
        architecture="SmolLM3ForCausalLM",
        model_type="smollm3",
        keys=common_keys(groups=4),
        tensors=DENSE,
        read=read_smollm3,
        write=write_smollm3,
        accepts={"attention_bias": (False, None), "mlp_bias": (False, None)},
        switches={"no_rope_layers": ANY, "window_size": ANY, "full_attention_layers": ANY},
        ignore=OLD_BUFFERS,
    ),
)
