"""The cache of openings and indexes: the same windows with it, whatever happened to its files or to the data."""

from __future__ import annotations

import multiprocessing
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_steel.config.schema import SequenceMode
from megatron_steel.data import indexed
from megatron_steel.data.index_cache import IndexCache
from megatron_steel.data.indexed import IndexedWriter
from megatron_steel.data.sources import DataSources, TokenizerFacts, open_sources

TOKENIZER = TokenizerFacts("t" * 64, 1000)


def write(prefix: Path, lengths: list[int], first: int = 0) -> str:
    """Documents of these lengths; token n of the file is (first + n) % 997."""
    tokens = ((first + np.arange(sum(lengths))) % 997).astype(np.uint16)
    with IndexedWriter(str(prefix), np.dtype(np.uint16)) as writer:
        writer.add_documents(tokens, [n for n in lengths if n], [int(n > 0) for n in lengths])
        writer.commit({"tokenizer_fingerprint": TOKENIZER.fingerprint, "bin_sha256": writer.bin_sha256()})
    return str(prefix)


def open_data(
    prefixes: list[str], cache: Path | None, seq_length: int = 8, mode: SequenceMode = "concat", split: str = "80,20,0"
) -> DataSources:
    return open_sources(
        data_path=prefixes,
        split=split,
        train_data_path=[],
        valid_data_path=[],
        seq_length=seq_length,
        seed=5,
        tokenizer=TOKENIZER,
        sequence_mode=mode,
        cache_path=None if cache is None else str(cache),
    )


def seen(data: DataSources) -> tuple[object, ...]:
    """Everything that a run takes from its data: names, windows, notes, and every token of two epochs."""
    sets = {**data.datasets, **data.valid}
    rows = {name: [d.read(i, e).tolist() for e in (0, 1) for i in range(len(d))] for name, d in sets.items()}
    lines = {name: (d.describe(), d.dropped_tokens, d.num_tokens) for name, d in sets.items()}
    return data.train, data.notes, rows, lines


@pytest.fixture
def prefixes(tmp_path: Path) -> list[str]:
    random = np.random.default_rng(3)
    return [write(tmp_path / name, random.integers(0, 30, 40).tolist(), n) for n, name in enumerate("abc")]


@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=4, max_size=30),
    seq_length=st.integers(1, 12),
    mode=st.sampled_from(["concat", "split", "truncate", "sample"]),
    split=st.sampled_from(["1", "70,30,0", "1,1,1"]),
)
def test_windows_are_the_same_with_it(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], seq_length: int, mode: SequenceMode, split: str
) -> None:
    folder = tmp_path_factory.mktemp("data")
    prefixes = [write(folder / name, [50, *lengths, 50], n) for n, name in enumerate("ab")]
    plain = seen(open_data(prefixes, None, seq_length, mode, split))
    for _ in range(3):
        assert seen(open_data(prefixes, folder / "cache", seq_length, mode, split)) == plain
    # The same folder serves another cut of the same files.
    other = seen(open_data(prefixes, None, seq_length + 1, "concat", split))
    for _ in range(2):
        assert seen(open_data(prefixes, folder / "cache", seq_length + 1, "concat", split)) == other
    assert seen(open_data(prefixes, folder / "cache", seq_length, mode, split)) == plain


def test_a_warm_start_opens_no_file(prefixes: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cold = open_data(prefixes, tmp_path / "cache")
    plain = seen(cold)
    opened: list[Path] = []
    mapped = indexed.mapped
    monkeypatch.setattr(indexed, "mapped", lambda path, stamp: [opened.append(path), mapped(path, stamp)][1])
    monkeypatch.setattr(indexed, "content_fingerprint", lambda prefix: pytest.fail("read"))
    monkeypatch.setattr(indexed, "read_sidecar", lambda prefix: pytest.fail("read"))
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}
    warm = open_data(prefixes, tmp_path / "cache")
    assert (warm.train, warm.notes, opened) == (cold.train, cold.notes, [])
    warm.datasets[warm.train[1].fingerprint].read(0, 0)
    assert sorted(path.name for path in opened) == ["b.bin", "b.idx"], "only what the first window needs"
    assert seen(warm) == plain
    assert files == {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}, "nothing rewritten"


@pytest.mark.parametrize("what", ["tokens", "boundaries", "sidecar", "gone"])
def test_changed_files_are_read_again(prefixes: list[str], tmp_path: Path, what: str) -> None:
    cache = tmp_path / "cache"
    before = seen(open_data(prefixes, cache))
    lengths = np.random.default_rng(3).integers(0, 30, 40)
    if what == "tokens":
        write(Path(prefixes[0]), lengths.tolist(), 500)
    elif what == "boundaries":
        write(Path(prefixes[0]), lengths[::-1].tolist())
    elif what == "sidecar":
        Path(f"{prefixes[0]}.json").unlink()
    else:
        os.unlink(f"{prefixes[0]}.bin")
        with pytest.raises(ValueError, match=r"a\.bin does not exist"):
            open_data(prefixes, cache)
        return
    plain = seen(open_data(prefixes, None))
    assert plain != before
    for _ in range(2):
        assert seen(open_data(prefixes, cache)) == plain


