"""GPT-NeoX (Pythia) and GPT-2: LayerNorm, biases everywhere, a feed-forward without gate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_steel.config.families.llama import OURS
from megatron_steel.config.family import ANY, Family, Key, Tensor, untied
from megatron_steel.config.rope import DEFAULT_ROPE_THETA, read_rope, write_rope
from megatron_steel.config.schema import ModelConfig

# Names of activation functions in config.json, and ours. The three others are the same function, written differently.
ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
SWITCHES: dict[str, tuple[Any, ...]] = {
    "normalization": ("LayerNorm",),
    "activation": ("gelu", "gelu_tanh"),
    "gated_linear_unit": (False,),
    "add_bias_linear": (True,),
}
NEOX, GPT2 = "gpt_neox.layers.{layer}.", "transformer.h.{layer}."


def linear(ours: str, theirs: str, shape: str, bias: str, how: str = "copy") -> tuple[Tensor, ...]:
    """A weight and its bias; ``how`` changes the weight only."""
    return (Tensor(f"{ours}.weight", f"{theirs}.weight", shape, how), Tensor(f"{ours}.bias", f"{theirs}.bias", bias))


def layer_norm(ours: str, theirs: str) -> tuple[Tensor, ...]:
    """Weight and bias of a LayerNorm; ``ours`` ends where their names begin."""
    return tuple(Tensor(f"{ours}{part}", f"{theirs}.{part}", "H") for part in ("weight", "bias"))


def read_activation(hf: Mapping[str, Any], key: str, default: str, origin: str) -> dict[str, Any]:
    """Our name of the activation function; ``ValueError`` for another one."""
    name = hf.get(key, default)
    if name not in ACTIVATIONS:
        raise ValueError(f"{origin}: {key} {name!r} is not supported; {', '.join(ACTIVATIONS)} are")
    return {"activation": ACTIVATIONS[name]}


def layers_of(switches: Mapping[str, tuple[Any, ...]]) -> dict[str, Any]:
    """Values of the switches that have one value."""
    return {name: values[0] for name, values in switches.items() if len(values) == 1}


def read_neox(hf: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """Rotary settings with the share of a head that is rotated, activation and head."""
    rope = hf.get("rope_parameters") or {}
    return {
        **layers_of(SWITCHES),
        **read_rope(hf, origin, float(hf.get("rotary_emb_base", DEFAULT_ROPE_THETA)), partial=True),
        **read_activation(hf, "hidden_act", "gelu", origin),
        "rotary_percent": float(rope.get("partial_rotary_factor", hf.get("rotary_pct", 0.25))),
        "untie_embeddings_and_output_weights": not hf.get("tie_word_embeddings", False),
    }


def write_neox(size: ModelConfig) -> dict[str, Any]:
    """What transformers wants besides the plain keys, in both spellings."""
    rope = write_rope(size)
    rope["rope_parameters"] = {**rope["rope_parameters"], "partial_rotary_factor": size.rotary_percent}
    return {
        **rope,
        "rotary_pct": size.rotary_percent,
        "rotary_emb_base": size.rotary_base,
        "hidden_act": "gelu" if size.activation == "gelu" else "gelu_new",
        "attention_bias": True,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
    }


def four_times(hf: Mapping[str, Any]) -> int:
    """The usual width of a feed-forward without gate."""
    return 4 * int(hf["n_embd"])


def read_gpt2(hf: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """Activation and head; positions are a table."""
    return {
        **layers_of(SWITCHES),
        **read_activation(hf, "activation_function", "gelu_new", origin),
        "position_embedding_type": "learned_absolute",
        "untie_embeddings_and_output_weights": not hf.get("tie_word_embeddings", True),
    }


def write_gpt2(size: ModelConfig) -> dict[str, Any]:
    """What transformers wants besides the plain keys."""
    return {
        "activation_function": "gelu" if size.activation == "gelu" else "gelu_new",
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "scale_attn_weights": True,
    }


NEOX_TENSORS = (
    Tensor("embedding.word_embeddings.weight", "gpt_neox.embed_in.weight", "V H", "vocab"),
    *layer_norm("decoder.final_layernorm.", "gpt_neox.final_layer_norm"),
    Tensor("output_layer.weight", "embed_out.weight", "V H", "vocab", when=untied),
    *layer_norm(f"{OURS}self_attention.linear_qkv.layer_norm_", f"{NEOX}input_layernorm"),
    *layer_norm(f"{OURS}mlp.linear_fc1.layer_norm_", f"{NEOX}post_attention_layernorm"),
    # Rows are query, key and value of one head after another: our groups of one query head.
    *linear(f"{OURS}self_attention.linear_qkv", f"{NEOX}attention.query_key_value", "3H H", "3H"),
    *linear(f"{OURS}self_attention.linear_proj", f"{NEOX}attention.dense", "H H", "H"),
    *linear(f"{OURS}mlp.linear_fc1", f"{NEOX}mlp.dense_h_to_4h", "F H", "F"),
    *linear(f"{OURS}mlp.linear_fc2", f"{NEOX}mlp.dense_4h_to_h", "H F", "H"),
)
GPT2_TENSORS = (
    Tensor("embedding.word_embeddings.weight", "transformer.wte.weight", "V H", "vocab"),
    Tensor("embedding.position_embeddings.weight", "transformer.wpe.weight", "P H"),
    *layer_norm("decoder.final_layernorm.", "transformer.ln_f"),
    Tensor("output_layer.weight", "lm_head.weight", "V H", "vocab", when=untied),
    *layer_norm(f"{OURS}self_attention.linear_qkv.layer_norm_", f"{GPT2}ln_1"),
    *layer_norm(f"{OURS}mlp.linear_fc1.layer_norm_", f"{GPT2}ln_2"),
    Tensor(f"{OURS}self_attention.linear_qkv.weight", f"{GPT2}attn.c_attn.weight", "H 3H", "qkv_columns"),
    Tensor(f"{OURS}self_attention.linear_qkv.bias", f"{GPT2}attn.c_attn.bias", "3H", "qkv_columns"),
    *linear(f"{OURS}self_attention.linear_proj", f"{GPT2}attn.c_proj", "H H", "H", "transpose"),
    *linear(f"{OURS}mlp.linear_fc1", f"{GPT2}mlp.c_fc", "H F", "F", "transpose"),
    *linear(f"{OURS}mlp.linear_fc2", f"{GPT2}mlp.c_proj", "F H", "H", "transpose"),
)

FAMILIES = (
    Family(
        name="gpt_neox",
        architecture="GPTNeoXForCausalLM",
        model_type="gpt_neox",
        keys=(
            Key("vocab_size", "vocab_size"),
            Key("hidden_size", "hidden_size"),
            Key("intermediate_size", "ffn_hidden_size"),
            Key("num_hidden_layers", "num_layers"),
            Key("num_attention_heads", "num_attention_heads"),
            Key("max_position_embeddings", "max_position_embeddings", 2048),
            Key("layer_norm_eps", "norm_epsilon", 1e-5),
            Key("initializer_range", "init_method_std", 0.02),
            Key("use_parallel_residual", "parallel_residual", True),
        ),
        tensors=NEOX_TENSORS,
        read=read_neox,
        write=write_neox,
        accepts={"attention_bias": (True,)},
        switches={**SWITCHES, "parallel_residual": ANY, "rotary_percent": ANY},
        plain_heads=True,
        ignore=(
            r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias)",
            r"gpt_neox\.layers\.\d+\.attention\.rotary_emb\.inv_freq",
        ),
    ),
    Family(
        name="gpt2",
        architecture="GPT2LMHeadModel",
        scorer="GPT2ForSequenceClassification",
        model_type="gpt2",
        keys=(
            Key("vocab_size", "vocab_size", 50257),
            Key("n_embd", "hidden_size"),
            Key("n_inner", "ffn_hidden_size", four_times, null=four_times),
            Key("n_layer", "num_layers"),
            Key("n_head", "num_attention_heads"),
            Key("n_positions", "max_position_embeddings", 1024),
            Key("layer_norm_epsilon", "norm_epsilon", 1e-5),
            Key("initializer_range", "init_method_std", 0.02),
        ),
        tensors=GPT2_TENSORS,
        read=read_gpt2,
        write=write_gpt2,
        accepts={
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False, None),
            "add_cross_attention": (False, None),
        },
        switches={**SWITCHES, "position_embedding_type": ("learned_absolute",)},
        plain_heads=True,
        ignore=(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)",),
        base_prefix="transformer.",
        dimensions=lambda size: {"P": size.max_position_embeddings},
    ),
)
