"""Parameter counts: every switch against transformers' models or sums by hand, and the published totals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from megatron_steel.config.schema import ModelConfig
from megatron_steel.plan.estimate import flops_per_token
from megatron_steel.plan.parameters import attention, count_parameters, layer_weights

SMALL: dict[str, Any] = {"num_layers": 2, "hidden_size": 96, "ffn_hidden_size": 160, "num_attention_heads": 6}
HF_SMALL: dict[str, Any] = {
    "num_hidden_layers": 2,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_attention_heads": 6,
    "vocab_size": 1000,
}
GATELESS: dict[str, Any] = {"normalization": "LayerNorm", "add_bias_linear": True, "gated_linear_unit": False}
STEEL: dict[str, Any] = {
    "num_layers": 18,
    "hidden_size": 1792,
    "ffn_hidden_size": 1792,
    "num_attention_heads": 32,
    "add_qkv_bias": True,
    "untie_embeddings_and_output_weights": True,
    "mlp_type": "senet",
}


def variant(name: str) -> tuple[ModelConfig, transformers.PreTrainedConfig]:
    """Our sizes and transformers' configuration of the same model."""
    if name == "gpt2":
        hf = transformers.GPT2Config(
            n_layer=2, n_embd=96, n_inner=160, n_head=6, n_positions=64, vocab_size=1000, tie_word_embeddings=True
        )
        ours = ModelConfig(**SMALL, **GATELESS, position_embedding_type="learned_absolute", max_position_embeddings=64)
        return ours, hf
    if name == "neox":
        ours = ModelConfig(**SMALL, **GATELESS, untie_embeddings_and_output_weights=True)
        return ours, transformers.GPTNeoXConfig(**HF_SMALL, tie_word_embeddings=False)
    if name == "gemma2":
        ours = ModelConfig(**SMALL, norm_placement="sandwich", num_query_groups=2, kv_channels=16)
        return ours, transformers.Gemma2Config(**HF_SMALL, num_key_value_heads=2, head_dim=16)
    ours = ModelConfig(
        **SMALL, norm_placement="post", num_query_groups=2, qk_layernorm_full=True,
        untie_embeddings_and_output_weights=True,
    )  # fmt: skip
    return ours, transformers.Olmo2Config(**HF_SMALL, num_key_value_heads=2, tie_word_embeddings=False)


@pytest.mark.parametrize("name", ["gpt2", "neox", "gemma2", "olmo2"])
def test_switches_count_what_transformers_models_have(name: str) -> None:
    ours, hf = variant(name)
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(hf)
    count = count_parameters(ours, 1000)
    assert count.total == sum(weight.numel() for weight in theirs.parameters())
    last = [weight.numel() for path, weight in theirs.named_parameters() if ".1." in path]
    assert count.per_layer == sum(last)
    matrices = sum(weight.numel() for path, weight in theirs.named_parameters() if ".1." in path and weight.dim() > 1)
    assert layer_weights(ours, 1).matmul == matrices


def test_tensor_parallel_ranks_hold_the_biases_that_are_added_once() -> None:
    model = ModelConfig(**SMALL, **GATELESS)
    part = layer_weights(model, 0)
    norms, output_biases = 4 * 96, 2 * 96
    assert part.whole == norms + output_biases
    assert 2 * part.dense_on_rank(2) - part.whole == part.total
    assert attention(model).split == 4 * 96 * 96 + 3 * 96


def test_steel_llm_has_the_published_number() -> None:
    """source: the released model; experts 6 x 4 x 1792 x 448, phi 1792 x 6, a scale, QKV biases."""
    for form in ("softmoe_v3", "softmoe_causal"):
        assert count_parameters(ModelConfig(**STEEL, ffn_type=form), 151936).total == 1_122_922_770  # type: ignore[arg-type]
    count = count_parameters(ModelConfig(**STEEL, ffn_type="softmoe_causal"), 151936)
    assert count.per_layer == 32_132_353
    # One v1 layer has a gate with a bias instead of phi and its scale, v2 has scores and no scale.
    assert count_parameters(ModelConfig(**STEEL, ffn_type="softmoe_v1"), 151936).per_layer == 32_132_353 - 1 + 6
    assert count_parameters(ModelConfig(**STEEL, ffn_type="softmoe_v2"), 151936).per_layer == 32_132_353 - 1
    alone = count_parameters(ModelConfig(**STEEL), 151936)
    assert alone.per_layer == 32_132_353 - 10_753 - 5 * 4 * 1792 * 448


def test_flops_of_soft_mixtures_count_what_is_computed() -> None:
    """The released form sends 6 slots of 2048 tokens through experts, the causal one sends every token."""
    released = ModelConfig(**STEEL, ffn_type="softmoe_v3")
    causal = ModelConfig(**STEEL, ffn_type="softmoe_causal")
    assert round(flops_per_token(released, 2048, 151936) / 1e9, 2) == 3.82
    experts, phi = 6 * 4 * 1792 * 448, 1792 * 6
    less = 6 * 18 * (experts - experts / 2048 - 2 * phi)
    assert flops_per_token(causal, 2048, 151936) - flops_per_token(released, 2048, 151936) == pytest.approx(less)
    dense = ModelConfig(**{**STEEL, "mlp_type": "swiglu", "ffn_hidden_size": 3584})
    assert layer_weights(causal, 0).matmul - phi == layer_weights(dense, 0).matmul


def test_slots_share_the_first_matrices() -> None:
    one, three = (ModelConfig(**STEEL, ffn_type="softmoe_causal", slots_per_expert=slots) for slots in (1, 3))
    experts, phi = 6 * 4 * 1792 * 448, 1792 * 6
    more = layer_weights(three, 0).matmul - layer_weights(one, 0).matmul
    assert more == 2 * experts // 2 + 2 * phi
    assert layer_weights(three, 0).total - layer_weights(one, 0).total == 2 * phi
