"""`bash examples/pretrain_1b.sh` end to end at 2 steps: everything it promises to leave behind is there and fits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


def run_example(output: Path, *flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the script with this test's Python; a GPU on the machine is hidden from it."""
    settings = {"OUTPUT_DIR": str(output), "STEEL_PYTHON": sys.executable, "GPUS_PER_NODE": "0", **environment}
    return subprocess.run(
        ["bash", str(ROOT / "examples/pretrain_1b.sh"), *flags],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **settings},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of one short run."""
    folder = tmp_path_factory.mktemp("example") / "run"
    done = run_example(folder, TRAIN_ITERS="2", WARMUP_ITERS="1", SEQ_LENGTH="64")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert "No GPU" in "".join(lines[:3])
    assert lines[-1].startswith("--- done")
    return folder


def test_it_trains_and_saves(output: Path) -> None:
    assert (output / "checkpoints/latest_checkpointed_iteration.txt").read_text() == "2"
    state = json.loads((output / "checkpoints/iter_0000002/state.json").read_text())
    assert (state["iteration"], state["consumed_samples"], state["world_size"]) == (2, 2 * 8, 2)
    rows = [json.loads(line) for line in (output / "checkpoints/metrics.jsonl").read_text().splitlines()]
    assert {row.get("name") for row in rows if row.get("split") == "valid"} == {"zh", "en", None}
    # An untrained model of 4,096 ids is close to uniform: ln 4096 = 8.32.
    assert all(7.5 < row["loss"] < 8.6 for row in rows)


def test_the_export_loads_alone_and_agrees(output: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(output / "hf")
    tokenizer = AutoTokenizer.from_pretrained(output / "hf")
    assert model.config.vocab_size == len(tokenizer) == 4096
    evaluation = json.loads((output / "evaluation.json").read_text())["sets"]
    # The first window of a validation set, scored by transformers: within the spread of single windows around the mean.
    text = json.loads((ROOT / "examples/data/valid_en.jsonl").read_text().splitlines()[0])["text"]
    ids = torch.tensor([tokenizer(text)["input_ids"][:65]])
    with torch.no_grad():
        loss = model(ids, labels=ids).loss.item()
    assert abs(loss - evaluation["en"]["loss"]) < 0.3


def test_a_second_start_finds_nothing_to_do(output: Path) -> None:
    before = (output / "checkpoints/iter_0000002/manifest.json").read_bytes()
    again = run_example(output, TRAIN_ITERS="2", WARMUP_ITERS="1", SEQ_LENGTH="64")
    assert again.returncode == 0, again.stderr[-2000:]
    assert "stopped at iteration 2" in again.stdout
    assert (output / "checkpoints/iter_0000002/manifest.json").read_bytes() == before


def test_a_wrong_flag_stops_it_before_training(output: Path) -> None:
    wrong = run_example(output, "--hidden-sizes", "64", TRAIN_ITERS="2")
    assert wrong.returncode != 0
    assert "error: command line: unknown option --hidden-sizes; did you mean --hidden-size?" in wrong.stderr
