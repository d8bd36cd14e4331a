"""`bash examples/finetune_1b.sh` from a random model: what it promises to leave behind is there and fits."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_chats import write_model

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples/finetune_1b.sh"
# One step over the bundled chats: 13 rows of 256 tokens hold them.
SETTINGS = {"NUM_EPOCHS": "1", "GLOBAL_BATCH_SIZE": "16", "MICRO_BATCH_SIZE": "2", "WARMUP_ITERS": "0"}


def run_example(output: Path, *flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the script with this test's Python; a GPU on the machine is hidden from it."""
    settings = {"OUTPUT_DIR": str(output), "STEEL_PYTHON": sys.executable, "GPUS_PER_NODE": "0", **environment}
    return subprocess.run(
        ["bash", str(SCRIPT), *flags],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **settings},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random Llama in a Hugging Face folder, with the bundled tokenizer."""
    return write_model(tmp_path_factory.mktemp("model"), max_position_embeddings=512, initializer_range=0.02)


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory, model: str) -> Path:
    """The output folder of one short run."""
    folder = tmp_path_factory.mktemp("example") / "run"
    done = run_example(folder, PRETRAINED=model, **SETTINGS)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert "No GPU" in lines[0] and "bundled sample chats" in lines[1]
    assert "Who are you?" in done.stdout and lines[-1].startswith("--- done")
    return folder


def test_it_trains_and_saves(output: Path) -> None:
    state = json.loads((output / "checkpoints/iter_0000001/state.json").read_text())
    assert (state["iteration"], state["consumed_samples"], state["world_size"]) == (1, 16, 2)
    rows = [json.loads(line) for line in (output / "checkpoints/metrics.jsonl").read_text().splitlines()]
    assert {row.get("name") for row in rows if row.get("split") == "valid"} == {"chats"}
    # An untrained model of 4,096 ids is close to uniform: ln 4096 = 8.32.
    assert rows and all(7.5 < row["loss"] < 8.6 for row in rows)


def test_the_export_writes_chats_as_they_were_trained(output: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(output / "hf")
    model = AutoModelForCausalLM.from_pretrained(output / "hf")
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
    prompt = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
    assert prompt == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.apply_chat_template(turns, tokenize=False) == f"{prompt}Hello!<|im_end|>\n"
    stops = model.generation_config.eos_token_id
    assert tokenizer.convert_ids_to_tokens(stops) == ["<|im_end|>", "<|endoftext|>"]
    with torch.no_grad():
        assert model(**tokenizer(prompt, return_tensors="pt")).logits.shape[-1] == 4096


def test_a_second_start_finds_nothing_to_do(output: Path, model: str) -> None:
    before = (output / "checkpoints/iter_0000001/manifest.json").read_bytes()
    again = run_example(output, PRETRAINED=model, STEPS="train", **SETTINGS)
    assert again.returncode == 0, again.stderr[-2000:]
    assert "stopped at iteration 1" in again.stdout
    assert (output / "checkpoints/iter_0000001/manifest.json").read_bytes() == before


def test_without_a_model_it_says_what_to_do(tmp_path: Path) -> None:
    done = run_example(tmp_path, PRETRAINED=str(tmp_path / "absent"))
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {tmp_path}/absent is not there; run examples/pretrain_1b.sh first")


def test_its_flags_exist() -> None:
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
    text = SCRIPT.read_text(encoding="utf-8")
    training = text[text.index("CHAT_FLAGS=(") : text.index("if wants")] + text[: text.index("CHAT_FLAGS=(")]
    known = {line.split()[0] for line in (ROOT / "tests/unit/flags.txt").read_text(encoding="utf-8").splitlines()}
    named = set(re.findall(r"(?<=[\s(])--[a-z][a-z0-9-]+", training))
    assert len(named) > 20 and named <= known


def test_the_bundled_chats_are_conversations_of_both_languages() -> None:
    from megatron_steel.data.chat_sources import open_chat
    from megatron_steel.text.conversation import Conversation

    found = {}
    for name, count in (("chat_train", 64), ("chat_valid", 10)):
        (source,) = open_chat([str(ROOT / f"examples/data/{name}.jsonl")], None, 1_000_000)
        rows = list(source.rows())
        assert len(rows) == count and all(isinstance(row, Conversation) for row in rows)
        texts = (ROOT / f"examples/data/{name}.jsonl").read_text(encoding="utf-8").splitlines()
        assert 0.4 < sum(any("\u4e00" <= letter <= "\u9fff" for letter in text) for text in texts) / count < 0.6
        found[name] = set(texts)
    assert not found["chat_train"] & found["chat_valid"]
