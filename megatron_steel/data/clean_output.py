"""The last steps of cleaning: shards of at most n lines in input order, manifest, report, publication by rename."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megatron_steel.data.clean_datatrove import Document, PipelineStep
from megatron_steel.data.clean_dedup import KINDS, removal_examples
from megatron_steel.text.files import replacement, sync, write_json, write_text

HEAVY = ("kept", "places", "counts", "exact", "minhash", "removed", "shards", "out")


class WriteShards(PipelineStep):
    """This task's share of the shards; what is in a shard depends on its number only."""

    type, name = "WRITER", "shards"

    def __init__(self, work: Path, tasks: int, max_lines: int, compression: str) -> None:
        super().__init__()
        self.work, self.tasks, self.max_lines, self.compression = work, tasks, max_lines, compression

    def run(self, data: Iterator[Document] | None, rank: int = 0, world_size: int = 1) -> None:
        """Write ``out/part-NUMBER.jsonl[.zst]`` and ``shards/NUMBER.json``."""
        kept = json.loads((self.work / "plan.json").read_text(encoding="utf-8"))["kept"]
        shards = -(-sum(kept) // self.max_lines)
        first, last = shards * rank // world_size, shards * (rank + 1) // world_size
        lines = kept_lines(self.work, kept, first * self.max_lines)
        for number in range(first, last):
            self._shard(number, min(self.max_lines, sum(kept) - number * self.max_lines), lines)

    def _shard(self, number: int, count: int, lines: Iterator[bytes]) -> None:
        name = f"part-{number:05d}.jsonl" + (".zst" if self.compression == "zstd" else "")
        path, size = self.work / "out" / name, 0
        with (
            replacement(path) as temporary,
            open(temporary, "wb") as file,
            compressed(file, self.compression) as stream,
        ):
            for _ in range(count):
                line = next(lines)
                size += len(line)
                stream.write(line)
        entry = {"name": name, "lines": count, "bytes": path.stat().st_size, "json_bytes": size, "sha256": sha256(path)}
        write_text(self.work / "shards" / f"{number:05d}.json", json.dumps(entry))


class Publish(PipelineStep):
    """One task: report, manifest and lists; the finished folder gets its name, and the work folder is emptied."""

    type, name = "WRITER", "publish"

    def __init__(self, work: Path, output: Path, report: Path | None, options: dict[str, Any]) -> None:
        super().__init__()
        self.work, self.output, self.report, self.options = work, output, report, options

    def run(self, data: Iterator[Document] | None, rank: int = 0, world_size: int = 1) -> None:
        """Write everything and rename."""
        out, tasks = self.work / "out", self.options["tasks"]
        counts = [
            json.loads((self.work / "counts" / f"{task:05d}.json").read_text(encoding="utf-8")) for task in range(tasks)
        ]
        names = Places(self.options["pieces"], counts)
        report = build_report(self.work, counts, names, self.options)
        if report["input"]["bad_lines"] > self.options["max_bad_lines"]:
            first = report["input"]["bad_line_list"][0]
            raise ValueError(
                f"{first['place']}: {first['reason']} (1 of {report['input']['bad_lines']} bad lines, "
                f"more than --max-bad-lines {self.options['max_bad_lines']})"
            )
        if not self.options["dry_run"]:
            write_json(out / "manifest.json", self._manifest(report))
            write_json(out / "report.json", report)
            hits = [hit for step in report["steps"] if step["name"] == "contamination" for hit in step_hits(step)]
            write_lines(out / "contamination.jsonl", hits)
            write_lines(out / "duplicates.jsonl", map(names.resolve, removal_examples(self.work, tasks)))
            write_lines(out / "bad_lines.jsonl", report["input"]["bad_line_list"])
            sync(out)
            out.rename(self.output)
            sync(self.output.parent)
        if self.report is not None:
            self.report.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.report, report)
        write_json(self.work / "report.json", report)
        for folder in HEAVY:
            shutil.rmtree(self.work / folder, ignore_errors=True)

    def _manifest(self, report: dict[str, Any]) -> dict[str, Any]:
        files = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((self.work / "shards").glob("*.json"))]
        return {
            "lines": sum(file["lines"] for file in files),
            "max_lines_per_file": self.options["max_lines"],
            "files": files,
            "inputs": self.options["inputs"],
            "settings": self.options["settings"],
            "output": report["output"],
        }


