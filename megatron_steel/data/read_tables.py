"""Readers of Parquet and Arrow files: rows of the wanted columns; others are not decoded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_steel.data.pieces import BLOCK_BYTES, BLOCK_ROWS, Block, Task, row_blocks
from megatron_steel.data.read_text import present

TABLE_SUFFIXES = (".parquet", ".arrow")


@contextmanager
def arrow_errors(path: str) -> Iterator[None]:
    """pyarrow's own faults as one ``ValueError`` that names the file."""
    import pyarrow as pa

    try:
        yield
    except pa.ArrowException as error:
        raise ValueError(f"{path}: cannot be read: {' '.join(str(error).split())}") from error


def table_tasks(path: Path, task_bytes: int) -> list[Task]:
    """Consecutive row groups or record batches whose stored size reaches ``task_bytes``; one task for a stream."""
    with arrow_errors(str(path)):
        if path.suffix == ".parquet":
            import pyarrow.parquet as pq

            with pq.ParquetFile(path) as table:
                sizes = [table.metadata.row_group(index).total_byte_size for index in range(table.num_row_groups)]
        else:
            with open_arrow(path, None) as batches:
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


def rows_before(task: Task) -> int:
    """Rows of the file in front of a task."""
    path = Path(task.path)
    if not task.start:
        return 0
    with arrow_errors(task.path):
        if path.suffix == ".parquet":
            import pyarrow.parquet as pq

            with pq.ParquetFile(path) as table:
                return sum(table.metadata.row_group(index).num_rows for index in range(task.start))
        with open_arrow(path, None) as batches:
            return sum(batches.get_batch(index).num_rows for index in range(task.start))


def table_blocks(task: Task, columns: Sequence[str] | None) -> Iterator[Block]:
    """Blocks of rows of a Parquet or Arrow file, in order."""
    with arrow_errors(task.path):
        yield from row_blocks(task.path, table_rows(task, columns))


def table_rows(task: Task, columns: Sequence[str] | None) -> Iterator[dict[str, Any] | str]:
    """Rows as Python objects, few at a time where they are large; text that is not UTF-8 costs its row only."""
    for batch in table_batches(Path(task.path), task, columns):
        step = max(1, min(BLOCK_ROWS, BLOCK_BYTES * batch.num_rows // max(batch.nbytes, 1)))
        for start in range(0, batch.num_rows, step):
            part = batch.slice(start, step)
            try:
                yield from part.to_pylist()
            except UnicodeDecodeError:
                for index in range(part.num_rows):
                    yield single_row(part.slice(index, 1))


def single_row(part: Any) -> dict[str, Any] | str:
    """The row of a batch of one, or what is wrong with it."""
    try:
        return part.to_pylist()[0]
    except UnicodeDecodeError as error:
        return f"not UTF-8 (byte {error.start + 1} of the text)"


def table_batches(path: Path, task: Task, columns: Sequence[str] | None) -> Iterator[Any]:
    """Record batches with the wanted columns."""
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        with pq.ParquetFile(path) as table:
            names = present(task.path, table.schema_arrow.names, columns)
            groups = range(task.start, task.stop)
            yield from table.iter_batches(BLOCK_ROWS, row_groups=groups, columns=None if columns is None else names)
        return
    with open_arrow(path, columns) as batches:
        chosen = range(task.start, task.stop)
        yield from (batches.get_batch(index) for index in chosen) if task.stop else batches


@contextmanager
def open_arrow(path: Path, columns: Sequence[str] | None) -> Iterator[Any]:
    """The record batches of an Arrow file, in its random-access or its stream form, with the wanted columns."""
    import pyarrow as pa

    with pa.memory_map(str(path)) as file:
        opener = pa.ipc.open_file
        try:
            batches = opener(file)
        except pa.ArrowInvalid:
            opener = pa.ipc.open_stream
            file.seek(0)
            batches = opener(file)
        if columns is not None:
            there = batches.schema.names
            chosen = sorted(there.index(name) for name in present(str(path), there, columns))
            file.seek(0)
            batches = opener(file, options=pa.ipc.IpcReadOptions(included_fields=chosen))
        with batches:
            yield batches
