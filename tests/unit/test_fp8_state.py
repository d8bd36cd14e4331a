"""Scales and histories of FP8's delayed recipe are saved as plain tensors and come back."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_steel.checkpoint import fp8_state
from megatron_steel.checkpoint.fp8_state import fp8_file, load_fp8, save_fp8


class Layer(torch.nn.Module):
    """What a layer of Transformer Engine (2.11) keeps of the recipe, in its names."""

    def __init__(self) -> None:
        super().__init__()
        self.fp8_meta: dict[str, Any] = {"fp8_checkpoint": False}

    def init_fp8_meta_tensors(self, recipe: Any) -> None:
        for which, tensors in (("scaling_fwd", 3), ("scaling_bwd", 2)):
            count = tensors * self.fp8_meta["num_gemms"]
            parts = SimpleNamespace(scale=torch.ones(count), amax_history=torch.zeros(recipe.amax_history_len, count))
            self.fp8_meta[which] = parts


def model(recipe: str = "delayed", length: int = 4) -> Any:
    layers = torch.nn.ModuleDict({"linear": Layer(), "experts": Layer(), "norm": torch.nn.LayerNorm(2)})
    options = SimpleNamespace(fp8="hybrid", fp8_recipe=recipe, fp8_amax_history_len=length)
    return SimpleNamespace(options=options, language_models=lambda: [layers])


@pytest.fixture(autouse=True)
def recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        fp8_state, "get_fp8_recipe", lambda options: SimpleNamespace(amax_history_len=options.fp8_amax_history_len)
    )


def test_scales_and_histories_come_back(tmp_path: Path) -> None:
    before, after = model(), model()
    for name, products in (("linear", 1), ("experts", 5)):
        layer = before.language_models()[0][name]
        layer.fp8_meta["num_gemms"] = products
        layer.init_fp8_meta_tensors(SimpleNamespace(amax_history_len=4))
        for which in fp8_state.PASSES:
            for part in fp8_state.PARTS:
                getattr(layer.fp8_meta[which], part).normal_()
    save_fp8(before, tmp_path, 0)
    load_fp8(after, tmp_path, 0)
    there, here = (fp8_state.fp8_state(each) for each in (before, after))
    assert len(there) == 8 and there.keys() == here.keys()
    assert all(torch.equal(there[name], here[name]) for name in there)
    assert after.language_models()[0]["experts"].fp8_meta["num_gemms"] == 5
    with pytest.raises(ValueError, match="histories have 4 steps, --fp8-amax-history-len is 8; resume with the same"):
        load_fp8(model(length=8), tmp_path, 0)


def test_other_recipes_and_new_models_have_none(tmp_path: Path) -> None:
    save_fp8(model("tensorwise"), tmp_path, 0)
    save_fp8(model(), tmp_path, 0)
    assert not (tmp_path / fp8_file(0)).exists()
    load_fp8(model(), tmp_path, 0)
