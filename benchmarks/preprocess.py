"""Preprocessing of real text, end to end: ours against Megatron-LM's script, datatrove and raw gigatoken.

    python benchmarks/preprocess.py --texts EN.jsonl ZH.jsonl --tokenizer FOLDER --megatron-lm CHECKOUT
    python benchmarks/preprocess.py --texts EN.jsonl ZH.jsonl --tokenizer FOLDER --sides ours gigatoken --megabytes 20
    python benchmarks/preprocess.py --texts EN.jsonl ZH.jsonl --tokenizer FOLDER --sides ours --memory-megabytes 1000

Every file of ``--texts`` gives an equal part of the input, whole lines from its beginning. Every run is a fresh process
from the files to finished output (raw gigatoken: to ids in memory). The gate before any timing is read: Megatron-LM's
.bin and .idx equal ours byte for byte, and the ids of the others are ours. Each side has the best of its worker counts.
Memory is the largest sum, over a side's processes, of proportional set sizes, so that shared pages count once.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
SIDES = ("ours", "megatron", "datatrove", "gigatoken")
SAMPLE_SECONDS = 0.1
HASH_TOKENS = 1 << 22
# Megatron-LM's script imports ``typing.override``, which Python 3.11 does not have.
MEGATRON = """
import runpy, sys, typing
import typing_extensions
typing.override = typing_extensions.override
sys.path.insert(0, sys.argv[1])
sys.argv = [sys.argv[1] + "/tools/preprocess_data.py", *sys.argv[2:]]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def write_input(texts: Sequence[Path], megabytes: float, path: Path) -> bool:
    """Whole lines from the beginning of each file, in equal parts; returns whether a file had to be repeated."""
    share, repeated = int(megabytes * 1e6 / len(texts)), False
    with open(path, "wb") as out:
        for text in texts:
            written = 0
            while written < share:
                with open(text, "rb") as stream:
                    for line in stream:
                        line = line.rstrip(b"\n") + b"\n"
                        written += out.write(line)
                        if written >= share:
                            break
                    else:
                        repeated = True
    return repeated


def command(side: str, workers: int, source: Path, out: Path, args: argparse.Namespace) -> list[str]:
    """The command line of one run."""
    flags = ["--input", str(source), "--output-prefix", str(out / side), "--append-eod", "--workers", str(workers)]
    flags += ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(args.tokenizer)]
    if side == "ours":
        return [sys.executable, str(ROOT / "tools" / "preprocess_data.py"), *flags]
    if side == "megatron":
        return [args.megatron_python, "-c", MEGATRON, str(args.megatron_lm), *flags, "--log-interval", "1000000"]
    inner = [sys.executable, str(Path(__file__).resolve()), "--texts", str(source), "--tokenizer", str(args.tokenizer)]
    return [*inner, "--inner", side, str(workers), str(out)]


def inner(side: str, workers: int, source: Path, out: Path, tokenizer: Path) -> None:
    """One run of datatrove (tasks over equal parts of the input, each a process) or of gigatoken (its threads)."""
    if side == "gigatoken":
        import gigatoken

        os.environ["RAYON_NUM_THREADS"] = str(workers)
        began = time.perf_counter()
        ids = gigatoken.Tokenizer(str(tokenizer)).encode_files(gigatoken.JsonlFileSource([str(source)], "text"))
        seconds = time.perf_counter() - began
        flat = np.asarray(ids.layout.content.data)
        report = {"seconds": seconds, "tokens": len(flat), "sha256": sha256_of(iter([flat]))}
        (out / "gigatoken.json").write_text(json.dumps(report))
        return
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer

    parts = out / "parts"
    parts.mkdir()
    subprocess.run(
        ["split", "--number", f"l/{workers}", "--suffix-length=4", "-d", str(source), str(parts / "part")], check=True
    )
    for path in parts.iterdir():
        path.rename(path.with_name(path.name + ".jsonl"))
    steps = [
        JsonlReader(str(parts), text_key="text"),
        DocumentTokenizer(str(out / "tokens"), str(tokenizer / "tokenizer.json"), shuffle_documents=False),
    ]
    LocalPipelineExecutor(steps, tasks=workers, workers=workers, logging_dir=str(out / "logs")).run()


