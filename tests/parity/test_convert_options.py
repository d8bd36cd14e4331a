"""Conversions to another precision, in files of a chosen size, without a process group; and code in folders."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch
from hf_models import make_model
from safetensors.torch import load_file

from megatron_steel.checkpoint.files import problem_with
from megatron_steel.checkpoint.hf import export_hf, import_hf
from tools.convert_hf import shard_bytes


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder."""
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("at_import", [True, False])
def test_another_precision_is_what_torch_makes_of_the_weights(tmp_path: Path, at_import: bool) -> None:
    make_model("qwen2-untied").save_pretrained(tmp_path / "theirs")
    first, second = (torch.bfloat16, None) if at_import else (None, torch.bfloat16)
    checkpoint = import_hf(tmp_path / "theirs", tmp_path / "ours", dtype=first)
    export_hf(checkpoint, tmp_path / "back", shard_bytes=20_000, dtype=second)
    before, after = tensors_of(tmp_path / "theirs"), tensors_of(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor.bfloat16()) for name, tensor in before.items())
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == "bfloat16"
    files = sorted((tmp_path / "back").glob("*.safetensors"))
    assert len(files) > 3 and all(path.stat().st_size < 20_000 + 4096 for path in files)
    assert problem_with(checkpoint, hashes=True) is None, "hashes taken while writing are those of the files"


@pytest.mark.parametrize(("text", "count"), [("5GB", 5 * 10**9), ("900MB", 9 * 10**8), ("1.5KB", 1500), ("77", 77)])
def test_sizes(text: str, count: int) -> None:
    assert shard_bytes(text) == count


@pytest.mark.parametrize("text", ["", "5 GB", "-1", "GB", "0", "5TB", "0MB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is not a size"):
        shard_bytes(text)
