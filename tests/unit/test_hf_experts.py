"""Published config.json files of models with experts, to sizes and back, against transformers' own reading of both."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoConfig

from megatron_steel.config.check import check_family
from megatron_steel.config.check_experts import check_experts
from megatron_steel.config.check_latent import check_latent
from megatron_steel.config.hf_sizes import hf_from_sizes, sizes_from_hf
from megatron_steel.config.load import apply
from megatron_steel.config.schema import Config

NO_IDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
LATENT = {
    "attention_bias": False, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 10000, "moe_layer_freq": 1, "tie_word_embeddings": False,
    "initializer_range": 0.02, "max_position_embeddings": 163840, "ep_size": 1, "vocab_size": 102400,
}  # fmt: skip
YARN = {
    "type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1, "original_max_position_embeddings": 4096,
}  # fmt: skip
PUBLISHED: dict[str, dict[str, Any]] = {
    "Mixtral-8x7B": {
        "model_type": "mixtral", "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
        "intermediate_size": 14336, "max_position_embeddings": 32768, "num_attention_heads": 32,
        "num_experts_per_tok": 2, "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 8,
        "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02, "sliding_window": None,
        "tie_word_embeddings": False, "vocab_size": 32000,
    },
    "Qwen3-30B-A3B": {
        "model_type": "qwen3_moe", "attention_bias": False, "decoder_sparse_step": 1, "head_dim": 128,
        "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 6144,
        "max_position_embeddings": 40960, "max_window_layers": 48, "mlp_only_layers": [],
        "moe_intermediate_size": 768, "norm_topk_prob": True, "num_attention_heads": 32, "num_experts": 128,
        "num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4, "rms_norm_eps": 1e-06,
        "rope_scaling": None, "rope_theta": 1000000.0, "sliding_window": None, "tie_word_embeddings": False,
        "use_sliding_window": False, "vocab_size": 151936,
    },
    "DeepSeek-V2-Lite": {
        **LATENT, "model_type": "deepseek_v2", "first_k_dense_replace": 1, "hidden_size": 2048,
        "intermediate_size": 10944, "moe_intermediate_size": 1408, "n_group": 1, "n_routed_experts": 64,
        "n_shared_experts": 2, "norm_topk_prob": False, "num_attention_heads": 16, "num_experts_per_tok": 6,
        "num_hidden_layers": 27, "num_key_value_heads": 16, "q_lora_rank": None, "routed_scaling_factor": 1.0,
        "scoring_func": "softmax", "topk_group": 1, "topk_method": "greedy",
        "rope_scaling": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
    },
    "DeepSeek-V2": {
        **LATENT, "model_type": "deepseek_v2", "first_k_dense_replace": 1, "hidden_size": 5120,
        "intermediate_size": 12288, "moe_intermediate_size": 1536, "n_group": 8, "n_routed_experts": 160,
        "n_shared_experts": 2, "norm_topk_prob": False, "num_attention_heads": 128, "num_experts_per_tok": 6,
        "num_hidden_layers": 60, "num_key_value_heads": 128, "q_lora_rank": 1536, "routed_scaling_factor": 16.0,
        "scoring_func": "softmax", "topk_group": 3, "topk_method": "group_limited_greedy",
        "rope_scaling": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
    },
    "DeepSeek-V3": {
        **LATENT, "model_type": "deepseek_v3", "first_k_dense_replace": 3, "hidden_size": 7168,
        "intermediate_size": 18432, "moe_intermediate_size": 2048, "n_group": 8, "n_routed_experts": 256,
        "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 128, "num_experts_per_tok": 8,
        "num_hidden_layers": 61, "num_key_value_heads": 128, "num_nextn_predict_layers": 1, "q_lora_rank": 1536,
        "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "topk_group": 4, "topk_method": "noaux_tc",
        "rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}, "vocab_size": 129280,
    },
}  # fmt: skip
# What transformers does not compute with, or says in two ways.
IGNORED = {
    "architectures", "dtype", "router_aux_loss_coef", "transformers_version", "max_window_layers", "scoring_func",
    "ep_size", "num_nextn_predict_layers", "num_mtp_layers", "moe_layer_freq", "n_group", "topk_group", "topk_method",
    "rope_theta", "rope_scaling", "num_experts", "torch_dtype", "head_dim", "sliding_window", "attention_bias",
    "bos_token_id", "eos_token_id", "norm_topk_prob", "rope_interleave",
}  # fmt: skip


def configured(hf: dict[str, Any]) -> Config:
    config = Config()
    apply(config, sizes_from_hf(hf, "test"), "test")
    return config


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files_there_and_back(name: str) -> None:
    config = configured(PUBLISHED[name])
    for rule in (check_family, check_experts, check_latent):
        rule(config)
    assert config.size.vocab_size is not None
    back = hf_from_sizes(config.size, config.size.vocab_size, NO_IDS, "bfloat16")
    assert configured(back).size == config.size
    theirs, ours = (AutoConfig.for_model(**values).to_dict() for values in (PUBLISHED[name], back))
    theirs["rope_parameters"].pop("type", None)  # the older name of rope_type, which stands beside it
    left = theirs.keys() - IGNORED
    assert {key: ours[key] for key in left} == {key: theirs[key] for key in left}


@pytest.mark.parametrize(
    ("name", "changes", "named"),
    [
        ("DeepSeek-V3", {"rms_norm_eps": 1e-5}, "rms_norm_eps 1e-05"),
        ("DeepSeek-V3", {"norm_topk_prob": False}, "norm_topk_prob False"),
        ("DeepSeek-V3", {"rope_interleave": False}, "rope_interleave False"),
        ("DeepSeek-V3", {"attention_bias": True}, "attention_bias True"),
        ("DeepSeek-V3", {"first_k_dense_replace": 61}, "first_k_dense_replace 61"),
        ("DeepSeek-V3", {"rope_scaling": {**YARN, "mscale": 1.0}}, "only one of mscale"),
        ("DeepSeek-V2", {"topk_method": "noaux_tc"}, "topk_method 'noaux_tc'"),
        ("DeepSeek-V2", {"norm_topk_prob": True}, "norm_topk_prob True"),
        ("Qwen3-30B-A3B", {"num_experts": 0}, "without experts"),
        ("Qwen3-30B-A3B", {"decoder_sparse_step": 0}, "without experts"),
    ],
)
def test_refusals_name_the_key(name: str, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError) as caught:
        sizes_from_hf({**PUBLISHED[name], **changes}, "test")
    assert named in str(caught.value)
