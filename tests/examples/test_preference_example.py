"""`bash examples/preference_1b.sh` from a random model: it trains on the bundled pairs, and exports."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_chats import write_model

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples/preference_1b.sh"


def run_example(output: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the script with this test's Python; a GPU on the machine is hidden from it."""
    settings = {"OUTPUT_DIR": str(output), "STEEL_PYTHON": sys.executable, "GPUS_PER_NODE": "0", **environment}
    return subprocess.run(
        ["bash", str(SCRIPT)],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **settings},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a run over the bundled pairs, one pass in each step."""
    model = write_model(tmp_path_factory.mktemp("model"), max_position_embeddings=512, initializer_range=0.02)
    folder = tmp_path_factory.mktemp("example") / "run"
    settings = {"NUM_EPOCHS": "2", "GLOBAL_BATCH_SIZE": "6", "LR": "1e-3", "WARMUP_ITERS": "0", "LOSS_TYPE": "sigmoid"}
    done = run_example(folder, PRETRAINED=model, **settings)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "No GPU" in done.stdout.splitlines()[0] and done.stdout.splitlines()[-1].startswith("--- done")
    return folder


def test_it_learns_what_is_preferred(output: Path) -> None:
    rows = [json.loads(line) for line in (output / "checkpoints/metrics.jsonl").read_text().splitlines()]
    (held,) = (row for row in rows if row.get("split") == "valid")
    assert held["name"] == "pairs" and held["pairs"] == 8
    (last,) = (row for row in rows if row.get("split") != "valid")
    # Two or more steps: the first is at ln 2, a later one below.
    assert last["loss"] < math.log(2) and last["rewards/margins"] > 0
    assert (output / "hf" / "chat_template.jinja").is_file()


def test_its_flags_exist() -> None:
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
    text = SCRIPT.read_text(encoding="utf-8")
    known = {line.split()[0] for line in (ROOT / "tests/unit/flags.txt").read_text(encoding="utf-8").splitlines()}
    named = set(re.findall(r"(?<=[\s(])--[a-z][a-z0-9-]+", text[: text.index("if wants")]))
    assert len(named) > 20 and named <= known


def test_the_bundled_pairs_are_pairs_of_both_languages() -> None:
    from megatron_steel.data.chat_sources import open_chat
    from megatron_steel.text.conversation import Pair

    found = {}
    for name, count in (("pairs_train", 40), ("pairs_valid", 8)):
        (source,) = open_chat([str(ROOT / f"examples/data/{name}.jsonl")], None, 1_000_000, row_kind="pair")
        rows = list(source.rows())
        assert len(rows) == count and all(isinstance(row, Pair) for row in rows)
        found[name] = {row.chosen.messages[0].content for row in rows if isinstance(row, Pair)}
        assert len(found[name]) == count
    assert not found["pairs_train"] & found["pairs_valid"]