class Places:
    """From (piece, line in it) to ``file:line``."""

    def __init__(self, pieces: list[dict[str, Any]], counts: list[dict[str, Any]]) -> None:
        lines = {int(piece): count for task in counts for piece, count in task["piece_lines"].items()}
        self.paths = [piece["path"] for piece in pieces]
        self.before, total = [], {path: 0 for path in self.paths}
        for number, path in enumerate(self.paths):
            self.before.append(total[path])
            total[path] += lines[number]

    def name(self, place: list[int]) -> str:
        """``file:line`` of a place."""
        piece, line = place
        return f"{self.paths[piece]}:{self.before[piece] + line}"

    def resolve(self, row: dict[str, Any]) -> dict[str, Any]:
        """A row with its places written out."""
        return {key: self.name(value) if key in ("place", "duplicate_of") else value for key, value in row.items()}


def build_report(work: Path, counts: list[dict[str, Any]], names: Places, options: dict[str, Any]) -> dict[str, Any]:
    """Counts and examples of all tasks together; only ``seconds`` depend on how the work was shared."""
    examples, steps = options["examples"], []
    for number, name in enumerate(options["filters"]):
        parts = [task["steps"][number] for task in counts]
        step: dict[str, Any] = {"name": name, "in": 0}
        for key in ("kept", "changed", "dropped", "noted", "characters_in", "characters_out"):
            step[key] = sum(part[key] for part in parts)
        step["in"] = step["kept"] + step["changed"] + step["dropped"]
        limit = None if name == "contamination" else examples
        step["examples"] = {
            kind: [names.resolve(row) for part in parts for row in part["examples"][kind]][:limit]
            for kind in ("dropped", "changed", "noted")
        }
        steps.append(step)
    documents = sum(task["written"] for task in counts)
    for kind, name in enumerate(KINDS):
        if options[name]:
            steps.append(dedup_step(work, kind, documents, names, options))
            documents -= steps[-1]["dropped"]
    bad = [names.resolve(row) for task in counts for row in task["bad_lines"]]
    total = {key: sum(task[key] for task in counts) for key in ("lines", "blank", "bad", "documents", "characters")}
    return {
        "input": {
            "lines": total["lines"],
            "blank_lines": total["blank"],
            "bad_lines": total["bad"],
            "documents": total["documents"],
            "characters": total["characters"],
            "text_bytes": sum(task["text_bytes"] for task in counts),
            "bad_line_list": bad,
        },
        "steps": steps,
        "output": {"documents": documents},
        "seconds": [
            round(sum(task["steps"][number]["seconds"] for task in counts), 3)
            for number in range(len(options["filters"]))
        ],
    }


def dedup_step(work: Path, kind: int, documents: int, names: Places, options: dict[str, Any]) -> dict[str, Any]:
    """Counts and examples of one kind of deduplication, in the form of a filter's."""
    dropped, tasks = 0, options["tasks"]
    for task in range(tasks):
        dropped += int(np.count_nonzero(np.load(work / "removed" / f"{task:05d}.npy")[:, 1] == kind))
    rows = (row for row in removal_examples(work, tasks) if row["step"] == KINDS[kind])
    found = [names.resolve(row) for _, row in zip(range(options["examples"]), rows, strict=False)]
    step = {"name": KINDS[kind], "in": documents, "kept": documents - dropped, "changed": 0, "dropped": dropped}
    return {**step, "noted": 0, "examples": {"dropped": found, "changed": [], "noted": []}}


def step_hits(step: dict[str, Any]) -> list[dict[str, Any]]:
    """All rows a contamination step listed, dropped and only noted."""
    kinds = ("dropped", "noted")
    return [{"dropped": kind == "dropped", **row} for kind in kinds for row in step["examples"][kind]]


def kept_lines(work: Path, kept: list[int], skip: int) -> Iterator[bytes]:
    """Lines that remain, in input order, from number ``skip`` on."""
    for task, count in enumerate(kept):
        if skip >= count:
            skip -= count
            continue
        removed = iter(np.load(work / "removed" / f"{task:05d}.npy")[:, 0].tolist())
        following = next(removed, None)
        with open(work / "kept" / f"{task:05d}.jsonl", "rb") as file:
            for number, line in enumerate(file):
                if number == following:
                    following = next(removed, None)
                elif skip:
                    skip -= 1
                else:
                    yield line


@contextlib.contextmanager
def compressed(file: BinaryIO, compression: str) -> Iterator[Any]:
    """The stream to write lines to: the file itself, or a zstd frame in it."""
    if compression != "zstd":
        yield file
        return
    import zstandard

    with zstandard.ZstdCompressor(level=3).stream_writer(file, closefd=False) as stream:
        yield stream


def sha256(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write JSON lines atomically; no file when there are none."""
    lines = (json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)
    first = next(lines, None)
    if first is not None:
        with replacement(path) as temporary, open(temporary, "wb") as file:
            file.writelines(itertools.chain([first], lines))
