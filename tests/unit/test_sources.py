"""Data options: Megatron-LM's forms, open files, and errors that say what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from megatron.core.datasets.utils import get_blend_from_list

from megatron_steel.data import sources as module
from megatron_steel.data.indexed import IndexedWriter
from megatron_steel.data.order import Ledger
from megatron_steel.data.selection import parse_data_path
from megatron_steel.data.sources import (
    DataSources,
    TokenizerFacts,
    open_sources,
    parse_valid_data_path,
    source_names,
)

TOKENIZER = TokenizerFacts("f" * 64, 100)


def write(prefix: Path, documents: list[list[int]], sidecar: dict[str, Any] | None = None) -> str:
    prefix.parent.mkdir(parents=True, exist_ok=True)
    with IndexedWriter(str(prefix), np.dtype(np.int32)) as writer:
        for document in documents:
            writer.add_document(document)
        writer.commit(sidecar)
    return str(prefix)


def documents(count: int, length: int, start: int = 0) -> list[list[int]]:
    return [[(start + i + j) % 100 for j in range(length)] for i in range(count)]


def open_data(tokenizer: TokenizerFacts | None = TOKENIZER, seed: int = 1, **options: Any) -> DataSources:
    defaults: dict[str, Any] = {"data_path": [], "split": "1", "train_data_path": [], "valid_data_path": []}
    return open_sources(**(defaults | options), seq_length=8, seed=seed, tokenizer=tokenizer)


@pytest.mark.parametrize("values", [["a"], ["0.3", "a", "0.7", "b"], ["a", "b"], ["a", "b", "c"], ["30", "a"]])
def test_data_path_is_read_as_megatron_core_reads_it(values: list[str]) -> None:
    prefixes, weights = get_blend_from_list(values)
    wanted = list(zip(weights or [None] * len(prefixes), prefixes, strict=True))
    assert [(file.weight, file.prefix) for file in parse_data_path(values)] == wanted


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["1", "a", "b", "c"], "prefixes only, or a weight before each"),
        (["1", "a", "b"], "prefixes only, or a weight before each"),
        (["a", "1"], "prefixes only, or a weight before each"),
        (["-1", "a"], "weight -1 of a must be a number of 0 or more"),
        (["nan", "a", "1", "b"], "weight nan of a"),
        (["1", "a", "2", "a"], "lists a 2 times"),
    ],
)
def test_bad_data_paths_are_refused(values: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_data_path(values)


def test_weight_zero_leaves_a_source_out_unless_a_phase_wants_it(tmp_path: Path) -> None:
    values = ["1", write(tmp_path / "a", documents(3, 50)), "0", write(tmp_path / "b", documents(4, 50))]
    assert [spec.name for spec in open_data(train_data_path=values).train] == ["a"]
    later = open_data(train_data_path=values, later={"b"})
    assert [(spec.name, spec.weight) for spec in later.train] == [("a", 1.0), ("b", 0.0)]
    assert len(later.datasets) == 2
    epochs = {"train_data_path": values[1::2], "target_epochs": [2.0, 0.0]}
    assert [spec.weight for spec in open_data(**epochs).train] == [2.0 * 18]
    assert [spec.weight for spec in open_data(**epochs, later={"b"}).train] == [2.0 * 18, 0.0]


def test_target_epochs_are_one_for_each_source_and_instead_of_weights(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a", documents(3, 50)), write(tmp_path / "b", documents(4, 50))
    assert open_data(train_data_path=[a, b]).weighting == "windows"
    assert open_data(train_data_path=["1", a, "2", b]).weighting == "weights"
    data = open_data(train_data_path=[a, b], target_epochs=[0.5, 3.0])
    assert data.weighting == "epochs"
    assert [spec.weight for spec in data.train] == [0.5 * (149 // 8), 3.0 * (199 // 8)]
    with pytest.raises(ValueError, match="weights in the data path or --target-epochs, not both"):
        open_data(train_data_path=["1", a, "2", b], target_epochs=[0.5, 3.0])
    with pytest.raises(ValueError, match="--target-epochs has 1 numbers for 2 sources"):
        open_data(train_data_path=[a, b], target_epochs=[0.5])


def found(*values: str) -> list[str]:
    """Prefixes that a data path names."""
    return [file.prefix for file in parse_data_path(values)]


def test_patterns_choose_files_by_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder, count in (("zh", 4), ("en", 1), ("code", 3)):
        for number in range(count):
            write(Path(folder) / f"part_{number}", documents(3, 50, number))
    names = ["code/part_0", "code/part_1", "code/part_2", "en/part_0"] + [f"zh/part_{i}" for i in range(4)]
    assert found("*/part_*") == names == found("**/part_?")
    first_two = ["code/part_0", "code/part_1", "en/part_0", "zh/part_0", "zh/part_1"]
    assert found("*/part_*:2") == first_two
    assert found("zh/part_[13]", "en/part_0") == ["zh/part_1", "zh/part_3", "en/part_0"]
    write(Path("odd[1]"), documents(3, 50))
    assert found("odd[1]") == ["odd[1]"]
    with pytest.raises(ValueError, match=r"--data-path fr/\*:2: no fr/\*.idx; give prefixes"):
        parse_data_path(["fr/*:2"])
    with pytest.raises(ValueError, match="lists zh/part_0 2 times"):
        parse_data_path(["zh/*", "zh/part_0"])


def test_names_are_short_and_tell_apart() -> None:
    assert source_names(["/d/zh/wiki_text_document", "/d/en/wiki_text_document", "/d/code", "news"]) == [
        "zh/wiki",
        "en/wiki",
        "code",
        "news",
    ]
    assert source_names(["x/a/b", "a/b", "b"]) == ["x/a/b", "a/b", "b"]


def test_valid_sets_have_names() -> None:
    values = ["zh=/d/zh/v", "/d/en/v_text_document", "/d/lang=fr/v"]
    assert parse_valid_data_path(values) == [("zh", values[0][3:]), ("en/v", values[1]), ("lang=fr/v", values[2])]
    for bad, message in (["=x"], "NAME=DATA"), (["x="], "NAME=DATA"), (["a=x", "a=y"], "2 sets are named 'a'"):
        with pytest.raises(ValueError, match=message):
            parse_valid_data_path(bad)


def test_split_gives_disjoint_training_and_validation(tmp_path: Path) -> None:
    texts = [[i] * 10 for i in range(20)]
    prefix = write(tmp_path / "a", texts)
    data = open_data(data_path=[prefix], split="75,25,0")
    (spec,) = data.train
    train, valid = data.datasets[spec.fingerprint], data.valid["a"]
    assert (spec.name, spec.windows, spec.weight) == ("a", (150 - 1) // 8, (150 - 1) // 8)
    assert set(np.concatenate([train[i] for i in range(len(train))])) == set(range(15))
    assert np.concatenate([valid[i] for i in range(len(valid))]).tolist()[:9] == [15] * 9
    assert set(np.concatenate([valid[i] for i in range(len(valid))])) == set(range(15, 20))
    assert data.notes == []


def test_weights_default_to_windows_so_that_epochs_end_together(tmp_path: Path) -> None:
    prefixes = [write(tmp_path / "a", documents(3, 50)), write(tmp_path / "b", documents(7, 30, 5))]
    data = open_data(train_data_path=prefixes)
    ledger = Ledger.create(data.train, 1, 8)
    total = sum(spec.windows for spec in data.train)
    assert ledger.epochs(total).tolist() == [1.0, 1.0]
    weighted = open_data(train_data_path=["3", prefixes[0], "1", prefixes[1]]).train
    assert [spec.weight for spec in weighted] == [3.0, 1.0]


def test_a_moved_file_is_the_same_source_and_a_copy_is_refused(tmp_path: Path) -> None:
    here = write(tmp_path / "a", documents(3, 50))
    there = write(tmp_path / "other" / "b", documents(3, 50))
    ledger = Ledger.create(open_data(data_path=[here]).train, 1, 8)
    ledger.check(open_data(data_path=[there], seed=ledger.seed).train, 8)
    with pytest.raises(ValueError, match="'a' and 'b' have the same content"):
        Ledger.create(open_data(data_path=[here, there]).train, 1, 8)


def test_validation_that_fills_no_window_is_noted(tmp_path: Path) -> None:
    data = open_data(data_path=[write(tmp_path / "a", documents(3, 50))], split="969,30,1")
    assert data.valid == {}
    assert "no validation set of a" in data.notes[0]
    with pytest.raises(ValueError, match=r"v: documents \[0, 1\) hold 8 tokens"):
        open_data(data_path=[str(tmp_path / "a")], valid_data_path=[write(tmp_path / "v", documents(1, 8))])


def test_named_validation_sets_replace_the_split(tmp_path: Path) -> None:
    prefix, held_out = write(tmp_path / "a", documents(20, 10)), write(tmp_path / "v", documents(4, 10, 7))
    data = open_data(data_path=[prefix], split="50,50", valid_data_path=[f"zh={held_out}"])
    assert list(data.valid) == ["zh"]
    assert data.valid["zh"][0].tolist() == list(range(7, 16))
    assert "--valid-data-path replaces" in data.notes[0]


def test_missing_files_say_what_to_do(tmp_path: Path) -> None:
    raw = tmp_path / "corpus.jsonl"
    raw.write_text('{"text": "x"}\n')
    plain = tmp_path / "notes"
    plain.write_text("text")
    prefix = write(tmp_path / "a_text_document", documents(3, 50))
    for path, message in (
        (str(raw), "python tools/preprocess_data.py --input"),
        (str(plain), "python tools/preprocess_data.py --input"),
        (prefix + ".bin", "give the prefix without .bin"),
        (str(tmp_path / "a"), "did you mean .*a_text_document"),
        (str(tmp_path / "none"), r"none.bin does not exist"),
    ):
        with pytest.raises(ValueError, match=message) as raised:
            open_data(data_path=[path])
        assert "\n" not in str(raised.value)
    for options in ({}, {"data_path": [prefix], "train_data_path": [prefix]}):
        with pytest.raises(ValueError, match="either --data-path"):
            open_data(**options)
    Path(prefix + ".idx").unlink()
    with pytest.raises(ValueError, match="a_text_document.idx does not exist"):
        open_data(data_path=[prefix])


def test_another_tokenizer_is_refused_naming_both(tmp_path: Path) -> None:
    recorded = {"tokenizer_fingerprint": "a" * 64, "vocab_size": 100}
    prefix = write(tmp_path / "a", documents(3, 50), recorded)
    with pytest.raises(ValueError, match=r"another tokenizer \(fingerprint aaaaaaaaaaaa, this run's is ffffffffffff\)"):
        open_data(data_path=[prefix])
    open_data(data_path=[prefix], tokenizer=TokenizerFacts("a" * 64, 100))
    open_data(data_path=[prefix], tokenizer=None)


@pytest.mark.parametrize("place", [0, 2999, 5999])
@pytest.mark.parametrize("budget", [1 << 22, 3000])
def test_files_without_sidecar_are_scanned_for_foreign_ids(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: int, budget: int
) -> None:
    """A small file is read whole; of a large one at least head, tail and places between are."""
    monkeypatch.setattr(module, "FULL_SCAN_TOKENS", budget)
    monkeypatch.setattr(module, "SAMPLED_BLOCKS", 300)
    texts = documents(60, 100)
    flat = [token for text in texts for token in text]
    flat[place] = 100
    if budget == 3000 and place == 2999:
        flat[2950:3050] = [100] * 100
    prefix = write(tmp_path / "a", [flat[i : i + 10] for i in range(0, 6000, 10)])
    sequence = r"29\d|30\d" if place == 2999 else str(place // 10)
    with pytest.raises(ValueError, match=f"token id 100 in sequence ({sequence}), but the tokenizer has 100 ids"):
        open_data(data_path=[prefix])
