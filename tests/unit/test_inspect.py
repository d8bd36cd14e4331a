"""tools/inspect_data.py on hand-made files: every fault is named with its place, and sound data passes."""

from __future__ import annotations

import errno
import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_steel.checkpoint.files import describe_files, list_files, publish, temporary_directory, write_json
from megatron_steel.checkpoint.state import STATE_FILE, TOKENIZER_FOLDER, TrainState
from megatron_steel.data import inspect, statistics
from megatron_steel.data.indexed import IndexedReader, IndexedWriter, read_sidecar, write_sidecar
from megatron_steel.data.inspect import Expected, compare_ledgers, first_difference, merge, verify
from megatron_steel.data.order import Ledger, SourceSpec
from megatron_steel.data.sources import open_sources
from megatron_steel.text.tokenizer import NullTokenizer
from tools import inspect_data

VOCAB, EOD = 101, 100  # of NullTokenizer(100)


def write(prefix: Path, documents: list[list[int]], sidecar: bool = False, dtype: Any = np.uint16, **extra: Any) -> str:
    prefix.parent.mkdir(parents=True, exist_ok=True)
    with IndexedWriter(str(prefix), np.dtype(dtype)) as writer:
        for document in documents:
            writer.add_document(document)
        facts = {
            "vocab_size": VOCAB,
            "eod_id": EOD,
            "append_eod": True,
            "tokenizer_fingerprint": "f" * 64,
            "dtype": str(writer.dtype),
            "documents": writer.num_documents,
            "tokens": writer.num_tokens,
            "bin_sha256": writer.bin_sha256(),
        }
        writer.commit(facts | extra if sidecar else None)
    return str(prefix)


def overwrite(prefix: str, position: int, value: int) -> None:
    """Change one uint16 token in place."""
    with open(prefix + ".bin", "r+b") as stream:
        stream.seek(2 * position)
        stream.write(value.to_bytes(2, "little"))


DOCUMENTS = [[1, 2, EOD], [], [3, EOD], [EOD], [4, 5, 6, 7, EOD], []]  # 11 tokens


@pytest.mark.parametrize("block", [2, 4, 6, 1 << 22])
def test_sound_data_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(inspect, "SCAN_BYTES", block)
    assert verify(write(tmp_path / "a", DOCUMENTS, sidecar=True), Expected()) == ([], [])


@pytest.mark.parametrize("block", [2, 4, 6, 1 << 22])
def test_every_wrong_token_is_named_with_its_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(inspect, "SCAN_BYTES", block)
    prefix = write(tmp_path / "a", DOCUMENTS)
    overwrite(prefix, 1, 500)  # document 0, token 1
    overwrite(prefix, 4, 9)  # the end of document 2
    overwrite(prefix, 10, 101)  # the end of document 4: no id, and no end
    problems, notes = verify(prefix, Expected(VOCAB, EOD))
    assert sorted(problems) == [
        f"{prefix}.bin: document 0, token 1: id 500 is not in [0, 101)",
        f"{prefix}.bin: document 2, token 1: the document ends with id 9, not with the end-of-document id 100",
        f"{prefix}.bin: document 4, token 4: id 101 is not in [0, 101)",
        f"{prefix}.bin: document 4, token 4: the document ends with id 101, not with the end-of-document id 100",
    ]
    assert notes == [f"{prefix}: no sidecar (.json), so no hash to compare"]


