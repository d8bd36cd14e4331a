"""What readers take and give: a task is a piece of a file, a block some of its lines or rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

BLOCK_BYTES = 1 << 18
BLOCK_ROWS = 256


@dataclass(frozen=True)
class Task:
    """A piece of one file: the lines that begin in bytes [start, stop), row groups or record batches [start, stop).

    (0, 0) is the whole of a file that can only be read from its beginning.
    """

    path: str
    start: int
    stop: int


@dataclass(frozen=True)
class Block:
    """Consecutive lines or rows of a task; ``first_line`` is the number of the first, counted from 1 in the task.

    ``rows`` are parsed (None for a blank line), otherwise ``data`` holds whole JSON lines. ``reason`` is set when the
    block stands for one line or row that could not be read.
    """

    path: str
    first_line: int
    data: bytes
    rows: list[dict[str, Any] | None] | None = None
    reason: str | None = None


def row_blocks(path: str, rows: Iterator[dict[str, Any] | str | None], first: int = 1) -> Iterator[Block]:
    """Rows gathered into blocks of about ``BLOCK_BYTES`` of text; a str stands for a row and says what is wrong."""
    held: list[dict[str, Any] | None] = []
    number = first  # of the first row held
    characters = 0
    for row in rows:
        if not isinstance(row, str):
            held.append(row)
            characters += sum(len(text) for text in row.values() if isinstance(text, str)) if row else 0
        if held and (isinstance(row, str) or len(held) == BLOCK_ROWS or characters >= BLOCK_BYTES):
            yield Block(path, number, b"", held)
            number, held, characters = number + len(held), [], 0
        if isinstance(row, str):
            yield Block(path, number, b"", reason=row)
            number += 1
    if held:
        yield Block(path, number, b"", held)
