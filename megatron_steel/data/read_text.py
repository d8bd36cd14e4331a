"""Readers of text forms: JSON lines, a JSON list, CSV and plain text, compressed or not, in bounded memory."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from megatron_steel.data.pieces import BLOCK_BYTES, Block, Task, row_blocks

TEXT_SUFFIXES = (".jsonl", ".json", ".txt", ".csv")
COMPRESSED_SUFFIXES = (".gz", ".zst")
MAX_LINE_BYTES = 100_000_000
BOM = codecs.BOM_UTF8
SPACE = " \t\r\n"


def text_blocks(task: Task, columns: Sequence[str] | None) -> Iterator[Block]:
    """Blocks of a text file, in order."""
    path = Path(task.path)
    kind = form(path)
    with open_text(path) as stream:
        if kind == "list":
            yield from row_blocks(task.path, list_items(stream, task.path))
        elif kind == ".csv":
            yield from row_blocks(task.path, csv_rows(stream, task.path, columns))
        elif kind == ".txt":
            for block in line_blocks(task, stream):
                yield from row_blocks(task.path, text_rows(block), block.first_line)
        else:
            yield from line_blocks(task, stream)


def form(path: Path) -> str:
    """What a text file holds: one of ``TEXT_SUFFIXES``, or "list" for a .json file with one list.

    A file with another suffix is taken for JSON lines.
    """
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
    """The decompressed bytes of a text file: all members of a .gz, all frames of a .zst."""
    with open(path, "rb") as raw:
        if path.suffix == ".gz":
            with gzip.GzipFile(fileobj=raw) as stream:
                yield cast(BinaryIO, stream)
        elif path.suffix == ".zst":
            # Not zstandard's reader: at a frame that is cut off it ends as if the file did.
            import pyarrow as pa

            with pa.CompressedInputStream(raw, "zstd") as frames:
                yield cast(BinaryIO, io.BufferedReader(cast(io.RawIOBase, frames), BLOCK_BYTES))
        else:
            yield cast(BinaryIO, raw)


def line_blocks(task: Task, stream: BinaryIO) -> Iterator[Block]:
    """Whole lines, about ``BLOCK_BYTES`` at a time; a line above ``MAX_LINE_BYTES`` is passed over, not held."""
    at, number = task.start, 1
    if task.start:
        # The byte before tells whether a line begins here. A line that goes on behind the task is not followed.
        stream.seek(task.start - 1)
        at += pass_line(stream, task.stop - task.start + 1) - 1
    while not task.stop or at < task.stop:
        data = stream.read(min(BLOCK_BYTES, task.stop - at) if task.stop else BLOCK_BYTES)
        if not data:
            return
        at += len(data)
        too_long = False
        if not data.endswith(b"\n"):
            whole = data.rfind(b"\n") + 1
            room = MAX_LINE_BYTES - (len(data) - whole)
            rest = stream.readline(max(room, 0) + 1)
            at += len(rest)
            too_long = len(rest.removesuffix(b"\n")) > room
            if too_long and not rest.endswith(b"\n"):
                at += pass_line(stream)
            data = data[:whole] if too_long else data + rest
        if number == 1 and task.start == 0:
            data = data.removeprefix(BOM)
        if data:
            yield Block(task.path, number, data)
            number += data.count(b"\n")
        if too_long:
            yield Block(task.path, number, b"", reason=f"a line of more than {MAX_LINE_BYTES} bytes")
            number += 1


def pass_line(stream: BinaryIO, limit: int | None = None) -> int:
    """Read to the end of the line, or up to ``limit`` bytes, and return how many bytes that was."""
    passed = 0
    while limit is None or passed < limit:
        part = stream.readline(BLOCK_BYTES if limit is None else min(BLOCK_BYTES, limit - passed))
        passed += len(part)
        if not part or part.endswith(b"\n"):
            break
    return passed


def text_rows(block: Block) -> Iterator[dict[str, Any] | str | None]:
    """The lines of a text file as rows, None for a blank one."""
    if block.reason:
        yield block.reason
        return
    for line in block.data.removesuffix(b"\n").split(b"\n"):
        try:
            text = line.decode("utf-8").removesuffix("\r")
        except UnicodeDecodeError as error:
            yield f"not UTF-8 (byte {error.start + 1} of the line)"
        else:
            yield {"text": text} if text.strip() else None


def list_items(stream: BinaryIO, path: str) -> Iterator[dict[str, Any] | str]:
    """Items of a JSON list, one at a time; only an unfinished item is held, and none above ``MAX_LINE_BYTES``.

    Raises ``ValueError`` where the list itself is broken: nothing behind that place can be told apart.
    """
    decoder, text = json.JSONDecoder(), codecs.getincrementaldecoder("utf-8-sig")()
    buffer, number, need, expected = "", 0, BLOCK_BYTES, "["
    while True:
        try:
            data = stream.read(need)
            buffer += text.decode(data, final=not data)
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 after item {number}: {error.reason}") from error
        position = skip_space(buffer, 0)
        while position < len(buffer):
            if expected == "end":
                raise ValueError(f"{path}: there is more behind the list of {number} items")
            if buffer[position] == "]" and expected in (",", "first"):
                expected, position = "end", position + 1
            elif expected in ("[", ","):
                if buffer[position] != expected:
                    raise ValueError(f"{path}: malformed JSON after item {number}: no {expected!r}")
                expected, position = "first" if expected == "[" else "item", position + 1
            else:
                try:
                    item, end = decoder.raw_decode(buffer, position)
                except (json.JSONDecodeError, RecursionError) as error:
                    if data and len(buffer) - position <= MAX_LINE_BYTES and not isinstance(error, RecursionError):
                        break
                    raise ValueError(f"{path}: malformed JSON in item {number + 1}: {error}") from error
                if end == len(buffer) and data:
                    break  # a number may go on
                number, position, expected = number + 1, end, ","
                yield item if isinstance(item, dict) else f"not a JSON object but {type(item).__name__}"
            position = skip_space(buffer, position)
        if not data:
            if expected != "end":
                raise ValueError(f"{path}: cannot be read: the list ends after item {number} without ']'")
            return
        buffer = buffer[position:]
        need = max(BLOCK_BYTES, len(buffer))


def skip_space(text: str, position: int) -> int:
    """The first position from here on that is not white space."""
    while position < len(text) and text[position] in SPACE:
        position += 1
    return position


def csv_rows(stream: BinaryIO, path: str, columns: Sequence[str] | None) -> Iterator[dict[str, Any] | str]:
    """Records of a CSV file with a header line; quoted fields may hold line breaks.

    Raises ``ValueError`` for quotes that do not match: nothing behind that place can be told apart.
    """
    csv.field_size_limit(MAX_LINE_BYTES)
    lines = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
    reader = csv.reader(short_lines(lines, path), strict=True)
    try:
        header = next(reader, None)
        if header is None:
            return
        names = present(path, header, columns)
        if len(set(header)) != len(header):
            raise ValueError(f"{path}: two columns have the same name: {', '.join(map(repr, header))}")
        for fields in reader:
            if not fields:
                continue  # a blank line
            if len(fields) != len(header):
                yield f"{len(fields)} fields where the header has {len(header)}"
                continue
            row = dict(zip(header, fields, strict=True))
            wanted = {name: row[name] for name in names}
            yield wanted if all(map(is_text, wanted.values())) else "not UTF-8"
    except csv.Error as error:
        raise ValueError(f"{path}:{reader.line_num}: malformed CSV: {error}") from error


def short_lines(lines: io.TextIOWrapper, path: str) -> Iterator[str]:
    """Lines of a text stream; ``ValueError`` for one above ``MAX_LINE_BYTES``."""
    number = 1
    while line := lines.readline(MAX_LINE_BYTES + 1):
        if len(line) > MAX_LINE_BYTES:
            raise ValueError(f"{path}:{number}: a line of more than {MAX_LINE_BYTES} characters")
        number += 1
        yield line


def is_text(text: str) -> bool:
    """Whether a string can be written as UTF-8: lone surrogates, also those read from other bytes, cannot."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            return False
    return True


def present(path: str, there: Sequence[str], wanted: Sequence[str] | None) -> list[str]:
    """The wanted columns (None: all) that a table has; ``ValueError`` if it has none of them.

    Those a file lacks may be needed in other files only; whoever needs one in every row will miss it there.
    """
    if wanted is None:
        return list(there)
    names = [name for name in wanted if name in there]
    if wanted and not names:
        raise ValueError(
            f"{path}: no column {' or '.join(map(repr, wanted))}; "
            f"its columns are {', '.join(map(repr, there)) or 'none'} (choose with --json-keys)"
        )
    return names
