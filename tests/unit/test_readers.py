"""Readers: every format gives its rows, any cut of a file gives every line once, faults name the file."""

from __future__ import annotations

import gzip
import io
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import feather

from megatron_steel.data import read_text
from megatron_steel.data.readers import Task, expand_inputs, place, plan_tasks, read_task

ROWS: list[dict[str, Any]] = [{"text": "a"}, {"text": '雪, "quoted"\nsecond'}, {"text": "end"}]


def rows_of(path: Path, task_bytes: int = 1 << 20, columns: list[str] | None = None) -> list[Any]:
    """All rows of a file; a line that was passed over as its reason."""
    rows: list[Any] = []
    for task in plan_tasks([path], task_bytes):
        for block in read_task(task, columns):
            if block.reason:
                rows.append(block.reason)
            elif block.rows is None:
                rows += [json.loads(line.decode()) for line in block.data.split(b"\n") if line.strip()]
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
    data = (b"\n".join(lines) + (b"\n" if ended else b"")).removeprefix(read_text.BOM)
    path.write_bytes(data)
    found: list[tuple[str, bytes]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(read_text, "BLOCK_BYTES", block_bytes)
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
    monkeypatch.setattr(read_text, "MAX_LINE_BYTES", 50)
    monkeypatch.setattr(read_text, "BLOCK_BYTES", 30)
    long = json.dumps({"text": "x" * 400}).encode()
    path = tmp_path / ("a.jsonl" + suffix)
    path.write_bytes(packed(b'{"text": "a"}\n' + long + b'\n{"text": "b"}\n' + long, suffix))
    reason = "a line of more than 50 bytes"
    assert rows_of(path, task_bytes) == [{"text": "a"}, reason, {"text": "b"}, reason]


def test_bad_utf8_in_a_text_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"good\n\xff\xfe\nlast")
    assert rows_of(path) == [{"text": "good"}, "not UTF-8 (byte 1 of the line)", {"text": "last"}]


def test_rows_count_with_those_that_are_blank_or_bad(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\n\n\xff\n\xff\nfive\nsix\n\xff\neight")
    [task] = plan_tasks([path], 1 << 20)
    found = [(block.first_line, len(block.rows) if block.rows else block.reason) for block in read_task(task, None)]
    bad = "not UTF-8 (byte 1 of the line)"
    assert found == [(1, 2), (3, bad), (4, bad), (5, 2), (7, bad), (8, 1)]


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


def test_columns_that_only_some_files_have(tmp_path: Path) -> None:
    for path in (tmp_path / "a.parquet", tmp_path / "a.arrow", tmp_path / "a.csv"):
        if path.suffix == ".csv":
            path.write_text("text,id\na,1\n")
        else:
            table = pa.Table.from_pylist([{"text": "a", "id": 1}])
            (pq.write_table if path.suffix == ".parquet" else feather.write_feather)(table, path)
        assert rows_of(path, columns=["system", "text"]) == [{"text": "a"}]
        with pytest.raises(ValueError, match="no column 'system' or 'history'; its columns are 'text', 'id'"):
            rows_of(path, columns=["system", "history"])


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


@pytest.mark.parametrize("length", [48, 49, 50, 51, 52, 99, 400])
@pytest.mark.parametrize("block_bytes", [7, 30])
@pytest.mark.parametrize("task_bytes", [5, 31, 1 << 20])
def test_the_length_of_a_line_counts_wherever_it_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, length: int, block_bytes: int, task_bytes: int
) -> None:
    monkeypatch.setattr(read_text, "MAX_LINE_BYTES", 50)
    monkeypatch.setattr(read_text, "BLOCK_BYTES", block_bytes)
    line = json.dumps({"text": "x" * (length - 12)})
    assert len(line) == length
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"text": "a"}}\n{line}\n{line}')
    expected = json.loads(line) if length <= 50 else "a line of more than 50 bytes"
    assert rows_of(path, task_bytes) == [{"text": "a"}, expected, expected]


class Counted(io.BytesIO):
    """A file that counts the bytes read from it."""

    count = 0

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(size)
        self.count += len(data)
        return data

    def readline(self, size: int | None = -1) -> bytes:
        data = super().readline(size)
        self.count += len(data)
        return data


def test_a_long_line_is_read_once_however_many_tasks_it_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_text, "MAX_LINE_BYTES", 50)
    data, read = b"x" * 10_000 + b"\nlast\n", 0
    for start in range(0, len(data), 100):
        stream = Counted(data)
        list(read_text.line_blocks(Task("a.jsonl", start, min(start + 100, len(data))), stream))
        read += stream.count
    assert read < 2.1 * len(data)


