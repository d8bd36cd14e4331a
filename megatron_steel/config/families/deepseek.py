"""DeepSeek-V2 and V3: latent attention, and after the first layers a mixture of experts with some that all take."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_steel.config.families.llama import OURS, OUTER, THEIRS, common_keys, dense_mlp, layer_norms, read_common
from megatron_steel.config.families.moe import dense, expert_dimensions, experts, without
from megatron_steel.config.family import ANY, Family, Key, Tensor, has_experts
from megatron_steel.config.rope import write_rope
from megatron_steel.config.schema import ModelConfig


def query_latent(size: ModelConfig) -> bool:
    """Whether queries come from a latent, too."""
    return size.q_lora_rank is not None


def whole_query(size: ModelConfig) -> bool:
    """Whether queries are projected at once."""
    return size.q_lora_rank is None


def latent_attention() -> tuple[Tensor, ...]:
    """Projections down to the latents and up from them, and the norms of latents."""
    ours, theirs = f"{OURS}self_attention.", f"{THEIRS}self_attn."
    return (
        Tensor(f"{OURS}input_layernorm.weight", f"{THEIRS}input_layernorm.weight", "H"),
        Tensor(f"{ours}linear_q_proj.weight", f"{theirs}q_proj.weight", "QB H", when=whole_query),
        Tensor(f"{ours}linear_q_down_proj.weight", f"{theirs}q_a_proj.weight", "QA H", when=query_latent),
        Tensor(f"{ours}linear_q_up_proj.layer_norm_weight", f"{theirs}q_a_layernorm.weight", "QA", when=query_latent),
        Tensor(f"{ours}linear_q_up_proj.weight", f"{theirs}q_b_proj.weight", "QB QA", when=query_latent),
        Tensor(f"{ours}linear_kv_down_proj.weight", f"{theirs}kv_a_proj_with_mqa.weight", "KA H"),
        Tensor(f"{ours}linear_kv_up_proj.layer_norm_weight", f"{theirs}kv_a_layernorm.weight", "KL"),
        Tensor(f"{ours}linear_kv_up_proj.weight", f"{theirs}kv_b_proj.weight", "KB KL"),
        Tensor(f"{ours}linear_proj.weight", f"{theirs}o_proj.weight", "H O"),
    )


def shared_experts() -> tuple[Tensor, ...]:
    """What every token goes through besides its experts, as wide as several of them."""
    ours, theirs = f"{OURS}mlp.shared_experts.", f"{THEIRS}mlp.shared_experts."
    both = (f"{theirs}gate_proj.weight", f"{theirs}up_proj.weight")
    return (
        Tensor(f"{ours}linear_fc1.weight", both, "S H | S H", "gate_up", layers=has_experts),
        Tensor(f"{ours}linear_fc2.weight", f"{theirs}down_proj.weight", "H S", layers=has_experts),
    )


def latent_dimensions(size: ModelConfig) -> dict[str, int]:
    """QA, QB: query latent and all query heads. KL, KA, KB: key/value latent, with the rotary key, and all heads.

    O: all value heads. S: shared experts.
    """
    heads = size.num_attention_heads
    return {
        **expert_dimensions(size),
        "QA": size.q_lora_rank or 0,
        "QB": heads * (size.qk_head_dim + size.qk_pos_emb_head_dim),
        "KL": size.kv_lora_rank,
        "KA": size.kv_lora_rank + size.qk_pos_emb_head_dim,
        "KB": heads * (size.qk_head_dim + size.v_head_dim),
        "O": heads * size.v_head_dim,
        "S": size.moe_shared_expert_intermediate_size or 0,
    }


def other_name(hf: Mapping[str, Any]) -> int:
    """The number of experts under the name that transformers 5 may write."""
    return int(hf["num_local_experts"])


def keys(**defaults: Any) -> tuple[Key, ...]:
    """Sizes; ``defaults`` of those that differ between the two generations."""
    return (
        *without(common_keys(), "num_key_value_heads", "head_dim"),
        Key("q_lora_rank", "q_lora_rank", 1536),
        Key("kv_lora_rank", "kv_lora_rank", 512),
        Key("qk_nope_head_dim", "qk_head_dim", 128),
        Key("qk_rope_head_dim", "qk_pos_emb_head_dim", 64),
        Key("v_head_dim", "v_head_dim", 128),
        Key("n_routed_experts", "num_experts", other_name),
        Key("num_experts_per_tok", "moe_router_topk"),
        Key("moe_intermediate_size", "moe_ffn_hidden_size"),
        Key("routed_scaling_factor", "moe_router_topk_scaling_factor", defaults["scaling"]),
    )


def check_yarn(size: ModelConfig, origin: str) -> None:
    """``ValueError`` for a scaling that megatron-core's latent attention and transformers compute differently."""
    if size.rope_scaling_type != "yarn":
        raise ValueError(f"{origin}: rope scaling {size.rope_scaling_type!r} is not supported for DeepSeek; yarn is")
    if (size.rope_mscale is None) != (size.rope_mscale_all_dim is None):
        raise ValueError(f"{origin}: yarn with only one of mscale and mscale_all_dim is not supported for DeepSeek")
    if size.rope_attention_factor is not None or not size.rope_truncate:
        raise ValueError(f"{origin}: yarn with attention_factor or without truncate is not supported for DeepSeek")


