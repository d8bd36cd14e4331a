"""A finetune of adapters as a user runs it: interrupted and resumed to the bit, the model below them untouched."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from command_line import as_flags, finish, start
from safetensors.torch import load_file
from tiny_chats import chat_options, write_chats, write_model

from megatron_steel.checkpoint.dcp_read import StoredTensors
from megatron_steel.checkpoint.files import find_checkpoint
from megatron_steel.checkpoint.hf import hf_tensors
from megatron_steel.checkpoint.state import read_state
from megatron_steel.config.load import from_flat

ADAPTERS = {"lora_rank": 4, "lora_dropout": 0.1, "preflight": False, "log_interval": 1, "train_iters": 4}


def finetune(folder: Path, options: dict[str, Any]) -> None:
    processes = start(folder, as_flags(options), program=("-m", "megatron_steel.finetune"))
    assert finish(processes) == [0], (folder / "err0").read_text()


def rows(folder: Path) -> list[tuple[Any, ...]]:
    """What has to be equal to the bit."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(row["iteration"], row["loss"], row["grad_norm"], row["lr"]) for row in lines]


def test_adapters_resume_and_leave_the_model_alone(tmp_path: Path) -> None:
    from tools.convert_hf import main

    model = write_model(tmp_path / "model")
    options = chat_options(model, write_chats(tmp_path / "chats.jsonl", 40), **ADAPTERS)
    finetune(tmp_path / "a", {**options, "save": str(tmp_path / "run"), "exit_interval": 2})
    finetune(tmp_path / "b", {**options, "save": str(tmp_path / "run"), "auto_resume": True})
    finetune(tmp_path / "c", {**options, "save": str(tmp_path / "whole")})
    assert len(rows(tmp_path / "run")) == 4 and rows(tmp_path / "run") == rows(tmp_path / "whole")

    weights = {}
    for name in ("run", "whole"):
        adapter = tmp_path / f"{name}-adapter"
        assert main(["export-adapter", "--load", str(tmp_path / name), "--adapter", str(adapter)]) == 0
        weights[name] = load_file(adapter / "adapter_model.safetensors")
    assert len(weights["run"]) == 2 * 7 * 4
    for name, tensor in weights["run"].items():
        assert torch.equal(tensor, weights["whole"][name]) and tensor.abs().max() > 0, name

    checkpoint = find_checkpoint(tmp_path / "run", None)[0]
    state = read_state(checkpoint)
    below = dict(hf_tensors(StoredTensors(checkpoint), from_flat(state.config).size, state.vocab_size))
    before = load_file(tmp_path / "model" / "model.safetensors")
    assert below.keys() >= before.keys()
    assert all(torch.equal(below[name], before[name]) for name in before)
    # Moments are kept for adapters alone.
    kept = [key for key in StoredTensors(checkpoint).tensors if key.startswith("optimizer.")]
    assert kept and all(".adapters." in key for key in kept)