def test_memory_does_not_grow_with_the_file_or_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """32 MB of which one line is 16 MB, of every text form, in less than 4 MB."""
    monkeypatch.setattr(read_text, "MAX_LINE_BYTES", 1 << 20)
    row = json.dumps({"text": "x" * 1000}).encode()
    many = b"\n".join([row] * 8000)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(many + b"\n" + b"y" * (1 << 24) + b"\n" + many, 1))
    (tmp_path / "a.json").write_bytes(b"[" + many.replace(b"\n", b",") + b"]")
    (tmp_path / "a.csv").write_bytes(b"text\n" + many.replace(b'"', b"").replace(b",", b" "))
    for name, expected in {"a.jsonl.gz": 16001, "a.json": 8000, "a.csv": 8000}.items():
        [task] = plan_tasks([tmp_path / name], 1 << 30)
        tracemalloc.start()
        count = sum(
            1 if block.reason else len(block.rows or block.data.splitlines()) for block in read_task(task, None)
        )
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert count == expected
        assert peak < 4 << 20, name


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ('[{"a": 1} {"a": 2}]', "after item 1: no ','"),
        ('[{"a": 1},, {"a": 2}]', "malformed JSON in item 2"),
        ('[{"a": 1}, ]', "malformed JSON in item 2"),
        ('[{"a": 1}][{"a": 2}]', "more behind the list of 1 items"),
        ('[{"a": 1}', "the list ends after item 1 without"),
        ("[", "the list ends after item 0 without"),
        ("[" + '{"a":' * 200_000, "malformed JSON in item 1"),
        ('[{"a": "\xff"}]', "not UTF-8 after item 0"),
    ],
)
def test_a_broken_list_is_named(tmp_path: Path, data: str, message: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(data.encode("latin-1"))
    with pytest.raises(ValueError, match=message) as caught:
        rows_of(path)
    assert "a.json" in str(caught.value) and "\n" not in str(caught.value)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    items=st.lists(st.dictionaries(st.text(max_size=3), st.text(max_size=9), max_size=3) | st.integers(), max_size=6),
    indent=st.sampled_from([None, 1]),
    block_bytes=st.integers(1, 20),
)
def test_any_buffer_gives_every_item_of_a_list(
    tmp_path: Path, items: list[Any], indent: int | None, block_bytes: int
) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(items, indent=indent, ensure_ascii=False).encode("utf-8", "replace").decode() + " \n")
    items = json.loads(path.read_text())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(read_text, "BLOCK_BYTES", block_bytes)
        assert rows_of(path) == [item if isinstance(item, dict) else "not a JSON object but int" for item in items]


def test_rows_of_csv_that_do_not_fit_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"id,text\n1,a\n2\n\n3,\xff\n\xff,b\n5,c,d\n6,\xe9\x9b\xaa\n")
    assert rows_of(path, columns=["text"]) == [
        {"text": "a"},
        "1 fields where the header has 2",
        "not UTF-8",
        {"text": "b"},
        "3 fields where the header has 2",
        {"text": "雪"},
    ]
    path.write_bytes(b'text\n"a" b\n')
    with pytest.raises(ValueError, match="a.csv:2: malformed CSV"):
        rows_of(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(read_text, "MAX_LINE_BYTES", 9)
        path.write_bytes(b"text\na\n" + b"x" * 40)
        with pytest.raises(ValueError, match="a.csv:3: a line of more than 9 characters"):
            rows_of(path)
    path.write_bytes(b"text,text\na,b\n")
    with pytest.raises(ValueError, match="two columns have the same name"):
        rows_of(path)


def test_other_columns_are_not_decoded(tmp_path: Path) -> None:
    """Overwritten on disk, they do no harm."""
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist([{"label": "x" * 99, **row} for row in ROWS]), path, compression="zstd")
    column = pq.read_metadata(path).row_group(0).column(0)
    assert column.path_in_schema == "label"
    data = bytearray(path.read_bytes())
    start = column.dictionary_page_offset or column.data_page_offset
    data[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    path.write_bytes(data)
    assert rows_of(path, columns=["text"]) == ROWS
    with pytest.raises(ValueError, match="a.parquet: cannot be read"):
        rows_of(path)


def test_text_in_a_table_that_is_not_utf8_costs_its_row(tmp_path: Path) -> None:
    texts = pa.array([b"a", b"b\xff", b"c"], pa.binary())
    table = pa.table({"text": pa.Array.from_buffers(pa.string(), 3, texts.buffers())})
    for path in (tmp_path / "a.parquet", tmp_path / "a.arrow"):
        if path.suffix == ".parquet":
            pq.write_table(table, path)
        else:
            with pa.ipc.new_file(path, table.schema) as writer:
                writer.write_table(table)
        assert rows_of(path) == [{"text": "a"}, "not UTF-8 (byte 2 of the text)", {"text": "c"}]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_an_archive_cut_anywhere_is_refused(tmp_path: Path, suffix: str) -> None:
    """Never taken for a shorter file, but where a whole member ends."""
    data = b"".join(b'{"text": "%d"}\n' % number for number in range(40))
    path = tmp_path / ("a.jsonl" + suffix)
    whole = packed(data, suffix)
    for stop in range(1, len(whole)):
        path.write_bytes(whole[:stop])
        [task] = plan_tasks([path], 1 << 20)
        try:
            got = b"".join(block.data for block in read_task(task, None))
        except ValueError as error:
            assert str(error).startswith(f"{path}: cannot be read: ")
        else:
            assert got == data[: len(data) // 2], stop


def test_empty_files_have_no_rows(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.txt", "a.csv", "a.json", "a.jsonl.gz", "a.jsonl.zst"):
        (tmp_path / name).touch()
        assert rows_of(tmp_path / name, columns=["text"]) == [], name
    for name in ("a.parquet", "a.arrow"):
        (tmp_path / name).touch()
        with pytest.raises(ValueError, match=f"{name}: cannot be read"):
            rows_of(tmp_path / name)
