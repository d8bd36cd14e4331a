"""Bad input to cleaning: one line on stderr, exit code 2, and nothing under the name of the result."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("datatrove")

ROOT = Path(__file__).resolve().parents[2]
GOOD = b'{"text": "one good line"}\n{"text": "another good line"}\n'


def run(tmp_path: Path, config: str, *flags: str) -> subprocess.CompletedProcess[str]:
    """Run the tool; the only commands it finds are those in ``bin``, so that no test submits a job."""
    (tmp_path / "c.yaml").write_text(config, encoding="utf-8")
    tool = [sys.executable, str(ROOT / "tools" / "clean_data.py"), "--config", "c.yaml", "--output", "out"]
    env = os.environ | {"PATH": str(tmp_path / "bin")}
    return subprocess.run([*tool, *flags], capture_output=True, text=True, timeout=60, cwd=tmp_path, env=env)


def assert_user_error(done: subprocess.CompletedProcess[str], tmp_path: Path, *parts: str) -> None:
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and last.startswith("error: "), done.stderr
    assert "Traceback" not in done.stderr and not done.stdout
    for part in parts:
        assert part in last
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("config", "flags", "parts"),
    [
        ("filters: [lenkth]", [], ["c.yaml: filters[0]: unknown filter 'lenkth'", "did you mean 'length'?"]),
        ("filters: [", [], ["c.yaml: not valid YAML"]),
        ("filters: [{contamination: {files: [no.jsonl]}}]", [], ["no.jsonl: no such file"]),
        ("", ["--config", "absent.yaml"], ["absent.yaml: no such file"]),
        ("", ["--input", "absent.jsonl"], ["absent.jsonl"]),
        ("", ["--taskss", "2"], ["unknown flag --taskss; did you mean --tasks?"]),
        ("", ["--tasks", "0"], ["--tasks must be at least 1"]),
        ("", ["--max-lines-per-file", "0"], ["--max-lines-per-file must be at least 1"]),
        ("", ["--executor", "slurm"], ["needs --slurm-partition"]),
        ("", ["--executor", "slurm", "--slurm-partition", "p"], ["no sbatch command here"]),
    ],
)
def test_a_bad_command_line_or_configuration(config: str, flags: list[str], parts: list[str], tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(GOOD)
    done = run(tmp_path, config, "--input", "in.jsonl", *flags)
    assert done.stderr.count("\n") == 1
    assert_user_error(done, tmp_path, *parts)
    assert not (tmp_path / "out.cleaning").exists()


def test_a_job_that_sbatch_refuses_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(GOOD)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "sbatch").write_text("#!/bin/sh\necho 'invalid partition specified: nope' >&2\nexit 1\n")
    (tmp_path / "bin" / "sbatch").chmod(0o755)
    done = run(tmp_path, "", "--input", "in.jsonl", "--executor", "slurm", "--slurm-partition", "nope")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    *_, reason, last = done.stderr.splitlines()
    assert reason == "invalid partition specified: nope"
    assert last.startswith("error: sbatch refused a job (exit code 1), its reason is above")


BAD = {
    b'{"text": "cut\n': "malformed JSON",
    b'{"text": "\xff"}\n': "not UTF-8",
    b'{"text": "\\ud800"}\n': "half of a surrogate pair",
    b"[1]\n": "each line must be a JSON object, not list",
    b'{"text": null}\n': "'text' must be text, not NoneType",
    b'{"content": "x"}\n': "no key 'text'; its keys are 'content'",
}


@pytest.mark.parametrize("line", BAD, ids=list(BAD.values()))
def test_a_bad_line_ends_the_run_with_its_place(line: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(GOOD)
    (tmp_path / "b.jsonl").write_bytes(GOOD + b"\n" + line + GOOD)
    done = run(tmp_path, "", "--input", "a.jsonl", "b.jsonl", "--tasks", "2", "--workers", "2")
    assert_user_error(done, tmp_path, "b.jsonl:4: ", BAD[line], "--max-bad-lines 0")


def test_bad_lines_within_the_quota_are_listed_and_counted(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(GOOD + b"".join(BAD) + b"\r\n" + GOOD)
    flags = ["--input", "in.jsonl", "--tasks", "1", "--max-bad-lines"]
    done = run(tmp_path, "", *flags, str(len(BAD)))
    assert done.returncode == 0, done.stderr
    listed = [json.loads(row) for row in (tmp_path / "out" / "bad_lines.jsonl").read_text().splitlines()]
    assert [row["place"] for row in listed] == [f"in.jsonl:{number}" for number in range(3, 9)]
    for row, reason in zip(listed, BAD.values(), strict=True):
        assert reason in row["reason"]
    assert (tmp_path / "out" / "part-00000.jsonl").read_bytes() == GOOD + GOOD
    assert "4 documents in" in done.stdout and "1 blank and 6 bad lines" in done.stdout


def test_the_quota_counts_all_tasks_together(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_bytes(GOOD + b"[1]\n")
    flags = ["--input", "a.jsonl", "b.jsonl", "--tasks", "2", "--workers", "1", "--max-bad-lines", "1"]
    assert_user_error(run(tmp_path, "", *flags), tmp_path, "a.jsonl:3: ", "1 of 2 bad lines")


def test_a_result_is_not_overwritten_and_another_run_not_continued(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(GOOD + b"[1]\n")
    flags = ["--input", "in.jsonl", "--tasks", "1"]
    assert run(tmp_path, "", *flags).returncode == 2
    done = run(tmp_path, "filters: [links]", *flags)
    assert_user_error(done, tmp_path, "out.cleaning: left by a run with other inputs or options")
    done = run(tmp_path, "", *flags, "--max-bad-lines", "1")
    assert done.returncode == 0 and "continuing" in done.stderr
    done = run(tmp_path, "", *flags)
    assert done.returncode == 2 and "--output out: exists already" in done.stderr


def test_without_the_extra_the_error_says_how_to_get_it(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(GOOD)
    (tmp_path / "c.yaml").write_text("filters: [links]")
    # None in sys.modules is what Python raises ModuleNotFoundError for.
    code = (
        "import runpy, sys; sys.modules['datatrove'] = None; sys.argv = sys.argv[1:]; "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    flags = ["--input", "in.jsonl", "--config", "c.yaml", "--output", "out"]
    tool = [sys.executable, "-c", code, str(ROOT / "tools" / "clean_data.py"), *flags]
    done = subprocess.run(tool, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr == 'error: datatrove is not installed; pip install "megatron_steel[clean]"\n'
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.cleaning").exists()
