"""The bundled corpus is what its README says, and its tokenizer is made by the recorded command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from megatron_steel.text.tokenizer import build_tokenizer

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "examples" / "data"


def rows(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in open(DATA / name, encoding="utf-8")]


def test_sizes_are_those_of_the_readme() -> None:
    readme = (DATA / "README.md").read_text(encoding="utf-8")
    tokenizer = build_tokenizer("HuggingFaceTokenizer", str(DATA / "tokenizer"))
    for name, documents, eod in (("train.jsonl", 619, 1), ("valid_zh.jsonl", 19, 0), ("valid_en.jsonl", 25, 0)):
        ids = tokenizer.encode_documents([row["text"] for row in rows(name)])
        tokens = sum(len(document) + eod for document in ids)
        assert len(ids) == documents
        line = next(line for line in readme.splitlines() if line.startswith(f"| `{name}`"))
        assert f"| {documents}" in line and f"| {tokens:,} |" in line


def test_validation_chapters_are_not_trained_on() -> None:
    train = {row["source"] for row in rows("train.jsonl")}
    for name, language in (("valid_zh.jsonl", "zh"), ("valid_en.jsonl", "en")):
        held_out = rows(name)
        assert {row["lang"] for row in held_out} == {language}
        assert not train & {row["source"] for row in held_out}
    texts = {row["text"] for row in rows("train.jsonl")}
    assert len(texts) == 619


def test_the_recorded_command_makes_the_tokenizer(tmp_path: Path) -> None:
    tool = [sys.executable, str(ROOT / "tools" / "train_tokenizer.py"), "--input", str(DATA / "train.jsonl")]
    subprocess.run([*tool, "--output", str(tmp_path), "--vocab-size", "4096"], check=True, timeout=120)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert json.loads((tmp_path / name).read_text("utf-8")) == json.loads(
            (DATA / "tokenizer" / name).read_text("utf-8")
        )


def test_training_a_tokenizer_refuses_bad_input(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"text": "a"}\n{"body": "b"}\n')
    tool = [sys.executable, str(ROOT / "tools" / "train_tokenizer.py"), "--output", str(tmp_path / "out")]
    for flags, message in (
        (["--input", "absent.jsonl"], "error: --input absent.jsonl: no such file\n"),
        (["--input", "in.jsonl"], "error: in.jsonl:2: no JSON object with the key 'text'\n"),
        (["--input", "in.jsonl", "--json-key", "text", "--vocab-size", "100"], "error: "),
    ):
        done = subprocess.run([*tool, *flags], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 2 and done.stderr.startswith(message) and done.stderr.count("\n") == 1
        assert not (tmp_path / "out").exists()
