"""Llama and those built like it: Mistral, Qwen 1.5, 2 and 2.5 (biases on q, k, v), Qwen 3 (a norm on each head).

Parts other families share are functions here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from megatron_steel.config.family import ANY, Family, Key, Tensor, group_count, head_width, untied
from megatron_steel.config.rope import read_rope, write_rope
from megatron_steel.config.schema import ModelConfig

OURS, THEIRS = "decoder.layers.{layer}.", "model.layers.{layer}."


def heads(hf: Mapping[str, Any]) -> int:
    """One key/value head per query head."""
    return int(hf["num_attention_heads"])


def width(hf: Mapping[str, Any]) -> int:
    """Hidden size over heads."""
    return int(hf["hidden_size"] // hf["num_attention_heads"])


def common_keys(*, groups: Any = heads, head_dim: Any = width) -> tuple[Key, ...]:
    """Sizes every family of this kind has; ``groups`` and ``head_dim`` are its defaults for absent keys."""
    return (
        Key("vocab_size", "vocab_size"),
        Key("hidden_size", "hidden_size"),
        Key("intermediate_size", "ffn_hidden_size"),
        Key("num_hidden_layers", "num_layers"),
        Key("num_attention_heads", "num_attention_heads"),
        Key("max_position_embeddings", "max_position_embeddings"),
        Key("num_key_value_heads", "num_query_groups", groups, null=heads),
        Key("head_dim", "kv_channels", head_dim, null=width),
        Key("rms_norm_eps", "norm_epsilon", 1e-6),
        Key("initializer_range", "init_method_std", 0.02),
    )


def attention(prefix: str = f"{THEIRS}self_attn.") -> tuple[Tensor, ...]:
    """Projections of the attention, and the norm before them."""
    names = tuple(f"{prefix}{part}_proj." for part in ("q", "k", "v"))
    ours = f"{OURS}self_attention."
    return (
        Tensor(f"{ours}linear_qkv.weight", tuple(f"{name}weight" for name in names), "Q H | K H | K H", "qkv"),
        Tensor(
            f"{ours}linear_qkv.bias", tuple(f"{name}bias" for name in names), "Q | K | K", "qkv",
            when=lambda size: size.add_qkv_bias,
        ),
        Tensor(f"{ours}linear_proj.weight", f"{prefix}o_proj.weight", "H Q"),
    )  # fmt: skip


def head_norms(prefix: str = f"{THEIRS}self_attn.") -> tuple[Tensor, ...]:
    """Norms of each query and key head."""
    ours = f"{OURS}self_attention."
    return (
        Tensor(f"{ours}q_layernorm.weight", f"{prefix}q_norm.weight", "D"),
        Tensor(f"{ours}k_layernorm.weight", f"{prefix}k_norm.weight", "D"),
    )


def dense_mlp(prefix: str = f"{THEIRS}mlp.", **more: Any) -> tuple[Tensor, ...]:
    """The gated feed-forward."""
    both = (f"{prefix}gate_proj.weight", f"{prefix}up_proj.weight")
    return (
        Tensor(f"{OURS}mlp.linear_fc1.weight", both, "F H | F H", "gate_up", **more),
        Tensor(f"{OURS}mlp.linear_fc2.weight", f"{prefix}down_proj.weight", "H F", **more),
    )


def layer_norms(before_mlp: str = "mlp.linear_fc1.layer_norm_weight", **more: Any) -> tuple[Tensor, ...]:
    """The norms before attention and before the feed-forward."""
    return (
        Tensor(f"{OURS}self_attention.linear_qkv.layer_norm_weight", f"{THEIRS}input_layernorm.weight", "H"),
        Tensor(f"{OURS}{before_mlp}", f"{THEIRS}post_attention_layernorm.weight", "H", **more),
    )


OUTER = (
    Tensor("embedding.word_embeddings.weight", "model.embed_tokens.weight", "V H", "vocab"),
    Tensor("decoder.final_layernorm.weight", "model.norm.weight", "H"),
    Tensor("output_layer.weight", "lm_head.weight", "V H", "vocab", when=untied),
)
DENSE = (*OUTER, *layer_norms(), *attention(), *dense_mlp())
OLD_BUFFERS = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",)


def read_common(hf: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """Rotary settings and the tied head."""
    if hf.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ValueError(f"{origin}: hidden_act {hf['hidden_act']!r} is not supported; only silu is")
    return read_rope(hf, origin) | {"untie_embeddings_and_output_weights": not hf.get("tie_word_embeddings", False)}


def read_window(
    hf: Mapping[str, Any], used: bool, slides: Callable[[int], bool], origin: str, default: int | None = None
) -> dict[str, Any]:
    """The window and the layers without it: ``layer_types`` says which, or ``slides`` where that is not given.

    ``used`` is whether there is a window at all, ``default`` its size where the key is absent.
    """
    layers, window = range(hf["num_hidden_layers"]), hf.get("sliding_window", default)
    kinds = hf.get("layer_types") or ["sliding_attention" if slides(i) else "full_attention" for i in layers]
    if unknown := set(kinds) - {"sliding_attention", "full_attention"}:
        raise ValueError(f"{origin}: layer_types {', '.join(sorted(map(str, unknown)))} are not supported")
    full = [i for i in layers if kinds[i] == "full_attention"]
    if not used or not window or len(full) == len(layers):
        return {"window_size": None, "full_attention_layers": []}
    return {"window_size": int(window), "full_attention_layers": full}


def write_layer_types(size: ModelConfig) -> dict[str, Any]:
    """The window and its layers as Qwen and SmolLM3 have them, for old and new versions of transformers."""
    layers, full = range(size.num_layers), size.full_attention_layers
    if size.window_size is None:
        return {"sliding_window": None, "use_sliding_window": False}
    return {
        "sliding_window": size.window_size,
        "use_sliding_window": True,
        "max_window_layers": len(full),
        "layer_types": ["full_attention" if i in full else "sliding_attention" for i in layers],
    }


def read_mistral(hf: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """A window in all layers, unless it is null."""
    window = read_window({**hf, "layer_types": None}, True, lambda layer: True, origin, 4096)
    return read_common(hf, origin) | window


def read_qwen(hf: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """A window that is off unless it is switched on, and then in the upper layers."""
    first = hf.get("max_window_layers", 28)
    used = bool(hf.get("use_sliding_window", False))
    return read_common(hf, origin) | read_window(hf, used, lambda layer: layer >= first, origin, 4096)


def write_common(size: ModelConfig) -> dict[str, Any]:
    """What transformers wants besides the plain keys."""
    return {
        "num_key_value_heads": group_count(size),
        "head_dim": head_width(size),
        "hidden_act": "silu",
        **write_rope(size),
        "attention_dropout": 0.0,
    }


FAMILIES = (
    Family(
        name="llama",
        architecture="LlamaForCausalLM",
        model_type="llama",
        keys=common_keys(),
        tensors=DENSE,
        read=read_common,
        write=lambda size: {**write_common(size), "attention_bias": False, "mlp_bias": False},
        accepts={"attention_bias": (False, None), "mlp_bias": (False, None)},
        ignore=OLD_BUFFERS,
    ),
    Family(
        name="mistral",
        architecture="MistralForCausalLM",
        model_type="mistral",
        keys=common_keys(groups=8),
        tensors=DENSE,
        read=read_mistral,
        write=lambda size: {**write_common(size), "sliding_window": size.window_size},
        accepts={"attention_bias": (False, None), "mlp_bias": (False, None)},
        switches={"window_size": ANY},
        ignore=OLD_BUFFERS,
    ),
    Family(
        name="qwen2",
        architecture="Qwen2ForCausalLM",
        model_type="qwen2",
        keys=common_keys(groups=32),
        tensors=DENSE,
        read=lambda hf, origin: {**read_qwen(hf, origin), "add_qkv_bias": True},
        write=lambda size: {**write_common(size), **write_layer_types(size)},
        accepts={"attention_bias": (False, None), "mlp_bias": (False, None)},
        switches={"add_qkv_bias": (True,), "window_size": ANY, "full_attention_layers": ANY},
        ignore=OLD_BUFFERS,
    ),
    Family(
        name="qwen3",
        architecture="Qwen3ForCausalLM",
        model_type="qwen3",
        keys=common_keys(groups=32, head_dim=128),
        tensors=(*DENSE, *head_norms()),
        read=lambda hf, origin: {**read_qwen(hf, origin), "qk_layernorm": True},
        write=lambda size: {**write_common(size), **write_layer_types(size), "attention_bias": False},
        accepts={"attention_bias": (False, None), "mlp_bias": (False, None)},
        switches={"qk_layernorm": (True,), "window_size": ANY, "full_attention_layers": ANY},
        ignore=OLD_BUFFERS,
    ),
)  # fmt: skip
