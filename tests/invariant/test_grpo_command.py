"""Training on rewards as a user runs it: a random model learns what a rule can check, and faults are one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_chats import write_model

from megatron_steel.preference import main

TOY = Path(__file__).resolve().parents[2] / "benchmarks" / "grpo_toy.py"


def test_the_reward_rises() -> None:
    """From what chance gives to nearly always, also on prompts that were never trained."""
    done = subprocess.run([sys.executable, str(TOY), "--steps", "60"], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    # A random letter and an end right after it are 1 in 12 each; a lone letter, "A." and "(A)" count too.
    assert result["first"] < 0.1
    assert result["last"] > 0.9 and result["held_out"] > 0.9


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize(
    ("row", "changes", "message"),
    [
        ({"prompt": "2 + 2?", "answer": "four"}, [], "the answer 'four' is no number, which --reward math compares"),
        ({"prompt": "2 + 2?"}, [], "1 of 1 rows are bad (1 missing key); first:"),
        ({"prompt": "sea " * 60, "answer": 4}, [], "tokens, --seq-length - --max-new-tokens is 48"),
        ({"prompt": "2 + 2?", "answer": 4}, ["--reward", "no_module:f"], "--reward no_module:f: cannot import"),
        ({"prompt": "2 + 2?", "answer": 4}, ["--reward", "maths"], "--reward maths: give one of math, choice"),
    ],
)
def test_faults_are_one_line(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], row: dict[str, object], changes: list[str],
    message: str,
) -> None:  # fmt: skip
    data = tmp_path / "prompts.jsonl"
    data.write_text(json.dumps(row) + "\n", encoding="utf-8")
    words = [
        *("--pretrained-checkpoint", model, "--train-data", str(data), "--chat-template", "chatml"),
        *("--loss-type", "grpo", "--reward", "math", "--seq-length", "64", "--max-new-tokens", "16"),
        *("--micro-batch-size", "1", "--global-batch-size", "1", "--train-iters", "1", "--lr", "1e-4"),
    ]
    with pytest.raises(SystemExit) as ended:
        main([*words, *changes])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.startswith("error: ") and message in said
    assert said.count("\n") == 1
