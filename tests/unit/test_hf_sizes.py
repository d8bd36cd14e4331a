"""Sizes to and from config.json, against transformers' own configuration classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import (
    AutoConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
)

from megatron_steel.checkpoint.modeling.open_llama.configuration_open_llama import OpenLlamaConfig
from megatron_steel.checkpoint.modeling.steel.configuration_steel import SteelConfig
from megatron_steel.config.families import FAMILIES
from megatron_steel.config.hf_sizes import hf_from_sizes, read_sizes, sizes_from_hf
from megatron_steel.config.load import apply, parse
from megatron_steel.config.presets import PRESETS
from megatron_steel.config.schema import Config

AutoConfig.register("steel", SteelConfig)
AutoConfig.register("open-llama", OpenLlamaConfig)
# By model_type.
CLASSES = {
    "open-llama": OpenLlamaConfig,
    "steel": SteelConfig,
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "smollm3": SmolLM3Config,
    "gpt_neox": GPTNeoXConfig,
    "gemma2": Gemma2Config,
    "gemma3_text": Gemma3TextConfig,
    "olmo2": Olmo2Config,
}
MINIMAL = {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "vocab_size": 100,
    "max_position_embeddings": 4096,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
NO_IDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}

# The config.json files on the Hugging Face hub, cut to the keys that decide numbers, in the spelling they have there.
PUBLISHED: dict[str, dict[str, Any]] = {
    "qwen2.5_0.5b": {
        "model_type": "qwen2",
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "hidden_size": 896,
        "initializer_range": 0.02,
        "intermediate_size": 4864,
        "max_position_embeddings": 32768,
        "max_window_layers": 24,
        "num_attention_heads": 14,
        "num_hidden_layers": 24,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "qwen3_0.6b": {
        "model_type": "qwen3",
        "attention_bias": False,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 1024,
        "initializer_range": 0.02,
        "intermediate_size": 3072,
        "max_position_embeddings": 40960,
        "max_window_layers": 28,
        "num_attention_heads": 16,
        "num_hidden_layers": 28,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "llama3.2_1b": {
        "model_type": "llama",
        "attention_bias": False,
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "initializer_range": 0.02,
        "intermediate_size": 8192,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "num_attention_heads": 32,
        "num_hidden_layers": 16,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {key: value for key, value in LLAMA3_ROPE.items() if key != "rope_theta"},
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "vocab_size": 128256,
    },
    "mistral_7b": {
        "model_type": "mistral",
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "vocab_size": 32768,
    },
    "open_llama_7b_v2": {
        "model_type": "open-llama",
        "attention_dropout_prob": 0.1,
        "hidden_act": "silu",
        "hidden_dropout_prob": 0.1,
        "hidden_size": 4096,
        "initializer_range": 0.01,
        "intermediate_size": 11008,
        "max_position_embeddings": 2048,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "pad_token_id": 32000,
        "rms_norm_eps": 1e-05,
        "shared_input_output_embedding": False,
        "tie_word_embeddings": False,
        "use_memorry_efficient_attention": True,
        "use_stable_embedding": False,
        "vocab_size": 68762,
    },
}


def configured(sizes: dict[str, Any]) -> Config:
    """Defaults with these sizes."""
    config = Config()
    apply(config, sizes, "test")
    return config


def old_spelling(hf: dict[str, Any]) -> dict[str, Any]:
    """The same configuration as transformers 4 wrote it."""
    return {key: value for key, value in hf.items() if key != "rope_parameters"}


def new_spelling(hf: dict[str, Any]) -> dict[str, Any]:
    """The same configuration as transformers 5 writes it."""
    return {key: value for key, value in hf.items() if key not in ("rope_theta", "rope_scaling")}


@pytest.mark.parametrize("spelling", [old_spelling, new_spelling, dict])
@pytest.mark.parametrize("name", PRESETS)
def test_presets_through_transformers(name: str, spelling: Any) -> None:
    size = parse(["--model", name]).size
    rows = size.vocab_size or 1000
    theirs = AutoConfig.for_model(**spelling(hf_from_sizes(size, rows, NO_IDS, "bfloat16")))
    classes = {**CLASSES, "qwen3_moe": Qwen3MoeConfig}
    assert type(theirs) is classes[FAMILIES[size.model_family].model_type]
    assert (theirs.num_hidden_layers, theirs.hidden_size) == (size.num_layers, size.hidden_size)
    assert theirs.intermediate_size == size.ffn_hidden_size and theirs.vocab_size == rows
    assert theirs.num_key_value_heads == (size.num_query_groups or size.num_attention_heads)
    assert theirs.rope_parameters["rope_theta"] == size.rotary_base
    assert theirs.tie_word_embeddings is not size.untie_embeddings_and_output_weights
    assert getattr(theirs, "sliding_window", None) is None

    again = configured(sizes_from_hf(theirs.to_dict(), "x")).size
    size.num_query_groups = size.num_query_groups or size.num_attention_heads
    size.kv_channels = size.kv_channels or size.hidden_size // size.num_attention_heads
    size.vocab_size = rows
    size.moe_aux_loss_coeff = 0.0  # how it is trained further is no part of a model
    assert again == size


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_are_the_presets(name: str) -> None:
    published = PUBLISHED[name]
    ours = sizes_from_hf(published, "x")
    assert ours == sizes_from_hf(AutoConfig.for_model(**published).to_dict(), "x")
    assert {key: ours[key] for key in PRESETS[name]} == PRESETS[name]
    switches = {"use_rope_scaling": False, "untie_embeddings_and_output_weights": False, "qk_layernorm": False}
    for key, default in {**switches, "add_qkv_bias": False, "init_method_std": 0.02}.items():
        assert getattr(configured(ours).size, key) == PRESETS[name].get(key, default)


@pytest.mark.parametrize("family", CLASSES)
def test_absent_keys_mean_what_transformers_takes_them_for(family: str) -> None:
    minimal = {"model_type": family, **MINIMAL}
    full = AutoConfig.for_model(**minimal).to_dict()
    if family == "qwen3":  # its default of 32 groups does not fit 8 heads, but both must read it so
        assert full["num_key_value_heads"] == sizes_from_hf(minimal, "x")["num_query_groups"] == 32
    assert sizes_from_hf(full, "x") == sizes_from_hf(minimal, "x")


def test_absent_sliding_window_of_mistral_is_its_default() -> None:
    minimal = {"model_type": "mistral", **MINIMAL, "max_position_embeddings": 32768}
    assert AutoConfig.for_model(**minimal).sliding_window == 4096 == sizes_from_hf(minimal, "x")["window_size"]
    assert sizes_from_hf({**minimal, "sliding_window": None}, "x")["window_size"] is None


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("mistral", {"sliding_window": 9}),
        ("qwen2", {"use_sliding_window": True}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 0}),
        ("qwen3", {"use_sliding_window": False, "sliding_window": 9, "max_window_layers": 0}),
        (
            "qwen3",
            {
                "use_sliding_window": True,
                "sliding_window": 9,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
            },
        ),
        ("smollm3", {"use_sliding_window": True, "sliding_window": 9}),
        ("smollm3", {"no_rope_layers": [1, 0, 0, 1, 1], "use_sliding_window": False, "sliding_window": 9}),
        ("smollm3", {"no_rope_layer_interval": 2}),
    ],
)
def test_windows_and_layers_without_rotation(family: str, change: dict[str, Any]) -> None:
    """Against what transformers' configuration makes of them, and once more from what we write."""
    values = {"model_type": family, **MINIMAL, "num_hidden_layers": 4, **change}
    theirs = AutoConfig.for_model(**values)
    for read in (values, theirs.to_dict(), hf_from_sizes(configured(sizes_from_hf(values, "x")).size, 9, NO_IDS, "x")):
        sizes = sizes_from_hf(read, "x")
        kinds = getattr(theirs, "layer_types", ["sliding_attention"] * 4)
        windows = [theirs.sliding_window if kind == "sliding_attention" else None for kind in kinds]
        full = sizes["full_attention_layers"]
        assert [None if layer in full else sizes["window_size"] for layer in range(4)] == windows
        turned = getattr(theirs, "no_rope_layers", [1] * 4)[:4]
        assert [int(layer not in sizes.get("no_rope_layers", [])) for layer in range(4)] == turned


