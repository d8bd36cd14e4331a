"""Gemma's configurations: as published, in both spellings, as transformers understands them, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoConfig

from megatron_steel.config.check import check
from megatron_steel.config.hf_sizes import hf_from_sizes, sizes_from_hf
from megatron_steel.config.load import from_flat
from megatron_steel.config.schema import ModelConfig
from megatron_steel.plan.parameters import count_parameters

NO_IDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
GEMMA2: dict[str, Any] = {
    "model_type": "gemma2", "attention_bias": False, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
    "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "initializer_range": 0.02,
    "max_position_embeddings": 8192, "rms_norm_eps": 1e-06, "rope_theta": 10000.0, "sliding_window": 4096,
    "vocab_size": 256000,
}  # fmt: skip
# The published config.json files (of 4b: its text_config, which leaves most keys out), cut to what decides numbers.
PUBLISHED: dict[str, dict[str, Any]] = {
    "gemma-2-2b": {
        **GEMMA2, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "num_attention_heads": 8,
        "num_key_value_heads": 4, "head_dim": 256, "query_pre_attn_scalar": 256,
    },
    "gemma-2-27b": {
        **GEMMA2, "hidden_size": 4608, "intermediate_size": 36864, "num_hidden_layers": 46, "num_attention_heads": 32,
        "num_key_value_heads": 16, "head_dim": 128, "query_pre_attn_scalar": 144,
    },
    "gemma-3-1b": {
        "model_type": "gemma3_text", "attn_logit_softcapping": None, "final_logit_softcapping": None, "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152, "intermediate_size": 6912,
        "max_position_embeddings": 32768, "num_attention_heads": 4, "num_hidden_layers": 26, "num_key_value_heads": 1,
        "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000, "rope_scaling": None,
        "rope_theta": 1000000, "sliding_window": 512, "sliding_window_pattern": 6, "vocab_size": 262144,
    },
    "gemma-3-4b": {
        "model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
    },
}  # fmt: skip
# Trainable parameters as the models' cards and safetensors indexes have them.
COUNTS = {"gemma-2-2b": 2_614_341_888, "gemma-2-27b": 27_227_128_320, "gemma-3-1b": 999_885_952}


def checked(sizes: dict[str, Any], **more: Any) -> ModelConfig:
    """The sizes after every rule of the configuration."""
    config = from_flat({**sizes, **more})
    check(config)
    return config.size


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations(name: str) -> None:
    published = PUBLISHED[name]
    sizes, theirs = sizes_from_hf(published, "x"), AutoConfig.for_model(**published)
    size = checked(sizes)
    assert sizes_from_hf(theirs.to_dict(), "x") == sizes
    full = [layer for layer, kind in enumerate(theirs.layer_types) if kind == "full_attention"]
    assert (size.full_attention_layers, size.window_size) == (full, theirs.sliding_window)
    assert size.softmax_scale == theirs.query_pre_attn_scalar**-0.5
    assert (size.attn_logit_softcapping, size.final_logit_softcapping) == (
        theirs.attn_logit_softcapping,
        theirs.final_logit_softcapping,
    )
    rope = theirs.rope_parameters.get("full_attention", theirs.rope_parameters)
    assert size.rotary_base == rope["rope_theta"]
    assert (size.rope_scaling_factor if size.use_rope_scaling else None) == rope.get("factor")
    local = theirs.rope_parameters.get("sliding_attention", {}).get("rope_theta")
    assert size.rotary_base_local == local
    assert name not in COUNTS or count_parameters(size, size.vocab_size or 0).total == COUNTS[name]


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("spelling", ["both", "old", "new"])
def test_written_configurations_come_back(name: str, spelling: str) -> None:
    sizes = sizes_from_hf(PUBLISHED[name], "x")
    written = hf_from_sizes(checked(sizes), sizes["vocab_size"], NO_IDS, "bfloat16")
    left_out = {"both": (), "old": ("rope_parameters",), "new": ("rope_theta", "rope_scaling", "rope_local_base_freq")}
    kept = {key: value for key, value in written.items() if key not in left_out[spelling]}
    assert sizes_from_hf(kept, "x") == sizes
    assert sizes_from_hf(AutoConfig.for_model(**kept).to_dict(), "x") == sizes


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("gemma-2-2b", {"hidden_activation": "gelu"}, "hidden_activation 'gelu'"),
    ("gemma-2-2b", {"attention_bias": True}, "attention_bias"),
    ("gemma-3-1b", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ("gemma-3-1b", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
    ("gemma-3-1b", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope types yarn"),
    ("gemma-3-1b", {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, "rope types dynamic"),
    ("gemma-3-1b", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, "by kind of layer"),
    ("gemma-3-1b", {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}}, "linear"),
    ("gemma-3-1b", {"layer_types": ["chunked_attention"] * 26}, "layer_types chunked_attention"),
]


@pytest.mark.parametrize(("name", "change", "named"), REFUSED, ids=[f"{name}-{named}" for name, _, named in REFUSED])
def test_refusals_name_the_key(name: str, change: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError) as caught:
        sizes_from_hf({**PUBLISHED[name], **change}, "some/config.json")
    assert str(caught.value).startswith("some/config.json: ") and named in str(caught.value)


def test_a_scale_that_config_json_cannot_hold_is_refused_on_export() -> None:
    size = checked(sizes_from_hf(PUBLISHED["gemma-2-2b"], "x"), softmax_scale=0.07)
    with pytest.raises(ValueError, match="--softmax-scale 0.07"):
        hf_from_sizes(size, 100, NO_IDS, "bfloat16")


@pytest.mark.parametrize("kind", ["yarn", "dynamic"])
def test_two_bases_go_with_some_scalings_only(kind: str) -> None:
    sizes = sizes_from_hf(PUBLISHED["gemma-3-1b"], "x")
    with pytest.raises(ValueError, match=f"--rotary-base-local .* --rope-scaling-type {kind}"):
        checked(sizes, use_rope_scaling=True, rope_scaling_type=kind)
    checked(sizes, use_rope_scaling=True, rope_scaling_type="llama3")
