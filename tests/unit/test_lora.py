"""Adapters: what they are attached to, what they are multiplied by, the order of rows, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_steel.config.adapters import identity, projections, scaling, targets
from megatron_steel.config.check import check
from megatron_steel.config.check_lora import check_same_part
from megatron_steel.config.load import from_flat
from megatron_steel.model.lora import fuse, unfuse
from megatron_steel.model.trained import is_trained

LLAMA: dict[str, Any] = {"model_family": "llama", "num_layers": 4, "num_attention_heads": 4, "num_query_groups": 2}
ALL = {
    "self_attention.linear_qkv": ("q_proj", "k_proj", "v_proj"),
    "self_attention.linear_proj": ("o_proj",),
    "mlp.linear_fc1": ("gate_proj", "up_proj"),
    "mlp.linear_fc2": ("down_proj",),
}


def test_projections_have_their_names_in_hugging_face_models() -> None:
    size = from_flat(LLAMA).size
    assert projections(size)["self_attention.linear_qkv"] == tuple(
        f"model.layers.{{layer}}.self_attn.{x}_proj" for x in "qkv"
    )
    for asked in ([], ["all-linear"]):
        assert targets(from_flat({**LLAMA, "lora_target_modules": asked}).lora, size) == ALL
    some = from_flat({**LLAMA, "lora_target_modules": ["v_proj", "q_proj", "up_proj"]}).lora
    assert targets(some, size) == {"self_attention.linear_qkv": ("q_proj", "v_proj"), "mlp.linear_fc1": ("up_proj",)}
    neox = projections(from_flat({"model_family": "gpt_neox"}).size)
    assert neox["self_attention.linear_qkv"] == ("gpt_neox.layers.{layer}.attention.query_key_value",)


def test_scaling() -> None:
    def of(**lora: Any) -> float:
        return scaling(from_flat(lora).lora)

    assert of(lora_rank=8) == 2.0
    assert of(lora_rank=8, lora_alpha=16.0) == 2.0
    assert of(lora_rank=16, lora_alpha=8.0) == 0.5
    assert of(lora_rank=16, lora_alpha=8.0, use_rslora=True) == 8 / math.sqrt(16)


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 5))
def test_rows_of_fused_layers(groups: int, per_group: int, width: int) -> None:
    """Each group's queries, its key, its value: megatron-core's order, as hf_map knows it."""
    block = [per_group * width, width, width]
    sizes = [groups * part for part in block]
    parts = list(torch.arange(float(sum(sizes))).split(sizes))
    fused = fuse(parts, block)
    wanted = np.concatenate(
        [np.concatenate([part.numpy().reshape(groups, -1)[g] for part in parts]) for g in range(groups)]
    )
    assert np.array_equal(fused.numpy(), wanted)
    for back, part in zip(unfuse(fused, block), parts, strict=True):
        assert torch.equal(back, part)


def test_which_layers_are_trained() -> None:
    def layers(count: int) -> list[int]:
        config = from_flat({**LLAMA, "freeze_trainable_layers": count})
        return [i for i in range(4) if is_trained(config, f"decoder.layers.{i}.mlp.linear_fc1.weight")]

    assert layers(1) == [3] and layers(3) == [1, 2, 3] and layers(-1) == [0] and layers(-4) == [0, 1, 2, 3]
    extra = from_flat({**LLAMA, "freeze_trainable_layers": 2, "freeze_extra_modules": ["norm", "embed_tokens"]})
    names = ("embedding.word_embeddings.weight", "decoder.final_layernorm.weight", "output_layer.weight")
    assert [is_trained(extra, name) for name in names] == [True, True, False]
    assert all(is_trained(from_flat(LLAMA), name) for name in names)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"lora_rank": 0}, "--lora-rank must be greater than 0, not 0"),
    ({"lora_rank": 4, "lora_alpha": 0.0}, "--lora-alpha must be greater than 0"),
    ({"lora_rank": 4, "lora_dropout": 1.0}, "--lora-dropout must be at least 0 and below 1"),
    ({"lora_rank": 4, "lora_dropout": 0.1, "use_dora": True}, "--use-dora does not go with --lora-dropout"),
    ({"use_dora": True}, "--use-dora needs --lora-rank"),
    ({"freeze_extra_modules": ["norm"]}, "--freeze-extra-modules needs --freeze-trainable-layers"),
    ({"lora_rank": 4, "train_embeddings_only": True}, "--lora-rank and --train-embeddings-only are two ways"),
    ({"lora_rank": 4, "lora_target_modules": ["c_attn"]}, "--lora-target-modules c_attn: not one of q_proj, k_proj"),
    ({"lora_rank": 4, "lora_modules_to_save": ["norm"]}, "--lora-modules-to-save norm: not one of embed_tokens"),
    ({"lora_rank": 4, "lora_modules_to_save": ["lm_head"]}, "lm_head: it is the embedding in this model"),
    ({"lora_rank": 4, "use_torch_fsdp2": True, "transformer_impl": "torch"}, "does not go with --use-torch-fsdp2"),
    ({"lora_rank": 4, "transformer_impl": "transformer_engine"}, "--transformer-impl transformer_engine; use torch"),
    ({"lora_rank": 4, "model_family": "gpt2"}, "no adapters for --model-family gpt2"),
    ({"lora_rank": 4, "num_experts": 4, "moe_ffn_hidden_size": 8}, "does not go with --num-experts 4"),
    ({"freeze_trainable_layers": 5}, "--freeze-trainable-layers 5: the model has 4 layers"),
    ({"freeze_trainable_layers": 0}, "--freeze-trainable-layers 0: the model has 4 layers"),
]


@pytest.mark.parametrize(("given", "message"), REFUSED)
def test_refused(given: dict[str, Any], message: str) -> None:
    from megatron_steel.config.check_lora import check_lora

    with pytest.raises(ValueError) as caught:
        check_lora(from_flat({**LLAMA, **given}))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_adapters_decide_the_backend() -> None:
    config = from_flat({**LLAMA, "lora_rank": 4})
    check(config)
    assert config.parallel.transformer_impl == "torch"


def test_what_a_run_starts_from() -> None:
    plain, adapted = {"lora_rank": None}, {"lora_rank": 4}
    check_same_part(plain, adapted, True, "CKPT")
    check_same_part({}, plain, False, "CKPT")
    check_same_part(adapted, {"lora_rank": 4, "lora_alpha": 8.0, "lora_target_modules": ["all-linear"]}, False, "CKPT")
    for saved, now, weights_only in (
        (plain, adapted, False),
        (adapted, plain, True),
        (adapted, {"lora_rank": 4, "lora_alpha": 4.0}, True),
        (adapted, {"lora_rank": 4, "use_dora": True}, True),
        (plain, {"freeze_trainable_layers": 1}, False),
    ):
        with pytest.raises(ValueError, match="^CKPT was saved with --"):
            check_same_part(saved, now, weights_only, "CKPT")
    assert identity(adapted)["lora_alpha"] == 8.0
