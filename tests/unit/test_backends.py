"""Which backend a model gets, which layers it is made of, and with which values its parameters start."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron_steel.config.load import from_flat
from megatron_steel.config.schema import ModelConfig
from megatron_steel.model import backends
from megatron_steel.model.backends import build_provider, check_engine_only, choose_backend
from megatron_steel.model.families import transformer_config
from megatron_steel.model.initialize import initial_value
from megatron_steel.model.layer import DecoderLayer, get_residual_add
from megatron_steel.model.norms import LayerNorm, RMSNorm, ZeroCentredRMSNorm
from megatron_steel.model.spec import layer_spec
from megatron_steel.train.prepare import prepare


def test_what_a_backend_lacks_is_named() -> None:
    special = ModelConfig(apply_layernorm_1p=True)
    with pytest.raises(ValueError, match="--transformer-impl local has no --apply-layernorm-1p.*use .* torch$"):
        choose_backend("local", special)
    assert choose_backend("torch", special)[0] == choose_backend("auto", special)[0] == "torch"
    assert choose_backend("local", ModelConfig())[0] == "local"


def test_auto_leaves_what_transformer_engine_lacks_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends.device, "has_gpu", lambda: True)
    monkeypatch.setattr(backends, "have_transformer_engine", lambda: True)
    assert choose_backend("auto", ModelConfig())[0] == "transformer_engine"
    only_torch = ("--window-size", lambda size: size.window_size, ("torch",))
    monkeypatch.setattr(backends, "SPECIAL", (only_torch,))
    assert choose_backend("auto", ModelConfig())[0] == "transformer_engine"
    assert choose_backend("auto", ModelConfig(window_size=8)) == ("torch", "Transformer Engine has no --window-size")


@pytest.mark.parametrize("name", ["local", "transformer_engine"])
@pytest.mark.parametrize("changes", [{"attn_logit_softcapping": 50.0}, {"rotary_base_local": 1e4}], ids=str)
def test_only_torch_has_softcaps_and_two_rotary_bases(
    monkeypatch: pytest.MonkeyPatch, name: str, changes: dict[str, Any]
) -> None:
    monkeypatch.setattr(backends.device, "has_gpu", lambda: True)
    monkeypatch.setattr(backends, "have_transformer_engine", lambda: True)
    flag = next(iter(changes)).replace("_", "-")
    with pytest.raises(ValueError, match=f"--transformer-impl {name} has no --{flag}"):
        choose_backend(name, ModelConfig(**changes))
    assert choose_backend("auto", ModelConfig(**changes))[0] == "torch"


def test_fp8_reaches_megatron_core_or_is_refused_in_one_line() -> None:
    flat = {"bf16": True, "fp8_format": "hybrid", "fp8_recipe": "blockwise"}
    options = transformer_config(from_flat(flat))
    assert (options.fp8, options.fp8_recipe) == ("hybrid", "blockwise")
    assert transformer_config(from_flat({"bf16": True})).fp8 is None
    check_engine_only(from_flat(flat), "transformer_engine", "")
    check_engine_only(from_flat({}), "torch", "")
    with pytest.raises(ValueError, match="--fp8-format needs Transformer Engine, this run takes torch layers: no GPU$"):
        prepare(from_flat(flat))


def test_layers_with_a_window_take_the_local_base() -> None:
    size = ModelConfig(rotary_base_local=1e4, window_size=8, full_attention_layers=[1], num_layers=3)
    block = layer_spec(build_provider("torch", size), size, range(3))
    assert [layer.submodules.self_attention.params["local_rope"] for layer in block.layer_specs] == [True, False, True]


@pytest.mark.parametrize(
    ("changes", "module", "norm", "before", "after"),
    [
        ({}, TransformerLayer, RMSNorm, True, False),
        ({"normalization": "LayerNorm"}, TransformerLayer, LayerNorm, True, False),
        ({"parallel_residual": True}, DecoderLayer, RMSNorm, True, False),
        ({"norm_placement": "sandwich", "apply_layernorm_1p": True}, DecoderLayer, ZeroCentredRMSNorm, True, True),
        ({"norm_placement": "post"}, DecoderLayer, RMSNorm, False, True),
    ],
)
def test_norms_of_a_layer(changes: dict[str, Any], module: type, norm: type, before: bool, after: bool) -> None:
    size = ModelConfig(**changes)
    block = layer_spec(build_provider("torch", size), size, range(1, 3))
    assert block.layer_norm is norm and len(block.layer_specs) == 2
    for layer in block.layer_specs:
        parts = layer.submodules
        assert layer.module is module
        assert {parts.input_layernorm, parts.pre_mlp_layernorm} == {norm if before else IdentityOp}
        assert {parts.post_self_attn_layernorm, parts.post_mlp_layernorm} == {norm if after else IdentityOp}


def test_parameters_start_by_their_role() -> None:
    group: Any = None  # not asked for a parameter that is not shared out
    parameter = torch.nn.Parameter(torch.full((3,), 7.0))

    def start(name: str, **changes: Any) -> list[float]:
        return initial_value(name, parameter, ModelConfig(**changes), 10, 0, group).tolist()

    for name in ("decoder.final_layernorm.weight", "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight"):
        assert start(name) == [1, 1, 1] and start(name, apply_layernorm_1p=True) == [0, 0, 0]
    assert (
        start("decoder.final_layernorm.bias") == start("decoder.layers.0.mlp.linear_fc1.layer_norm_bias") == [0, 0, 0]
    )
    drawn = start("decoder.layers.0.mlp.special")
    assert 0 < max(map(abs, drawn)) < 0.2
    parameter.initial_std = 20.0  # type: ignore[attr-defined]
    assert start("decoder.layers.0.mlp.special") == pytest.approx([1000 * value for value in drawn])
    parameter.initial_value = 5.0  # type: ignore[attr-defined]
    assert start("decoder.layers.0.mlp.special") == [5, 5, 5]


@pytest.mark.parametrize("bias", [None, torch.tensor([1.0, 2.0])])
def test_residual_add(bias: torch.Tensor | None) -> None:
    x, residual = torch.tensor([[3.0, 4.0]]), torch.tensor([[10.0, 20.0]])
    expected = x + residual + (0 if bias is None else bias)
    assert torch.equal(get_residual_add(True, False)((x, bias), residual, 0.0), expected)
    assert torch.equal(get_residual_add(False, False)((x, bias), residual, 0.5), expected)
    torch.manual_seed(0)
    dropped = get_residual_add(True, False)((x.expand(50, 2), bias), residual.expand(50, 2), 0.5)
    assert torch.equal(dropped.unique(dim=0)[0], residual[0]), "both columns dropped in some row, bias and all"
