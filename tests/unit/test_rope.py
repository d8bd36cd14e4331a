"""Rotary frequencies of every scaling against transformers' functions, from config.json to the table and back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from megatron_steel.config.hf_sizes import hf_from_sizes, sizes_from_hf
from megatron_steel.config.rope import longest_sequence
from megatron_steel.config.schema import ModelConfig
from megatron_steel.model.rope import attention_factor, frequencies

LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.5, "high_freq_factor": 6.0}
YARN = {"rope_type": "yarn", "original_max_position_embeddings": 64}
SCALINGS: list[dict[str, Any]] = [
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 3.0},
    {"rope_type": "dynamic", "factor": 2.5},
    {**LLAMA3, "factor": 8.0, "original_max_position_embeddings": 32},
    {**LLAMA3, "factor": 3.0},
    {**YARN, "factor": 4.0},
    {**YARN, "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 1.0},
    {**YARN, "factor": 40.0, "mscale": 0.707, "mscale_all_dim": 0.5, "beta_fast": 8, "beta_slow": 2},
    {**YARN, "factor": 4.0, "attention_factor": 0.75, "truncate": False},
    {**YARN, "factor": 4.0, "mscale": 0.5},
    {**YARN, "factor": None},
]


def config_of(rope: dict[str, Any], theta: float = 10000.0, width: int = 20) -> LlamaConfig:
    """A Llama of transformers with these rotary settings."""
    return LlamaConfig(
        hidden_size=48, num_attention_heads=4, num_key_value_heads=2, head_dim=width, num_hidden_layers=2,
        intermediate_size=88, vocab_size=100, max_position_embeddings=128, bos_token_id=1, eos_token_id=2,
        rope_parameters={**rope, "rope_theta": theta},
    )  # fmt: skip


def size_of(hf: dict[str, Any]) -> ModelConfig:
    """Our sizes of a config.json."""
    return ModelConfig(**sizes_from_hf(hf, "config.json"))


@pytest.mark.parametrize("rope", SCALINGS, ids=str)
@pytest.mark.parametrize(("theta", "width"), [(10000.0, 20), (5e5, 128), (1234.5, 6)])
def test_frequencies_and_factor_are_those_of_transformers(rope: dict[str, Any], theta: float, width: int) -> None:
    theirs = config_of(rope, theta, width)
    table, size = LlamaRotaryEmbedding(theirs), size_of(theirs.to_dict())
    assert torch.equal(frequencies(size, 10), table.inv_freq)
    assert attention_factor(size) == table.attention_scaling
    if rope["rope_type"] == "dynamic":
        beyond, _ = ROPE_INIT_FUNCTIONS["dynamic"](theirs, seq_len=torch.tensor(200))
        assert torch.equal(frequencies(size, 200), beyond) and not torch.equal(beyond, table.inv_freq)
        assert longest_sequence(size) == 320


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["linear", "dynamic", "llama3", "yarn"]), st.floats(1, 64), st.floats(100, 1e7),
    st.integers(2, 64), st.integers(16, 32768), st.integers(1, 10**6),
)  # fmt: skip
@example("dynamic", 1.8788724450319, 100.0, 2, 64, 140)
def test_frequencies_of_any_settings(
    kind: str, factor: float, theta: float, half: int, original: int, length: int
) -> None:
    more = {"original_max_position_embeddings": original} if kind in ("llama3", "yarn") else {}
    rope = {**LLAMA3, **more} if kind == "llama3" else more
    theirs = config_of({**rope, "rope_type": kind, "factor": factor}, theta, 2 * half)
    expected, scale = ROPE_INIT_FUNCTIONS[kind](theirs, seq_len=torch.tensor(length) if length > 128 else None)
    size = size_of(theirs.to_dict())
    assert torch.equal(frequencies(size, length), expected) and attention_factor(size) == scale


@pytest.mark.parametrize("rope", SCALINGS, ids=str)
def test_settings_come_back_from_both_spellings(rope: dict[str, Any]) -> None:
    new = config_of(rope, 5e5).to_dict()
    old = {key: value for key, value in new.items() if key != "rope_parameters"}
    old |= {"rope_theta": 5e5, "rope_scaling": {"type": rope["rope_type"], **new["rope_parameters"]}}
    del old["rope_scaling"]["rope_theta"], old["rope_scaling"]["rope_type"]
    size = size_of(new)
    assert size == size_of(old) and size.rotary_base == 5e5
    written = hf_from_sizes(size, 100, {}, "float32")
    for names in (("rope_parameters",), ("rope_theta", "rope_scaling")):
        kept = {k: v for k, v in written.items() if k in names or k not in ("rope_parameters", "rope_theta")}
        kept = {k: v for k, v in kept.items() if k in names or k != "rope_scaling"}
        assert size_of(kept) == size
        again = LlamaRotaryEmbedding(LlamaConfig(**kept))
        assert torch.equal(again.inv_freq, frequencies(size, 1)) and again.attention_scaling == attention_factor(size)
