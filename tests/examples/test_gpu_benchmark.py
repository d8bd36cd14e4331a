"""The benchmark of a GPU runs on a CPU with tiny models, and its numbers are those of the published sizes."""

from __future__ import annotations

import importlib
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_steel.config.load import from_flat
from megatron_steel.plan.estimate import flops_per_token

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("gpu_train"), importlib.import_module("gpu_leg")


def test_smoke_run_writes_a_consistent_record(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "gpu_train.py"), "--smoke", "--record", str(tmp_path / "record")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "record.json").read_text())["rows"]
    ours, plain, bare, unfused, engine = rows
    for row in (ours, plain, bare, unfused):
        step = row["samples"] * row["seq_length"] / row["tokens_per_s"]
        assert step == pytest.approx(row["step_ms"] / 1e3) == pytest.approx(sum(row["block_ms"]) / 2e3)
        assert row["tflops"] == pytest.approx(row["tokens_per_s"] * row["gflop_per_token"] / 1e3)
        assert row["share_of_matmul"] == pytest.approx(row["tflops"] / max(row["matmul_tflops"]))
        assert abs(row["loss"] - math.log(512)) < 0.2
    assert ours["loss"] == bare["loss"] == unfused["loss"] and plain["backend"] == "plain megatron-core"
    assert "no GPU is visible" in engine["error"]
    table = (tmp_path / "record.md").read_text()
    assert f"| smoke, 64, torch, fp32 | 2 | {ours['tokens_per_s']:,.0f} |" in table and "first losses agree" in table


def test_models_are_those_that_speeds_are_published_of(benchmarks: tuple[Any, Any]) -> None:
    """GFLOP per token at 4096: 6 x parameters in matrix products + 12 x layers x width x 4096, by hand."""
    train, leg = benchmarks
    for model, expected in {"llama3.2_1b": 9.03, "olmo2_1b": 8.59, "llama3_8b": 51.5}.items():
        one = {**train.case(model, 4096, "torch"), "micro_batch": 1}
        config = from_flat(leg.flat_options(one, "data"))
        flops = flops_per_token(config.size, 4096, leg.MODELS[model]["vocab_size"])
        assert flops / 1e9 == pytest.approx(expected, rel=2e-3)


def test_gate_sees_other_losses(benchmarks: tuple[Any, Any]) -> None:
    train, _ = benchmarks
    row = {**train.case("olmo2_1b", 4096, "torch"), "loss": 11.5, "vocabulary": 100352}
    other = {**row, "backend": "local"}
    assert train.gate([row, {**other, "loss": 11.501}, {**row, "flags": train.FP8, "loss": 12.0}]) == []
    (line,) = train.gate([row, {**other, "loss": 11.6}])
    assert "olmo2_1b, 4096, local, bf16: first loss 11.60000, not 11.50000" in line
    assert len(train.gate([{**row, "backend": "plain megatron-core", "loss": float("nan")}])) == 1


def test_smaller_micro_batches_follow_when_memory_is_out(
    benchmarks: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    train, _ = benchmarks
    tried: list[int] = []

    def leg(one: dict[str, Any], seconds: float) -> dict[str, Any]:
        tried.append(one["micro_batch"])
        return {"error": "out of memory"} if one["micro_batch"] > 2 else {"loss": 1.0}

    monkeypatch.setattr(train, "run_leg", leg)
    rows = list(train.measurements([train.case("llama3_8b", 4096, "torch", 8)], math.inf))
    assert tried == [8, 4, 2] and [row.get("error") for row in rows] == ["out of memory", "out of memory", None]