def test_pythia_and_gpt2_as_published() -> None:
    """Keys of EleutherAI/pythia-70m and openai-community/gpt2 on the hub."""
    pythia = {
        "model_type": "gpt_neox", "hidden_act": "gelu", "hidden_size": 512, "initializer_range": 0.02,
        "intermediate_size": 2048, "layer_norm_eps": 1e-05, "max_position_embeddings": 2048,
        "num_attention_heads": 8, "num_hidden_layers": 6, "rotary_emb_base": 10000, "rotary_pct": 0.25,
        "tie_word_embeddings": False, "use_parallel_residual": True, "vocab_size": 50304,
    }  # fmt: skip
    size = configured(sizes_from_hf(pythia, "x")).size
    assert (size.rotary_percent, size.rotary_base, size.parallel_residual) == (0.25, 10000.0, True)
    assert (size.activation, size.normalization, size.norm_epsilon) == ("gelu", "LayerNorm", 1e-5)
    assert size.untie_embeddings_and_output_weights and size.add_bias_linear and not size.gated_linear_unit
    again = GPTNeoXConfig(**hf_from_sizes(size, 50304, NO_IDS, "float16"))
    assert {key: getattr(again, key, None) for key in pythia if "rotary" not in key} == {
        key: value for key, value in pythia.items() if "rotary" not in key
    }
    assert again.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}

    gpt2 = {
        "model_type": "gpt2", "activation_function": "gelu_new", "attn_pdrop": 0.1, "embd_pdrop": 0.1,
        "initializer_range": 0.02, "layer_norm_epsilon": 1e-05, "n_ctx": 1024, "n_embd": 768, "n_head": 12,
        "n_layer": 12, "n_positions": 1024, "resid_pdrop": 0.1, "vocab_size": 50257,
    }  # fmt: skip
    size = configured(sizes_from_hf(gpt2, "x")).size
    assert (size.ffn_hidden_size, size.max_position_embeddings, size.activation) == (3072, 1024, "gelu_tanh")
    assert size.position_embedding_type == "learned_absolute" and not size.untie_embeddings_and_output_weights
    again = GPT2Config(**hf_from_sizes(size, 50257, NO_IDS, "float32"))
    assert again.n_inner == 3072 and {
        key: getattr(again, key) for key in gpt2 if "drop" not in key and key != "n_ctx"
    } == {key: value for key, value in gpt2.items() if "drop" not in key and key != "n_ctx"}