@settings(deadline=None, max_examples=30)
@given(
    documents=st.lists(
        st.lists(st.lists(st.integers(0, 120), min_size=0, max_size=4), max_size=3), min_size=1, max_size=8
    ),
    block=st.integers(1, 9),
)
def test_verify_agrees_with_looking_at_every_document(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[list[int]]], block: int
) -> None:
    if not any(ids for document in documents for ids in document):
        return
    prefix = str(tmp_path_factory.mktemp("v") / "a")
    with IndexedWriter(prefix, np.dtype(np.uint16)) as writer:
        for document in documents:
            writer.add_document([i for ids in document for i in ids], [len(ids) for ids in document])
        writer.commit()
    expected = []
    for number, document in enumerate(documents):
        ids = [i for part in document for i in part]
        expected += [f"document {number}, token {i}: id" for i, token in enumerate(ids) if token >= VOCAB]
        if ids and ids[-1] != EOD:
            expected.append(f"document {number}, token {len(ids) - 1}: the document ends")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inspect, "SCAN_BYTES", 2 * block)
        problems, _ = verify(prefix, Expected(VOCAB, EOD), limit=1000)
    assert len(problems) == len(expected)
    assert all(any(phrase in line for line in problems) for phrase in expected)


def test_negative_ids_are_found_without_a_vocabulary(tmp_path: Path) -> None:
    prefix = write(tmp_path / "a", [[1, -2, 3]], dtype=np.int32)
    problems, notes = verify(prefix, Expected())
    assert problems == [f"{prefix}.bin: document 0, token 1: id -2 is not 0 or more"]
    assert len(notes) == 3


def test_the_number_of_lines_is_bounded(tmp_path: Path) -> None:
    prefix = write(tmp_path / "a", [[200] * 50])
    problems, _ = verify(prefix, Expected(VOCAB, 200), limit=7)
    assert len(problems) == 8 and problems[-1] == "... and 43 more problems"


def test_the_sidecar_must_agree(tmp_path: Path) -> None:
    prefix = write(tmp_path / "a", DOCUMENTS, sidecar=True)
    overwrite(prefix, 8, 7)  # still an id: only the hash knows
    problems, _ = verify(prefix, Expected())
    assert len(problems) == 1 and problems[0].startswith(f"{prefix}.json: bin_sha256 is '")
    facts = read_sidecar(prefix) or {}
    write_sidecar(prefix, facts | {"documents": 7, "tokens": 12, "dtype": "int32"})
    problems, _ = verify(prefix, Expected())
    assert [line.split()[1] for line in problems] == ["documents", "tokens", "dtype", "bin_sha256"]
    boundaries = write(tmp_path / "b", [[1, EOD], [EOD], [2, EOD]], sidecar=True)
    index = Path(f"{boundaries}.idx").read_bytes()
    Path(f"{boundaries}.idx").write_bytes(index[:-16] + (1).to_bytes(8, "little") + index[-8:])
    problems, _ = verify(boundaries, Expected())
    assert len(problems) == 1 and problems[0].startswith(f"{boundaries}.json: idx_sha256 is '")


def test_damaged_files_are_problems_and_not_crashes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prefix = write(tmp_path / "a", DOCUMENTS, sidecar=True)
    sound = write(tmp_path / "b", DOCUMENTS, sidecar=True)
    Path(prefix + ".bin").write_bytes(b"\0" * 20)
    assert inspect_data.main(["verify", prefix, sound]) == 2
    assert capsys.readouterr().out.splitlines() == [
        f"{prefix}.bin: 20 bytes, {prefix}.idx describes 22: truncated",
        f"{sound}: sound",
    ]
    assert inspect_data.main(["verify", str(tmp_path / "none")]) == 2
    assert inspect_data.main(["verify", sound, "--vocab-size", "7"]) == 2
    assert (
        inspect_data.main(["verify", sound + ".idx", "--tokenizer-type", "NullTokenizer", "--vocab-size", "100"]) == 0
    )


def core_merge(prefixes: list[str], output: str) -> None:
    """Megatron-LM's tools/merge_datasets.py."""
    builder = IndexedDatasetBuilder(output + ".bin", dtype=IndexedReader(prefixes[0]).dtype.type)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gc, "collect", int)  # called for every part, a tenth of a second each time
        for prefix in prefixes:
            builder.add_index(prefix)
    builder.finalize(output + ".idx")


