"""What a model family is, declared once for both directions: its Hugging Face keys, tensors and fixed switches.

Data only, so that configuration and planning need no torch; checkpoint/hf_map.py turns it into tensors.

Shapes are written in symbols (:func:`dimensions`): H hidden, V vocabulary rows, F feed-forward, Q all query heads,
K all key heads, D one head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_steel.config.schema import ModelConfig

REQUIRED = object()
ANY: tuple[Any, ...] = ()
# What decides which modules and tensors a model has. A family fixes each of them, or says which values it has.
SWITCHES = (
    "normalization", "apply_layernorm_1p", "norm_placement", "parallel_residual", "activation", "gated_linear_unit",
    "add_bias_linear", "add_qkv_bias", "qk_layernorm", "qk_layernorm_full", "position_embedding_type",
    "rotary_percent", "rotary_base_local", "window_size", "full_attention_layers", "no_rope_layers", "softmax_scale",
    "attn_logit_softcapping",
    "final_logit_softcapping", "embedding_scale", "stable_embedding", "num_experts", "multi_latent_attention",
    "moe_layer_freq", "moe_shared_expert_intermediate_size", "moe_router_score_function", "moe_router_pre_softmax",
    "moe_router_topk_scaling_factor", "moe_router_enable_expert_bias", "moe_router_num_groups",
    "moe_router_group_topk", "moe_ffn_hidden_size", "ffn_type", "mlp_type",
)  # fmt: skip


def always(size: ModelConfig) -> bool:
    """The default of :attr:`Tensor.when`."""
    return True


def every(size: ModelConfig, layer: int) -> bool:
    """The default of :attr:`Tensor.layers`."""
    return True


def untied(size: ModelConfig) -> bool:
    """Whether there are logits, from an output layer with a weight of its own."""
    return size.untie_embeddings_and_output_weights and not size.score_head


def tied(size: ModelConfig) -> bool:
    """Whether there are logits, from the embedding's weight."""
    return not size.untie_embeddings_and_output_weights and not size.score_head


@dataclass(frozen=True)
class Tensor:
    """One of our tensors and the Hugging Face tensors it is made of.

    Names hold ``{layer}`` and ``{expert}`` where there is one per layer or expert. ``shapes`` are those of ``theirs``,
    one after the other, separated by ``|``. ``how`` names a transform of checkpoint/hf_map.py. ``when`` says which
    sizes have the tensor at all, ``layers`` which layers. ``fp32``: kept in fp32 whatever the model is in.
    """

    ours: str
    theirs: str | tuple[str, ...]
    shapes: str
    how: str = "copy"
    when: Callable[[ModelConfig], bool] = always
    layers: Callable[[ModelConfig, int], bool] = every
    fp32: bool = False

    @property
    def sources(self) -> tuple[str, ...]:
        """``theirs`` as a tuple."""
        return (self.theirs,) if isinstance(self.theirs, str) else self.theirs


# Of reward models of all families; the weight has one name in the model, in checkpoints and in Hugging Face folders.
SCORE = "score.weight"
HEAD = Tensor(SCORE, SCORE, "1 H", when=lambda size: size.score_head)


@dataclass(frozen=True)
class Key:
    """A key of ``config.json`` and the field it stands for.

    ``default`` is what transformers takes an absent key for, a value or a function of the whole configuration;
    ``null`` the same for a key that is null.
    """

    theirs: str
    ours: str
    default: Any = REQUIRED
    null: Any = None

    def read(self, hf: Mapping[str, Any], origin: str) -> Any:
        """The field's value; ``ValueError`` when a key that must be there is not."""
        value = hf[self.theirs] if self.theirs in hf else self.default
        if self.theirs in hf and value is None:
            value = REQUIRED if self.default is REQUIRED else self.null
        if value is REQUIRED:
            raise ValueError(f"{origin}: {self.theirs} is missing")
        return value(hf) if callable(value) else value


@dataclass(frozen=True, kw_only=True)
class Family:
    """Everything that sets a family apart.

    keys: plain keys of ``config.json``, read and written. read: fields that need more than one key, from
    (config.json, origin); it raises ``ValueError`` for what this engine would compute differently. write: the keys
    ``transformers`` needs besides. accepts: keys that are not read, with the values that change nothing; another
    value is refused. switches: values a switch may have (``ANY`` for all); a switch that is not named has its default.
    ignore: patterns of tensors that old files hold and nobody needs. modeling: name of the code written beside the
    weights for a family transformers does not have. dimensions: symbols of its own for shapes. plain_heads: one key
    head per query head, all of them together as wide as the model. wide_feed_forward: it is always four times as wide
    as the model. base_prefix: what names of tensors begin with, except in old files. scorer: transformers' class of
    sequence classification, where its name is not that of ``architecture`` with another end.
    """

    name: str
    architecture: str
    model_type: str
    keys: tuple[Key, ...]
    tensors: tuple[Tensor, ...]
    read: Callable[[Mapping[str, Any], str], dict[str, Any]] = lambda hf, origin: {}
    write: Callable[[ModelConfig], dict[str, Any]] = lambda size: {}
    accepts: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    switches: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    ignore: tuple[str, ...] = ()
    modeling: str | None = None
    dimensions: Callable[[ModelConfig], dict[str, int]] = lambda size: {}
    plain_heads: bool = False
    wide_feed_forward: bool = False
    base_prefix: str = ""
    scorer: str | None = None

    @property
    def scoring_architecture(self) -> str | None:
        """transformers' class for the family with one number as output; None where it has none."""
        if self.modeling is not None:
            return None
        return self.scorer or self.architecture.replace("ForCausalLM", "ForSequenceClassification")


def group_count(size: ModelConfig) -> int:
    """Key/value heads."""
    return size.num_query_groups or size.num_attention_heads


def head_width(size: ModelConfig) -> int:
    """Channels of one head."""
    return size.kv_channels or size.hidden_size // size.num_attention_heads


def expert_count(size: ModelConfig) -> int:
    """Experts of a layer, of which either kind of mixture has its own number."""
    return size.soft_experts if size.ffn_type != "dense" else size.num_experts or 0


def dimensions(family: Family, size: ModelConfig) -> dict[str, int]:
    """The symbols shapes are written in."""
    width = head_width(size)
    common = {
        "H": size.hidden_size,
        "V": size.vocab_size or 0,
        "F": size.ffn_hidden_size,
        "Q": size.num_attention_heads * width,
        "K": group_count(size) * width,
        "D": width,
    }
    return common | family.dimensions(size)


def shapes(family: Family, tensor: Tensor, size: ModelConfig) -> list[tuple[int, ...]]:
    """Shapes of the Hugging Face tensors; a number before a symbol multiplies it (``3H``)."""
    symbols = dimensions(family, size)

    def length(word: str) -> int:
        letters = word.lstrip("0123456789")
        factor = int(word[: len(word) - len(letters)] or 1)
        return factor * (symbols[letters] if letters else 1)

    return [tuple(map(length, shape.split())) for shape in tensor.shapes.split("|")]


def stacked(size: ModelConfig) -> bool:
    """Whether checkpoints hold the decoder layers stacked under one name: when all are alike, as in megatron-core."""
    return not size.moe_layer_freq and size.decoder_layer is None


def has_experts(size: ModelConfig, layer: int) -> bool:
    """Whether the feed-forward of a layer, counted from 0, is a mixture of experts."""
    return size.num_experts is not None and (not size.moe_layer_freq or bool(size.moe_layer_freq[layer]))