def test_null_groups_are_one_per_head() -> None:
    values = {"model_type": "llama", **MINIMAL, "num_key_value_heads": None, "head_dim": None}
    sizes = sizes_from_hf(values, "x")
    theirs = LlamaConfig(**values)
    assert sizes["num_query_groups"] == theirs.num_key_value_heads == 8
    assert sizes["kv_channels"] == theirs.head_dim == 64


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_parameters": LLAMA3_ROPE},
        {"rope_theta": 500000.0, "rope_scaling": {k: v for k, v in LLAMA3_ROPE.items() if k != "rope_theta"}},
        {"rope_theta": 500000.0, "rope_scaling": {**LLAMA3_ROPE, "low_freq_factor": 1, "high_freq_factor": 4}},
    ],
)
def test_llama3_scaling_in_every_spelling(rope: dict[str, Any]) -> None:
    values = {"model_type": "llama", **MINIMAL, **rope}
    for read in (values, LlamaConfig(**json.loads(json.dumps(values))).to_dict()):
        sizes = sizes_from_hf(read, "x")
        assert (sizes["use_rope_scaling"], sizes["rope_scaling_factor"]) == (True, 32.0)
        assert sizes["rotary_base"] == 500000.0
    written = hf_from_sizes(configured(sizes).size, 100, NO_IDS, "float32")
    assert written["rope_parameters"] == LLAMA3_ROPE == written["rope_scaling"]
    assert LlamaConfig(**written).rope_parameters == LLAMA3_ROPE


