"""Content keys of datasets: what the fast key can see, what only the full hash can, and what a sidecar may spare."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_steel.data import duplicates
from megatron_steel.data.duplicates import fast_key, find_duplicates, full_hash
from megatron_steel.data.indexed import IndexedReader, IndexedWriter, write_sidecar

WINDOW = 64
TOKENS = 400  # int32: 1600 bytes, far more than two windows


def write(prefix: Path, change: dict[int, int] | None = None, sidecar: bool = False) -> str:
    """One document of tokens 0 to 399 with some of them changed."""
    tokens = np.arange(TOKENS, dtype=np.int32)
    for place, value in (change or {}).items():
        tokens[place] = value
    prefix.parent.mkdir(parents=True, exist_ok=True)
    with IndexedWriter(str(prefix), np.dtype(np.int32)) as writer:
        writer.add_document(tokens)
        facts: dict[str, Any] = {"tokens": TOKENS, "dtype": "int32", "bin_sha256": writer.bin_sha256()}
        writer.commit(facts if sidecar else None)
    return str(prefix)


def age(prefix: str, suffix: str, seconds: float) -> None:
    """Set the time of a file to ``seconds`` after a fixed moment."""
    os.utime(prefix + suffix, (1e9 + seconds, 1e9 + seconds))


def test_files_that_differ_only_in_the_middle_are_told_apart_by_the_full_hash(tmp_path: Path) -> None:
    one, other = write(tmp_path / "one"), write(tmp_path / "other", {TOKENS // 2: 9999})
    assert fast_key(one, WINDOW) == fast_key(other, WINDOW)
    assert full_hash(one) != full_hash(other)
    assert [p.verdict for p in find_duplicates([one, other], full=False, window=WINDOW)] == ["possible"]
    assert [p.verdict for p in find_duplicates([one, other], full=True, window=WINDOW)] == ["different"]


def test_equal_files_are_found_whatever_their_name_and_place(tmp_path: Path) -> None:
    one, other = write(tmp_path / "a/one"), write(tmp_path / "b/two")
    third = write(tmp_path / "c/three", {0: 7})
    pairs = find_duplicates([one, third, other])
    assert [(p.first, p.second, p.verdict) for p in pairs] == [(one, other, "same")]


def test_no_file_of_a_group_is_dropped(tmp_path: Path) -> None:
    same = [write(tmp_path / name) for name in "abc"]
    odd = write(tmp_path / "odd", {TOKENS // 2: 5000})
    pairs = find_duplicates([*same, odd], window=WINDOW)
    assert {p.first for p in pairs} | {p.second for p in pairs} == {*same, odd}
    assert [p.verdict for p in pairs].count("same") == 3
    assert [p.verdict for p in pairs].count("different") == 3


@pytest.mark.parametrize("place", [0, 1, TOKENS - 1])
def test_a_change_at_an_end_changes_the_fast_key(tmp_path: Path, place: int) -> None:
    assert fast_key(write(tmp_path / "one")) != fast_key(write(tmp_path / "other", {place: 12345}))
    assert fast_key(str(tmp_path / "one"), WINDOW) != fast_key(str(tmp_path / "other"), WINDOW)


def test_other_document_ends_are_another_dataset(tmp_path: Path) -> None:
    one = write(tmp_path / "one")
    with IndexedWriter(str(tmp_path / "other"), np.dtype(np.int32)) as writer:
        writer.add_document(np.arange(TOKENS), [TOKENS // 2, TOKENS // 2])
        writer.commit()
    assert fast_key(one) != fast_key(str(tmp_path / "other"))
    assert full_hash(one) != full_hash(str(tmp_path / "other"))


def test_the_fast_key_is_the_one_of_the_ledger(tmp_path: Path) -> None:
    prefix = write(tmp_path / "one")
    assert fast_key(prefix) == IndexedReader(prefix).fingerprint()


def test_the_full_hash_is_of_both_files(tmp_path: Path) -> None:
    prefix = write(tmp_path / "one")
    parts = [hashlib.sha256(Path(prefix + suffix).read_bytes()).hexdigest() for suffix in (".bin", ".idx")]
    assert full_hash(prefix) == hashlib.sha256("|".join(["indexed 1", *parts]).encode()).hexdigest()


def test_a_newer_sidecar_spares_reading_the_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prefix = write(tmp_path / "one", sidecar=True)
    age(prefix, ".bin", 0)
    age(prefix, ".json", 1)
    expected = full_hash(prefix, trust_sidecar=False)
    read: list[str] = []
    real = duplicates.hash_file
    monkeypatch.setattr(duplicates, "hash_file", lambda path: read.append(path.suffix) or real(path))
    assert full_hash(prefix) == expected
    assert read == [".idx"]


def test_a_file_changed_after_its_sidecar_is_hashed(tmp_path: Path) -> None:
    prefix = write(tmp_path / "one", sidecar=True)
    before = full_hash(prefix, trust_sidecar=False)
    data = bytearray(Path(prefix + ".bin").read_bytes())
    data[len(data) // 2] ^= 1
    Path(prefix + ".bin").write_bytes(data)
    age(prefix, ".json", 1)
    for seconds in (1, 2):  # at the same tick of the clock, and later
        age(prefix, ".bin", seconds)
        assert full_hash(prefix) != before
    age(prefix, ".bin", 0)  # a change that put the old time back is only seen by reading
    assert full_hash(prefix) == before != full_hash(prefix, trust_sidecar=False)


@pytest.mark.parametrize("facts", [{}, {"bin_sha256": "0" * 64}, {"tokens": 1, "dtype": "int32", "bin_sha256": "0"}])
def test_a_sidecar_that_does_not_describe_the_file_is_not_trusted(tmp_path: Path, facts: dict[str, Any]) -> None:
    prefix = write(tmp_path / "one")
    expected = full_hash(prefix)
    write_sidecar(prefix, facts)
    age(prefix, ".bin", 0)
    age(prefix, ".json", 1)
    assert full_hash(prefix) == expected


def test_a_moved_dataset_keeps_both_keys(tmp_path: Path) -> None:
    prefix = write(tmp_path / "one", sidecar=True)
    keys = fast_key(prefix), full_hash(prefix)
    (tmp_path / "elsewhere").mkdir()
    for suffix in (".bin", ".idx", ".json"):
        shutil.move(prefix + suffix, tmp_path / f"elsewhere/renamed{suffix}")
    moved = str(tmp_path / "elsewhere/renamed")
    assert (fast_key(moved), full_hash(moved)) == keys


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    prefix = write(tmp_path / "one")
    Path(prefix + ".idx").unlink()
    for function in (fast_key, full_hash):
        with pytest.raises(ValueError, match="one.idx: no such file"):
            function(prefix)
    with pytest.raises(ValueError, match="at least 1 byte"):
        fast_key(write(tmp_path / "two"), 0)
