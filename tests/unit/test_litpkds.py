"""LITPKDS chunks, written here from the description of the format, become the documents that were put in."""

from __future__ import annotations

import struct
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_steel.data import litpkds
from megatron_steel.data.indexed import IndexedReader, read_sidecar
from megatron_steel.data.litpkds import CODES, ImportOptions, import_litpkds, read_header

EOD, PAD, VOCAB = 90, 91, 92
CODE_OF = {"u1": 1, "i1": 2, "i2": 3, "i4": 4, "i8": 5, "f4": 6, "f8": 7, "u2": 8}
OPTIONS = ImportOptions(vocab_size=VOCAB, pad_id=PAD, eod_id=EOD)


def write_chunk(path: Path, tokens: list[int], dtype: str = "i4") -> Path:
    """One file: magic, version 1, dtype code, count, ids; all little-endian."""
    head = b"LITPKDS" + (1).to_bytes(8, "little") + bytes([CODE_OF[dtype]]) + len(tokens).to_bytes(8, "little")
    path.write_bytes(head + np.array(tokens, dtype=f"<{dtype}").tobytes())
    return path


def write_process(
    directory: Path, name: str, stream: list[int], size: int, pad: int = PAD, dtype: str = "i4", extra: bool = False
) -> list[Path]:
    """The chunks of one process: full ones, then the remainder filled with pad, then (extra) one of pad only."""
    chunks = [stream[i : i + size] for i in range(0, len(stream), size)]
    chunks[-1] = chunks[-1] + [pad] * (size - len(chunks[-1]))
    if extra:
        chunks.append([pad] * size)
    return [write_chunk(directory / f"{name}_{i:010d}.bin", chunk, dtype) for i, chunk in enumerate(chunks)]


def documents_of(prefix: Path) -> list[list[int]]:
    reader = IndexedReader(str(prefix))
    return [reader.document(i).tolist() for i in range(reader.num_documents)]


texts = st.lists(st.integers(0, EOD - 1), max_size=12)