@settings(deadline=None, max_examples=6)
@given(
    parts=st.lists(st.lists(st.lists(st.integers(0, 99), max_size=6), min_size=1, max_size=5), min_size=1, max_size=4),
    dtype=st.sampled_from([np.uint16, np.int32]),
)
def test_merge_has_the_bytes_of_megatron_core(
    tmp_path_factory: pytest.TempPathFactory, parts: list[list[list[int]]], dtype: Any
) -> None:
    folder = tmp_path_factory.mktemp("merge")
    prefixes = [
        write(folder / f"part{i}", [*documents, [1]], sidecar=i % 2 == 0, dtype=dtype)
        for i, documents in enumerate(parts)
    ]
    merge(prefixes, str(folder / "ours"))
    core_merge(prefixes, str(folder / "core"))
    for suffix in (".bin", ".idx"):
        assert (folder / f"ours{suffix}").read_bytes() == (folder / f"core{suffix}").read_bytes()


def test_merged_sidecars(tmp_path: Path) -> None:
    texts = {"text_bytes": 30, "rejected_lines": {"blank": 2}, "language_shares": {"zh": 1.0}}
    one = write(tmp_path / "in/a", DOCUMENTS, True, **texts)
    other = write(tmp_path / "in/b", [[8, EOD]], True, text_bytes=4, rejected_lines={"blank": 1, "nul": 3})
    assert inspect_data.main(["merge", "--input", str(tmp_path / "in"), "--output-prefix", str(tmp_path / "ab")]) == 0
    sidecar = read_sidecar(str(tmp_path / "ab"))
    assert sidecar is not None
    assert (sidecar["documents"], sidecar["tokens"], sidecar["text_bytes"]) == (7, 13, 34)
    assert sidecar["rejected_lines"] == {"blank": 3, "nul": 3}
    assert (sidecar["tokenizer_fingerprint"], sidecar["vocab_size"]) == ("f" * 64, VOCAB)
    assert [part["prefix"] for part in sidecar["merged_from"]] == ["a", "b"]
    assert verify(str(tmp_path / "ab"), Expected()) == ([], [])
    # Where one input has no sidecar nothing is claimed about the tokenizer of all.
    Path(other + ".json").unlink()
    assert "tokenizer_fingerprint" not in merge([one, other], str(tmp_path / "ab2"))


def test_what_is_not_merged(tmp_path: Path) -> None:
    one = write(tmp_path / "a", DOCUMENTS, True)
    cases = [
        (
            [one, write(tmp_path / "wide", DOCUMENTS, dtype=np.int32)],
            "wide: its ids are int32, those of .*a are uint16",
        ),
        ([one, write(tmp_path / "other", DOCUMENTS, True, tokenizer_fingerprint="e" * 64)], "other: tokenizer_finger"),
        ([one, write(tmp_path / "noeod", DOCUMENTS, True, append_eod=False)], "noeod: append_eod is False"),
        ([one, one], "named twice"),
        ([one, str(tmp_path / "out")], "is one of the inputs|no such file"),
    ]
    before = sorted(tmp_path.iterdir())
    for prefixes, message in cases:
        with pytest.raises(ValueError, match=message):
            merge(prefixes, str(tmp_path / "out"))
    assert sorted(tmp_path.iterdir()) == before


def test_known_lengths_have_known_percentiles() -> None:
    lengths = np.arange(1, 201)[::-1].copy()  # 1 to 200
    found = statistics.describe_lengths(lengths)
    assert found["percentiles"] == {"1": 2, "5": 10, "25": 50, "50": 100, "75": 150, "95": 190, "99": 198}
    assert (found["min"], found["max"], found["sum"], found["mean"]) == (1, 200, 20100, 100.5)
    assert found["cdf"] == {str(2**i): min(2**i, 200) / 200 for i in range(9)}
    assert statistics.describe_lengths(np.array([0]))["percentiles"]["99"] == 0


@given(st.lists(st.integers(0, 5000), min_size=1, max_size=300))
def test_percentiles_are_those_of_numpy(lengths: list[int]) -> None:
    found = statistics.describe_lengths(np.array(lengths))
    for percent, value in found["percentiles"].items():
        assert value == np.percentile(lengths, int(percent), method="inverted_cdf")
    assert list(found["cdf"].values())[-1] == 1.0


