"""Indexed datasets: what is written is the format, what is read is what was written, and damage is named."""

from __future__ import annotations

import hashlib
import shutil
import struct
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_steel.data.indexed import IndexedReader, IndexedWriter, optimal_dtype, read_sidecar, write_sidecar

DTYPES = st.sampled_from([np.uint16, np.int32, np.int64])
DOCUMENTS = st.lists(st.lists(st.lists(st.integers(0, 65499), min_size=1, max_size=6), max_size=4), max_size=8).filter(
    lambda documents: any(documents)
)


def write(prefix: str, documents: list[list[list[int]]], dtype: type = np.uint16) -> None:
    """Write documents given as lists of sentences."""
    with IndexedWriter(prefix, np.dtype(dtype)) as writer:
        for sentences in documents:
            writer.add_document([index for ids in sentences for index in ids], [len(ids) for ids in sentences])
        writer.commit()


def expected_index(documents: list[list[list[int]]], code: int, itemsize: int) -> bytes:
    """The .idx file of documents, put together from the format's description."""
    lengths = [len(ids) for sentences in documents for ids in sentences]
    pointers = [itemsize * sum(lengths[:index]) for index in range(len(lengths))]
    bounds = [0]
    for sentences in documents:
        bounds.append(bounds[-1] + len(sentences))
    head = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(lengths), len(bounds))
    body = struct.pack(f"<{len(lengths)}i{len(lengths)}q{len(bounds)}q", *lengths, *pointers, *bounds)
    return head + body


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    """A small dataset of three documents, one of two sequences, one empty."""
    write(str(tmp_path / "set"), [[[1, 2, 3]], [], [[4, 5], [6, 7, 8, 9]]])
    return str(tmp_path / "set")


@given(DOCUMENTS, DTYPES)
@settings(max_examples=50, deadline=None)
def test_files_are_the_format_and_read_back(documents: list[list[list[int]]], dtype: type) -> None:
    code, itemsize = {np.uint16: (8, 2), np.int32: (4, 4), np.int64: (5, 8)}[dtype]
    flat = [ids for sentences in documents for ids in sentences]
    with tempfile.TemporaryDirectory() as folder:
        name = f"{folder}/set"
        write(name, documents, dtype)
        assert sorted(path.name for path in Path(folder).iterdir()) == ["set.bin", "set.idx"]
        assert Path(f"{name}.idx").read_bytes() == expected_index(documents, code, itemsize)
        assert Path(f"{name}.bin").read_bytes() == np.array(sum(flat, []), dtype=dtype).tobytes()
        reader = IndexedReader(name)
        assert reader.dtype == dtype and len(reader) == len(flat)
        assert (reader.num_documents, reader.num_tokens) == (len(documents), sum(map(len, flat)))
        assert [reader.sequence(index).tolist() for index in range(len(flat))] == flat
        assert [reader.document(index).tolist() for index in range(len(documents))] == [sum(d, []) for d in documents]


