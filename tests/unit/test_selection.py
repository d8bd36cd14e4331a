"""What a data path chooses: files of folders, by order or by lot, shares of a weight, and parts of a file."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_steel.data.indexed import IndexedWriter
from megatron_steel.data.order import Ledger
from megatron_steel.data.selection import parse_data_path
from megatron_steel.data.sources import DataSources, open_sources

SEQ_LENGTH = 8


def write(prefix: Path, documents: int, start: int = 0) -> str:
    """Documents of 20 tokens, all different."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    with IndexedWriter(str(prefix), np.dtype(np.int32)) as writer:
        for document in range(documents):
            writer.add_document(list(range(start + document * 20, start + document * 20 + 20)))
        writer.commit()
    return str(prefix)


def open_data(*values: str, seed: int = 1, **more: Any) -> DataSources:
    options: dict[str, Any] = {"data_path": [], "split": "1", "valid_data_path": [], "tokenizer": None}
    return open_sources(**(options | more), train_data_path=list(values), seq_length=SEQ_LENGTH, seed=seed)


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """zh with five files of 4 to 8 documents, en with three of 3 to 5, code with one of 2."""
    monkeypatch.chdir(tmp_path)
    start = 0
    for folder, sizes in (("zh", range(4, 9)), ("en", range(3, 6)), ("code", range(2, 3))):
        for number, size in enumerate(sizes):
            write(Path(folder) / f"part_{number}", size, start)
            start += size * 20
    return tmp_path


def found(*values: str) -> list[str]:
    return [file.prefix for file in parse_data_path(values)]


def test_the_expected_files_of_three_folders(folders: Path) -> None:
    """Row D9."""
    assert found("zh/*:2", "en/part_[02]", "code/part_0") == [
        "zh/part_0",
        "zh/part_1",
        "en/part_0",
        "en/part_2",
        "code/part_0",
    ]
    assert found("*/part_*:1") == ["code/part_0", "en/part_0", "zh/part_0"]


