"""Readers of raw text: every format as blocks of rows or of JSON lines, whole files or pieces, in bounded memory.

A file is cut into tasks by its bytes (or row groups) alone, so that what comes out does not depend on who reads what.

    .jsonl, .json with objects   JSON lines; handed on as raw bytes, parsed by the reader's caller
    .json with a list            its items
    .txt                         one document per line, under the key "text"
    .csv                         one row per record, keys from the header
    .parquet, .arrow             rows; only the wanted columns are decoded

Text formats may end in .gz or .zst.
"""

from __future__ import annotations

import codecs
import csv
import glob
import gzip
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

TEXT_SUFFIXES = (".jsonl", ".json", ".txt", ".csv")
COMPRESSED_SUFFIXES = (".gz", ".zst")
TABLE_SUFFIXES = (".parquet", ".arrow")
INPUT_SUFFIXES = (
    *TEXT_SUFFIXES,
    *(text + end for text in TEXT_SUFFIXES for end in COMPRESSED_SUFFIXES),
    *TABLE_SUFFIXES,
)
BLOCK_BYTES = 1 << 18
BLOCK_ROWS = 256
MAX_LINE_BYTES = 100_000_000
BOM = codecs.BOM_UTF8


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
    block stands for one line that could not be read.
    """

    path: str
    first_line: int
    data: bytes
    rows: list[dict[str, Any] | None] | None = None
    reason: str | None = None


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


def table_tasks(path: Path, task_bytes: int) -> list[Task]:
    """Consecutive row groups or record batches whose stored size reaches ``task_bytes``."""
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        with pq.ParquetFile(path) as table:
            sizes = [table.metadata.row_group(index).total_byte_size for index in range(table.num_row_groups)]
    else:
        with open_arrow(path) as batches:
            if not hasattr(batches, "num_record_batches"):
                return [Task(str(path), 0, 0)]
            count = batches.num_record_batches
            sizes = [path.stat().st_size // max(count, 1)] * count
    tasks, start, held = [], 0, 0
    for index, size in enumerate(sizes, start=1):
        held += size
        if held >= task_bytes or index == len(sizes):
            tasks.append(Task(str(path), start, index))
            start, held = index, 0
    return tasks


def read_task(task: Task, columns: Sequence[str] | None) -> Iterator[Block]:
    """Blocks of a task, in order; ``columns`` names the wanted keys (None: all) where others need not be decoded.

    Raises ``ValueError`` "FILE: cannot be read: ..." for a damaged or truncated file.
    """
    path = Path(task.path)
    with readable(task.path):
        if path.suffix in TABLE_SUFFIXES:
            yield from table_blocks(task, columns)
            return
        kind = form(path)
        with open_text(path) as stream:
            if kind == "list":
                yield from row_blocks(task.path, list_items(stream, task.path))
            elif kind == ".csv":
                yield from row_blocks(task.path, csv_rows(stream, task.path, columns))
            elif kind == ".txt":
                for block in line_blocks(task, stream):
                    yield from text_rows(block)
            else:
                yield from line_blocks(task, stream)


def place(task: Task, line: int) -> str:
    """ "file:line" of a line of a task, counted from the start of the file (which is read up to the task for it)."""
    before, path = 0, Path(task.path)
    if task.start and path.suffix == ".parquet":
        import pyarrow.parquet as pq

        with pq.ParquetFile(path) as table:
            before = sum(table.metadata.row_group(index).num_rows for index in range(task.start))
    elif task.start and path.suffix == ".arrow":
        with open_arrow(path) as batches:
            before = sum(batches.get_batch(index).num_rows for index in range(task.start))
    elif task.start:
        with open(path, "rb") as file:
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
    import pyarrow

    try:
        yield
    except (OSError, EOFError, zlib.error, pyarrow.ArrowException) as error:
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())
        raise ValueError(f"{path}: cannot be read: {reason}") from error


def form(path: Path) -> str:
    """What a text file holds: one of ``TEXT_SUFFIXES``, or "list" for a .json file with one list."""
    suffixes = [suffix for suffix in path.suffixes if suffix not in COMPRESSED_SUFFIXES]
    suffix = suffixes[-1] if suffixes else ".jsonl"
    if suffix == ".json":
        with open_text(path) as stream:
            start = stream.read(64).removeprefix(BOM)
            while start and not start.strip():
                start = stream.read(64)
        return "list" if start.lstrip().startswith(b"[") else ".jsonl"
    return suffix if suffix in TEXT_SUFFIXES else ".jsonl"


@contextmanager
def open_text(path: Path) -> Iterator[BinaryIO]:
    """The decompressed bytes of a text file."""
    with open(path, "rb") as raw:
        if path.suffix == ".gz":
            with gzip.GzipFile(fileobj=raw) as stream:
                yield cast(BinaryIO, stream)
        elif path.suffix == ".zst":
            import pyarrow as pa

            with pa.CompressedInputStream(raw, "zstd") as frames:
                yield cast(BinaryIO, io.BufferedReader(cast(io.RawIOBase, frames), BLOCK_BYTES))
        else:
            yield cast(BinaryIO, raw)


def line_blocks(task: Task, stream: BinaryIO) -> Iterator[Block]:
    """Whole lines, about ``BLOCK_BYTES`` at a time; a line above ``MAX_LINE_BYTES`` is passed over, not held."""
    if task.start:
        stream.seek(task.start - 1)
    at, number = task.start, 1
    if task.start:
        skipped = pass_line(stream, b"")
        at += skipped - 1
    while not task.stop or at < task.stop:
        data = stream.read(min(BLOCK_BYTES, task.stop - at) if task.stop else BLOCK_BYTES)
        if not data:
            return
        at += len(data)
        too_long = False
        if not data.endswith(b"\n"):
            rest = stream.readline(MAX_LINE_BYTES)
            data, at = data + rest, at + len(rest)
            too_long = len(rest) == MAX_LINE_BYTES and not rest.endswith(b"\n")
            if too_long:
                at += pass_line(stream, rest)
                data = data[: data.rfind(b"\n", 0, len(data) - len(rest)) + 1]
        if number == 1 and task.start == 0:
            data = data.removeprefix(BOM)
        if data:
            yield Block(task.path, number, data)
            number += data.count(b"\n")
        if too_long:
            yield Block(task.path, number, b"", reason=f"a line of more than {MAX_LINE_BYTES} bytes")
            number += 1


def pass_line(stream: BinaryIO, last: bytes) -> int:
    """Read to the end of the line and return how many bytes that was."""
    passed = 0
    while not last.endswith(b"\n") and (last := stream.readline(BLOCK_BYTES)):
        passed += len(last)
    return passed


def text_rows(block: Block) -> Iterator[Block]:
    """The lines of a text file as rows; one that is not UTF-8 becomes a block of its own."""
    if block.reason:
        yield block
        return
    rows: list[dict[str, Any] | None] = []
    first = number = block.first_line
    for number, line in enumerate(block.data.removesuffix(b"\n").split(b"\n"), start=block.first_line):
        try:
            text = line.decode("utf-8").rstrip("\r")
        except UnicodeDecodeError as error:
            if rows:
                yield Block(block.path, first, b"", rows)
            yield Block(block.path, number, b"", reason=f"not UTF-8 (byte {error.start + 1} of the line)")
            first, rows = number + 1, []
            continue
        rows.append({"text": text} if text.strip() else None)
    if rows:
        yield Block(block.path, first, b"", rows)


def row_blocks(path: str, rows: Iterator[dict[str, Any] | None]) -> Iterator[Block]:
    """Rows gathered into blocks."""
    held: list[dict[str, Any] | None] = []
    number = 1
    for row in rows:
        held.append(row)
        if len(held) == BLOCK_ROWS:
            yield Block(path, number, b"", held)
            number, held = number + len(held), []
    if held:
        yield Block(path, number, b"", held)


def list_items(stream: BinaryIO, path: str) -> Iterator[dict[str, Any] | None]:
    """Items of a JSON list, one at a time; only an unfinished item is held."""
    decoder, text = json.JSONDecoder(), codecs.getincrementaldecoder("utf-8-sig")()
    buffer, number, need, ended = "", 0, BLOCK_BYTES, False
    while True:
        try:
            data = stream.read(need)
            buffer += text.decode(data, final=not data)
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 after item {number}: {error.reason}") from error
        ended = not data
        position = 0
        while True:
            position = skip(buffer, position, " \t\r\n," if number else " \t\r\n[")
            if position == len(buffer) or buffer[position] == "]":
                break
            try:
                item, end = decoder.raw_decode(buffer, position)
            except json.JSONDecodeError as error:
                if ended or len(buffer) - position > MAX_LINE_BYTES:
                    raise ValueError(f"{path}: malformed JSON in item {number + 1}: {error.msg}") from error
                break
            number += 1
            if not isinstance(item, dict):
                raise ValueError(f"{path}: item {number} must be a JSON object, not {type(item).__name__}")
            yield item
            position = end
        if position < len(buffer) and buffer[position] == "]":
            return
        if ended:
            raise ValueError(f"{path}: cannot be read: the list does not end")
        buffer, need = buffer[position:], max(BLOCK_BYTES, len(buffer) - position)


def skip(text: str, position: int, characters: str) -> int:
    """The first position from here on that holds none of these characters."""
    while position < len(text) and text[position] in characters:
        position += 1
    return position


def csv_rows(stream: BinaryIO, path: str, columns: Sequence[str] | None) -> Iterator[dict[str, Any] | None]:
    """Records of a CSV file with a header line; quoted fields may hold line breaks."""
    csv.field_size_limit(MAX_LINE_BYTES)
    lines = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
    reader = csv.DictReader(lines, strict=True)
    try:
        check_columns(path, reader.fieldnames or (), columns)
        for row in reader:
            if None in row or None in row.values():
                raise ValueError(f"{path}:{reader.line_num}: has not as many fields as the header")
            yield {key: row[key] for key in columns} if columns else row
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path}:{reader.line_num + 1}: malformed CSV: {error}") from error


def check_columns(path: str, there: Sequence[str], wanted: Sequence[str] | None) -> None:
    """``ValueError`` if a wanted column is not in a table."""
    for column in wanted or ():
        if column not in there:
            names = ", ".join(map(repr, there)) or "none"
            raise ValueError(f"{path}: no column {column!r}; its columns are {names} (choose with --json-keys)")


@contextmanager
def open_arrow(path: Path) -> Iterator[Any]:
    """The record batches of an Arrow file, in its random-access or its stream form."""
    import pyarrow as pa

    with pa.memory_map(str(path)) as file:
        try:
            batches = pa.ipc.open_file(file)
        except pa.ArrowInvalid:
            file.seek(0)
            batches = pa.ipc.open_stream(file)
        with batches:
            yield batches


def table_blocks(task: Task, columns: Sequence[str] | None) -> Iterator[Block]:
    """Rows of a Parquet or Arrow file."""
    path, number = Path(task.path), 1
    for batch in table_batches(path, task, columns):
        for start in range(0, batch.num_rows, BLOCK_ROWS):
            rows = batch.slice(start, BLOCK_ROWS).to_pylist()
            yield Block(task.path, number, b"", rows)
            number += len(rows)


def table_batches(path: Path, task: Task, columns: Sequence[str] | None) -> Iterator[Any]:
    """Record batches with the wanted columns."""
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        with pq.ParquetFile(path) as table:
            check_columns(task.path, table.schema_arrow.names, columns)
            groups = range(task.start, task.stop)
            yield from table.iter_batches(BLOCK_ROWS, row_groups=groups, columns=list(columns) if columns else None)
        return
    with open_arrow(path) as batches:
        check_columns(task.path, batches.schema.names, columns)
        several = range(task.start, task.stop)
        for batch in (batches.get_batch(index) for index in several) if task.stop else batches:
            yield batch.select(list(columns)) if columns else batch
