"""Readers: every format gives its rows, any cut of a file gives every line once, faults name the file."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_steel.data import readers
from megatron_steel.data.readers import expand_inputs, place, plan_tasks, read_task

ROWS: list[dict[str, Any]] = [{"text": "a"}, {"text": '雪, "quoted"\nsecond'}, {"text": "end"}]


def rows_of(path: Path, task_bytes: int = 1 << 20, columns: list[str] | None = None) -> list[Any]:
    """All rows of a file; a line that was passed over as its reason."""
    rows: list[Any] = []
    for task in plan_tasks([path], task_bytes):
        for block in read_task(task, columns):
            if block.reason:
                rows.append(block.reason)
            elif block.rows is None:
                rows += [json.loads(line) for line in block.data.split(b"\n") if line.strip()]
            else:
                rows += [row for row in block.rows if row is not None]
    return rows


def packed(data: bytes, suffix: str) -> bytes:
    """Two members or frames, as concatenated archives have."""
    half = len(data) // 2
    if suffix == ".gz":
        return gzip.compress(data[:half]) + gzip.compress(data[half:])
    if suffix == ".zst":
        return zstandard.compress(data[:half]) + zstandard.compress(data[half:])
    return data


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize("task_bytes", [1, 7, 1 << 20])
def test_text_formats(tmp_path: Path, suffix: str, task_bytes: int) -> None:
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS).encode()
    documents = {
        "a.jsonl": lines,
        "crlf.jsonl": b"\xef\xbb\xbf" + lines.replace(b"\n", b"\r\n") + b"\r\n",
        "lines.json": lines + b"\n",
        "list.json": json.dumps(ROWS, ensure_ascii=False, indent=1).encode(),
        "bom.json": b"\xef\xbb\xbf" + json.dumps(ROWS).encode(),
        "a.csv": '\ufefftext\r\na\r\n"雪, ""quoted""\nsecond"\r\nend\r\n'.encode(),
    }
    for name, data in documents.items():
        path = tmp_path / (name + suffix)
        path.write_bytes(packed(data, suffix))
        assert rows_of(path, task_bytes, ["text"]) == ROWS, name
    path = tmp_path / ("a.txt" + suffix)
    path.write_bytes(packed("a\r\n\n雪\nend".encode(), suffix))
    assert rows_of(path, task_bytes) == [{"text": "a"}, {"text": "雪"}, {"text": "end"}]


@pytest.mark.parametrize("task_bytes", [1, 1 << 20])
def test_tables_read_the_wanted_columns(tmp_path: Path, task_bytes: int) -> None:
    """``label`` is a struct in one file and text in the other, ``id`` a number and text: neither is read."""
    count = 0
    for number, extra in enumerate(({"id": 7, "label": {"a": 1}}, {"id": "x", "label": "b"})):
        table = pa.Table.from_pylist([row | extra for row in ROWS] * 200)
        parquet, arrow, stream = (tmp_path / f"{kind}{number}" for kind in ("p.parquet", "a.arrow", "s.arrow"))
        parquet, arrow, stream = (path.with_name(f"{number}{path.name[:-1]}") for path in (parquet, arrow, stream))
        pq.write_table(table, parquet, row_group_size=100)
        with pa.ipc.new_file(arrow, table.schema) as writer:
            writer.write_table(table, max_chunksize=100)
        with pa.ipc.new_stream(stream, table.schema) as writer:
            writer.write_table(table, max_chunksize=100)
        assert (
            len(plan_tasks([parquet], task_bytes))
            == len(plan_tasks([arrow], task_bytes))
            == (6 if task_bytes == 1 else 1)
        )
        for path in (parquet, arrow, stream):
            rows = rows_of(path, task_bytes, ["text"])
            assert rows == ROWS * 200
            count += len(rows)
    assert count == 3600
    with pytest.raises(ValueError, match="no column 'content'; its columns are 'text', 'id', 'label'"):
        rows_of(parquet, task_bytes, ["content"])
    assert place(plan_tasks([parquet], 1)[2], 5) == f"{parquet}:205"
    assert place(plan_tasks([arrow], 1)[2], 5) == f"{arrow}:205"


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lines=st.lists(st.binary(max_size=12).map(lambda line: line.replace(b"\n", b" ")), max_size=12),
    ended=st.booleans(),
    task_bytes=st.integers(1, 40),
    block_bytes=st.integers(1, 20),
)
def test_any_cut_gives_every_line_once(
    tmp_path: Path, lines: list[bytes], ended: bool, task_bytes: int, block_bytes: int
) -> None:
    """And each with its number in the file."""
    path = tmp_path / "a.jsonl"
    data = (b"\n".join(lines) + (b"\n" if ended else b"")).removeprefix(readers.BOM)
    path.write_bytes(data)
    found: list[tuple[str, bytes]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "BLOCK_BYTES", block_bytes)
        for task in plan_tasks([path], task_bytes):
            for block in read_task(task, None):
                parts = block.data.removesuffix(b"\n").split(b"\n")
                found += [(place(task, number), line) for number, line in enumerate(parts, block.first_line)]
    expected = data.removesuffix(b"\n").split(b"\n") if data else []
    assert found == [(f"{path}:{number}", line) for number, line in enumerate(expected, start=1)]


@pytest.mark.parametrize("task_bytes", [5, 1 << 20])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_line_that_is_too_long_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task_bytes: int, suffix: str
) -> None:
    monkeypatch.setattr(readers, "MAX_LINE_BYTES", 50)
    monkeypatch.setattr(readers, "BLOCK_BYTES", 30)
    long = json.dumps({"text": "x" * 400}).encode()
    path = tmp_path / ("a.jsonl" + suffix)
    path.write_bytes(packed(b'{"text": "a"}\n' + long + b'\n{"text": "b"}\n' + long, suffix))
    reason = "a line of more than 50 bytes"
    assert rows_of(path, task_bytes) == [{"text": "a"}, reason, {"text": "b"}, reason]


def test_bad_utf8_in_a_text_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"good\n\xff\xfe\nlast")
    assert rows_of(path) == [{"text": "good"}, "not UTF-8 (byte 1 of the line)", {"text": "last"}]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.arrow", "a.json", "a.csv"])
def test_a_cut_file_is_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    table = pa.Table.from_pylist(ROWS)
    if name == "a.parquet":
        pq.write_table(table, path)
    elif name == "a.arrow":
        with pa.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table)
    elif name == "a.csv":
        path.write_bytes(b'text\n"a')
    else:
        path.write_bytes(packed(json.dumps(ROWS).encode(), path.suffix))
    path.write_bytes(path.read_bytes()[: -9 if name != "a.csv" else None])
    with pytest.raises(ValueError, match=path.name) as caught:
        rows_of(path)
    assert "\n" not in str(caught.value)


def test_inputs(tmp_path: Path) -> None:
    for name in ("b.parquet", "a.jsonl.zst", "c.txt.gz", "notes.md"):
        (tmp_path / name).touch()
    assert [path.name for path in expand_inputs([str(tmp_path)])] == ["a.jsonl.zst", "b.parquet", "c.txt.gz"]
    assert [path.name for path in expand_inputs([f"{tmp_path}/*.md", f"{tmp_path}/a*"])] == ["notes.md", "a.jsonl.zst"]
    with pytest.raises(ValueError, match="named twice"):
        expand_inputs([str(tmp_path), str(tmp_path / "b.parquet")])
    with pytest.raises(ValueError, match="no such file"):
        expand_inputs([str(tmp_path / "missing.jsonl")])
    with pytest.raises(ValueError, match="matches no file"):
        expand_inputs([f"{tmp_path}/*.csv"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no file"):
        expand_inputs([str(tmp_path / "empty")])
