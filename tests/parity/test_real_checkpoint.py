"""Real files, when they are there: a published model and a published tokenizer go through the whole path.

STEEL_REAL_CHECKPOINT   a Hugging Face folder with weights and tokenizer, small enough to train here (SmolLM2-135M)
STEEL_REAL_TOKENIZER    a Hugging Face tokenizer folder with a chat template (Qwen2.5)
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import hf_models
import pytest
import torch
from pool import WorkerPool
from safetensors.torch import load_file
from transformers import AutoTokenizer

from megatron_steel.checkpoint.verify import Comparison, compare_with_hf
from megatron_steel.runtime import world as runtime

REPOSITORY = Path(__file__).parents[2]
CORPUS = REPOSITORY / "examples" / "data"
ROWS_OF_QWEN = 151_936
TEXT_TOKENS = 256
STEPS = 20


def real_folder(variable: str) -> Path:
    """The folder an environment variable names; without it the test is skipped."""
    if variable not in os.environ:
        pytest.skip(f"{variable} names no folder")
    return Path(os.environ[variable])


def run(*argv: object) -> str:
    """Run ``python argv`` from the repository; returns its output."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, *(str(item) for item in argv)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def same_tensors(one: Path, other: Path) -> bool:
    """Whether two folders hold the same tensors to the bit."""
    first, second = (
        {k: v for p in folder.glob("*.safetensors") for k, v in load_file(p).items()} for folder in (one, other)
    )
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]) for name in first
    )


def work_compare(checkpoint: str, folder: str) -> Comparison:
    """How far both models are apart on the first validation texts."""
    from megatron_steel.checkpoint.state import load_tokenizer

    world = runtime.start()
    tokenizer, texts = load_tokenizer(Path(checkpoint)), []
    for name in ("valid_en", "valid_zh"):
        with open(CORPUS / f"{name}.jsonl", encoding="utf-8") as stream:
            text = json.loads(stream.readline())["text"]
        texts.append(torch.tensor([tokenizer.encode(text)[:TEXT_TOKENS]]))
    return compare_with_hf(Path(checkpoint), Path(folder), world, texts)


def check_agreement(pool: WorkerPool, checkpoint: Path, folder: Path) -> None:
    """Both libraries must see the same model; prints the numbers (``pytest -s``)."""
    report = pool.run(1, work_compare, str(checkpoint), str(folder), join=False, timeout=400)[0]
    print(f"{folder.name}: {report.one_line()}")
    assert report.same and report.top1_agreement == 1.0 and report.tokens == 2 * TEXT_TOKENS


def losses(load: Path, data: Path) -> dict[str, float]:
    """Held-out loss by language, from the evaluation tool."""
    sets = [f"{name}={data / f'valid_{name}_text_document'}" for name in ("en", "zh")]
    result = data / "scores.json"
    shape = ("--seq-length", 128, "--micro-batch-size", 4, "--max-samples", 16)
    printed = run("tools/evaluate.py", "--load", load, "--valid-data-path", *sets, *shape, "--output", result)
    print(printed)
    scores = json.loads(result.read_text())
    return {name: scores["sets"][name]["loss"] for name in ("en", "zh")}


@pytest.mark.timeout(3600)
def test_published_model_goes_on_training(pool: WorkerPool, tmp_path: Path) -> None:
    """Import, agree with transformers on real text, export the same bits, train on, export again, agree again."""
    hf, ours, tuned, data = (
        real_folder("STEEL_REAL_CHECKPOINT"),
        tmp_path / "ours",
        tmp_path / "tuned",
        tmp_path / "data",
    )
    run("tools/convert_hf.py", "import", "--hf", hf, "--save", ours)
    check_agreement(pool, ours / "iter_0000000", hf)
    run("tools/convert_hf.py", "export", "--load", ours, "--hf", tmp_path / "back")
    assert same_tensors(hf, tmp_path / "back")
    data.mkdir()
    for name in ("train", "valid_en", "valid_zh"):
        tokenizer = ("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", hf)
        source = ("--input", CORPUS / f"{name}.jsonl", "--output-prefix", data / name)
        run("tools/preprocess_data.py", *source, *tokenizer, "--append-eod")
    before = losses(ours, data)
    model = ("--model", hf, "--load", ours, "--finetune", "--tokenizer-model", hf)
    shape = ("--seq-length", 128, "--micro-batch-size", 2, "--global-batch-size", 4, "--train-iters", STEPS)
    rates = ("--lr", 1e-4, "--min-lr", 1e-5, "--lr-warmup-iters", 3, "--weight-decay", 0)
    where = ("--train-data-path", data / "train_text_document", "--save", tuned)
    run("-m", "megatron_steel.pretrain", *model, *shape, *rates, *where)
    after = losses(tuned, data)
    assert all(after[name] < before[name] - 0.1 for name in before), (before, after)
    run("tools/convert_hf.py", "export", "--load", tuned, "--hf", tmp_path / "tuned-hf")
    check_agreement(pool, tuned / f"iter_{STEPS:07d}", tmp_path / "tuned-hf")
    assert not same_tensors(hf, tmp_path / "tuned-hf")


def test_published_tokenizer_survives_the_round_trip(pool: WorkerPool, tmp_path: Path) -> None:
    """A Qwen2 of tiny width with the full vocabulary: files, chat template, ids and logits are the same afterwards."""
    source = real_folder("STEEL_REAL_TOKENIZER")
    model = hf_models.make_model("qwen2-tied", vocab_size=ROWS_OF_QWEN).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "hf")
    for path in source.iterdir():
        shutil.copy(path, tmp_path / "hf")
    names = {path.name for path in source.iterdir()} & {path.name for path in (tmp_path / "hf").iterdir()}
    for argv in (
        ["import", "--hf", tmp_path / "hf", "--save", tmp_path / "ours"],
        ["export", "--load", tmp_path / "ours", "--hf", tmp_path / "back"],
        ["verify", "--load", tmp_path / "ours", "--hf", tmp_path / "back"],
    ):
        code, out, err = pool.run(1, hf_models.work_convert, [str(item) for item in argv], join=False, timeout=200)[0]
        print(out)
        assert code == 0, err
    assert same_tensors(tmp_path / "hf", tmp_path / "back")
    for name in names:
        assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes(), name
    before, after = (AutoTokenizer.from_pretrained(folder) for folder in (source, tmp_path / "back"))
    chat = [{"role": "user", "content": "你好, world"}]
    assert before.chat_template and before.chat_template == after.chat_template
    text = before.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == after.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert before.encode(text) == after.encode(text)


def test_as_many_rows_as_qwen_on_real_text(pool: WorkerPool, tmp_path: Path) -> None:
    """The same without anything from outside: 151,936 rows, biases, the bundled tokenizer, English and Chinese."""
    sizes = {"vocab_size": ROWS_OF_QWEN, "max_position_embeddings": 2 * TEXT_TOKENS}
    hf_models.make_model("qwen2-tied", **sizes).to(torch.bfloat16).save_pretrained(tmp_path / "hf")
    for path in (CORPUS / "tokenizer").iterdir():
        shutil.copy(path, tmp_path / "hf")
    where = {"model": (str(tmp_path / "hf"), str(tmp_path / "ours"))}
    checkpoint = pool.run(1, hf_models.work_import, where, join=False)[0]["model"]
    check_agreement(pool, Path(checkpoint), tmp_path / "hf")
    pool.run(1, hf_models.work_export, {"model": (checkpoint, str(tmp_path / "back"))}, 10**9, join=False)
    assert same_tensors(tmp_path / "hf", tmp_path / "back")
