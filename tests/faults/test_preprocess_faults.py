"""Bad input to preprocessing: one line on stderr, exit code 2, and no file left."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "examples" / "data"
GOOD = '{"text": "one"}\n{"text": "two", "lang": "en"}\n'
TOKENIZER = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(DATA / "tokenizer")]


def command(tmp_path: Path, *flags: str) -> list[str]:
    """The tool's command line, output under ``tmp_path/out``."""
    tool = [sys.executable, str(ROOT / "tools" / "preprocess_data.py")]
    return [*tool, "--output-prefix", str(tmp_path / "out" / "set"), *flags]


def run(tmp_path: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(tmp_path, *flags), capture_output=True, text=True, timeout=60, cwd=tmp_path)


def outputs(tmp_path: Path) -> list[str]:
    """Names of everything under the output folder."""
    folder = tmp_path / "out"
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def assert_user_error(done: subprocess.CompletedProcess[str], tmp_path: Path, *parts: str) -> None:
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert not done.stdout and not outputs(tmp_path)
    for part in parts:
        assert part in done.stderr


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (b"", ["in.jsonl: holds no documents"]),
        (b"\n \n\r\n", ["in.jsonl: holds no documents"]),
        (
            GOOD.encode() + b'{"content": "x", "id": 3}\n',
            ["in.jsonl:3: no key 'text'", "'content', 'id'", "--json-keys"],
        ),
        (GOOD.encode() + b'{"text": "cut\n', ["in.jsonl:3: malformed JSON", "column"]),
        (b"\n" + GOOD.encode() + b"{}\n", ["in.jsonl:4: no key 'text'"]),
        (GOOD.encode() + b"[1, 2]\n", ["in.jsonl:3: each line must be a JSON object, not list"]),
        (GOOD.encode() + b'{"text": null}\n', ["in.jsonl:3: 'text' must be text or a list of texts, not NoneType"]),
        (GOOD.encode() + b'{"text": ["a", 1]}\n', ["in.jsonl:3: 'text' must be text or a list of texts, not int"]),
        (GOOD.encode() + b'{"text": "\xff"}\n', ["in.jsonl:3: not UTF-8"]),
        (GOOD.encode() + b'{"text": "\\ud800"}\n', ["in.jsonl:3: 'text' holds half of a surrogate pair"]),
        (b'{"text": ""}\n', ["'text' is empty text in all 1 documents"]),
    ],
    ids=["empty", "blank", "key", "json", "numbering", "list", "null", "number", "utf8", "surrogate", "empty-text"],
)
@pytest.mark.parametrize("workers", ["1", "2"])
def test_bad_content_names_file_and_line(content: bytes, parts: list[str], workers: str, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(content)
    done = run(tmp_path, "--input", "in.jsonl", *TOKENIZER, "--workers", workers)
    assert_user_error(done, tmp_path, *parts)


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--input", "absent.jsonl", *TOKENIZER], ["--input absent.jsonl: no such file or directory"]),
        (["--input", "*.none", *TOKENIZER], ["--input *.none: matches no file"]),
        (["--input", "empty", *TOKENIZER], ["--input empty: the directory holds no .jsonl"]),
        (["--input", "in.jsonl", "./in.jsonl", *TOKENIZER], ["named twice"]),
        (["--input", "cut.jsonl.gz", *TOKENIZER], ["cut.jsonl.gz: cannot be read"]),
        (["--input", "in.jsonl", *TOKENIZER, "--worker", "2"], ["unknown flag --worker; did you mean --workers?"]),
        (["--input", "in.jsonl", *TOKENIZER, "--workers", "two"], ["--workers", "'two'"]),
        (["--input", "in.jsonl", *TOKENIZER, "--workers", "0"], ["--workers 0: must be at least 1"]),
        (["--input", "in.jsonl", *TOKENIZER, "--split-sentences"], ["--split-sentences", "not supported"]),
        (["--input", "in.jsonl", *TOKENIZER, "--json-keys", "text", "text"], ["a key is named twice"]),
        (["--input", "in.jsonl", "--tokenizer-type", "HuggingFaceTokenizer"], ["give --tokenizer-model"]),
        (["--input", "in.jsonl", "--tokenizer-type", "NullTokenizer"], ["NullTokenizer: give --vocab-size"]),
        (["--input", "in.jsonl", "--tokenizer-type", "Null", "--vocab-size", "9"], ["must be one of"]),
        (["--input", "in.jsonl", "--tokenizer-type", "NullTokenizer", "--vocab-size", "9"], ["in.jsonl:1: Null"]),
        (["--input", "in.jsonl", *TOKENIZER, "--output-prefix", "in.jsonl/x"], ["x_text_document.bin: cannot be"]),
        (["--input", "in.jsonl", *TOKENIZER, "--output-prefix", "empty"], ["--output-prefix empty: is a directory"]),
        ([*TOKENIZER], ["--input"]),
    ],
)
def test_bad_flags_are_one_line(flags: list[str], parts: list[str], tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text(GOOD)
    (tmp_path / "empty").mkdir()
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(GOOD.encode() * 100)[:-20])
    assert_user_error(run(tmp_path, *flags), tmp_path, *parts)


