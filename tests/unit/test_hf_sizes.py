"""Sizes to and from config.json, against transformers' own configuration classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from megatron_steel.config.hf_sizes import hf_from_sizes, read_sizes, sizes_from_hf
from megatron_steel.config.load import apply, parse
from megatron_steel.config.presets import PRESETS
from megatron_steel.config.schema import Config

CLASSES = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
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
    assert type(theirs) is CLASSES[size.model_family]
    assert (theirs.num_hidden_layers, theirs.hidden_size) == (size.num_layers, size.hidden_size)
    assert theirs.intermediate_size == size.ffn_hidden_size and theirs.vocab_size == rows
    assert theirs.num_key_value_heads == (size.num_query_groups or size.num_attention_heads)
    assert theirs.rope_parameters["rope_theta"] == size.rotary_base
    assert theirs.tie_word_embeddings is not size.untie_embeddings_and_output_weights
    assert theirs.sliding_window is None if size.model_family != "llama" else True

    again = configured(sizes_from_hf(theirs.to_dict(), "x")).size
    size.num_query_groups = size.num_query_groups or size.num_attention_heads
    size.kv_channels = size.kv_channels or size.hidden_size // size.num_attention_heads
    size.vocab_size = rows
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
    assert AutoConfig.for_model(**minimal).sliding_window == 4096
    with pytest.raises(ValueError, match="sliding_window 4096 is not supported"):
        sizes_from_hf(minimal, "x")
    assert sizes_from_hf({**minimal, "sliding_window": None}, "x")["max_position_embeddings"] == 32768


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


@pytest.mark.parametrize("family", CLASSES)
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
        ("mistral", {"sliding_window": 1024}, "sliding_window 1024"),
        ("qwen2", {"sliding_window": 1024, "use_sliding_window": True}, "sliding_window 1024"),
        ("qwen3", {"sliding_window": 1024, "use_sliding_window": True}, "sliding_window 1024"),
        ("gpt2", {}, "model_type 'gpt2'"),
        (None, {}, "model_type None"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "'linear'"),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, "'yarn'"),
        ("llama", {"rope_parameters": {**LLAMA3_ROPE, "low_freq_factor": 2.0}}, "rope scaling"),
        ("llama", {"rope_parameters": {k: v for k, v in LLAMA3_ROPE.items() if k != "factor"}}, "rope scaling"),
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
