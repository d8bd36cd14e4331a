"""Open-Llama: Llama with a norm after the embedding (stable embedding) and one matrix for embedding and head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_steel.config.families.llama import DENSE, OLD_BUFFERS, common_keys, read_common, write_common
from megatron_steel.config.family import ANY, Family, Tensor
from megatron_steel.config.schema import ModelConfig


def is_stable(size: ModelConfig) -> bool:
    """Whether there is a norm after the embedding."""
    return size.stable_embedding


def read_open_llama(hf: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """Norm after the embedding, and the head: it is the embedding when either of two keys says so.

    Embeddings with a norm behind them start as Xavier's normal distribution, as in the published code.
    """
    stable = bool(hf.get("use_stable_embedding", True))
    shared = bool(hf.get("shared_input_output_embedding", True)) or bool(hf.get("tie_word_embeddings", False))
    return {
        **read_common(hf, origin),
        "untie_embeddings_and_output_weights": not shared,
        "stable_embedding": stable,
        "embedding_init": "xavier" if stable else "normal",
    }


def write_open_llama(size: ModelConfig) -> dict[str, Any]:
    """The published keys, and the modules beside the weights."""
    shared = not size.untie_embeddings_and_output_weights
    return {
        **write_common(size),
        "auto_map": {
            "AutoConfig": "configuration_open_llama.OpenLlamaConfig",
            "AutoModelForCausalLM": "modeling_open_llama.OpenLlamaForCausalLM",
        },
        "tie_word_embeddings": shared,
        "shared_input_output_embedding": shared,
        "use_stable_embedding": size.stable_embedding,
        "use_memory_efficient_attention": False,
        "hidden_dropout_prob": 0.0,
        "attention_dropout_prob": 0.0,
    }


NORM = "embedding.layer_norm.", "model.embed_layer_norm."
FAMILIES = (
    Family(
        name="open_llama",
        architecture="OpenLlamaForCausalLM",
        model_type="open-llama",
        keys=common_keys(),
        tensors=(*DENSE, *(Tensor(NORM[0] + part, NORM[1] + part, "H", when=is_stable) for part in ("weight", "bias"))),
        read=read_open_llama,
        write=write_open_llama,
        switches={"stable_embedding": ANY},
        ignore=OLD_BUFFERS,
        modeling="open_llama",
    ),
)
