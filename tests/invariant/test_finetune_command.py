"""The finetune command from start to exported folder, as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_chats import chat_options, write_chats, write_model

from megatron_steel import pretrain
from megatron_steel.finetune import main

MODULE = [sys.executable, "-m", "megatron_steel.finetune"]


def flags(options: dict[str, Any]) -> list[str]:
    """Options as a command line."""
    words: list[str] = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return words


def finetune(options: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*MODULE, *flags(options)], capture_output=True, text=True, timeout=120)


def refusal(capsys: pytest.CaptureFixture[str], options: dict[str, Any]) -> str:
    """The one line of a run that ends with a user error, which is before any process group."""
    with pytest.raises(SystemExit) as ended:
        main(flags(options))
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1, said
    return said


def losses(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row.get("split") != "valid"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_chats(tmp_path_factory.mktemp("data") / "chats.jsonl", 40)


def test_from_a_folder_to_a_folder(model: str, data: str, tmp_path: Path) -> None:
    """Epochs as the length, preflight, metrics, resume without the first folder, export with template and ends."""
    options = chat_options(model, data, num_epochs=2.0, log_interval=1, valid_data=[f"held={data}"], bf16=False)
    del options["train_iters"]
    first = finetune({**options, "save": str(tmp_path / "run"), "exit_interval": 3})
    assert first.returncode == 0, first.stderr
    assert "preflight: widest micro-batch 2 x 64 tokens" in first.stdout
    assert "chats: 40 rows, 40 conversations of" in first.stdout
    second = finetune({**options, "save": str(tmp_path / "run"), "auto_resume": True, "preflight": False})
    assert second.returncode == 0, second.stderr
    whole = finetune({**options, "save": str(tmp_path / "whole"), "preflight": False})
    assert whole.returncode == 0, whole.stderr
    rows, wanted = losses(tmp_path / "run"), losses(tmp_path / "whole")
    total = rows[-1]["epochs_by_source"]["chats"]
    assert 2.0 <= total < 2.0 + 8 / 3 and rows[-1]["iteration"] == len(rows) == len(wanted)
    for row, other in zip(rows, wanted, strict=True):
        assert (row["loss"], row["grad_norm"], row["lr"]) == (other["loss"], other["grad_norm"], other["lr"])
        assert 0.1 < row["trained_token_share"] == other["trained_token_share"] < 0.7

    from megatron_steel.checkpoint.files import find_checkpoint
    from megatron_steel.checkpoint.hf import export_hf

    export_hf(find_checkpoint(tmp_path / "run", None)[0], tmp_path / "hf")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    turns = [{"role": "user", "content": "the sea"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\nthe sea<|im_end|>\n<|im_start|>assistant\n"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    ends = loaded.generation_config.eos_token_id
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in (ends if isinstance(ends, list) else [ends])


def test_inspect_shows_what_is_trained(model: str, data: str) -> None:
    shown = finetune(chat_options(model, data, inspect=2))
    assert shown.returncode == 0 and shown.stdout.count("chats.jsonl:") == 2
    assert "<|im_start|>assistant" in shown.stdout and "[<|im_end|>]" in shown.stdout


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ('{"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}', "role order"),
        ('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]}', "empty"),
        ('{"text": "nothing of a conversation"}', "missing key"),
        ('{"messages": [{"role": "user", "content": 3}, {"role": "assistant", "content": "b"}]}', "type"),
        ('{"messages": [{"role": "user", "content": "a"', "malformed JSON"),
    ],
)
def test_bad_rows_are_named_and_refused(
    capsys: pytest.CaptureFixture[str], model: str, data: str, tmp_path: Path, row: str, reason: str
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(Path(data).read_text() + row + "\n")
    said = refusal(capsys, chat_options(model, str(path), train_iters=1))
    assert "1 of 41 rows are bad" in said and "rows.jsonl:41" in said and "--max-bad-rows" in said
    assert reason in said
    if reason == "malformed JSON":
        allowed = finetune(chat_options(model, str(path), train_iters=1, max_bad_rows=0.1))
        assert allowed.returncode == 0 and "1 bad rows left out (1 malformed JSON" in allowed.stdout


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_data": []}, "--train-data"),
        ({"pretrained_checkpoint": "/nowhere"}, "--pretrained-checkpoint /nowhere: neither a Hugging Face folder"),
        ({"num_epochs": 1.0, "train_tokens": 100}, "give --num-epochs or --train-tokens, not both"),
        ({"train_on_prompt": True, "mask_history": True}, "--mask-history and --train-on-prompt exclude each other"),
        ({"chat_template": "nonsense"}, "--chat-template nonsense: no such file"),
        ({"hidden_size": 48}, "has --hidden-size 32, not 48"),
        ({"eod_mask_loss": True}, "--eod-mask-loss is an option of pretraining"),
        ({"seq_length": 4, "truncation": "proportional"}, "nothing would be trained"),
        ({"system_probability": 0.5}, "--system-probability needs --system-text"),
        ({"train_iters": 9, "num_epochs": 1.0}, "--train-iters"),
    ],
)
def test_user_errors_are_one_line(
    capsys: pytest.CaptureFixture[str], model: str, data: str, changes: dict[str, Any], message: str
) -> None:
    assert message in refusal(capsys, {**chat_options(model, data), **changes})


def test_pretraining_refuses_options_of_conversations(capsys: pytest.CaptureFixture[str], data: str) -> None:
    with pytest.raises(SystemExit) as ended:
        pretrain.main(["--train-data", data])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "--train-data is an option of megatron_steel.finetune; pretraining takes --data-path" in said
