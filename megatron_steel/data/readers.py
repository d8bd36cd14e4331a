"""Readers of raw text: every format as blocks of rows or of JSON lines, whole files or pieces, in bounded memory.

A file is cut into tasks by its bytes (or row groups) alone, so that what comes out does not depend on who reads what.

    .jsonl, .json with objects   JSON lines; handed on as raw bytes, parsed by the reader's caller
    .json with a list            its items
    .txt                         one document per line, under the key "text"
    .csv                         one row per record, keys from the header
    .parquet, .arrow             rows; only the wanted columns are decoded

Text formats may end in .gz or .zst. A byte order mark at the start and carriage returns at the ends of lines are no
part of what is read. What cannot be read is told by size: a line or row becomes a block with a reason, a damaged file
a ``ValueError``.
"""

from __future__ import annotations

import glob
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from megatron_steel.data.pieces import Block, Task
from megatron_steel.data.read_tables import TABLE_SUFFIXES, rows_before, table_blocks, table_tasks
from megatron_steel.data.read_text import COMPRESSED_SUFFIXES, TEXT_SUFFIXES, form, text_blocks

INPUT_SUFFIXES = (
    *TEXT_SUFFIXES,
    *(text + end for text in TEXT_SUFFIXES for end in COMPRESSED_SUFFIXES),
    *TABLE_SUFFIXES,
)


def expand_inputs(patterns: Sequence[str]) -> list[Path]:
    """Input files in the order given; those of a directory or a glob sorted by name.

    Raises ``ValueError`` for a pattern without files and for a file that is named twice.
    """
    paths: list[Path] = []
    for pattern in patterns:
        if Path(pattern).is_dir():
            found = sorted(path for path in Path(pattern).iterdir() if path.name.endswith(INPUT_SUFFIXES))
            if not found:
                raise ValueError(
                    f"--input {pattern}: the directory holds no file that ends in {', '.join(INPUT_SUFFIXES)}"
                )
        elif Path(pattern).exists():
            found = [Path(pattern)]
        elif glob.has_magic(pattern):
            found = [Path(name) for name in sorted(glob.glob(pattern)) if Path(name).is_file()]
            if not found:
                raise ValueError(f"--input {pattern}: matches no file")
        else:
            raise ValueError(f"--input {pattern}: no such file or directory")
        paths += found
    seen: set[Path] = set()
    for path in paths:
        if path.resolve() in seen:
            raise ValueError(f"--input: {path} is named twice; its documents would be repeated")
        seen.add(path.resolve())
    return paths


def plan_tasks(paths: Sequence[Path], task_bytes: int) -> list[Task]:
    """Pieces of about ``task_bytes``, in input order. Raises ``ValueError`` for a file that cannot be opened."""
    tasks: list[Task] = []
    for path in paths:
        with readable(str(path)):
            if path.suffix in TABLE_SUFFIXES:
                tasks += table_tasks(path, task_bytes)
            elif path.suffix in COMPRESSED_SUFFIXES or form(path) in (".csv", "list"):
                tasks.append(Task(str(path), 0, 0))
            else:
                size = path.stat().st_size
                tasks += [Task(str(path), at, min(at + task_bytes, size)) for at in range(0, size, task_bytes)]
    return tasks


def read_task(task: Task, columns: Sequence[str] | None) -> Iterator[Block]:
    """Blocks of a task, in order; ``columns`` names the wanted keys (None: all) where others need not be decoded.

    Raises ``ValueError`` "FILE: cannot be read: ..." for a damaged or truncated file, and for one that has columns but
    not the wanted ones.
    """
    with readable(task.path):
        if Path(task.path).suffix in TABLE_SUFFIXES:
            yield from table_blocks(task, columns)
        else:
            yield from text_blocks(task, columns)


def place(task: Task, line: int) -> str:
    """ "file:line" of a line of a task, counted from the start of the file (which is read up to the task for it)."""
    if Path(task.path).suffix in TABLE_SUFFIXES:
        return f"{task.path}:{rows_before(task) + line}"
    before = 0
    if task.start:
        with open(task.path, "rb") as file:
            # The task's first line begins after the first newline at or behind start - 1.
            remaining = task.start - 1
            while remaining and (data := file.read(min(remaining, 1 << 20))):
                before += data.count(b"\n")
                remaining -= len(data)
            before += 1
    return f"{task.path}:{before + line}"


@contextmanager
def readable(path: str) -> Iterator[None]:
    """Faults of a file as one ``ValueError`` that names it."""
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())
        raise ValueError(f"{path}: cannot be read: {reason}") from error
