"""Named model sizes. A preset only expands to flags; any flag on the command line or in YAML wins over it.

Sizes are those of the published configurations on the Hugging Face hub. ``steel_1b`` is Steel-LLM with the causal form
of its soft mixture, which has the same weights; ``steel_1b_dense`` has a plain SwiGLU of equal size instead of experts
(3 * 1792 * 3584 = 6 * 4 * 1792 * 448).
"""

from __future__ import annotations

from typing import Any

QWEN2: dict[str, Any] = {
    "model_family": "qwen2",
    "add_qkv_bias": True,
    "norm_epsilon": 1e-6,
    "rotary_base": 1e6,
    "max_position_embeddings": 32768,
}
STEEL: dict[str, Any] = {
    **QWEN2,
    "model_family": "steel",
    "ffn_type": "softmoe_causal",
    "mlp_type": "senet",
    "soft_experts": 6,
    "slots_per_expert": 1,
    "mlp_div_ratio": 4,
    "untie_embeddings_and_output_weights": True,
}
QWEN3: dict[str, Any] = {
    "model_family": "qwen3",
    "qk_layernorm": True,
    "kv_channels": 128,
    "norm_epsilon": 1e-6,
    "rotary_base": 1e6,
    "max_position_embeddings": 40960,
    "num_query_groups": 8,
    "vocab_size": 151936,
}
LLAMA3: dict[str, Any] = {
    "model_family": "llama",
    "norm_epsilon": 1e-5,
    "rotary_base": 5e5,
    "num_query_groups": 8,
    "vocab_size": 128256,
}
OPEN_LLAMA: dict[str, Any] = {
    "model_family": "open_llama",
    "num_layers": 32,
    "hidden_size": 4096,
    "ffn_hidden_size": 11008,
    "num_attention_heads": 32,
    "norm_epsilon": 1e-5,
    "init_method_std": 0.01,
    "max_position_embeddings": 2048,
}

PRESETS: dict[str, dict[str, Any]] = {
    "steel_tiny": {
        **QWEN2,
        "num_layers": 4,
        "hidden_size": 192,
        "ffn_hidden_size": 512,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "rotary_base": 1e4,
        "max_position_embeddings": 1024,
    },
    "steel_1b": {
        **STEEL,
        "num_layers": 18,
        "hidden_size": 1792,
        "ffn_hidden_size": 1792,
        "num_attention_heads": 32,
        "vocab_size": 151936,
    },
    "steel_softmoe_tiny": {
        **STEEL,
        "num_layers": 4,
        "hidden_size": 192,
        "ffn_hidden_size": 192,
        "num_attention_heads": 4,
        "rotary_base": 1e4,
        "max_position_embeddings": 1024,
    },
    "steel_1b_dense": {
        **QWEN2,
        "num_layers": 18,
        "hidden_size": 1792,
        "ffn_hidden_size": 3584,
        "num_attention_heads": 32,
        "vocab_size": 151936,
        "untie_embeddings_and_output_weights": True,
    },
    "mini_qwen_1b": {
        **QWEN2,
        "num_layers": 48,
        "hidden_size": 1024,
        "ffn_hidden_size": 4864,
        "num_attention_heads": 16,
        "num_query_groups": 4,
        "vocab_size": 151936,
    },
    "qwen2.5_0.5b": {
        **QWEN2,
        "num_layers": 24,
        "hidden_size": 896,
        "ffn_hidden_size": 4864,
        "num_attention_heads": 14,
        "num_query_groups": 2,
        "vocab_size": 151936,
    },
    "qwen2.5_1.5b": {
        **QWEN2,
        "num_layers": 28,
        "hidden_size": 1536,
        "ffn_hidden_size": 8960,
        "num_attention_heads": 12,
        "num_query_groups": 2,
        "vocab_size": 151936,
        "max_position_embeddings": 131072,
    },
    "qwen3_0.6b": {
        **QWEN3,
        "num_layers": 28,
        "hidden_size": 1024,
        "ffn_hidden_size": 3072,
        "num_attention_heads": 16,
    },
    "qwen3_1.7b": {
        **QWEN3,
        "num_layers": 28,
        "hidden_size": 2048,
        "ffn_hidden_size": 6144,
        "num_attention_heads": 16,
    },
    "llama3.2_1b": {
        **LLAMA3,
        "num_layers": 16,
        "hidden_size": 2048,
        "ffn_hidden_size": 8192,
        "num_attention_heads": 32,
        "use_rope_scaling": True,
        "rope_scaling_factor": 32.0,
        "max_position_embeddings": 131072,
    },
    "llama3_8b": {
        **LLAMA3,
        "num_layers": 32,
        "hidden_size": 4096,
        "ffn_hidden_size": 14336,
        "num_attention_heads": 32,
        "untie_embeddings_and_output_weights": True,
        "max_position_embeddings": 8192,
    },
    "smollm2_135m": {
        "model_family": "llama",
        "num_layers": 30,
        "hidden_size": 576,
        "ffn_hidden_size": 1536,
        "num_attention_heads": 9,
        "num_query_groups": 3,
        "norm_epsilon": 1e-5,
        "rotary_base": 1e5,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
    },
    "mistral_7b": {
        "model_family": "mistral",
        "num_layers": 32,
        "hidden_size": 4096,
        "ffn_hidden_size": 14336,
        "num_attention_heads": 32,
        "num_query_groups": 8,
        "norm_epsilon": 1e-5,
        "rotary_base": 1e6,
        "vocab_size": 32768,
        "untie_embeddings_and_output_weights": True,
        "max_position_embeddings": 32768,
    },
    "open_llama_7b": {**OPEN_LLAMA, "stable_embedding": True, "embedding_init": "xavier", "vocab_size": 100_000},
    "open_llama_7b_v2": {**OPEN_LLAMA, "untie_embeddings_and_output_weights": True, "vocab_size": 68_762},
}