@given(DOCUMENTS, DOCUMENTS)
@settings(max_examples=25, deadline=None)
def test_merging_is_writing_both(first: list[list[list[int]]], second: list[list[list[int]]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write(f"{folder}/first", first)
        write(f"{folder}/second", second)
        write(f"{folder}/both", first + second)
        with IndexedWriter(f"{folder}/merged", np.dtype(np.uint16)) as writer:
            writer.merge(f"{folder}/first")
            writer.merge(f"{folder}/second")
            assert writer.bin_sha256() == hashlib.sha256(Path(f"{folder}/both.bin").read_bytes()).hexdigest()
            writer.commit()
        for suffix in (".bin", ".idx"):
            assert Path(f"{folder}/merged{suffix}").read_bytes() == Path(f"{folder}/both{suffix}").read_bytes()


def test_windows_of_a_sequence(prefix: str) -> None:
    reader = IndexedReader(prefix)
    assert reader.sequence(2, 1).tolist() == [7, 8, 9]
    assert reader.sequence(2, 1, 2).tolist() == [7, 8]
    assert reader.sequence(2, 4, 0).tolist() == []


@pytest.mark.parametrize("position", range(34))
@given(value=st.integers(1, 255))
@settings(max_examples=12, deadline=None)
def test_every_flipped_header_byte_is_detected(position: int, value: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write(f"{folder}/set", [[[1, 2, 3]], [[4, 5]]])
        damage(Path(f"{folder}/set.idx"), position, value)
        with pytest.raises(ValueError, match=r"set\.(idx|bin): ") as caught:
            IndexedReader(f"{folder}/set")
        assert "\n" not in str(caught.value)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_every_flipped_length_or_offset_is_detected(data: st.DataObject) -> None:
    documents = [[[1, 2, 3]], [[4, 5]], [[6]]]
    with tempfile.TemporaryDirectory() as folder:
        write(f"{folder}/set", documents)
        position = data.draw(st.integers(34, 34 + 12 * len(documents) - 1))
        damage(Path(f"{folder}/set.idx"), position, data.draw(st.integers(1, 255)))
        with pytest.raises(ValueError, match=r"set\.(idx|bin): "):
            IndexedReader(f"{folder}/set")


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_every_truncation_is_detected(prefix: str, suffix: str) -> None:
    path = Path(prefix + suffix)
    content = path.read_bytes()
    for size in range(len(content)):
        path.write_bytes(content[:size])
        with pytest.raises(ValueError, match=rf"set\{suffix}: "):
            IndexedReader(prefix)
    path.write_bytes(content + b"\0\0")
    with pytest.raises(ValueError, match=rf"set\{suffix}: "):
        IndexedReader(prefix)


def damage(path: Path, position: int, value: int) -> None:
    """Exclusive-or one byte of a file with a value that is not zero."""
    content = bytearray(path.read_bytes())
    content[position] ^= value
    path.write_bytes(bytes(content))


def test_swapped_document_boundaries_are_detected(prefix: str) -> None:
    content = bytearray(Path(f"{prefix}.idx").read_bytes())
    bounds = len(content) - 4 * 8
    content[bounds + 8 : bounds + 16] = struct.pack("<q", 3)
    Path(f"{prefix}.idx").write_bytes(bytes(content))
    with pytest.raises(ValueError, match="document boundaries do not rise from 0 to 3"):
        IndexedReader(prefix)


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_missing_file_is_named(prefix: str, suffix: str) -> None:
    Path(prefix + suffix).unlink()
    with pytest.raises(ValueError, match=rf"set\{suffix}: no such file"):
        IndexedReader(prefix)


def test_fingerprint_follows_content_and_not_place(prefix: str, tmp_path: Path) -> None:
    before = IndexedReader(prefix).fingerprint()
    for suffix in (".bin", ".idx"):
        shutil.copy(prefix + suffix, tmp_path / f"moved{suffix}")
    assert IndexedReader(str(tmp_path / "moved")).fingerprint() == before
    damage(tmp_path / "moved.bin", 4, 1)
    assert IndexedReader(str(tmp_path / "moved")).fingerprint() != before


def test_nothing_has_its_name_before_commit_and_nothing_is_left_after_abort(tmp_path: Path) -> None:
    with IndexedWriter(str(tmp_path / "set"), np.dtype(np.int32)) as writer:
        writer.add_document([1, 2])
        assert {path.suffix for path in tmp_path.iterdir()} == {".tmp"}
    assert not list(tmp_path.iterdir())
    with IndexedWriter(str(tmp_path / "set"), np.dtype(np.int32)) as writer:
        writer.add_document([])
        with pytest.raises(ValueError, match="there are no tokens"):
            writer.commit()
    assert not list(tmp_path.iterdir())


def test_writer_refuses_ids_and_lengths_that_do_not_fit(tmp_path: Path) -> None:
    with IndexedWriter(str(tmp_path / "set"), np.dtype(np.uint16)) as writer:
        for ids in ([65536], [-1], np.array([70000])):
            with pytest.raises(ValueError, match="do not fit uint16"):
                writer.add_document(ids)
        with pytest.raises(ValueError, match="sequence lengths sum to 3, the document has 2"):
            writer.add_document([1, 2], [3])


def test_writing_again_replaces_a_dataset(prefix: str) -> None:
    write(prefix, [[[7]]])
    assert IndexedReader(prefix).document(0).tolist() == [7]


def test_dtype_follows_megatrons_limit() -> None:
    assert [optimal_dtype(size) for size in (65499, 65500)] == [np.uint16, np.int32]


def test_sidecar(tmp_path: Path) -> None:
    assert read_sidecar(str(tmp_path / "set")) is None
    write_sidecar(str(tmp_path / "set"), {"tokens": 3})
    assert read_sidecar(str(tmp_path / "set")) == {"tokens": 3}
    (tmp_path / "set.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"set\.json: must be a JSON object"):
        read_sidecar(str(tmp_path / "set"))
