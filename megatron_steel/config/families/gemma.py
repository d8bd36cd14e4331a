"""Gemma 2 and the text model of Gemma 3: norms before and behind each branch, their weights less 1; scaled embeddings.

Gemma 2 has softcaps on scores and logits; Gemma 3 has norms on heads instead, and two bases of the rotary embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_steel.config.families.llama import (
    OLD_BUFFERS,
    OURS,
    OUTER,
    THEIRS,
    attention,
    common_keys,
    dense_mlp,
    head_norms,
    read_window,
)
from megatron_steel.config.family import ANY, Family, Key, Tensor, group_count, head_width
from megatron_steel.config.rope import read_rope, write_rope
from megatron_steel.config.schema import ModelConfig

# What transformers takes absent keys for.
DEFAULTS = {
    "vocab_size": 256_000, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "max_position_embeddings": 8192,
}  # fmt: skip
WINDOW = 4096
GLOBAL_THETA, LOCAL_THETA = 1_000_000.0, 10_000.0
SWITCHES: dict[str, tuple[Any, ...]] = {
    "norm_placement": ("sandwich",),
    "apply_layernorm_1p": (True,),
    "activation": ("gelu_tanh",),
    "embedding_scale": (True,),
    "window_size": ANY,
    "full_attention_layers": ANY,
    "softmax_scale": ANY,
    "attn_logit_softcapping": ANY,
    "final_logit_softcapping": ANY,
}


def gemma_keys(**changes: int) -> tuple[Key, ...]:
    """Sizes, with the defaults of the generation."""
    defaults = DEFAULTS | changes
    return tuple(Key(key.theirs, key.ours, defaults.get(key.theirs, key.default), key.null) for key in common_keys())


def read_gemma(hf: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """What both generations have; ``ValueError`` for another activation function."""
    for name in ("hidden_activation", "hidden_act"):
        if name in hf:
            if hf[name] not in ("gelu_pytorch_tanh", None):
                raise ValueError(f"{origin}: {name} {hf[name]!r} is not supported; only gelu_pytorch_tanh is")
            break
    return {
        **{name: values[0] for name, values in SWITCHES.items() if len(values) == 1},
        "softmax_scale": float(hf.get("query_pre_attn_scalar", 256)) ** -0.5,
        "untie_embeddings_and_output_weights": not hf.get("tie_word_embeddings", True),
    }


def read_gemma2(hf: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """A window in every second layer, from the first on, unless ``layer_types`` says otherwise."""
    return {
        **read_gemma(hf, origin),
        **read_rope(hf, origin),
        **read_window(hf, True, lambda layer: layer % 2 == 0, origin, WINDOW),
    }


def query_scalar(size: ModelConfig) -> int:
    """What scores are divided by the root of; ``ValueError`` when it is no whole number, which config.json needs."""
    exact = head_width(size) if size.softmax_scale is None else size.softmax_scale**-2
    if abs(exact - round(exact)) > 1e-6 * exact:
        raise ValueError(
            f"--softmax-scale {size.softmax_scale}: config.json of --model-family {size.model_family} has its square's "
            f"inverse as a whole number, not {exact}"
        )
    return round(exact)


def write_gemma(size: ModelConfig) -> dict[str, Any]:
    """What transformers wants besides the plain keys."""
    full = range(size.num_layers) if size.window_size is None else size.full_attention_layers
    return {
        **write_rope(size),
        "num_key_value_heads": group_count(size),
        "head_dim": head_width(size),
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": query_scalar(size),
        # Without windows the number is not used, but transformers wants one.
        "sliding_window": size.window_size or WINDOW,
        "layer_types": ["full_attention" if i in full else "sliding_attention" for i in range(size.num_layers)],
        "attention_bias": False,
        "attention_dropout": 0.0,
    }


def read_bases(hf: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """Rotary settings by kind of layer, in both spellings; ``ValueError`` for what only one of two bases could have."""
    rope = hf.get("rope_parameters") or {}
    if rope and not set(rope) & {"full_attention", "sliding_attention"}:
        raise ValueError(f"{origin}: rope_parameters of {hf['model_type']} must be given by kind of layer")
    local, scaling = rope.get("sliding_attention") or {}, hf.get("rope_scaling") or {}
    full = {"rope_theta": hf.get("rope_theta", GLOBAL_THETA), **(rope.get("full_attention") or {}), **scaling}
    kinds = [table.get("rope_type", table.get("type", "default")) for table in (full, local)]
    if kinds[0] in ("yarn", "dynamic") or kinds[1] != "default":
        raise ValueError(f"{origin}: rope types {kinds[0]} (full) and {kinds[1]} (sliding) are not supported together")
    theta = local.get("rope_theta", hf.get("rope_local_base_freq", LOCAL_THETA))
    return {
        **read_rope({**hf, "rope_parameters": full, "rope_scaling": None}, origin),
        "rotary_base_local": float(theta),
    }


def read_gemma3(hf: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """A window in all layers but every sixth."""
    pattern = int(hf.get("sliding_window_pattern", 6))
    return {
        **read_gemma(hf, origin),
        **read_bases(hf, origin),
        **read_window(hf, True, lambda layer: (layer + 1) % pattern != 0, origin, WINDOW),
        "qk_layernorm": True,
    }


def write_gemma3(size: ModelConfig) -> dict[str, Any]:
    """The same as for Gemma 2, with a rotary base for each kind of layer."""
    rest, local = write_gemma(size), size.rotary_base_local or size.rotary_base
    plain = {"rope_type": "default", "rope_theta": local}
    return {
        **rest,
        "rope_parameters": {"full_attention": rest["rope_parameters"], "sliding_attention": plain},
        "rope_local_base_freq": local,
    }


TENSORS = (
    *OUTER,
    Tensor(f"{OURS}self_attention.linear_qkv.layer_norm_weight", f"{THEIRS}input_layernorm.weight", "H"),
    *attention(),
    # Behind the attention; Llama's tensor of this name is before the feed-forward.
    Tensor(f"{OURS}post_self_attn_layernorm.weight", f"{THEIRS}post_attention_layernorm.weight", "H"),
    Tensor(f"{OURS}mlp.linear_fc1.layer_norm_weight", f"{THEIRS}pre_feedforward_layernorm.weight", "H"),
    *dense_mlp(),
    Tensor(f"{OURS}post_mlp_layernorm.weight", f"{THEIRS}post_feedforward_layernorm.weight", "H"),
)
ACCEPTS = {"attention_bias": (False, None), "use_bidirectional_attention": (False, None)}
FAMILIES = (
    Family(
        name="gemma2",
        architecture="Gemma2ForCausalLM",
        model_type="gemma2",
        keys=(
            *gemma_keys(),
            Key("attn_logit_softcapping", "attn_logit_softcapping", 50.0),
            Key("final_logit_softcapping", "final_logit_softcapping", 30.0),
        ),
        tensors=TENSORS,
        read=read_gemma2,
        write=write_gemma,
        accepts=ACCEPTS,
        switches=SWITCHES,
        ignore=OLD_BUFFERS,
    ),
    Family(
        name="gemma3",
        architecture="Gemma3ForCausalLM",
        scorer="Gemma3TextForSequenceClassification",
        model_type="gemma3_text",
        keys=(
            *gemma_keys(vocab_size=262_208, max_position_embeddings=131_072),
            Key("final_logit_softcapping", "final_logit_softcapping", None),
        ),
        tensors=(*TENSORS, *head_norms()),
        read=read_gemma3,
        write=write_gemma3,
        # transformers reads the key and then makes no use of it.
        accepts={**ACCEPTS, "attn_logit_softcapping": (None,)},
        switches={
            **{name: values for name, values in SWITCHES.items() if name != "attn_logit_softcapping"},
            "qk_layernorm": (True,),
            "rotary_base_local": ANY,
        },
        ignore=OLD_BUFFERS,
    ),
)
