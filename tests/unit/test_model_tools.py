"""The tools that run a model: which checkpoint they take, and who says what was passed over."""

from __future__ import annotations

import argparse
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_steel.checkpoint.files import TRACKER, describe_files, list_files, publish, temporary_directory
from megatron_steel.runtime import cpu, world
from tools import evaluate, generate
from tools.command_line import start_model_run

FLAGS = {evaluate: ["--valid-data-path", "x"], generate: []}


@pytest.mark.parametrize("tool", [evaluate, generate])
@pytest.mark.parametrize("rank", [0, 1])
def test_rank_0_warns_of_a_checkpoint_that_was_passed_over(
    tool: object, rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for iteration in (1, 2):
        folder = temporary_directory(tmp_path, iteration)
        folder.mkdir()
        (folder / "state.json").write_text("{}")
        publish(tmp_path, iteration, describe_files(folder, list_files(folder)))
    (tmp_path / TRACKER).write_text("3")
    (tmp_path / "iter_0000002" / "state.json").unlink()
    asked: dict[str, int] = {}
    monkeypatch.setattr(cpu, "install", lambda: None)
    monkeypatch.setattr(world, "start", lambda **sizes: asked.update(sizes) or SimpleNamespace(rank=rank))
    flags = ["--load", str(tmp_path), "--tensor-model-parallel-size", "2", *FLAGS[tool]]
    options: argparse.Namespace = tool.build_parser().parse_args(flags)
    checkpoint, ours = start_model_run(options)
    assert (checkpoint.name, ours.rank) == ("iter_0000001", rank)
    assert asked == {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 1}
    lines = capsys.readouterr().err.splitlines()
    assert [line.startswith("warning: ") for line in lines] == [True, True] * (rank == 0)
    assert rank or ("names no checkpoint ('3')" in lines[0] and "iter_0000002/state.json is missing" in lines[1])
