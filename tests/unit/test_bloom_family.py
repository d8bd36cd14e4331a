"""BLOOM's configuration and names: as published, as transformers has them, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM

from megatron_steel.checkpoint.hf_map import pieces, to_ours, to_theirs
from megatron_steel.config.check import check
from megatron_steel.config.hf_sizes import hf_from_sizes, sizes_from_hf
from megatron_steel.config.load import from_flat
from megatron_steel.model.backends import choose_backend
from megatron_steel.plan.parameters import count_parameters

NO_IDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
# bigscience/bloom-560m on the hub, with its old names.
PUBLISHED = {
    "model_type": "bloom", "apply_residual_connection_post_layernorm": False, "attention_dropout": 0.0,
    "attention_softmax_in_fp32": True, "hidden_dropout": 0.0, "initializer_range": 0.02, "layer_norm_epsilon": 1e-05,
    "n_embed": 1024, "n_inner": None, "n_layer": 24, "num_attention_heads": 16, "offset_alibi": 100,
    "pretraining_tp": 1, "slow_but_exact": False, "vocab_size": 250880,
}  # fmt: skip
TINY: dict[str, Any] = {
    "model_family": "bloom", "num_layers": 3, "hidden_size": 24, "ffn_hidden_size": 96, "num_attention_heads": 6,
    "position_embedding_type": "alibi", "normalization": "LayerNorm", "activation": "gelu_tanh", "vocab_size": 50,
    "gated_linear_unit": False, "add_bias_linear": True, "stable_embedding": True, "seq_length": 16,
}  # fmt: skip


def test_the_published_configuration() -> None:
    size = from_flat(sizes_from_hf(PUBLISHED, "x")).size
    assert (size.num_layers, size.hidden_size, size.ffn_hidden_size, size.num_attention_heads) == (24, 1024, 4096, 16)
    assert not size.untie_embeddings_and_output_weights and size.max_position_embeddings == 2048
    assert count_parameters(size, 250880).total == 559_214_592
    written = hf_from_sizes(size, 250880, NO_IDS, "float16")
    assert sizes_from_hf(BloomConfig(**written).to_dict(), "x") == sizes_from_hf(PUBLISHED, "x")
    with torch.device("meta"):
        model = BloomForCausalLM(BloomConfig(**PUBLISHED))
    assert sum(weight.numel() for weight in model.parameters()) == 559_214_592


@pytest.mark.parametrize("untied", [False, True])
def test_names_and_shapes_are_those_of_transformers(untied: bool) -> None:
    size = from_flat({**TINY, "untie_embeddings_and_output_weights": untied}).size
    model = BloomForCausalLM(BloomConfig(**hf_from_sizes(size, 50, NO_IDS, "float32")))
    weights = dict(model.named_parameters())
    assert count_parameters(size, 50).total == sum(weight.numel() for weight in weights.values())
    theirs = {name: shape for piece in pieces(size) for name, shape in zip(piece.theirs, piece.shapes, strict=True)}
    assert theirs == {name: tuple(weight.shape) for name, weight in weights.items()}
    for piece in pieces(size):
        tensors = [weights[name].detach() for name in piece.theirs]
        back = to_theirs(piece.how, to_ours(piece.how, tensors, size, 64), size, 50)
        assert all(torch.equal(a, b) for a, b in zip(back, tensors, strict=True))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"ffn_hidden_size": 64}, "--model-family bloom needs --ffn-hidden-size 96, 4 hidden sizes"),
        ({"position_embedding_type": "rope"}, "--position-embedding-type is rope, but --model-family bloom has alibi"),
        ({"stable_embedding": False}, "--model-family bloom needs --stable-embedding"),
        ({"num_query_groups": 2}, "one key head per query head"),
    ],
)
def test_what_cannot_be_is_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check(from_flat({**TINY, **change}))


def test_what_can_be_passes() -> None:
    assert check(from_flat({**TINY, "reset_attention_mask": True})) == []


def test_other_families_have_no_alibi() -> None:
    with pytest.raises(ValueError, match="--position-embedding-type is alibi, but --model-family llama has rope"):
        check(from_flat({"position_embedding_type": "alibi"}))


def test_only_one_backend_has_alibi() -> None:
    size = from_flat(TINY).size
    assert choose_backend("torch", size) == ("torch", "asked for")
    with pytest.raises(ValueError, match="--transformer-impl local has no --position-embedding-type alibi"):
        choose_backend("local", size)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"apply_residual_connection_post_layernorm": True}, "x: apply_residual_connection_post_layernorm True"),
        ({"n_layer": None, "num_hidden_layers": None}, "n_layer is missing"),
        ({"n_embed": None}, "hidden_size is missing"),
    ],
)
def test_what_cannot_be_read_is_named(change: dict[str, Any], words: str) -> None:
    values = {key: value for key, value in {**PUBLISHED, **change}.items() if value is not None}
    with pytest.raises(ValueError, match=words):
        sizes_from_hf(values, "x")