def sha256_of(arrays: Iterator[np.ndarray]) -> str:
    """sha256 hex of ids as uint32."""
    total = hashlib.sha256()
    for array in arrays:
        for start in range(0, len(array), HASH_TOKENS):
            total.update(array[start : start + HASH_TOKENS].astype(np.uint32).tobytes())
    return total.hexdigest()


def processes_of(pid: int) -> Iterator[int]:
    """A process and all below it."""
    yield pid
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return
    for child in children:
        yield from processes_of(int(child))


def proportional_bytes(pid: int) -> int:
    """Proportional set size of a process; 0 when it has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)


def cpu_seconds(pid: int) -> float:
    """User and system time of a process so far; 0 when it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def run(arguments: list[str], folder: Path, environment: dict[str, str]) -> dict[str, float]:
    """Seconds, CPU seconds and peak memory (MB) of one run. Raises ``RuntimeError`` with its last lines if it fails.

    CPU time is sampled, because processes of a fork server are not waited for by the one that was started.
    """
    began = time.perf_counter()
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(arguments, stdout=log, stderr=log, env=os.environ | environment)
        peak, cpu = 0, dict[int, float]()
        while process.poll() is None:
            tree = list(processes_of(process.pid))
            peak = max(peak, sum(map(proportional_bytes, tree)))
            cpu |= {pid: max(cpu.get(pid, 0.0), cpu_seconds(pid)) for pid in tree}
            time.sleep(SAMPLE_SECONDS)
    seconds = time.perf_counter() - began
    if process.returncode:
        raise RuntimeError(f"{arguments[:3]} failed: " + (folder / "log").read_text(errors="replace")[-2000:])
    return {"seconds": seconds, "cpu_seconds": sum(cpu.values()), "peak_mb": peak / 1e6}


def ids_of(side: str, folder: Path) -> str:
    """sha256 of a side's ids without the ends of documents that only some sides write."""
    if side == "gigatoken":
        return str(json.loads((folder / "gigatoken.json").read_text())["sha256"])
    if side == "datatrove":
        files = sorted((folder / "tokens").glob("*.ds"))
        return sha256_of(np.memmap(path, np.uint32, mode="r") for path in files)
    from megatron_steel.data.indexed import IndexedReader

    reader = IndexedReader(str(folder / f"{side}_text_document"))
    return sha256_of(reader.document(index)[:-1] for index in range(reader.num_documents))


def files_of(side: str, folder: Path) -> str:
    """sha256 of a .bin and .idx."""
    total = hashlib.sha256()
    for suffix in (".bin", ".idx"):
        with open(folder / f"{side}_text_document{suffix}", "rb") as stream:
            while block := stream.read(1 << 22):
                total.update(block)
    return total.hexdigest()


