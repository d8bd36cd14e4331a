"""A cleaning run loses no line, keeps the order, adds up, and is the same however the work is shared or interrupted."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("datatrove")
import zstandard

from megatron_steel.data.clean import CleanOptions, clean

ROOT = Path(__file__).resolve().parents[2]
TOOL = [sys.executable, str(ROOT / "tools" / "clean_data.py")]
HAN = [chr(code) for code in range(0x4E00, 0x9000, 7)]


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def run(tmp_path: Path, config: str, inputs: list[str], name: str = "out", **options: Any) -> dict[str, Any]:
    """Clean in this process; the report."""
    (tmp_path / f"{name}.yaml").write_text(config, encoding="utf-8")
    report = clean(CleanOptions(inputs, tmp_path / f"{name}.yaml", tmp_path / name, **options))
    assert report is not None
    return report


def lines(folder: Path) -> list[str]:
    """All output lines in order."""
    return [
        line for part in sorted(folder.glob("part-*.jsonl")) for line in part.read_text(encoding="utf-8").splitlines()
    ]


def texts(folder: Path) -> list[str]:
    return [json.loads(line)["text"] for line in lines(folder)]


def english(generator: random.Random, count: int) -> str:
    return " ".join(f"w{generator.randrange(5000)}" for _ in range(count))


def chinese(generator: random.Random, count: int) -> str:
    return "".join(generator.choice(HAN) + ("，" if number % 9 == 8 else "") for number in range(count))


def assert_sums(report: dict[str, Any]) -> None:
    """Documents in = kept + changed + dropped of every step, and what passes one step is what the next is given."""
    count = report["input"]["documents"]
    assert report["input"]["lines"] == count + report["input"]["blank_lines"] + report["input"]["bad_lines"]
    for step in report["steps"]:
        assert step["in"] == count == step["kept"] + step["changed"] + step["dropped"], step["name"]
        count -= step["dropped"]
    assert report["output"]["documents"] == count


def test_100_lines_of_16_make_7_files_and_none_is_lost(tmp_path: Path) -> None:
    file = tmp_path / "in.jsonl"
    file.write_bytes(b"".join(b'{"id": %d.0,  "text":"\\u4e2d %d", "e": 1e2}\n' % (n, n) for n in range(100)))
    report = run(tmp_path, "filters: []", [str(file)], max_lines_per_file=16, compression="zstd", tasks=3)
    assert_sums(report)
    parts = sorted((tmp_path / "out").glob("part-*"))
    assert [part.name for part in parts] == [f"part-0000{number}.jsonl.zst" for number in range(7)]
    content = [zstandard.ZstdDecompressor().stream_reader(part.open("rb")).read() for part in parts]
    assert [data.count(b"\n") for data in content] == [16] * 6 + [4]
    assert b"".join(content) == file.read_bytes()  # rows that stay are the very bytes of the input
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["lines"] == 100 and [entry["lines"] for entry in manifest["files"]] == [16] * 6 + [4]
    for entry, part in zip(manifest["files"], parts, strict=True):
        assert entry["sha256"] == hashlib.sha256(part.read_bytes()).hexdigest()
        assert entry["bytes"] == part.stat().st_size
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out", "out.yaml"]


def test_documents_are_chosen_by_a_field_also_after_a_change(tmp_path: Path) -> None:
    """Row D9: langdetect == zh-cn; the record is there for a filter behind one that changed the text."""
    rows = [{"text": f"a\u3000{i}", "lang": ("zh-cn", "en", "ko")[i % 3], "id": i} for i in range(9)]
    rows.insert(1, {"text": "a  9"})
    config = "filters: [whitespace, field: {key: lang, values: [zh-cn, ko]}]"
    report = run(tmp_path, config, [write(tmp_path / "in.jsonl", rows)])
    assert texts(tmp_path / "out") == [f"a {i}" for i in (0, 2, 3, 5, 6, 8)]
    assert_sums(report)
    dropped = {example["value"] for example in report["steps"][1]["examples"]["dropped"]}
    assert dropped == {"en", None}


def test_duplicates_are_found_in_both_languages_and_others_stay(tmp_path: Path) -> None:
    generator = random.Random(7)
    long_en, long_zh = english(generator, 300), chinese(generator, 400)
    near_en = long_en.replace(long_en.split()[150], "changed") + " end"
    near_zh = long_zh[:200] + "改" + long_zh[201:]
    others = [english(generator, 300), chinese(generator, 400), "short one", "short two", "短句甲", "短句乙"]
    rows = [long_en, long_zh, *others, long_en, near_zh, near_en, "short one", long_en.upper()]
    file = write(tmp_path / "in.jsonl", [{"text": text} for text in rows])
    report = run(tmp_path, "{exact_dedup: {}, minhash_dedup: {}}", [file], examples=9)
    assert_sums(report)
    assert texts(tmp_path / "out") == [long_en, long_zh, *others]
    found = [json.loads(line) for line in (tmp_path / "out" / "duplicates.jsonl").read_text().splitlines()]
    expected = {9: ("exact_dedup", 1), 10: ("minhash_dedup", 2), 11: ("minhash_dedup", 1), 12: ("exact_dedup", 5)}
    expected[13] = ("minhash_dedup", 1)
    assert found == [
        {"step": step, "place": f"{file}:{line}", "duplicate_of": f"{file}:{first}"}
        for line, (step, first) in sorted(expected.items())
    ]
    assert [(step["name"], step["dropped"]) for step in report["steps"]] == [("exact_dedup", 2), ("minhash_dedup", 3)]
    run(tmp_path, "exact_dedup: {ignore_case_and_punctuation: true}", [file], name="loose")
    assert texts(tmp_path / "loose") == [long_en, long_zh, *others, near_zh, near_en]


def test_every_input_format_gives_the_same_rows(tmp_path: Path) -> None:
    """Other keys stay, in their order, also in rows whose text changed and in rows that never were JSON lines."""
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pytest.importorskip("pyarrow").Table
    rows = [
        {"id": number, "content": f"第{number}行\u00a0见 http://a.b/{number}", "lang": "zh"} for number in range(40)
    ]
    plain = write(tmp_path / "in.jsonl", rows)
    parquet.write_table(table.from_pylist(rows), tmp_path / "in.parquet", row_group_size=7)
    (tmp_path / "in2.jsonl.zst").write_bytes(zstandard.compress(Path(plain).read_bytes()))
    config = "{text_key: content, filters: [whitespace, links]}"
    expected = [{**row, "content": f"第{row['id']}行 见 "} for row in rows]
    for name, file in (("a", plain), ("b", str(tmp_path / "in.parquet")), ("c", str(tmp_path / "in2.jsonl.zst"))):
        report = run(tmp_path, config, [file], name=name, tasks=2)
        assert_sums(report)
        got = [json.loads(line) for line in lines(tmp_path / name)]
        assert [list(row.items()) for row in got] == [list(row.items()) for row in expected]
        assert report["steps"][1]["examples"]["changed"][2]["place"] == f"{file}:3"


FULL = """
filters:
  - whitespace
  - links
  - length: {min: 5}
  - contamination: {files: [EVAL], n: 6, action: drop}
