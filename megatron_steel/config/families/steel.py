"""Steel-LLM: Qwen2's attention with a double SwiGLU or a soft mixture of experts as feed-forward."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from megatron_steel.config.families.llama import OURS, OUTER, THEIRS, attention, common_keys, read_common, write_common
from megatron_steel.config.family import ANY, Family, Key, Tensor
from megatron_steel.config.schema import ModelConfig


def is_soft(size: ModelConfig) -> bool:
    """Whether the feed-forward is a soft mixture of experts."""
    return size.ffn_type != "dense"


def expert_width(size: ModelConfig) -> int:
    """Inner width of one expert, or of the double SwiGLU that stands alone: mlp_div_ratio times narrower."""
    return size.ffn_hidden_size // (size.mlp_div_ratio if is_soft(size) or size.mlp_type == "senet" else 1)


def is_double(size: ModelConfig) -> bool:
    """Whether one feed-forward, or one expert, is the double SwiGLU."""
    return size.mlp_type == "senet"


def stands_alone(double: bool) -> Callable[[ModelConfig], bool]:
    """Sizes with a single feed-forward of this kind."""
    return lambda size: not is_soft(size) and is_double(size) is double


def mixes(double: bool) -> Callable[[ModelConfig], bool]:
    """Sizes with experts of this kind."""
    return lambda size: is_soft(size) and is_double(size) is double


def of_form(*forms: str) -> Callable[[ModelConfig], bool]:
    """Sizes with a soft mixture of one of these forms."""
    return lambda size: size.ffn_type in forms


def feed_forward(ours: str, theirs: str, when: Callable[[bool], Callable[[ModelConfig], bool]]) -> tuple[Tensor, ...]:
    """Both matrices of a feed-forward of either kind; ``up_proj`` is the first one's half without an activation."""
    plain, double = when(False), when(True)
    first, second = f"{OURS}mlp.{ours}linear_fc1.weight", f"{OURS}mlp.{ours}linear_fc2.weight"
    gate, up, down = (f"{THEIRS}mlp.{theirs}{part}_proj.weight" for part in ("gate", "up", "down"))
    gate_up, gate_down = (f"{THEIRS}mlp.{theirs}gate_{part}_proj.weight" for part in ("up", "down"))
    return (
        Tensor(first, (gate, up), "f H | f H", "gate_up", when=plain),
        Tensor(second, down, "H f", when=plain),
        Tensor(first, (gate_up, up), "f H | f H", "gate_up", when=double),
        Tensor(second, (gate_down, down), "H f | H f", "gate_up", when=double),
    )


TENSORS = (
    *OUTER,
    Tensor(f"{OURS}self_attention.linear_qkv.layer_norm_weight", f"{THEIRS}input_layernorm.weight", "H"),
    # The norm before a linear layer belongs to it; a mixture begins with more than one.
    Tensor(
        f"{OURS}mlp.linear_fc1.layer_norm_weight", f"{THEIRS}post_attention_layernorm.weight", "H",
        when=lambda size: not is_soft(size),
    ),
    Tensor(f"{OURS}pre_mlp_layernorm.weight", f"{THEIRS}post_attention_layernorm.weight", "H", when=is_soft),
    *attention(),
    *feed_forward("", "", stands_alone),
    *feed_forward("experts.", "experts.{expert}.", mixes),
    Tensor(f"{OURS}mlp.gating.weight", f"{THEIRS}mlp.gating.weight", "n H", when=of_form("softmoe_v1")),
    Tensor(f"{OURS}mlp.gating.bias", f"{THEIRS}mlp.gating.bias", "n", when=of_form("softmoe_v1")),
    Tensor(f"{OURS}mlp.score", f"{THEIRS}mlp.score", "H s", when=of_form("softmoe_v2")),
    Tensor(f"{OURS}mlp.phi", f"{THEIRS}mlp.phi", "H n p", when=of_form("softmoe_v3", "softmoe_causal")),
    Tensor(f"{OURS}mlp.scale", f"{THEIRS}mlp.scale", "1", when=of_form("softmoe_v3", "softmoe_causal")),
)  # fmt: skip
FORMS = ("softmoe_v1", "softmoe_v2", "softmoe_v3", "softmoe_causal")
KINDS = {"raw": "swiglu", "senet": "senet"}


def describes_steel(hf: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` is a Steel model's: the published one says qwen2 and tells apart by other keys."""
    return hf.get("model_type") == "steel" or "FFN_type" in hf


def read_steel(hf: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """Kinds of the feed-forward, and what Qwen2 has."""
    form, kind = hf.get("FFN_type", "raw"), hf.get("mlp_type", "raw")
    if form not in ("raw", *FORMS) or kind not in KINDS:
        raise ValueError(f"{origin}: FFN_type {form!r} with mlp_type {kind!r} is not supported")
    forms = {"ffn_type": "dense" if form == "raw" else form, "mlp_type": KINDS[kind]}
    return {**read_common(hf, origin), **forms, "add_qkv_bias": True}


def write_steel(size: ModelConfig) -> dict[str, Any]:
    """Names of the modules beside the weights, and the published names of the kinds."""
    kinds = {ours: theirs for theirs, ours in KINDS.items()}
    return {
        **write_common(size),
        "auto_map": {
            "AutoConfig": "configuration_steel.SteelConfig",
            "AutoModelForCausalLM": "modeling_steel.SteelForCausalLM",
        },
        "FFN_type": size.ffn_type if is_soft(size) else "raw",
        "mlp_type": kinds[size.mlp_type],
        "sliding_window": None,
        "use_sliding_window": False,
    }


FAMILIES = (
    Family(
        name="steel",
        architecture="SteelForCausalLM",
        model_type="steel",
        keys=(
            *common_keys(groups=32),
            Key("n_experts", "soft_experts", 6),
            Key("slots_per_expert", "slots_per_expert", 1),
            Key("mlp_div_ratio", "mlp_div_ratio", 1),
        ),
        tensors=TENSORS,
        read=read_steel,
        write=write_steel,
        accepts={"use_sliding_window": (False, None), "attention_bias": (True, None)},
        switches={"add_qkv_bias": (True,), "ffn_type": ANY, "mlp_type": ANY},
        modeling="steel",
        dimensions=lambda size: {
            "f": expert_width(size),
            "n": size.soft_experts,
            "p": size.slots_per_expert,
            "s": size.soft_experts * size.slots_per_expert,
        },
    ),
)
