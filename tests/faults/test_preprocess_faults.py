"""Bad input to preprocessing: one line on stderr, exit code 2, and no file left."""

from __future__ import annotations

import gzip
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
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


def assert_user_error(
    done: subprocess.CompletedProcess[str], tmp_path: Path, *parts: str, finished_pieces: bool = False
) -> None:
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert not done.stdout and outputs(tmp_path) == (["set.parts"] if finished_pieces else [])
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
        (["--input", "empty", *TOKENIZER], ["--input empty: the directory holds no file that ends in .jsonl"]),
        (["--input", "in.jsonl", "./in.jsonl", *TOKENIZER], ["named twice"]),
        (["--input", "cut.jsonl.gz", *TOKENIZER], ["cut.jsonl.gz: cannot be read"]),
        (["--input", "in.jsonl", *TOKENIZER, "--worker", "2"], ["unknown flag --worker; did you mean --workers?"]),
        (["--input", "in.jsonl", *TOKENIZER, "--workers", "two"], ["--workers", "'two'"]),
        (["--input", "in.jsonl", *TOKENIZER, "--workers", "0"], ["--workers 0: must be at least 1"]),
        (["--input", "in.jsonl", *TOKENIZER, "--keep-newlines"], ["--keep-newlines: is about --split-sentences"]),
        (["--input", "in.jsonl", *TOKENIZER, "--punkt-model", "x"], ["--punkt-model: is for --split-sentences"]),
        (["--input", "in.jsonl", *TOKENIZER, "--split-sentences", "--punkt-model", "empty"], ["holds no abbrev"]),
        (["--input", "in.jsonl", *TOKENIZER, "--max-rejected", "-1"], ["--max-rejected -1: must be a number of"]),
        (["--input", "in.jsonl", *TOKENIZER, "--max-rejected", "200%"], ["--max-rejected 200%: must be a number"]),
        (["--input", "in.jsonl", *TOKENIZER, "--input-format", "none"], ["--input-format none: must be one of"]),
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
        done.stderr = done.stderr.split("\n", 1)[1] if done.stderr.startswith("preprocess: going on") else done.stderr
        assert_user_error(done, tmp_path, "in.jsonl:21: malformed JSON", finished_pieces=True)
    done = run(tmp_path, "--input", "in.jsonl", *TOKENIZER, "--max-rejected", "1")
    assert "more lines than --max-rejected 1 cannot be used; the first: in.jsonl:21: malformed JSON" in done.stderr


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


def write_long_input(tmp_path: Path) -> None:
    """38 MB, several seconds of work."""
    with open(tmp_path / "in.jsonl", "w") as stream:
        for number in range(400):
            stream.write(json.dumps({"text": f"many different words {number} " * 4000}) + "\n")


def start_long_run(tmp_path: Path, *flags: str) -> subprocess.Popen[str]:
    """A run on that input, returned when its first piece is finished."""
    process = subprocess.Popen(
        command(tmp_path, "--input", "in.jsonl", *TOKENIZER, "--no-fast-tokenizer", *flags),
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=tmp_path, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not list((tmp_path / "out" / "set.parts").glob("[0-9]*.json")) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.02)
    return process


def children_of(process: subprocess.Popen[str]) -> list[int]:
    """Process ids."""
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


@pytest.mark.parametrize(
    ("number", "workers"), [(signal.SIGTERM, 1), (signal.SIGINT, 2), (signal.SIGKILL, 1), (signal.SIGKILL, 2)]
)
def test_a_stopped_run_leaves_no_dataset_and_no_process_and_goes_on(
    number: signal.Signals, workers: int, tmp_path: Path
) -> None:
    write_long_input(tmp_path)
    process = start_long_run(tmp_path, "--workers", str(workers))
    children = children_of(process)
    # One that computes the fingerprint of the tokenizer may still be there.
    assert workers <= len(children) <= workers + 1
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == (-signal.SIGKILL if number == signal.SIGKILL else 1)
    assert "Traceback" not in errors
    left = outputs(tmp_path)
    assert "set.parts" in left and all(name.endswith((".parts", ".tmp")) for name in left)
    assert number == signal.SIGKILL or left == ["set.parts"]
    deadline = time.monotonic() + 10
    while any(alive(child) for child in children) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(alive(child) for child in children)
    done = run(tmp_path, "--input", "in.jsonl", *TOKENIZER, "--no-fast-tokenizer", "--workers", "2")
    assert done.returncode == 0 and "going on from" in done.stderr
    again = files(tmp_path)
    assert run(tmp_path, "--input", "in.jsonl", *TOKENIZER, "--workers", "1").returncode == 0
    assert files(tmp_path) == again, "the fast encoder and a run in one go write the same"


