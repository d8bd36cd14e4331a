"""The map between our weights and Hugging Face's, against loops and transformers' own models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_steel.checkpoint.hf_map import our_shape, pieces, to_ours, to_theirs
from megatron_steel.config.family import group_count, head_width
from megatron_steel.config.hf_sizes import hf_from_sizes
from megatron_steel.config.schema import ModelConfig

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"kv_channels": 6},
    "qwen2": {"add_qkv_bias": True},
    "qwen3": {"qk_layernorm": True, "kv_channels": 12},
    "smollm3": {"no_rope_layers": [1]},
    "olmo2": {},
    "gemma2": {},
    "gemma3": {},
    "gpt_neox": {"num_query_groups": None, "activation": "gelu", "add_bias_linear": True},
    "gpt2": {"num_query_groups": None, "activation": "gelu_tanh", "add_bias_linear": True},
}
# Names in memory that differ from those in files.
RENAMED = {"gpt_neox": {"lm_head.weight": "embed_out.weight"}}
NO_IDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


def tiny(family: str, untied: bool) -> ModelConfig:
    """Sizes that are all different, so that a mix-up cannot fit."""
    return ModelConfig(
        model_family=family,  # type: ignore[arg-type]
        num_layers=3,
        hidden_size=32,
        ffn_hidden_size=20,
        num_attention_heads=4,
        untie_embeddings_and_output_weights=untied,
        **{"num_query_groups": 2, **FAMILIES[family]},
    )


def heads(size: ModelConfig) -> tuple[int, int, int]:
    """Groups, query heads per group, head width."""
    groups = group_count(size)
    return groups, size.num_attention_heads // groups, head_width(size)


def numbered(*shape: int) -> Tensor:
    """Every element different."""
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    """Equal bit for bit, shapes and types included."""
    return len(left) == len(right) and all(
        a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b) for a, b in zip(left, right, strict=True)
    )


@st.composite
def attention_sizes(draw: st.DrawFn) -> ModelConfig:
    """Any grouping of heads."""
    groups, per_group, width = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(1, 5))
    return ModelConfig(
        num_attention_heads=groups * per_group,
        num_query_groups=draw(st.sampled_from([groups, None])) if per_group == 1 else groups,
        kv_channels=width,
        hidden_size=draw(st.integers(1, 7)),
    )


@given(attention_sizes(), st.booleans(), st.sampled_from([torch.float32, torch.bfloat16]))
def test_qkv_there_and_back(size: ModelConfig, bias: bool, dtype: torch.dtype) -> None:
    groups, per_group, width = heads(size)
    rest = () if bias else (size.hidden_size,)
    ours = torch.randn(groups * (per_group + 2) * width, *rest).to(dtype)
    theirs = to_theirs("qkv", ours, size, 0)
    assert [part.shape[0] for part in theirs] == [groups * per_group * width, groups * width, groups * width]
    assert all(part.is_contiguous() for part in theirs)
    assert same([to_ours("qkv", theirs, size, 0)], [ours])
    assert same(to_theirs("qkv", to_ours("qkv", theirs, size, 0), size, 0), theirs)


@given(attention_sizes())
def test_qkv_layout_against_a_loop(size: ModelConfig) -> None:
    groups, per_group, width = heads(size)
    query = numbered(groups * per_group * width, size.hidden_size)
    key, value = -1 - numbered(groups * width, size.hidden_size), 0.5 + numbered(groups * width, size.hidden_size)
    rows: list[Tensor] = []
    for group in range(groups):
        for head in range(group * per_group, (group + 1) * per_group):
            rows += [query[head * width + i] for i in range(width)]
        rows += [key[group * width + i] for i in range(width)]
        rows += [value[group * width + i] for i in range(width)]
    expected = torch.stack(rows)
    assert torch.equal(to_ours("qkv", [query, key, value], size, 0), expected)
    assert same(to_theirs("qkv", expected, size, 0), [query, key, value])


@given(st.integers(1, 6), st.integers(1, 6))
def test_gate_up_there_and_back(ffn: int, hidden: int) -> None:
    gate, up = numbered(ffn, hidden), -1 - numbered(ffn, hidden)
    ours = to_ours("gate_up", [gate, up], ModelConfig(), 0)
    for row in range(ffn):  # gate rows first, then up rows
        assert torch.equal(ours[row], gate[row]) and torch.equal(ours[ffn + row], up[row])
    theirs = to_theirs("gate_up", ours, ModelConfig(), 0)
    assert same(theirs, [gate, up]) and all(part.is_contiguous() for part in theirs)


@given(st.integers(1, 6), st.integers(1, 6))
def test_transposed_there_and_back(rows: int, columns: int) -> None:
    theirs = numbered(rows, columns)
    ours = to_ours("transpose", [theirs], ModelConfig(), 0)
    assert ours.shape == (columns, rows) and all(torch.equal(ours[i], theirs[:, i]) for i in range(columns))
    assert same(to_theirs("transpose", ours, ModelConfig(), 0), [theirs]) and ours.is_contiguous()


@given(st.integers(1, 4), st.integers(1, 5), st.booleans())
def test_columns_of_queries_keys_and_values_there_and_back(heads: int, width: int, bias: bool) -> None:
    hidden = heads * width
    size = ModelConfig(num_attention_heads=heads, hidden_size=hidden)
    theirs = numbered(3 * hidden) if bias else numbered(hidden, 3 * hidden)
    ours = to_ours("qkv_columns", [theirs], size, 0)
    for head in range(heads):
        for part in range(3):  # query, key, value of each head
            rows = ours[(3 * head + part) * width :][:width]
            assert torch.equal(rows.t(), theirs[..., part * hidden + head * width :][..., :width])
    assert same(to_theirs("qkv_columns", ours, size, 0), [theirs])


@given(st.integers(1, 20), st.integers(0, 9), st.integers(1, 4))
def test_vocabulary_is_padded_with_zeros_and_trimmed(rows: int, padding: int, hidden: int) -> None:
    theirs = 1 + numbered(rows, hidden)
    ours = to_ours("vocab", [theirs], ModelConfig(), rows + padding)
    assert ours.shape == (rows + padding, hidden)
    assert torch.equal(ours[:rows], theirs) and not ours[rows:].any()
    assert same(to_theirs("vocab", ours, ModelConfig(), rows), [theirs])


@given(st.lists(st.integers(1, 4), min_size=1, max_size=3))
def test_copies_are_copies(shape: list[int]) -> None:
    tensor = numbered(*shape)
    assert same(to_theirs("copy", tensor, ModelConfig(), 0), [tensor])
    assert same([to_ours("copy", [tensor], ModelConfig(), 0)], [tensor])


def test_more_rows_than_the_padded_vocabulary_are_refused() -> None:
    with pytest.raises((ValueError, RuntimeError)):
        to_ours("vocab", [numbered(9, 2)], ModelConfig(), 8)


@pytest.mark.parametrize("untied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_rules_name_every_tensor_of_transformers_model_once(family: str, untied: bool) -> None:
    size = tiny(family, untied)
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**hf_from_sizes(size, 50, NO_IDS, "float32")))
    state = theirs.state_dict()
    if not untied:
        assert state.pop("lm_head.weight").data_ptr() == theirs.get_input_embeddings().weight.data_ptr()
    state = {RENAMED.get(family, {}).get(name, name): tensor for name, tensor in state.items()}
    names = [name for piece in pieces(size) for name in piece.theirs]
    assert len(names) == len(set(names)) and set(names) == set(state)

    groups, per_group, width = heads(size)
    size.vocab_size = 50
    for rule in pieces(size):
        tensors = [state[name] for name in rule.theirs]
        assert rule.shapes == tuple(tuple(tensor.shape) for tensor in tensors)
        ours = to_ours(rule.how, tensors, size, 64)
        assert same(to_theirs(rule.how, ours, size, 50), tensors)
        if rule.how == "qkv":
            assert ours.shape[0] == groups * (per_group + 2) * width
        elif rule.how == "gate_up":
            assert ours.shape == (2 * size.ffn_hidden_size, size.hidden_size)
        elif rule.how == "vocab":
            assert ours.shape == (64, size.hidden_size)


def test_gate_and_up_are_in_megatron_cores_order() -> None:
    """megatron-core 0.16.1, transformer/mlp.py, glu: the first half goes through the activation."""
    size = tiny("llama", True)
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**hf_from_sizes(size, 50, NO_IDS, "float32")))
    state = theirs.state_dict()
    table = {piece.key.rsplit(".", 2)[1]: piece for piece in pieces(size) if piece.index in ((0,), ())}
    table |= {"linear_qkv": next(piece for piece in pieces(size) if piece.how == "qkv")}
    fc1, fc2 = (
        to_ours(table[name].how, [state[n] for n in table[name].theirs], size, 0)
        for name in ("linear_fc1", "linear_fc2")
    )
    x = torch.randn(5, size.hidden_size)
    first, second = (x @ fc1.T).chunk(2, -1)
    expected = theirs.model.layers[0].mlp(x)
    torch.testing.assert_close((torch.nn.functional.silu(first) * second) @ fc2.T, expected, rtol=1e-5, atol=1e-6)
    assert [n.split(".")[-2] for n in table["linear_qkv"].theirs] == ["q_proj", "k_proj", "v_proj"]


@pytest.mark.parametrize("family", FAMILIES)
def test_our_names_are_unique(family: str) -> None:
    ours = [(piece.key, piece.index) for piece in pieces(tiny(family, True))]
    assert len(ours) == len(set(ours))
    outer = {"embedding.word_embeddings.weight", "decoder.final_layernorm.weight", "output_layer.weight"}
    outer |= {"decoder.final_layernorm.bias"} if family.startswith("gpt") else set()
    outer |= {"embedding.position_embeddings.weight"} if family == "gpt2" else set()
    assert {key for key, index in ours if not index} == outer
    stacks = {key for key, index in ours if index}
    assert all(key.startswith("decoder.layers.") and "{" not in key for key in stacks)
    assert sorted(ours) == sorted(
        [(key, (layer,)) for key in stacks for layer in range(3)] + [i for i in ours if not i[1]]
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_shapes_are_those_of_the_tensors_that_are_made(family: str) -> None:
    size = tiny(family, untied=False)
    size.vocab_size = 100
    for piece in pieces(size):
        made = to_ours(piece.how, [torch.zeros(shape) for shape in piece.shapes], size, 128)
        assert our_shape(piece, 128) == tuple(made.shape), piece.key