def test_append_eod_needs_an_end_of_document(tmp_path: Path) -> None:
    shutil.copytree(DATA / "tokenizer", tmp_path / "bare")
    config = json.loads((tmp_path / "bare" / "tokenizer_config.json").read_text(encoding="utf-8"))
    del config["eos_token"]
    (tmp_path / "bare" / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    (tmp_path / "in.jsonl").write_text(GOOD)
    flags = ["--input", "in.jsonl", "--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", "bare"]
    assert_user_error(run(tmp_path, *flags, "--append-eod"), tmp_path, "no end-of-document token", "eos_token")
    assert run(tmp_path, *flags).returncode == 0


def test_the_first_error_in_file_order_is_reported_for_any_worker_count(tmp_path: Path) -> None:
    long = json.dumps({"text": "word " * 20000}) + "\n"
    (tmp_path / "in.jsonl").write_text(long * 20 + "{bad\n" + long * 20 + "{worse\n")
    for workers in ("1", "2", "3"):
        done = run(tmp_path, "--input", "in.jsonl", *TOKENIZER, "--workers", workers)
        assert_user_error(done, tmp_path, "in.jsonl:21: malformed JSON")


def test_a_failed_run_leaves_an_earlier_dataset_alone(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text(GOOD)
    assert run(tmp_path, "--input", "in.jsonl", *TOKENIZER).returncode == 0
    names = ["set_text_document.bin", "set_text_document.idx", "set_text_document.json"]
    before = [(tmp_path / "out" / name).read_bytes() for name in names]
    (tmp_path / "in.jsonl").write_text(GOOD + "{bad\n")
    assert run(tmp_path, "--input", "in.jsonl", *TOKENIZER).returncode == 2
    assert outputs(tmp_path) == names
    assert [(tmp_path / "out" / name).read_bytes() for name in names] == before


def test_blank_lines_are_skipped_and_counted(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('\n{"text": "one"}\n\n  \n{"text": "two"}')
    assert run(tmp_path, "--input", "in.jsonl", *TOKENIZER).returncode == 0
    sidecar = json.loads((tmp_path / "out" / "set_text_document.json").read_text())
    assert sidecar["documents"] == 2 and sidecar["rejected_lines"] == {"blank": 3}


def test_directories_globs_and_gzip_give_the_documents_of_the_plain_files(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}')
    (tmp_path / "parts" / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "three"}\n'))
    (tmp_path / "all.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n{"text": "three"}\n')
    contents = []
    for flags in (["all.jsonl"], ["parts"], ["parts/*"], ["parts/a.jsonl", "parts/b.jsonl.gz"]):
        assert run(tmp_path, "--input", *flags, *TOKENIZER, "--workers", "2").returncode == 0
        contents.append([(tmp_path / "out" / f"set_text_document{suffix}").read_bytes() for suffix in (".bin", ".idx")])
    assert contents[1:] == contents[:1] * 3


def test_several_keys_make_several_datasets(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"title": "ab", "body": "\u4e09\u56fd"}\n', encoding="utf-8")
    assert run(tmp_path, "--input", "in.jsonl", *TOKENIZER, "--json-keys", "title", "body").returncode == 0
    assert len(outputs(tmp_path)) == 6
    title, body = (json.loads((tmp_path / "out" / f"set_{key}_document.json").read_text()) for key in ("title", "body"))
    assert (title["text_bytes"], body["text_bytes"]) == (2, 6)
    assert title["language_shares"] == {"zh": 0.0, "en": 1.0, "other": 0.0}
    assert body["language_shares"] == {"zh": 1.0, "en": 0.0, "other": 0.0}


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_stopped_run_leaves_no_dataset_and_no_process(number: signal.Signals, workers: str, tmp_path: Path) -> None:
    with open(tmp_path / "in.jsonl", "w") as stream:
        for _ in range(400):
            stream.write(json.dumps({"text": "many different words 123 " * 4000}) + "\n")
    flags = ["--input", "in.jsonl", *TOKENIZER, "--workers", workers]
    process = subprocess.Popen(
        command(tmp_path, *flags), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=tmp_path, text=True
    )
    temporary = tmp_path / "out" / "set_text_document.bin.tmp"
    deadline = time.monotonic() + 30
    while not (temporary.exists() and temporary.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.02)
    children = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    assert len(children) == (0 if workers == "1" else 2)
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == (-signal.SIGKILL if number == signal.SIGKILL else 1)
    assert "Traceback" not in errors
    assert outputs(tmp_path) == (["set_text_document.bin.tmp"] if number == signal.SIGKILL else [])
    while any(alive(child) for child in children) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(alive(child) for child in children)


def alive(pid: int) -> bool:
    """Whether a process runs (one that ended but was not reaped does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_worker_that_dies_ends_the_run(tmp_path: Path) -> None:
    with open(tmp_path / "in.jsonl", "w") as stream:
        for _ in range(400):
            stream.write(json.dumps({"text": "many different words 123 " * 4000}) + "\n")
    process = subprocess.Popen(
        command(tmp_path, "--input", "in.jsonl", *TOKENIZER, "--workers", "2"),
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=tmp_path, text=True,
    )  # fmt: skip
    temporary = tmp_path / "out" / "set_text_document.bin.tmp"
    deadline = time.monotonic() + 30
    while not (temporary.exists() and temporary.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.02)
    child = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0]
    os.kill(int(child), signal.SIGKILL)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 1
    assert errors.startswith("error: a worker process died") and errors.count("\n") == 1
    assert not outputs(tmp_path)