@settings(deadline=None, max_examples=30)
@given(
    processes=st.lists(st.lists(texts, min_size=1, max_size=6), min_size=1, max_size=3),
    size=st.integers(1, 9),
    block=st.integers(1, 7),
    dtype=st.sampled_from(sorted(CODE_OF)),
    pad=st.sampled_from([PAD, EOD]),
    extra=st.booleans(),
)
def test_documents_survive_packing(
    processes: list[list[list[int]]], size: int, block: int, dtype: str, pad: int, extra: bool
) -> None:
    expected, total = [], 0
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(litpkds, "BLOCK_TOKENS", block)
        directory = Path(folder)
        for number, texts in enumerate(processes):
            # With pad as the border, empty documents at the very end look like padding; a text before them does not.
            documents = [[*text, EOD] for text in texts] + [[7, EOD]]
            expected += documents
            stream = [token for document in documents for token in document]
            total += -(-len(stream) // size) * size + size * extra
            write_process(directory, f"train_process{number}", stream, size, pad, dtype, extra)
        out = directory / "out/data"
        report = import_litpkds([folder], str(out), ImportOptions(VOCAB, pad, eod_id=EOD))
        assert documents_of(out) == expected
        sidecar = read_sidecar(str(out))
    assert report.unfinished_documents == 0 and (report.documents, report.tokens) == (
        len(expected),
        sum(map(len, expected)),
    )
    assert report.tokens + report.pad_tokens == total
    assert sidecar is not None and sidecar["append_eod"] is True and sidecar["eod_id"] == EOD


@settings(deadline=None, max_examples=30)
@given(
    documents=st.lists(st.lists(st.integers(0, 80), min_size=1, max_size=9), min_size=1, max_size=6),
    size=st.integers(2, 9),
)
def test_documents_that_begin_with_bos_and_are_padded_with_it(documents: list[list[int]], size: int) -> None:
    bos = 88
    expected = [[bos, *document] for document in documents]
    with tempfile.TemporaryDirectory() as folder:
        write_process(Path(folder), "train_slim_0", [token for document in expected for token in document], size, bos)
        out = Path(folder) / "out/data"
        report = import_litpkds([folder], str(out), ImportOptions(VOCAB, pad_id=bos, bos_id=bos))
        assert documents_of(out) == expected
    assert report.unfinished_documents == 0


def test_the_header_is_that_of_the_description(tmp_path: Path) -> None:
    path = write_chunk(tmp_path / "train_process3_0000000017.bin", [1, 2, 3], "u2")
    assert struct.calcsize("<7sQBQ") == litpkds.HEADER.size == 24
    assert path.read_bytes()[:24] == b"LITPKDS\x01\0\0\0\0\0\0\0\x08\x03\0\0\0\0\0\0\0"
    chunk = read_header(path)
    assert (chunk.tokens, chunk.counter, chunk.stream) == (3, 17, str(tmp_path / "train_process3"))
    assert chunk.read(0, 3).tolist() == [1, 2, 3]


@pytest.mark.parametrize("name", sorted(CODE_OF))
def test_every_dtype_code(tmp_path: Path, name: str) -> None:
    assert CODES[CODE_OF[name]] == np.dtype(f"<{name}")
    write_chunk(tmp_path / "a.bin", [5, 127 if name == "i1" else 91, EOD], name)
    import_litpkds([str(tmp_path / "a.bin")], str(tmp_path / "out"), ImportOptions(128, 127, eod_id=EOD))
    assert documents_of(tmp_path / "out") == [[5, 127 if name == "i1" else 91, EOD]]


def test_large_vocabularies_are_stored_as_int32(tmp_path: Path) -> None:
    write_chunk(tmp_path / "a_0000000000.bin", [151642, 151645, 151643, 151643], "i4")
    options = ImportOptions(151646, pad_id=151643, eod_id=151645)
    report = import_litpkds([str(tmp_path)], str(tmp_path / "out"), options)
    assert documents_of(tmp_path / "out") == [[151642, 151645]] and report.pad_tokens == 2
    assert IndexedReader(str(tmp_path / "out")).dtype == np.int32


def test_the_chunk_of_pad_only_is_left_out_with_a_line(tmp_path: Path) -> None:
    paths = write_process(tmp_path, "train_process0", [1, 2, EOD], 4, extra=True)
    report = import_litpkds([str(tmp_path)], str(tmp_path / "out/x"), OPTIONS)
    assert report.notes == [f"{paths[1]}: nothing but pad ({PAD}), left out"]
    assert (report.chunks, report.pad_tokens) == (1, 5)


def test_a_missing_chunk_cuts_the_documents_there(tmp_path: Path) -> None:
    paths = write_process(tmp_path, "p", [1, 2, 3, 4, EOD, 5, 6, 7, 8, EOD], 2)
    paths[1].unlink()
    report = import_litpkds([str(tmp_path)], str(tmp_path / "out/x"), OPTIONS)
    assert documents_of(tmp_path / "out/x") == [[1, 2], [EOD], [5, 6, 7, 8, EOD]]
    assert report.notes == [f"{paths[2]}: chunk 0000000001 before it is missing; documents are cut there"]
    assert report.unfinished_documents == 1


def test_a_padded_chunk_before_others_ends_its_documents(tmp_path: Path) -> None:
    first = write_chunk(tmp_path / "p_0000000000.bin", [1, EOD, 2, PAD])
    write_chunk(tmp_path / "p_0000000001.bin", [3, EOD, PAD, PAD])
    report = import_litpkds([str(tmp_path)], str(tmp_path / "out/x"), OPTIONS)
    assert documents_of(tmp_path / "out/x") == [[1, EOD], [2], [3, EOD]]
    assert report.notes == [f"{first}: padded, though a chunk follows it; documents do not run on into that"]


def test_a_document_without_an_end_is_kept_and_told(tmp_path: Path) -> None:
    (path,) = write_process(tmp_path, "p", [1, EOD, 2, 3], 4)
    report = import_litpkds([str(tmp_path)], str(tmp_path / "out/x"), OPTIONS)
    assert documents_of(tmp_path / "out/x") == [[1, EOD], [2, 3]]
    assert report.notes == [f"{path}: the last document of the stream has no end; it is kept as it is"]
    sidecar = read_sidecar(str(tmp_path / "out/x"))
    assert sidecar is not None and sidecar["append_eod"] is False and sidecar["unfinished_documents"] == 1


def test_counters_decide_the_order_and_streams_do_not_mix(tmp_path: Path) -> None:
    first = write_process(tmp_path, "p0", [1, 2, 3, EOD], 2)
    second = write_process(tmp_path, "p1", [4, 5, 6, EOD], 2)
    import_litpkds([str(path) for path in (first[1], second[1], first[0], second[0])], str(tmp_path / "o"), OPTIONS)
    assert documents_of(tmp_path / "o") == [[1, 2, 3, EOD], [4, 5, 6, EOD]]


def broken(path: Path, change: str) -> None:
    data = path.read_bytes()
    parts = {
        "magic": b"LITPKDX" + data[7:],
        "version": data[:7] + b"\x02" + data[8:],
        "code": data[:15] + b"\x09" + data[16:],
        "cut": data[:-1],
        "long": data + b"\0",
        "header": data[:20],
    }
    path.write_bytes(parts[change])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("magic", "not a LITPKDS chunk"),
        ("version", "version 2 of LITPKDS; only version 1"),
        ("code", "dtype code 9 is not one of"),
        ("cut", r"39 bytes, its header \(4 tokens of int32\) needs 40: truncated"),
        ("long", "needs 40: too long"),
        ("header", "truncated inside its 24-byte header"),
    ],
)
def test_damage_is_named_and_nothing_is_written(tmp_path: Path, change: str, message: str) -> None:
    (path,) = write_process(tmp_path, "p", [1, 2, 3, EOD], 4)
    broken(path, change)
    with pytest.raises(ValueError, match=f"p_0000000000.bin: .*{message}|{message}"):
        import_litpkds([str(path)], str(tmp_path / "o"), OPTIONS)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("tokens", "dtype", "message"),
    [
        ([1, 2, VOCAB, EOD], "i4", f"p_0000000000.bin: token 2 is {VOCAB}, not an id of a vocabulary of {VOCAB}"),
        ([1, -3, 2, EOD], "i4", "token 1 is -3"),
        ([1, 2.5, 2, EOD], "f4", "token 1 is 2.5"),
        ([1, float("nan"), 2, EOD], "f8", "token 1 is nan"),
        ([1, 2, 3, 4], "i4", f"no token of .* is --eod-id {EOD}"),
    ],
)
def test_ids_that_are_none(tmp_path: Path, tokens: list[int], dtype: str, message: str) -> None:
    (path,) = write_process(tmp_path, "p", tokens, 4, dtype=dtype)
    with pytest.raises(ValueError, match=message):
        import_litpkds([str(path)], str(tmp_path / "o"), OPTIONS)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (ImportOptions(10, 1), "either --eod-id"),
        (ImportOptions(10, 1, eod_id=2, bos_id=3), "either --eod-id"),
        (ImportOptions(10, 10, eod_id=2), "--pad-id 10: not an id of a vocabulary of 10"),
        (ImportOptions(10, 1, eod_id=-1), "--eod-id -1"),
    ],
)
def test_options_that_cannot_be(tmp_path: Path, options: ImportOptions, message: str) -> None:
    write_process(tmp_path, "p", [1, 2], 4)
    with pytest.raises(ValueError, match=message):
        import_litpkds([str(tmp_path)], str(tmp_path / "o"), options)


def test_inputs_that_cannot_be_read(tmp_path: Path) -> None:
    (path,) = write_process(tmp_path, "p", [1, EOD], 2)
    (tmp_path / "empty").mkdir()
    for inputs, message in (
        ([str(tmp_path / "none.bin")], "none.bin: cannot be read"),
        ([str(tmp_path / "empty")], "holds no .bin file"),
        ([str(tmp_path), str(path)], "is named twice"),
    ):
        with pytest.raises(ValueError, match=message):
            import_litpkds(inputs, str(tmp_path / "o"), OPTIONS)
