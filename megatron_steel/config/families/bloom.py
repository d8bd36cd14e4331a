"""BLOOM: GPT-NeoX's parts with ALiBi instead of rotation and a norm after the embedding."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from megatron_steel.config.families.gpt import layer_norm, layers_of, linear
from megatron_steel.config.families.llama import OURS
from megatron_steel.config.family import Family, Key, Tensor, untied
from megatron_steel.config.schema import ModelConfig

SWITCHES: dict[str, tuple[Any, ...]] = {
    "normalization": ("LayerNorm",),
    "activation": ("gelu_tanh",),
    "gated_linear_unit": (False,),
    "add_bias_linear": (True,),
    "position_embedding_type": ("alibi",),
    "stable_embedding": (True,),
}
THEIRS = "transformer.h.{layer}."


# Names in published files of what transformers writes under others.
OLD_NAMES = {"hidden_size": "n_embed", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads"}


def either(name: str) -> Callable[[Mapping[str, Any]], int]:
    """The value under the other name."""

    def read(hf: Mapping[str, Any]) -> int:
        if hf.get(OLD_NAMES[name]) is None:
            raise ValueError(f"config.json: {name} is missing, and so is {OLD_NAMES[name]}")
        return int(hf[OLD_NAMES[name]])

    return read


def read_bloom(hf: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """The head, and the width of the feed-forward, which is always four times the hidden size."""
    return {
        **layers_of(SWITCHES),
        "ffn_hidden_size": 4 * int(hf.get("hidden_size") or hf["n_embed"]),
        "untie_embeddings_and_output_weights": not hf.get("tie_word_embeddings", True),
    }


def write_bloom(size: ModelConfig) -> dict[str, Any]:
    """What transformers wants besides the plain keys."""
    return {
        "apply_residual_connection_post_layernorm": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "pretraining_tp": 1,
        "slow_but_exact": False,
    }


FAMILIES = (
    Family(
        name="bloom",
        architecture="BloomForCausalLM",
        model_type="bloom",
        keys=(
            Key("vocab_size", "vocab_size"),
            Key("hidden_size", "hidden_size", either("hidden_size")),
            Key("n_layer", "num_layers", either("n_layer")),
            Key("n_head", "num_attention_heads", either("n_head")),
            Key("seq_length", "max_position_embeddings", 2048),
            Key("layer_norm_epsilon", "norm_epsilon", 1e-5),
            Key("initializer_range", "init_method_std", 0.02),
        ),
        tensors=(
            Tensor("embedding.word_embeddings.weight", "transformer.word_embeddings.weight", "V H", "vocab"),
            *layer_norm("embedding.layer_norm.", "transformer.word_embeddings_layernorm"),
            *layer_norm("decoder.final_layernorm.", "transformer.ln_f"),
            Tensor("output_layer.weight", "lm_head.weight", "V H", "vocab", when=untied),
            *layer_norm(f"{OURS}self_attention.linear_qkv.layer_norm_", f"{THEIRS}input_layernorm"),
            *layer_norm(f"{OURS}mlp.linear_fc1.layer_norm_", f"{THEIRS}post_attention_layernorm"),
            # Rows are query, key and value of one head after another: our groups of one query head.
            *linear(f"{OURS}self_attention.linear_qkv", f"{THEIRS}self_attention.query_key_value", "3H H", "3H"),
            *linear(f"{OURS}self_attention.linear_proj", f"{THEIRS}self_attention.dense", "H H", "H"),
            *linear(f"{OURS}mlp.linear_fc1", f"{THEIRS}mlp.dense_h_to_4h", "F H", "F"),
            *linear(f"{OURS}mlp.linear_fc2", f"{THEIRS}mlp.dense_4h_to_h", "H F", "H"),
        ),
        read=read_bloom,
        write=write_bloom,
        accepts={"apply_residual_connection_post_layernorm": (False,)},
        switches=SWITCHES,
        plain_heads=True,
        wide_feed_forward=True,
        base_prefix="transformer.",
    ),
)
