"""Open-Llama's configuration and names: as published, and as our code for transformers has them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from megatron_steel.checkpoint.hf_map import pieces
from megatron_steel.checkpoint.modeling.open_llama.configuration_open_llama import OpenLlamaConfig
from megatron_steel.checkpoint.modeling.open_llama.modeling_open_llama import OpenLlamaForCausalLM
from megatron_steel.config.check import check
from megatron_steel.config.hf_sizes import hf_from_sizes, sizes_from_hf
from megatron_steel.config.load import from_flat, parse
from megatron_steel.plan.parameters import count_parameters

NO_IDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
TINY: dict[str, Any] = {
    "model_family": "open_llama", "num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 20, "num_attention_heads": 4,
    "vocab_size": 50, "max_position_embeddings": 64, "seq_length": 16, "norm_epsilon": 1e-5,
}  # fmt: skip
# The first release: the published class's default sizes, and what its training script changes.
FIRST = {
    "model_type": "open-llama", "vocab_size": 100_000, "hidden_size": 4096, "intermediate_size": 11008,
    "num_hidden_layers": 32, "num_attention_heads": 32, "max_position_embeddings": 2048, "hidden_act": "silu",
    "initializer_range": 0.01, "rms_norm_eps": 1e-5, "hidden_dropout_prob": 0.1,
    "attention_dropout_prob": 0.1, "use_stable_embedding": True, "shared_input_output_embedding": True,
}  # fmt: skip
KINDS = [(stable, shared) for stable in (True, False) for shared in (True, False)]


def test_the_first_release_is_the_preset() -> None:
    preset = parse(["--model", "open_llama_7b"]).size
    preset.num_query_groups, preset.kv_channels = 32, 128
    assert from_flat(sizes_from_hf(FIRST, "x")).size == preset


@pytest.mark.parametrize(
    ("keys", "tied"),
    [
        ({}, True),
        ({"shared_input_output_embedding": False}, False),
        ({"shared_input_output_embedding": False, "tie_word_embeddings": True}, True),
        ({"shared_input_output_embedding": True, "tie_word_embeddings": False}, True),
    ],
)
def test_the_head_is_the_embedding_when_either_key_says_so(keys: dict[str, bool], tied: bool) -> None:
    sizes = sizes_from_hf({**FIRST, "shared_input_output_embedding": True, **keys}, "x")
    assert sizes["untie_embeddings_and_output_weights"] is not tied
    assert OpenLlamaConfig(**keys).tie_word_embeddings is tied


@pytest.mark.parametrize(("stable", "shared"), KINDS)
def test_names_and_shapes_are_those_of_the_code_for_transformers(stable: bool, shared: bool) -> None:
    size = from_flat({**TINY, "stable_embedding": stable, "untie_embeddings_and_output_weights": not shared}).size
    written = hf_from_sizes(size, 50, NO_IDS, "float32")
    assert written["model_type"] == "open-llama"
    assert (written["use_stable_embedding"], written["shared_input_output_embedding"]) == (stable, shared)
    read = sizes_from_hf(written, "x")
    assert (read["stable_embedding"], read["untie_embeddings_and_output_weights"]) == (stable, not shared)
    assert read["embedding_init"] == ("xavier" if stable else "normal")
    model = OpenLlamaForCausalLM(OpenLlamaConfig(**written))
    weights = dict(model.named_parameters())
    assert count_parameters(size, 50).total == sum(weight.numel() for weight in weights.values())
    theirs = {name: shape for piece in pieces(size) for name, shape in zip(piece.theirs, piece.shapes, strict=True)}
    assert theirs == {name: tuple(weight.shape) for name, weight in weights.items()}
    ours = {piece.key for piece in pieces(size)}
    assert {f"embedding.layer_norm.{part}" in ours for part in ("weight", "bias")} == {stable}


@torch.no_grad()
def test_code_for_transformers_is_llama_behind_a_norm() -> None:
    """What goes into the first layer, in float64; and one token at a time gives what all at once give."""
    model = OpenLlamaForCausalLM(OpenLlamaConfig(**hf_from_sizes(from_flat(
        {**TINY, "stable_embedding": True}).size, 50, NO_IDS, "float32"))).eval()  # fmt: skip
    norm, table = model.model.embed_layer_norm, model.model.embed_tokens.weight
    norm.weight.normal_(1.0, 0.3)
    norm.bias.normal_()
    ids = torch.randint(50, (2, 12))
    seen: list[torch.Tensor] = []
    handle = model.model.layers[0].register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0]))
    whole = model(ids).logits
    handle.remove()
    rows = table.double()[ids]
    centred = rows - rows.mean(-1, keepdim=True)
    wanted = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight.double() + norm.bias
    torch.testing.assert_close(seen[0].double(), wanted, rtol=0, atol=1e-5)
    assert torch.equal(model(inputs_embeds=table[ids]).logits, whole)
    cache, parts = None, []
    for part in ids.split(1, dim=1):
        output = model(part, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        parts.append(output.logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="give input_ids or inputs_embeds"):
        model.model(ids, inputs_embeds=table[ids])


@pytest.mark.parametrize("stable", [True, False])
def test_first_values_of_the_code_for_transformers(stable: bool) -> None:
    values = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 1, "intermediate_size": 64}
    config = OpenLlamaConfig(**values, vocab_size=500, initializer_range=0.01, use_stable_embedding=stable)
    table = OpenLlamaForCausalLM(config).model.embed_tokens.weight
    std = math.sqrt(2 / 564) if stable else 0.01
    assert abs(table.std().item() / std - 1) < 5 / math.sqrt(2 * table.numel())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_family": "llama", "stable_embedding": True}, "--model-family llama has no --stable-embedding"),
        ({"qk_layernorm": True}, "--model-family open_llama has no --qk-layernorm"),
    ],
)
def test_what_cannot_be_is_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check(from_flat({**TINY, **change}))


def test_other_activations_are_named() -> None:
    with pytest.raises(ValueError, match="x: hidden_act 'gelu' is not supported"):
        sizes_from_hf({**FIRST, "hidden_act": "gelu"}, "x")