def measure(side: str, workers: int, source: Path, args: argparse.Namespace) -> dict[str, Any]:
    """One run, and what it made, in a folder that is removed."""
    environment = {"PYTHONPATH": str(args.megatron_lm)} if side == "megatron" else {"PYTHONPATH": str(ROOT)}
    environment |= {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": str(workers)}
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        found: dict[str, Any] = run(command(side, workers, source, folder, args), folder, environment)
        if side == "gigatoken":  # its own clock: loading and hashing are no part of the raw rate
            found["raw_seconds"] = json.loads((folder / "gigatoken.json").read_text())["seconds"]
        found |= {"side": side, "workers": workers, "ids": ids_of(side, folder)}
        if side in ("ours", "megatron"):
            found["files"] = files_of(side, folder)
    print(json.dumps(found), flush=True)
    return found


def summary(runs: list[dict[str, Any]], megabytes: float) -> list[str]:
    """A row per side, at its best worker count, and the ratios the targets are about."""
    best: dict[str, dict[str, Any]] = {}
    for side in dict.fromkeys(row["side"] for row in runs):
        groups: dict[int, list[dict[str, Any]]] = {}
        for row in (row for row in runs if row["side"] == side):
            groups.setdefault(row["workers"], []).append(row)
        rows = min(groups.values(), key=lambda group: statistics.median(row["seconds"] for row in group))
        keys = [key for key in ("seconds", "cpu_seconds", "peak_mb", "raw_seconds") if key in rows[0]]
        best[side] = {key: statistics.median(row[key] for row in rows) for key in keys}
        best[side]["workers"] = rows[0]["workers"]
    lines = ["| side | workers | seconds | MB/s | CPU seconds | peak MB |", "|---|---|---|---|---|---|"]
    for side, row in best.items():
        rate = megabytes / row["seconds"]
        lines.append(
            f"| {side} | {row['workers']} | {row['seconds']:.2f} | {rate:.1f} | {row['cpu_seconds']:.1f} "
            f"| {row['peak_mb']:.0f} |"
        )
    ours = best.get("ours")
    if ours and "megatron" in best:
        theirs = best["megatron"]
        lines.append(f"\nours / megatron: {theirs['seconds'] / ours['seconds']:.1f}x the speed, ")
        lines[-1] += f"{ours['peak_mb'] / theirs['peak_mb']:.2f}x the memory"
    if ours and "gigatoken" in best:
        raw = best["gigatoken"]
        lines.append(f"ours / gigatoken: {raw['seconds'] / ours['seconds']:.2f}x as whole processes, ")
        lines[-1] += f"{raw['raw_seconds'] / ours['seconds']:.2f}x its encode_files alone (which includes loading)"
    return lines


def gate(runs: list[dict[str, Any]]) -> None:
    """``RuntimeError`` unless all sides made the same."""
    for key in ("ids", "files"):
        found = {row["side"]: row[key] for row in runs if key in row}
        if len({row[key] for row in runs if key in row}) > 1:
            raise RuntimeError(f"the sides differ in their {key}: {found}")


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--texts", nargs="+", type=Path, required=True, help="JSON lines with the key text, one file per language")
    add("--tokenizer", type=Path, required=True, help="Hugging Face folder of a byte-level BPE vocabulary")
    add("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    add("--megabytes", type=float, default=100.0)
    add("--workers", nargs="+", type=int, default=[1, 2, 4])
    add("--rounds", type=int, default=1)
    add("--megatron-lm", type=Path, help="a Megatron-LM checkout")
    add("--megatron-python", default=sys.executable, help="a Python that can run its script")
    add("--memory-megabytes", nargs="*", type=float, default=[], help="also the peak memory of ours at these sizes")
    add("--folder", type=Path, help="where inputs and outputs go (a temporary folder)")
    add("--record", type=Path, help="write RECORD.json and RECORD.md")
    add("--inner", nargs=3, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measure what was asked for and print a table."""
    args = parse()
    if args.inner:
        inner(args.inner[0], int(args.inner[1]), args.texts[0], Path(args.inner[2]), args.tokenizer)
        return
    if "megatron" in args.sides and args.megatron_lm is None:
        raise SystemExit("error: --megatron-lm: give a checkout, or leave the side out with --sides")
    sys.path.insert(0, str(ROOT))
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        args.folder, source = Path(name), Path(name) / "input.jsonl"
        repeated = write_input(args.texts, args.megabytes, source)
        megabytes = source.stat().st_size / 1e6
        runs = [
            measure(side, workers, source, args)
            for _ in range(args.rounds)
            for side in args.sides
            for workers in args.workers
        ]
        gate(runs)
        memory = {}
        for size in args.memory_megabytes:
            write_input(args.texts, size, source)
            memory[f"{size:g}"] = measure("ours", max(args.workers), source, args)["peak_mb"]
        names = ("gigatoken", "tokenizers", "datatrove", "numpy")
        facts = {
            "input_mb": megabytes,
            "repeated_text": repeated,
            "cores": os.cpu_count(),
            "free_disk_gb": shutil.disk_usage(args.folder).free // 10**9,
            "versions": {package: version(package) for package in names},
            "date": time.strftime("%Y-%m-%d"),
            "peak_mb_of_ours_by_input_mb": memory,
        }
    lines = [*summary(runs, megabytes), "", json.dumps(facts)]
    print("\n".join(lines))
    if args.record:
        args.record.with_suffix(".json").write_text(json.dumps({"facts": facts, "runs": runs}, indent=1) + "\n")
        args.record.with_suffix(".md").write_text("# Preprocessing, end to end\n\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