def test_valid_token_ratio() -> None:
    ratio = statistics.valid_ratio(np.array([4, 0, 8, 12]), 8)
    assert ratio["one_per_row_valid"] == (4 + 8 + 8) / 24 and ratio["one_per_row_kept"] == 20 / 24
    assert ratio["packed_kept"] == 16 / 24  # 23 labels: two windows of 8


def test_stats_of_a_dataset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prefix = write(tmp_path / "a", [*DOCUMENTS, [1, 2, EOD], [3, EOD], [3, EOD]], True, text_bytes=36)
    command = ["stats", prefix, "--json", "--seq-length", "4", "--tokenizer-type", "NullTokenizer"]
    assert inspect_data.main([*command, "--vocab-size", "100"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["documents"], found["tokens"], found["empty_documents"]) == (9, 18, 2)
    assert found["duplicate_documents"] == 3
    assert found["tokens_per_text_byte"] == 0.5
    # NullTokenizer writes digits, which are letters of no language: "1 2" is two tokens in three characters.
    assert found["languages"]["other"] == {
        "documents": 7,
        "tokens": 11,
        "characters": 3 + 1 + 0 + 7 + 3 + 1 + 1,
        "tokens_per_character": 11 / 16,
    }
    assert inspect_data.main(["stats", prefix, "--seq-length", "4"]) == 0
    assert "duplicate documents      3\n" in capsys.readouterr().out
    assert inspect_data.main(["stats", str(tmp_path), "--json"]) == 0
    with pytest.raises(SystemExit) as error:
        inspect_data.main(["stats", prefix, "--seq-length", "0"])
    assert error.value.code == 2


class Words:
    """A tokenizer of four words."""

    eos_id = 4
    words = ("hello ", "\u4f60\u597d", "world", "\u3002", "")

    def decode(self, ids: list[int]) -> str:
        return "".join(self.words[i] for i in ids)


def test_tokens_per_character_by_language(tmp_path: Path) -> None:
    prefix = write(tmp_path / "a", [[0, 2, 4], [1, 3, 4], [1, 1, 1, 4], [3, 4]])
    found = statistics.dataset_stats(prefix, tokenizer=Words())["languages"]
    assert found["en"] == {"documents": 1, "tokens": 2, "characters": 11, "tokens_per_character": 2 / 11}
    assert found["zh"] == {"documents": 2, "tokens": 5, "characters": 9, "tokens_per_character": 5 / 9}
    assert found["other"]["characters"] == 1
    assert (
        sum(row["documents"] for row in statistics.dataset_stats(prefix, None, Words(), 2)["languages"].values()) == 2
    )


SOURCES = [SourceSpec("zh", "a" * 64, 40, 0.7), SourceSpec("en", "b" * 64, 30, 0.3)]


def test_equal_ledgers_do_not_differ() -> None:
    one, other = (Ledger.create(SOURCES, 1, 8) for _ in range(2))
    assert compare_ledgers(one, other) == [] and first_difference(one, other, 1000) is None


def brute_difference(one: Ledger, other: Ledger, limit: int) -> int | None:
    for n in range(limit):
        a, b = one.sample(n), other.sample(n)
        if (one.sources[a.source].fingerprint, *a[1:]) != (other.sources[b.source].fingerprint, *b[1:]):
            return n
    return None


@pytest.mark.parametrize("block", [3, 1 << 14])
def test_the_first_sample_that_differs(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(inspect, "COMPARE_BLOCK", block)
    one = Ledger.create(SOURCES, 1, 8)
    new = SourceSpec("code", "c" * 64, 20, 0.2)
    renamed = [SourceSpec("en2", "b" * 64, 30, 0.3), SourceSpec("zh", "a" * 64, 40, 0.7)]
    others = [
        Ledger.create(SOURCES, 2, 8),
        Ledger.create([SOURCES[0], SourceSpec("en", "b" * 64, 30, 0.31)], 1, 8),
        Ledger.create(renamed, 1, 8),
        one.append(25, [*SOURCES, new], 1),
        one.append(25, [*SOURCES, new], 1).append(60, SOURCES, 1),
    ]
    for other in others:
        expected = brute_difference(one, other, 120)
        assert first_difference(one, other, 120) == expected == first_difference(other, one, 120)
    assert first_difference(others[3], others[4], 120) == brute_difference(others[3], others[4], 120)
    assert first_difference(others[3], others[4], 120) >= 60


def test_differences_of_ledgers_are_named() -> None:
    one = Ledger.create(SOURCES, 1, 8)
    other = Ledger.create([SOURCES[0], SourceSpec("en", "d" * 64, 31, 0.3)], 2, 8)
    other = other.append(5, [SOURCES[0], SourceSpec("en", "d" * 64, 31, 0.3)], 1)
    lines = compare_ledgers(one, other)
    assert lines[0] == "segment 0: seed: 1 | 2"
    assert lines[1].startswith("segment 0: source en is only in A: fingerprint bbbbbbbbbbbb, share 0.3, windows 30")
    assert lines[2].startswith("segment 0: source en is only in B: fingerprint dddddddddddd")
    assert lines[3] == "segment 1 from sample 5 is only in B"
    weights = Ledger.create([SourceSpec("zh", "a" * 64, 40, 0.5), SourceSpec("en", "b" * 64, 30, 0.5)], 1, 8)
    assert compare_ledgers(one, weights) == [
        "segment 0: source zh: share: 0.7 | 0.5",
        "segment 0: source en: share: 0.3 | 0.5",
    ]


def make_checkpoint(root: Path, prefixes: list[str]) -> Ledger:
    """A checkpoint of a run that reads `prefixes`, without tensors."""
    values = {"train_data_path": prefixes, "seq_length": 8}
    data = open_sources(
        data_path=[], split="1", train_data_path=prefixes, valid_data_path=[], seq_length=8, seed=3, tokenizer=None
    )
    ledger = Ledger.create(data.train, 3, 8)
    folder = temporary_directory(root, 5)
    folder.mkdir(parents=True)
    write_json(folder / STATE_FILE, TrainState(iteration=5, ledger=ledger.to_json(), config=values).to_json())
    NullTokenizer(100).save(folder / TOKENIZER_FOLDER)
    publish(root, 5, describe_files(folder, list_files(folder)))
    return ledger


def test_a_sample_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prefixes = [
        write(tmp_path / "zh_text_document", [[i % 50] * 9 + [EOD] for i in range(20)]),
        write(tmp_path / "en_text_document", [[50 + i % 50] * 9 + [EOD] for i in range(20)]),
    ]
    root = tmp_path / "run"
    ledger = make_checkpoint(root, prefixes)
    assert inspect_data.main(["sample", "7", "--load", str(root), "--count", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    heads = [line for line in lines if line.startswith("sample")]
    data = open_sources(
        data_path=[], split="1", train_data_path=prefixes, valid_data_path=[], seq_length=8, seed=3, tokenizer=None
    )
    for head, text, n in zip(heads, lines[1::3], (7, 8, 9), strict=True):
        place = ledger.sample(n)
        source = ledger.sources[place.source]
        dataset = data.datasets[source.fingerprint]
        assert head == (
            f"sample {n}: source {source.name} ({dataset.prefix}), epoch {place.epoch}, window {place.window} of "
            f"{source.windows}, 9 tokens"
        )
        assert text == " ".join(map(str, dataset[place.window].tolist()))
    moved = [
        str(Path(p).rename(tmp_path / f"moved{Path(p).suffix}")) for p in (prefixes[0] + ".bin", prefixes[0] + ".idx")
    ]
    assert moved
    with pytest.raises(SystemExit) as error:
        inspect_data.main(["sample", "7", "--load", str(root)])
    assert error.value.code == 2
    here = ["--data-path", str(tmp_path / "moved"), prefixes[1]]
    capsys.readouterr()
    assert inspect_data.main(["sample", "7", "--load", str(root), "--count", "3", *here]) == 0
    assert capsys.readouterr().out.splitlines()[1] == lines[1]


def test_diff_reads_checkpoints_and_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prefix = write(tmp_path / "zh_text_document", [[i % 50] * 9 + [EOD] for i in range(20)])
    ledger = make_checkpoint(tmp_path / "run", [prefix])
    (tmp_path / "ledger.json").write_text(json.dumps(ledger.to_json()))
    for path in ("run", "run/iter_0000005", "run/iter_0000005/state.json", "ledger.json"):
        assert inspect_data.main(["diff", str(tmp_path / "run"), str(tmp_path / path)]) == 0
        assert capsys.readouterr().out == "the same order\n"
    appended = ledger.append(4, [SourceSpec("new", "e" * 64, 9, 9.0)], 1)
    (tmp_path / "other.json").write_text(json.dumps(appended.to_json()))
    assert inspect_data.main(["diff", str(tmp_path / "run"), str(tmp_path / "other.json")]) == 0
    out = capsys.readouterr().out
    assert "segment 1 from sample 4 is only in B" in out and out.endswith("the first sample that differs is 4\n")
    (tmp_path / "bad.json").write_text("{")
    for name in ("bad.json", "none.json"):
        with pytest.raises(SystemExit) as error:
            inspect_data.main(["diff", str(tmp_path / "run"), str(tmp_path / name)])
        assert error.value.code == 2
        assert name in capsys.readouterr().err


def test_duplicates_and_import_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = write(tmp_path / "d/a", DOCUMENTS), write(tmp_path / "d/b", DOCUMENTS)
    assert inspect_data.main(["duplicates", str(tmp_path / "d")]) == 2
    assert capsys.readouterr().out == f"same: {one} and {other}: the same content, byte for byte\n"
    assert inspect_data.main(["duplicates", one]) == 0
    chunk = tmp_path / "c/p_0000000000.bin"
    chunk.parent.mkdir()
    chunk.write_bytes(b"LITPKDS\x01\0\0\0\0\0\0\0\x08\x04\0\0\0\0\0\0\0" + np.array([5, 6, 100, 99], "<u2").tobytes())
    command = ["import-litpkds", str(chunk.parent), "--output-prefix", str(tmp_path / "out"), "--vocab-size", "100"]
    assert inspect_data.main([*command, "--tokenizer-type", "NullTokenizer", "--pad-id", "99"]) == 0
    assert inspect_data.main(["verify", str(tmp_path / "out")]) == 0
    sidecar = read_sidecar(str(tmp_path / "out")) or {}
    assert sidecar["tokenizer_fingerprint"] == NullTokenizer(100).fingerprint() and sidecar["tokens"] == 3
    with pytest.raises(SystemExit) as error:
        inspect_data.main([*command, "--eod-id", "3"])
    assert error.value.code == 2
    assert "give --pad-id" in capsys.readouterr().err


def test_a_full_disk_leaves_nothing_behind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = write(tmp_path / "a", DOCUMENTS), write(tmp_path / "b", [[7, EOD]])
    before = sorted(tmp_path.iterdir())
    real = os.fsync

    def full(handle: int) -> None:
        real(handle)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert inspect_data.main(["merge", "--input", one, other, "--output-prefix", str(tmp_path / "ab")]) == 1
    assert capsys.readouterr().err == "error: [Errno 28] No space left on device; nothing was written\n"
    assert sorted(tmp_path.iterdir()) == before


def test_output_into_a_closed_pipe_is_no_error(tmp_path: Path) -> None:
    prefix = write(tmp_path / "a", [[200] * 3000])
    root = Path(__file__).resolve().parents[2]
    script = f"{sys.executable} tools/inspect_data.py verify {prefix} --vocab-size 9 --max-problems 3000 | head -n 1"
    done = subprocess.run(["bash", "-c", script], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.count("\n") == 1
    assert "Error" not in done.stderr