exact_dedup: {}
minhash_dedup: {n: 3}
"""


@pytest.fixture
def corpus(tmp_path: Path) -> tuple[str, list[str]]:
    """A configuration, and three files with everything in them."""
    generator = random.Random(3)
    question = english(generator, 12)
    evaluation = write(tmp_path / "eval.jsonl", [{"q": english(generator, 12)}, {"q": question}])
    pool = [english(generator, 60) for _ in range(30)] + [chinese(generator, 80) for _ in range(30)]
    files = []
    for number in range(3):
        rows = []
        for line in range(120):
            text = generator.choice(pool) if line % 3 else english(generator, 40)
            text += " tail" * (line % 4 == 1) + " http://a.b/c" * (line % 5 == 0)
            rows.append({"text": "x" if line % 17 == 0 else text, "id": [number, line]})
        rows[50 + number] = {"text": f"Intro {question} outro"}
        files.append(write(tmp_path / f"in{number}.jsonl", rows))
    return FULL.replace("EVAL", evaluation), files


def everything(folder: Path) -> dict[str, Any]:
    """Name -> content of a result; without the seconds, the only thing that differs between runs."""
    content: dict[str, Any] = {path.name: path.read_bytes() for path in folder.iterdir()}
    content["report.json"] = json.loads(content["report.json"])
    del content["report.json"]["seconds"]
    return content


def test_the_result_does_not_depend_on_the_tasks(
    corpus: tuple[str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, files = corpus
    report = run(tmp_path, config, files, name="one", max_lines_per_file=50)
    assert_sums(report)
    one = everything(tmp_path / "one")
    assert {"contamination.jsonl", "duplicates.jsonl", "manifest.json", "report.json"} < set(one)
    hits = [json.loads(line) for line in one["contamination.jsonl"].splitlines()]
    assert [hit["place"] for hit in hits] == [f"{file}:{51 + number}" for number, file in enumerate(files)]
    assert {hit["evaluation"] for hit in hits} == {f"{tmp_path}/eval.jsonl:2"}
    run(tmp_path, config, files, name="seven", max_lines_per_file=50, tasks=7)
    # Pieces of a few lines, which tasks share within a file.
    monkeypatch.setattr("megatron_steel.data.clean.PIECE_BYTES", 3000)
    run(tmp_path, config, files, name="pieces", max_lines_per_file=50, tasks=4)
    assert everything(tmp_path / "seven") == one
    assert everything(tmp_path / "pieces") == one


def command(tmp_path: Path, config: str, files: list[str], *flags: str) -> list[str]:
    (tmp_path / "c.yaml").write_text(config, encoding="utf-8")
    return [*TOOL, "--input", *files, "--config", "c.yaml", "--output", "out", *flags]


def test_a_dry_run_reports_the_same_and_writes_nothing(corpus: tuple[str, list[str]], tmp_path: Path) -> None:
    config, files = corpus
    report = run(tmp_path, config, files)
    flags = ["--dry-run", "--report", "r.json", "--tasks", "3", "--workers", "2"]
    (tmp_path / "out").rename(tmp_path / "kept")
    before = sorted(tmp_path.iterdir())
    done = subprocess.run(
        command(tmp_path, config, files, *flags), cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / "c.yaml", tmp_path / "r.json"])
    dry = json.loads((tmp_path / "r.json").read_text())
    assert {**dry, "seconds": 0} == {**report, "seconds": 0}
    table = [line.split() for line in done.stdout.splitlines()]
    assert [row[0] for row in table[1:-1]] == [step["name"] for step in report["steps"]]
    for row, step in zip(table[1:-1], report["steps"], strict=True):
        assert [int(cell.replace(",", "")) for cell in row[1:5]] == [
            step[key] for key in ("in", "kept", "changed", "dropped")
        ]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_run_continues_to_the_same_bytes(
    number: signal.Signals, corpus: tuple[str, list[str]], tmp_path: Path
) -> None:
    config, files = corpus
    run(tmp_path, config, files, name="whole")
    arguments = command(tmp_path, config, files, "--tasks", "5", "--workers", "2")
    process = subprocess.Popen(arguments, cwd=tmp_path, stderr=subprocess.DEVNULL, start_new_session=True)
    completions = tmp_path / "out.cleaning" / "logs" / "filter" / "completions"
    deadline = time.monotonic() + 30
    while not (completions.is_dir() and any(completions.iterdir())) and time.monotonic() < deadline:
        time.sleep(0.005)
    if number == signal.SIGKILL:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    assert process.wait(timeout=30) != 0
    assert not (tmp_path / "out").exists()
    again = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert again.returncode == 0, again.stderr
    assert "continuing the run" in again.stderr
    assert everything(tmp_path / "out") == everything(tmp_path / "whole")
    assert not (tmp_path / "out.cleaning").exists()


def test_slurm_jobs_make_the_same_result(corpus: tuple[str, list[str]], tmp_path: Path) -> None:
    """sbatch, srun and scontrol are stand-ins that run a job array at once, in order."""
    config, files = corpus[0].replace("{n: 3}", "{n: 3, buckets: 3}"), corpus[1]
    run(tmp_path, config, files, name="local")
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "sbatch").write_text(SBATCH)
    (tools / "srun").write_text('#!/bin/sh\nwhile [ "$1" != -n ]; do shift; done; shift 2; exec "$@"\n')
    (tools / "scontrol").write_text("#!/bin/sh\necho localhost\n")
    for tool in tools.iterdir():
        tool.chmod(tool.stat().st_mode | stat.S_IEXEC)
    path = f"{tools}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    flags = ["--executor", "slurm", "--slurm-partition", "p", "--slurm-time", "1:00:00", "--tasks", "2"]
    done = subprocess.run(
        command(tmp_path, config, files, *flags, "--slurm-sbatch", "account=me"),
        cwd=tmp_path,
        env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "JOBS": str(tmp_path / "jobs")},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert everything(tmp_path / "out") == everything(tmp_path / "local")
    jobs = (tmp_path / "jobs").read_text()
    assert "--partition=p" in jobs and "--account=me" in jobs and "--time=1:00:00" in jobs
    assert jobs.count("--dependency=afterok:") >= 5


# Runs every index of the array, without the statistics jobs.
SBATCH = f"""#!{sys.executable}
import os, re, subprocess, sys
script = open(sys.argv[-1]).read()
with open(os.environ["JOBS"], "a") as jobs:
    jobs.write(script + " ".join(sys.argv) + "\\n")
last = int(re.search(r"--array=0-(\\d+)", script).group(1))
if "merge_stats" not in script:
    for index in range(last + 1):
        variables = dict(os.environ, SLURM_ARRAY_TASK_ID=str(index), SLURM_NODELIST="localhost", RUN_OFFSET="0")
        subprocess.run(["bash", sys.argv[-1]], env=variables, check=True, stdout=subprocess.DEVNULL)
print("Submitted batch job 7")
"""