def test_another_tokenizer_is_still_refused(
    prefixes: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_data(prefixes, tmp_path / "cache")
    monkeypatch.setattr(f"{__name__}.TOKENIZER", TokenizerFacts("u" * 64, 1000))
    with pytest.raises(ValueError, match="another tokenizer"):
        open_data(prefixes, tmp_path / "cache")


def test_a_file_replaced_after_the_start_is_refused(prefixes: list[str], tmp_path: Path) -> None:
    open_data(prefixes, tmp_path / "cache")
    warm = open_data(prefixes, tmp_path / "cache")
    write(Path(prefixes[0]), [100, 100], 7)
    with pytest.raises(ValueError, match="was changed after this run began"):
        warm.datasets[warm.train[0].fingerprint].read(0, 0)


@pytest.mark.parametrize("damage", ["cut", "empty", "header", "foreign", "swapped", "longer"])
def test_damaged_files_are_made_again(
    prefixes: list[str], tmp_path: Path, damage: str, capfd: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "cache"
    plain = seen(open_data(prefixes, cache))
    whole = {path: path.read_bytes() for path in sorted(cache.iterdir())}
    assert len(whole) == 7, "three sources, three validation sets, one record"
    contents = list(whole.values())
    for number, (path, data) in enumerate(whole.items()):
        path.write_bytes(
            {
                "cut": data[:-4],
                "empty": b"",
                "header": data[:20] + bytes([data[20] ^ 1]) + data[21:],
                "foreign": b"something else entirely",
                "swapped": contents[number - 1],
                "longer": data + b"\0" * 8,
            }[damage]
        )
    assert seen(open_data(prefixes, cache)) == plain
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 7 and all(line.endswith("is damaged; made again") for line in lines)
    assert {path: path.read_bytes() for path in sorted(cache.iterdir())} == whole
    assert seen(open_data(prefixes, cache)) == plain
    assert capfd.readouterr().err == ""


def start(prefixes: list[str], cache: Path) -> None:
    """What a rank does at its start."""
    seen(open_data(prefixes, cache))


def test_writers_at_the_same_time_leave_whole_files(prefixes: list[str], tmp_path: Path) -> None:
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    start(prefixes, alone)
    context = multiprocessing.get_context("fork")
    for _ in range(3):
        shutil.rmtree(shared, ignore_errors=True)
        ranks = [context.Process(target=start, args=(prefixes, shared)) for _ in range(4)]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join(timeout=30)
        assert [rank.exitcode for rank in ranks] == [0] * 4
        assert {p.name: p.read_bytes() for p in shared.iterdir()} == {p.name: p.read_bytes() for p in alone.iterdir()}


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_a_kill_while_publishing_leaves_nothing_under_a_final_name(
    prefixes: list[str], tmp_path: Path, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    context = multiprocessing.get_context("fork")
    with monkeypatch.context() as patch:
        patch.setattr(os, moment, lambda *_: os._exit(9))
        rank = context.Process(target=start, args=(prefixes, cache))
        rank.start()
        rank.join(timeout=30)
    assert rank.exitcode == 9
    assert [path.suffix for path in cache.iterdir()] == [".tmp"]
    assert seen(open_data(prefixes, cache)) == seen(open_data(prefixes, None))


@pytest.mark.parametrize("why", ["full", "file"])
def test_a_folder_that_cannot_be_written_costs_one_line(
    prefixes: list[str],
    tmp_path: Path,
    why: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    plain, cache = seen(open_data(prefixes, None)), tmp_path / "cache"
    if why == "file":
        cache.write_text("not a folder")
    else:

        def full(_: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
    assert seen(open_data(prefixes, cache)) == plain
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "going on without writing" in line]
    assert line.startswith("warning: --data-cache-path")
    assert why == "file" or list(cache.iterdir()) == [], "nothing half-written stays"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_read(prefixes: list[str], tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    plain = seen(open_data(prefixes, cache))
    cache.chmod(0o555)
    assert seen(open_data(prefixes, cache)) == plain
    assert seen(open_data(prefixes[:2], cache)) == seen(open_data(prefixes[:2], None))


def test_indexes_are_mapped_and_small(prefixes: list[str], tmp_path: Path) -> None:
    data = open_data(prefixes, tmp_path / "cache")
    for dataset in data.datasets.values():
        documents, starts = dataset.prepare()
        assert documents.dtype == starts.dtype == np.int32
        assert not documents.flags.writeable and not documents.flags.owndata
    large = IndexCache(tmp_path / "cache", [], "")
    reader = next(iter(data.datasets.values())).reader
    wide = (np.array([1, 2**31]), np.arange(3, dtype=np.int64))
    for _ in range(2):
        first, second = large.index("wide", reader, lambda: wide)
        assert (first.dtype, first.tolist()) == (np.int64, [1, 2**31])
        assert (second.dtype, second.tolist()) == (np.int32, [0, 1, 2])