def read_latent(hf: Mapping[str, Any], origin: str, shared: int, first_dense: int) -> dict[str, Any]:
    """What both generations have; ``shared`` and ``first_dense`` are defaults of absent keys."""
    if hf.get("rms_norm_eps", 1e-6) != 1e-6:
        # transformers norms latents with 1e-6 whatever this says, and we have one epsilon.
        raise ValueError(f"{origin}: rms_norm_eps {hf['rms_norm_eps']} is not supported for DeepSeek; only 1e-06 is")
    first, layers = hf.get("first_k_dense_replace", first_dense), hf["num_hidden_layers"]
    if first >= layers:
        raise ValueError(f"{origin}: first_k_dense_replace {first} leaves none of {layers} layers with experts")
    width = (hf.get("n_shared_experts", shared) or 0) * hf["moe_intermediate_size"]
    common = read_common(hf, origin)
    if common["use_rope_scaling"]:
        check_yarn(ModelConfig(**common), origin)
    return {
        **common,
        "multi_latent_attention": True,
        "moe_layer_freq": [int(layer >= first) for layer in range(layers)] if first else [],
        "moe_shared_expert_intermediate_size": width or None,
    }


def read_groups(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Groups of experts to choose from first; one group, or all of them, is the same as none."""
    groups, chosen = hf.get("n_group"), hf.get("topk_group")
    limited = groups is not None and chosen is not None and groups > chosen
    return {
        "moe_router_num_groups": groups if limited else None,
        "moe_router_group_topk": chosen if limited else None,
    }


def read_v3(hf: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """Sigmoid scores, a bias that chooses, weights that sum to one."""
    defaults = {"n_group": 8, "topk_group": 4}
    return {
        **read_latent(hf, origin, shared=1, first_dense=3),
        **read_groups({**defaults, **hf}),
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
    }


def read_v2(hf: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """Softmax over all experts, whose weights stay as they are."""
    method = hf.get("topk_method", "greedy")
    if method not in ("greedy", "group_limited_greedy"):
        raise ValueError(f"{origin}: topk_method {method!r} is not supported for deepseek_v2")
    groups = read_groups(hf) if method == "group_limited_greedy" else {}
    return {**read_latent(hf, origin, shared=2, first_dense=0), **groups, "moe_router_pre_softmax": True}


def write_latent(size: ModelConfig) -> dict[str, Any]:
    """What transformers wants besides the plain keys, in both generations."""
    frequency = size.moe_layer_freq or [1]
    shared, width = size.moe_shared_expert_intermediate_size or 0, size.moe_ffn_hidden_size or size.ffn_hidden_size
    return {
        **write_rope(size),
        "moe_intermediate_size": width,
        "routed_scaling_factor": size.moe_router_topk_scaling_factor or 1.0,
        "num_key_value_heads": size.num_attention_heads,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "n_shared_experts": shared // width,
        "first_k_dense_replace": frequency.index(1),
        "n_group": size.moe_router_num_groups or 1,
        "topk_group": size.moe_router_group_topk or 1,
        "moe_layer_freq": 1,
    }


def write_v2(size: ModelConfig) -> dict[str, Any]:
    """The keys of :func:`read_v2`."""
    method = "group_limited_greedy" if size.moe_router_num_groups else "greedy"
    return {**write_latent(size), "topk_method": method, "scoring_func": "softmax", "norm_topk_prob": False}


def write_v3(size: ModelConfig) -> dict[str, Any]:
    """The keys of :func:`read_v3`."""
    fixed = {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "norm_topk_prob": True, "rope_interleave": True}
    return {**write_latent(size), **fixed, "num_nextn_predict_layers": 0}


BIAS = Tensor(
    f"{OURS}mlp.router.expert_bias", f"{THEIRS}mlp.gate.e_score_correction_bias", "E", layers=has_experts, fp32=True
)
TENSORS = (
    *OUTER,
    *latent_attention(),
    layer_norms(layers=dense)[1],
    *dense_mlp(layers=dense),
    *experts(f"{THEIRS}mlp.", "gate_proj", "up_proj", "down_proj"),
    *shared_experts(),
)
SWITCHES = {
    "multi_latent_attention": (True,),
    "num_experts": ANY,
    "moe_ffn_hidden_size": ANY,
    "moe_layer_freq": ANY,
    "moe_shared_expert_intermediate_size": ANY,
    "moe_router_num_groups": ANY,
    "moe_router_group_topk": ANY,
    "moe_router_topk_scaling_factor": ANY,
}
COMMON = {"attention_bias": (False, None), "mlp_bias": (False, None), "moe_layer_freq": (1,), "ep_size": (1,)}
FAMILIES = (
    Family(
        name="deepseek_v2",
        architecture="DeepseekV2ForCausalLM",
        model_type="deepseek_v2",
        keys=keys(scaling=1.0),
        tensors=TENSORS,
        read=read_v2,
        write=write_v2,
        accepts={**COMMON, "scoring_func": ("softmax",), "norm_topk_prob": (False, None)},
        switches={**SWITCHES, "moe_router_pre_softmax": (True,)},
        dimensions=latent_dimensions,
    ),
    Family(
        name="deepseek_v3",
        architecture="DeepseekV3ForCausalLM",
        model_type="deepseek_v3",
        keys=keys(scaling=2.5),
        tensors=(*TENSORS, BIAS),
        read=read_v3,
        write=write_v3,
        accepts={
            **COMMON,
            "scoring_func": ("sigmoid",),
            "topk_method": ("noaux_tc",),
            "norm_topk_prob": (True,),
            "rope_interleave": (True, None),
        },
        switches={
            **SWITCHES, "moe_router_score_function": ("sigmoid",), "moe_router_enable_expert_bias": (True,),
        },
        # Predicts a token further ahead; transformers has no use for it either.
        ignore=(r"model\.layers\.61\..*",),
        dimensions=latent_dimensions,
    ),
)  # fmt: skip