def files(tmp_path: Path) -> dict[str, bytes]:
    """Name and content of every output file."""
    out = tmp_path / "out"
    return {name: (out / name).read_bytes() for name in outputs(tmp_path) if (out / name).is_file()}


def alive(pid: int) -> bool:
    """Whether a process runs (one that ended but was not reaped does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_worker_that_dies_ends_the_run(tmp_path: Path) -> None:
    write_long_input(tmp_path)
    process = start_long_run(tmp_path, "--workers", "2")
    # The last to be forked: the first is the one that computes the fingerprint, which may be done with its work.
    os.kill(children_of(process)[-1], signal.SIGKILL)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 1
    assert errors.startswith("error: a worker process died") and errors.count("\n") == 1
    assert outputs(tmp_path) == ["set.parts"]


def test_killed_at_random_points_the_next_run_writes_the_same(tmp_path: Path) -> None:
    """STEEL_KILLS says how often (20 in the long run); every other time the next run is killed again before it ends."""
    write_long_input(tmp_path)
    flags = ["--input", "in.jsonl", *TOKENIZER, "--workers", "2"]
    began = time.monotonic()
    assert run(tmp_path, *flags).returncode == 0
    whole = time.monotonic() - began
    expected = files(tmp_path)
    random_points = random.Random(3)
    for number in range(int(os.environ.get("STEEL_KILLS", "2"))):
        for name in expected if number % 2 == 0 else ():
            (tmp_path / "out" / name).unlink(missing_ok=True)
        process = subprocess.Popen(command(tmp_path, *flags), cwd=tmp_path, stderr=subprocess.DEVNULL)
        time.sleep(whole * random_points.uniform(0.05, 0.95))
        process.kill()
        process.wait()
        left = {name: data for name, data in files(tmp_path).items() if not name.endswith(".tmp")}
        assert "set_text_document.idx" not in left or left == expected, "complete or not there"
        if number % 2 == 1:
            done = run(tmp_path, *flags)
            assert done.returncode == 0, done.stderr
            assert files(tmp_path) == expected


def test_a_full_disk_ends_the_run_and_the_next_goes_on(tmp_path: Path) -> None:
    """The size a file may have stands in for the disk: writing beyond it fails in the same place."""
    write_long_input(tmp_path)
    flags = ["--input", "in.jsonl", *TOKENIZER, "--workers", "2"]
    limit = ["bash", "-c", 'ulimit -f 4000; trap "" XFSZ; exec "$@"', "limited"]
    done = subprocess.run([*limit, *command(tmp_path, *flags)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.startswith(f"error: {tmp_path / 'out'}: File too large; make room")
    assert outputs(tmp_path) == ["set.parts"]
    done = run(tmp_path, *flags)
    assert done.returncode == 0 and "going on from" in done.stderr
    again = files(tmp_path)
    assert run(tmp_path, *flags).returncode == 0 and files(tmp_path) == again


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize("moment", ["shards", "join"])
def test_a_full_file_system_ends_the_run_and_the_next_goes_on(
    moment: str, workers: str, make_disk: Callable[[int], Path], tmp_path: Path
) -> None:
    """A file takes the room that is missing; when it is removed the same command ends like one never disturbed.

    Of very short documents the index is the largest file: a disk that is only too small for it is full in the join.
    """
    lines = (json.dumps({"text": f"a{number % 10}"}) + "\n" for number in range(150_000))
    (tmp_path / "in.jsonl").write_text("".join(lines))
    flags = ["--input", "in.jsonl", *TOKENIZER, "--append-eod", "--workers", workers]
    assert run(tmp_path, *flags).returncode == 0
    expected = files(tmp_path)
    shutil.rmtree(tmp_path / "out")
    tokens, index = (len(expected[f"set_text_document{suffix}"]) for suffix in (".bin", ".idx"))
    disk = make_disk(64 << 20)
    (tmp_path / "out").symlink_to(disk)
    # Shards hold as much as the tokens' file and most of the index; so do the writer's files, which joined make these.
    room = (tokens + index) // 2 if moment == "shards" else 2 * (tokens + index)
    ballast = disk / "ballast"
    with open(ballast, "wb") as stream:
        os.posix_fallocate(stream.fileno(), 0, shutil.disk_usage(disk).free - room)
    done = run(tmp_path, *flags)
    assert done.returncode == 1, done
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert f"error: {tmp_path / 'out'}: No space left on device; make room there" in done.stderr
    assert not [name for name in outputs(tmp_path) if name not in ("ballast", "set.parts")]
    ballast.unlink()
    done = run(tmp_path, *flags)
    assert done.returncode == 0, done.stderr
    going_on = re.search(r"going on from (\d+) of (\d+) finished pieces", done.stderr)
    whole = going_on is not None and going_on[1] == going_on[2]
    assert whole == (moment == "join"), done.stderr
    assert files(tmp_path) == expected


def test_bad_lines_go_to_a_file_under_a_quota(tmp_path: Path) -> None:
    good = json.dumps({"text": "good words " * 100}) + "\n"
    lines = [good] * 3000
    bad = {
        10: (b'{"text": "cut\n', "malformed JSON"),
        700: (b'{"text": "\xff"}\n', "not UTF-8"),
        1400: (b'{"text": "a\x00b"}\n', "holds a NUL byte"),
        2100: (b'{"other": 1}\n', "no key 'text'"),
        2999: (b'{"text": 5}\n', "'text' must be text"),
    }
    data = b"".join(bad[number][0] if number in bad else line.encode() for number, line in enumerate(lines, start=1))
    (tmp_path / "in.jsonl").write_bytes(data)
    (tmp_path / "good.jsonl").write_text(good * (3000 - len(bad)))
    assert run(tmp_path, "--input", "good.jsonl", *TOKENIZER).returncode == 0
    expected = {name: content for name, content in files(tmp_path).items() if not name.endswith(".json")}
    for flags in (["5", "--workers", "1"], ["5", "--workers", "3"], ["0.2%", "--workers", "2"]):
        done = run(tmp_path, "--input", "in.jsonl", *TOKENIZER, "--max-rejected", *flags)
        assert done.returncode == 0 and "5 rejected" in done.stdout, done.stderr
        found = files(tmp_path)
        rejected = [json.loads(line) for line in found["set.rejected.jsonl"].splitlines()]
        assert [row["line"] for row in rejected] == sorted(bad)
        assert {row["file"] for row in rejected} == {"in.jsonl"}
        assert all(bad[row["line"]][1] in row["reason"] for row in rejected)
        assert rejected[0]["text"] == '{"text": "cut'
        assert {name: found[name] for name in expected} == expected
        sidecar = json.loads(found["set_text_document.json"])
        assert sidecar["rejected_lines"] == {"blank": 0, "bad": 5} and sidecar["documents"] == 2995
    done = run(tmp_path, "--input", "in.jsonl", *TOKENIZER, "--max-rejected", "0.1%")
    assert done.returncode == 2 and "5 of 3000 lines cannot be used, more than --max-rejected 0.1%" in done.stderr
    assert run(tmp_path, "--input", "good.jsonl", *TOKENIZER).returncode == 0
    assert "set.rejected.jsonl" not in outputs(tmp_path), "it was another dataset's"
