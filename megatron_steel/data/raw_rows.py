"""Rows of raw text files with the file and line they come from, faulty ones included: what statistics and checks read.

Reading and formats are those of data/readers.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_steel.data.encode import parse_leniently
from megatron_steel.data.progress import ByteProgress
from megatron_steel.data.readers import Block, plan_tasks, read_task

# A file is one task, so that lines count from its first.
WHOLE_FILE = 1 << 62
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


@dataclass(frozen=True)
class RawRow:
    """The value of a row, or in ``error`` why there is none; ``place`` is file:line."""

    place: str
    value: Any
    error: str | None = None


def raw_rows(paths: Sequence[Path], columns: Sequence[str] | None = None, what: str = "read") -> Iterator[RawRow]:
    """Every row of the files, in order; blank lines are errors too. ``columns`` names those that are needed."""
    for path in paths:
        progress = ByteProgress(f"{what} {path}", path.stat().st_size)
        for task in plan_tasks([path], WHOLE_FILE):
            for block in read_task(task, columns):
                yield from block_rows(block)
                progress.add(len(block.data))


def block_rows(block: Block) -> Iterator[RawRow]:
    """The rows of a block: parsed ones as they are, JSON lines parsed, a line that could not be read as an error."""
    if block.reason is not None:
        yield RawRow(f"{block.path}:{block.first_line}", None, block.reason)
    elif block.rows is None:
        yield from line_rows(block.path, block.first_line, block.data)
    else:
        for number, row in enumerate(block.rows, start=block.first_line):
            yield RawRow(f"{block.path}:{number}", row, "blank line" if row is None else None)


def line_rows(path: str, first_line: int, data: bytes) -> Iterator[RawRow]:
    """The rows of consecutive JSON lines."""
    lines = data.split(b"\n")
    if not lines[-1]:
        lines.pop()
    for number, line in enumerate(lines, start=first_line):
        value, error = parse(line)
        yield RawRow(f"{path}:{number}", value, error)


def parse(line: bytes) -> tuple[Any, str | None]:
    """The value of a JSON line and None, or None and what is wrong with it."""
    if not line.strip():
        return None, "blank line"
    try:
        value = parse_leniently(line)
    except ValueError as error:
        return None, str(error)
    if SURROGATE.search(line):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            return None, "holds half of a surrogate pair, which is not text"
    return value, None