# Gemma 3 has settings for each kind of layer.
@pytest.mark.parametrize("family", [family for family in CLASSES if family != "gemma3_text"])
def test_plain_rope_in_both_spellings(family: str) -> None:
    values = {"model_type": family, **MINIMAL}
    old = sizes_from_hf({**values, "rope_theta": 123456.0, "rope_scaling": None}, "x")
    new = sizes_from_hf({**values, "rope_parameters": {"rope_type": "default", "rope_theta": 123456.0}}, "x")
    assert old == new and old["rotary_base"] == 123456.0 and old["use_rope_scaling"] is False


@pytest.mark.parametrize(
    ("family", "change", "named"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ("llama", {"attention_bias": True}, "attention_bias"),
        ("llama", {"mlp_bias": True}, "mlp_bias"),
        ("qwen3", {"attention_bias": True}, "attention_bias"),
        ("qwen2", {"layer_types": ["chunked_attention"] * 2}, "layer_types chunked_attention"),
        ("gpt_neox", {"hidden_act": "relu"}, "hidden_act 'relu'"),
        ("gpt_neox", {"attention_bias": False}, "attention_bias"),
        ("gpt2", {"n_embd": 32, "n_layer": 1, "n_head": 1, "scale_attn_by_inverse_layer_idx": True}, "inverse_layer"),
        ("mpt", {}, "model_type 'mpt'"),
        (None, {}, "model_type None"),
        ("llama", {"rope_scaling": {"type": "longrope", "factor": 2.0}}, "'longrope'"),
        ("llama", {"rope_scaling": {"type": "linear"}}, "rope scaling linear needs factor"),
        ("llama", {"rope_parameters": {**LLAMA3_ROPE, "low_freq_factor": None}}, "needs low_freq_factor"),
        ("llama", {"rope_parameters": {k: v for k, v in LLAMA3_ROPE.items() if k != "factor"}}, "needs factor"),
        ("llama", {"rope_parameters": {**LLAMA3_ROPE, "partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
        ("llama", {"hidden_size": None}, "hidden_size is missing"),
    ],
)
def test_refusals_name_the_key(family: str | None, change: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError) as caught:
        sizes_from_hf({"model_type": family, **MINIMAL, **change}, "some/config.json")
    assert str(caught.value).startswith("some/config.json: ") and named in str(caught.value)


@pytest.mark.parametrize("key", MINIMAL)
def test_missing_sizes_are_named(key: str) -> None:
    values = {k: v for k, v in {"model_type": "llama", **MINIMAL}.items() if k != key}
    with pytest.raises(ValueError, match=f"^x: {key} is missing$"):
        sizes_from_hf(values, "x")


@pytest.mark.parametrize(
    ("family", "harmless"),
    [
        ("qwen2", {"sliding_window": 1024, "use_sliding_window": False}),
        ("mistral", {"sliding_window": 4096}),  # no shorter than max_position_embeddings
        ("llama", {"hidden_act": "swish"}),
        ("llama", {"attention_bias": False, "mlp_bias": None, "pretraining_tp": 1}),
    ],
)
def test_harmless_settings_are_read(family: str, harmless: dict[str, Any]) -> None:
    assert sizes_from_hf({"model_type": family, **MINIMAL, **harmless}, "x")["model_family"] == family


def test_a_folder_written_by_transformers_is_a_model(tmp_path: Path) -> None:
    theirs = Qwen3Config(**MINIMAL, num_key_value_heads=4, head_dim=32, tie_word_embeddings=True)
    theirs.save_pretrained(tmp_path)
    size = parse(["--model", str(tmp_path)]).size
    assert (size.model_family, size.kv_channels, size.num_query_groups, size.qk_layernorm) == ("qwen3", 32, 4, True)
    assert size.untie_embeddings_and_output_weights is False
    assert read_sizes(tmp_path / "config.json")["hidden_size"] == 512
