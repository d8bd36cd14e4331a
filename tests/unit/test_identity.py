"""What names a source: copies are refused under any name, a difference in the middle is told, old names stay."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from megatron_steel.data.identity import Known
from megatron_steel.data.indexed import IndexedWriter
from megatron_steel.data.order import Ledger
from megatron_steel.data.sources import DataSources, open_sources

# More than head and tail (64 KiB each) of both files, so that there is a middle nobody looks at.
DOCUMENTS, LENGTH = 30_000, 4


def write(prefix: Path, change: int | None = None, sidecar: bool = True) -> str:
    """A dataset of 480 kB; `change` adds one to the token at that place."""
    tokens = np.arange(DOCUMENTS * LENGTH, dtype=np.int32) % 97
    if change is not None:
        tokens[change] += 1
    prefix.parent.mkdir(parents=True, exist_ok=True)
    with IndexedWriter(str(prefix), np.dtype(np.int32)) as writer:
        writer.add_documents(tokens, [LENGTH] * DOCUMENTS, [1] * DOCUMENTS)
        writer.commit({"bin_sha256": writer.bin_sha256()} if sidecar else None)
    return str(prefix)


MIDDLE = DOCUMENTS * LENGTH // 2


def open_data(prefixes: list[str], ledger: Ledger | None = None, full: bool = False) -> DataSources:
    known = {s.fingerprint: Known(s.name, s.windows) for s in ledger.sources} if ledger else {}
    return open_sources(
        data_path=[],
        split="1",
        train_data_path=prefixes,
        valid_data_path=[],
        seq_length=64,
        seed=1,
        tokenizer=None,
        known=known,
        read_all=full,
    )


def run(prefixes: list[str], full: bool = False) -> Ledger:
    return Ledger.create(open_data(prefixes, full=full).train, 1, 64)


@pytest.mark.parametrize("sidecars", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("full", [False, True])
def test_the_same_content_is_refused_whatever_its_name(tmp_path: Path, sidecars: tuple[bool, bool], full: bool) -> None:
    one, two = (write(tmp_path / name, sidecar=has) for name, has in zip("ab", sidecars, strict=True))
    with pytest.raises(ValueError, match="'a' and 'b' have the same content"):
        run([one, two], full)


@pytest.mark.parametrize("sidecars", [(True, True), (True, False), (False, False)])
def test_files_that_differ_in_the_middle_are_two_sources(tmp_path: Path, sidecars: tuple[bool, bool]) -> None:
    one, two = write(tmp_path / "a", sidecar=sidecars[0]), write(tmp_path / "b", MIDDLE, sidecar=sidecars[1])
    data = open_data([one, two])
    assert data.datasets[data.train[0].fingerprint].content_name(None) == data.datasets[
        data.train[1].fingerprint
    ].content_name(None), "the fast key should not tell them apart"
    ledger = run([one, two])
    assert len({source.fingerprint for source in ledger.sources}) == 2
    # A resume finds both again, in any order and after a move.
    moved = shutil.copytree(tmp_path, tmp_path.parent / f"{tmp_path.name}_moved")
    ledger.check(open_data([str(moved / "b"), str(moved / "a")], ledger).train, 64)


def test_appending_a_near_twin_keeps_the_old_source(tmp_path: Path) -> None:
    """The checkpoint knows `a` by its fast key (no sidecar); `b` differs in the middle and is new."""
    old = write(tmp_path / "a", sidecar=False)
    ledger = run([old])
    near = write(tmp_path / "b", MIDDLE)
    for order in ([old, near], [near, old]):
        data = open_data(order, ledger)
        with pytest.raises(ValueError, match="source 'b' is new: pass --append-data"):
            ledger.check(data.train, 64)
        grown = ledger.append(10, data.train, 1)
        assert [source.name for source in grown.sources] == ["a", "b"]
        grown.check(open_data(order[::-1], grown).train, 64)
    renamed = write(tmp_path / "c", sidecar=False)
    with pytest.raises(ValueError, match="'c' and 'b' agree in size, head and tail, and the checkpoint does not tell"):
        open_data([renamed, near], ledger)


@pytest.mark.parametrize("place", [0, MIDDLE])
def test_a_changed_file_with_a_sidecar_is_named(tmp_path: Path, place: int) -> None:
    ledger = run([write(tmp_path / "a")])
    prefix = write(tmp_path / "a", place)
    with pytest.raises(ValueError, match="the content of source 'a' changed"):
        ledger.check(open_data([prefix], ledger).train, 64)


def flip(prefix: str, place: int) -> None:
    """Change a byte behind the back of the sidecar."""
    with open(f"{prefix}.bin", "r+b") as stream:
        stream.seek(place)
        byte = stream.read(1)
        stream.seek(place)
        stream.write(bytes([byte[0] ^ 1]))


def test_a_flipped_byte_is_caught_at_the_ends_at_once_and_in_the_middle_by_the_full_hash(tmp_path: Path) -> None:
    for sidecar in (True, False):
        prefix = write(tmp_path / "a", sidecar=sidecar)
        for full, place in ((False, 100), (True, 100), (True, MIDDLE * 4)):
            prefix = write(tmp_path / "a", sidecar=sidecar)
            if not sidecar:
                (tmp_path / "a.json").unlink(missing_ok=True)
            ledger = run([prefix], full)
            flip(prefix, place)
            wanted = (
                r"a.bin: its tokens are not those that were written" if sidecar and full else "content of source 'a'"
            )
            with pytest.raises(ValueError, match=wanted):
                ledger.check(open_data([prefix], ledger, full).train, 64)
    # Without the full hash a change in the middle that nobody recorded stays unseen, as documented.
    prefix = write(tmp_path / "b", sidecar=False)
    ledger = run([prefix])
    flip(prefix, MIDDLE * 4)
    ledger.check(open_data([prefix], ledger).train, 64)


def test_a_moved_document_boundary_in_the_middle_of_the_index_is_caught_by_the_full_hash(tmp_path: Path) -> None:
    """The index stays a valid one: one document loses its only sequence to the next."""
    prefix = write(tmp_path / "a")
    ledger, before = run([prefix]), Path(f"{prefix}.idx").stat()
    with open(f"{prefix}.idx", "r+b") as stream:
        stream.seek(-8 * DOCUMENTS // 2, os.SEEK_END)
        place, bound = stream.tell(), int.from_bytes(stream.read(8), "little")
        stream.seek(place)
        stream.write((bound - 1).to_bytes(8, "little"))
    assert Path(f"{prefix}.idx").stat().st_size == before.st_size
    ledger.check(open_data([prefix], ledger).train, 64)  # as documented
    with pytest.raises(ValueError, match="a.idx: it is not the index that was written"):
        open_data([prefix], ledger, full=True)
    # A sidecar of an earlier version has no hash of the index.
    facts = json.loads(Path(f"{prefix}.json").read_text())
    Path(f"{prefix}.json").write_text(json.dumps({"bin_sha256": facts["bin_sha256"]}))
    ledger.check(open_data([prefix], ledger, full=True).train, 64)


def test_a_lost_sidecar_changes_nothing(tmp_path: Path) -> None:
    prefix = write(tmp_path / "a")
    ledger = run([prefix])
    Path(f"{prefix}.json").unlink()
    ledger.check(open_data([prefix], ledger).train, 64)
    other = write(tmp_path / "other", 0, sidecar=False)
    with pytest.raises(ValueError, match="'other' is new"):
        ledger.check(open_data([prefix, other], ledger).train, 64)


def test_a_checkpoint_from_before_full_hashes_goes_on(tmp_path: Path) -> None:
    """Its ledger has the fast name of a file that has a sidecar."""
    prefix = write(tmp_path / "a")
    dataset = open_data([prefix]).datasets.popitem()[1]
    content = dataset.reader.fingerprint()
    old_name = hashlib.sha256(f"windows 1|{content}|0|{DOCUMENTS}|seed 1".encode()).hexdigest()
    data = json.loads(json.dumps(run([prefix]).to_json()))
    assert data["segments"][0]["sources"][0]["fingerprint"] != old_name
    data["segments"][0]["sources"][0]["fingerprint"] = old_name
    ledger = Ledger.from_json(data)
    ledger.check(open_data([prefix], ledger).train, 64)
    ledger.check(open_data([prefix], ledger, full=True).train, 64)
