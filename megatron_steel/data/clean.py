"""Cleaning a corpus on datatrove: stages, executors, what an interrupted run continues from, and the printed table.

The work folder ``OUTPUT.cleaning`` holds everything until the finished folder is renamed to OUTPUT. datatrove marks
finished tasks there, so the same command run again goes on; with other inputs or options it is refused.
"""

from __future__ import annotations

import collections
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_steel.data.clean_settings import Settings, SlurmOptions, describe, load_settings
from megatron_steel.data.contamination import Contamination
from megatron_steel.text.files import write_text

PIECE_BYTES = 64 << 20
FOLDERS = ("kept", "places", "counts", "exact", "removed", "shards", "out")


@dataclass(frozen=True)
class CleanOptions:
    """One run of ``clean_data.py``; names are its flags."""

    input: list[str]
    config: Path
    output: Path
    report: Path | None = None
    dry_run: bool = False
    executor: str = "local"
    tasks: int = 1
    workers: int = 1
    max_lines_per_file: int = 1_000_000
    compression: str = "none"
    max_bad_lines: int = 0
    examples: int = 3
    slurm: SlurmOptions = SlurmOptions()


def clean(options: CleanOptions) -> dict[str, Any] | None:
    """Clean; returns the report, or None when jobs were handed to SLURM. ``ValueError`` for what a user can fix."""
    from megatron_steel.data.readers import expand_inputs, plan_tasks

    settings = load_settings(options.config)
    check(options)
    for _, step in settings.filters:
        if isinstance(step, Contamination):
            index = step.index()
            if index.too_short:
                say(f"{index.too_short} of {len(index.places)} evaluation records hold fewer than {step.n} tokens each")
    paths = expand_inputs(options.input)
    pieces = plan_tasks(paths, PIECE_BYTES)
    inputs = [{"path": str(path), "bytes": path.stat().st_size} for path in paths]
    work = options.output.with_name(options.output.name + ".cleaning").absolute()
    # After the checks: the import takes a second.
    from megatron_steel.data.clean_datatrove import run_local, run_slurm

    prepare(work, options, settings, inputs, [path.stat().st_mtime_ns for path in paths])
    stages = build_stages(work, options, settings, inputs, pieces)
    if options.executor == "slurm":
        run_slurm(work, stages, options.workers, options.slurm)
        say(f"submitted; the last job renames {work / 'out'} to {options.output}, its logs are in {work / 'logs'}")
        return None
    run_local(work, stages, options.workers)
    report = json.loads((work / "report.json").read_text(encoding="utf-8"))
    shutil.rmtree(work)
    return report


def check(options: CleanOptions) -> None:
    """Refuse options that cannot work, before anything is written."""
    for name in ("tasks", "workers", "max_lines_per_file"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1")
    if options.output.exists() and not options.dry_run:
        raise ValueError(f"--output {options.output}: exists already; remove it or choose another")
    if options.dry_run and options.executor == "slurm" and options.report is None:
        raise ValueError("--dry-run with --executor slurm needs --report FILE: nothing is printed here")
    if options.executor == "slurm" and not options.slurm.partition:
        raise ValueError("--executor slurm needs --slurm-partition")
    if options.executor == "slurm" and shutil.which("sbatch") is None:
        raise ValueError("--executor slurm: there is no sbatch command here; use --executor local")


def prepare(
    work: Path, options: CleanOptions, settings: Settings, inputs: list[dict[str, Any]], times: list[int]
) -> None:
    """Make the work folder, or find that it belongs to this very run and can be continued.

    A run that met too many bad lines may go on with a larger quota, so the quota is no part of what a run is.
    """
    result = {
        "settings": describe(settings),
        "inputs": [[*entry.values(), changed] for entry, changed in zip(inputs, times, strict=True)],
        "options": [options.tasks, options.dry_run, options.max_lines_per_file, options.compression, options.examples],
    }
    identity = json.loads(json.dumps(result))
    file = work / "run.json"
    if file.exists():
        if json.loads(file.read_text(encoding="utf-8")) != identity:
            raise ValueError(f"{work}: left by a run with other inputs or options; remove it, or repeat that run")
        say(f"continuing the run in {work}")
    for folder in FOLDERS:
        (work / folder).mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(identity))


def build_stages(
    work: Path, options: CleanOptions, settings: Settings, inputs: list[dict[str, Any]], pieces: list[Any]
) -> list[Any]:
    """The pipelines (:class:`clean_datatrove.Stage`), in order."""
    from megatron_steel.data import clean_steps as steps
    from megatron_steel.data.clean_datatrove import Stage, minhash_stages
    from megatron_steel.data.clean_dedup import Decide
    from megatron_steel.data.clean_output import Publish, WriteShards

    minhash, tasks = settings.minhash_dedup, options.tasks
    parts = collections.Counter(piece.path for piece in pieces)
    sized = [(Path(piece.path).stat().st_size // parts[piece.path] + 1, piece) for piece in pieces]
    first = [
        steps.Read(sized, settings, options.max_bad_lines),
        steps.Apply(settings, options.examples),
        steps.Store(work, settings, options.dry_run),
    ]
    stages = [Stage("filter", first, tasks)]
    if minhash is not None:
        signature, found = minhash_stages(work / "minhash", minhash)
        first.append(signature)
        stages += found
    stages.append(Stage("decide", [Decide(work, tasks, settings.exact_dedup is not None, minhash is not None)], 1))
    if not options.dry_run:
        shards = WriteShards(work, tasks, options.max_lines_per_file, options.compression)
        stages.append(Stage("write", [shards], tasks))
    facts = {
        "tasks": tasks,
        "pieces": [{"path": str(piece.path)} for piece in pieces],
        "inputs": inputs,
        "filters": [name for name, _ in settings.filters],
        "exact_dedup": settings.exact_dedup is not None,
        "minhash_dedup": minhash is not None,
        "examples": options.examples,
        "max_bad_lines": options.max_bad_lines,
        "max_lines": options.max_lines_per_file,
        "dry_run": options.dry_run,
        "settings": describe(settings),
    }
    report = options.report.absolute() if options.report else None
    stages.append(Stage("publish", [Publish(work, options.output.absolute(), report, facts)], 1))
    return stages


def say(line: str) -> None:
    """One line of progress."""
    print(line, file=sys.stderr, flush=True)


def format_report(report: dict[str, Any]) -> str:
    """The report as a table: one row per filter."""
    head = ("filter", "in", "kept", "changed", "dropped", "share dropped")
    rows = [head]
    for step in report["steps"]:
        share = step["dropped"] / max(step["in"], 1)
        numbers = (f"{step[key]:,}" for key in ("in", "kept", "changed", "dropped"))
        rows.append((step["name"], *numbers, f"{share:.2%}"))
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = [
        "  ".join(cell.ljust(width) if not column else cell.rjust(width) for column, (cell, width) in enumerate(pairs))
        for pairs in (list(zip(row, widths, strict=True)) for row in rows)
    ]
    given = report["input"]
    noted = sum(step["noted"] for step in report["steps"])
    lines.append(
        f"{given['documents']:,} documents in ({given['text_bytes'] / 1e6:.2f} MB of text, "
        f"{given['blank_lines']} blank and {given['bad_lines']} bad lines), "
        f"{report['output']['documents']:,} out, {noted} reported and kept"
    )
    return "\n".join(lines)