def test_files_are_drawn_by_lot_and_the_seed_repeats_it(
    folders: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    drawn = {seed: found(f"zh/*:2@{seed}") for seed in range(60)}
    assert all(len(set(files)) == 2 and files == sorted(files) for files in drawn.values())
    assert drawn == {seed: found(f"zh/*:2@{seed}") for seed in range(60)}
    counts = Counter(file for files in drawn.values() for file in files)
    # 120 draws of 5 files: 24 each, standard deviation 3.8.
    assert len(counts) == 5 and min(counts.values()) >= 10 and max(counts.values()) <= 38
    assert [len([f for f in found("*/part_*:1@3") if f.startswith(name)]) for name in ("zh", "en", "code")] == [1, 1, 1]
    assert sorted(found("zh/*:5@7")) == [f"zh/part_{i}" for i in range(5)]
    elsewhere = tmp_path_factory.mktemp("moved") / "zh"
    for number in range(5):
        write(elsewhere / f"part_{number}", 4)
    assert [Path(file).name for file in found(f"{elsewhere}/*:2@3")] == [Path(file).name for file in drawn[3]]
    with pytest.raises(ValueError, match=r"en/\*:4@1: en has only 3 matching files; choose fewer"):
        found("en/*:4@1")


def test_a_weight_before_a_pattern_is_shared_by_windows(folders: Path) -> None:
    train = open_data("0.6", "zh/*:2", "0.4", "en/part_0").train
    windows = [79 // 8, 99 // 8, 59 // 8]
    assert [spec.windows for spec in train] == windows
    assert [spec.weight for spec in train] == pytest.approx([0.6 * 9 / 21, 0.6 * 12 / 21, 0.4], rel=1e-15)
    assert train[2].weight == 0.4
    shares = [row.share for row in Ledger.create(train, 1, SEQ_LENGTH).epoch_table(1)]
    assert shares[0] + shares[1] == pytest.approx(0.6, abs=1e-15)
    assert [spec.name for spec in open_data("1", "zh/*:2", "0", "en/*").train] == ["zh/part_0", "zh/part_1"]


@pytest.mark.parametrize(
    ("limit", "windows"),
    [("max_samples=5", 5), ("max_tokens=47", 5), ("max_tokens=1.6e1", 2), ("fraction=0.25", 10), ("fraction=1/3", 13)],
)
def test_a_part_of_a_source(tmp_path: Path, limit: str, windows: int) -> None:
    """16 documents of 20 tokens are 39 windows; a part is the first of them in the shuffled order."""
    prefix = write(tmp_path / "web", 16)
    whole = open_data(prefix)
    (every,) = whole.datasets.values()
    data = open_data(f"{prefix}:{limit}")
    ((name, dataset),) = data.datasets.items()
    assert (data.train[0].windows, len(dataset), len(every)) == (windows, windows, 39)
    assert name != whole.train[0].fingerprint
    assert all(np.array_equal(dataset[i], every[i]) for i in range(windows))
    assert dataset.describe() == "of 39"
    assert data.train[0].weight == windows  # all sources end their epoch together, this one after its part
    # Another seed takes other documents.
    ((_, other),) = open_data(f"{prefix}:{limit}", seed=2).datasets.items()
    assert len(other) == windows and not np.array_equal(other[0], dataset[0])


def test_70_of_340_windows_by_seed(tmp_path: Path) -> None:
    prefix = write(tmp_path / "english", 137)
    parts = [open_data(f"{prefix}:fraction=70/340", seed=seed) for seed in (1, 1, 2)]
    assert [len(d) for part in parts for d in part.datasets.values()] == [70] * 3
    seen = [{tuple(d[i].tolist()) for d in part.datasets.values() for i in range(70)} for part in parts]
    assert next(iter(parts[0].datasets.values())).all_windows == 342
    assert seen[0] == seen[1] != seen[2]


def test_a_part_that_is_all_is_the_source_itself(tmp_path: Path) -> None:
    prefix = write(tmp_path / "web", 16)
    names = {open_data(value).train[0].fingerprint for value in (prefix, f"{prefix}:max_samples=39")}
    names |= {open_data(f"{prefix}:{limit}").train[0].fingerprint for limit in ("max_tokens=1e9", "fraction=1")}
    assert len(names) == 1


def test_a_resume_with_another_part_is_refused_by_name(tmp_path: Path) -> None:
    prefix = write(tmp_path / "web", 16)
    ledger = Ledger.create(open_data(f"{prefix}:max_samples=20").train, 1, SEQ_LENGTH)
    ledger.check(open_data(f"{prefix}:max_tokens=160").train, SEQ_LENGTH)
    for value in (prefix, f"{prefix}:max_samples=21"):
        with pytest.raises(ValueError, match="content of source 'web' changed .*only :max_samples=.* as it was"):
            ledger.check(open_data(value).train, SEQ_LENGTH)
        with pytest.raises(ValueError, match="cannot append data: the content of source 'web' changed"):
            ledger.append(8, open_data(value).train, 1)


def test_a_selected_file_names_itself_again(folders: Path) -> None:
    selected = parse_data_path(["zh/*:2:fraction=70/340", "en/part_0"])
    assert [file.value for file in selected] == ["zh/part_0:fraction=7/34", "zh/part_1:fraction=7/34", "en/part_0"]
    assert [file.limit for file in parse_data_path([file.value for file in selected])] == [f.limit for f in selected]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("zh/part_0:2", ":2 chooses among the files of a pattern, this is one file"),
        ("zh/*:0", "takes 0 files"),
        ("zh/*:max_samples=5:2", "one limit, as the last thing"),
        ("zh/part_0:max_samples=5:fraction=0.5", "one limit, as the last thing"),
        ("zh/part_0:num_samples=5", "with :max_samples=5; to see a source more often than once, give --target-epochs"),
        ("zh/part_0:max_samples=1.5", "max_samples is a whole number, not '1.5'"),
        ("zh/part_0:max_tokens=-3", "max_tokens is a whole number, not '-3'"),
        ("zh/part_0:max_samples=", "max_samples is a whole number, not ''"),
        ("zh/part_0:fraction=1.5", "fraction is a number above 0 and up to 1"),
        ("zh/part_0:fraction=1/0", "fraction is a number above 0 and up to 1"),
        ("zh/part_0:max_tokens=7", "zh/part_0:max_tokens=7 leaves none of 9 windows"),
        ("zh/part_0:fraction=0.01", "zh/part_0:fraction=1/100 leaves none of 9 windows"),
    ],
)
def test_ambiguous_and_empty_choices_are_refused(folders: Path, value: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        open_data(value)
    assert "\n" not in str(caught.value)


def test_a_name_that_looks_like_a_choice_is_a_name(folders: Path) -> None:
    for name in ("odd:3", "odd:max_samples=3", "odd*:2@1"):
        write(Path(name), 4)
        assert [(file.prefix, file.limit) for file in parse_data_path([name])] == [(name, None)]
