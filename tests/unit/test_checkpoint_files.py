"""Publication, damage, tracker and retention of checkpoint directories."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from megatron_steel.checkpoint import files
from megatron_steel.checkpoint.files import (
    MANIFEST,
    TRACKER,
    checkpoint_directory,
    describe_files,
    find_checkpoint,
    list_files,
    problem_with,
    publish,
    published,
    remove_leftovers,
    remove_old,
    temporary_directory,
    write_json,
    write_text,
)

CALLS = ("open", "fsync", "rename", "replace", "unlink", "rmdir")
STEPS = (*((os, name) for name in CALLS), (Path, "write_bytes"))


class Killed(BaseException):
    """Stands for kill -9: nothing in the code under test may catch it."""


def write(root: Path, iteration: int, mark: str = "") -> dict[str, dict[str, Any]]:
    """An unpublished checkpoint of three files, one in a folder; returns its facts."""
    temporary = temporary_directory(root, iteration)
    (temporary / "tokenizer").mkdir(parents=True)
    (temporary / "weights.distcp").write_bytes(f"weights {iteration} {mark}".encode())
    (temporary / "state.json").write_text(json.dumps({"iteration": iteration}))
    (temporary / "tokenizer" / "vocab.txt").write_text("a\nb\n")
    return describe_files(temporary, list_files(temporary))


def make(root: Path, *iterations: int) -> None:
    """Publish checkpoints one after the other."""
    for iteration in iterations:
        publish(root, iteration, write(root, iteration))


@contextmanager
def killed_at(monkeypatch: pytest.MonkeyPatch, number: int, halfway: bool = False) -> Iterator[list[str]]:
    """Raise :class:`Killed` instead of the ``number``-th file system step; yields the steps taken.

    ``halfway``: when that step writes a file, half of it gets there.
    """
    steps: list[str] = []

    def wrap(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any, **keywords: Any) -> Any:
            if len(steps) == number:
                if halfway and name == "write_bytes":
                    original(args[0], args[1][: len(args[1]) // 2], **keywords)
                steps.append(name)
                raise Killed(name)
            steps.append(name)
            return original(*args, **keywords)

        return step

    with monkeypatch.context() as patch:
        for owner, name in STEPS:
            patch.setattr(owner, name, wrap(name, getattr(owner, name)))
        try:
            yield steps
        except Killed:
            steps.append("killed")


def read_mark(checkpoint: Path) -> str:
    """What ``write`` put into the weights."""
    return (checkpoint / "weights.distcp").read_text()


def kill_everywhere(monkeypatch: pytest.MonkeyPatch, root: Path, start: tuple[int, ...], iteration: int) -> None:
    """Publish over ``start`` and kill it before every step; after each, nothing older than the newest may load."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # counted as a step, but slow
    newest = checkpoint_directory(root, start[-1]).name
    steps: list[str] = []
    for number, halfway in ((number, halfway) for number in range(200) for halfway in (False, True)):
        if halfway and steps[-1] == "killed" and steps[-2] != "write_bytes":
            continue
        here = root / f"{number}{halfway}"
        make(here, *start)
        facts = write(here, iteration, "new")
        with killed_at(monkeypatch, number, halfway) as steps:
            publish(here, iteration, facts)
        for cleaned in (False, True):
            if cleaned:
                remove_leftovers(here)
            for fall_back in (False, True):
                found, _ = find_checkpoint(here, None, fall_back)
                assert problem_with(found, hashes=True) is None, steps
                assert found.name >= newest, f"a newer one was lost: {steps}"
                assert read_mark(found) in (f"weights {iteration} new", f"weights {start[-1]} "), steps
        publish(here, iteration, write(here, iteration, "again"))
        assert find_checkpoint(here, None) == (checkpoint_directory(here, iteration), [])
        assert read_mark(checkpoint_directory(here, iteration)) == f"weights {iteration} again"
        if steps[-1] != "killed":
            assert number > 12, "the publication has fewer steps than it must have"
            return
    raise AssertionError("the publication never ended")


def test_a_kill_before_any_step_leaves_a_whole_checkpoint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    kill_everywhere(monkeypatch, tmp_path, (10,), 20)


def test_replacing_a_checkpoint_leaves_a_whole_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    kill_everywhere(monkeypatch, tmp_path, (10, 20), 20)


def test_replacing_the_only_checkpoint_leaves_a_whole_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    kill_everywhere(monkeypatch, tmp_path, (20,), 20)


def test_a_killed_first_save_leaves_nothing_half_done(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for number in range(200):
        here = tmp_path / str(number)
        facts = write(here, 5)
        with killed_at(monkeypatch, number) as steps:
            publish(here, 5, facts)
        if published(here):
            assert problem_with(find_checkpoint(here, None)[0], hashes=True) is None
        else:
            with pytest.raises(ValueError, match="holds no checkpoint"):
                find_checkpoint(here, None)
        if steps[-1] != "killed":
            return


def test_everything_is_on_disk_before_it_gets_its_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    events: list[tuple[str, str]] = []
    real_sync, real_rename = files.sync, os.rename

    def sync(path: Path) -> None:
        events.append(("sync", Path(path).name))
        real_sync(path)

    def rename(source: Path, target: Path) -> None:
        events.append(("rename", Path(target).name))
        real_rename(source, target)

    for module in (files, files.text_files):
        monkeypatch.setattr(module, "sync", sync)
    monkeypatch.setattr(os, "rename", rename)
    monkeypatch.setattr(os, "replace", rename)
    root = tmp_path / "run"
    publish(root, 7, write(root, 7))
    named = events.index(("rename", "iter_0000007"))
    synced = {name for kind, name in events[:named] if kind == "sync"}
    assert synced >= {"weights.distcp", "state.json", "vocab.txt", "tokenizer", "iter_0000007.tmp", f"{MANIFEST}.tmp"}
    # The directory's name is on disk before the tracker says it, and the tracker's text before its name.
    assert events[named + 1 :] == [("sync", "run"), ("sync", f"{TRACKER}.tmp"), ("rename", TRACKER), ("sync", "run")]
    assert (root / TRACKER).read_text() == "7"  # Megatron-LM's form


def test_manifest_lists_sizes_and_hashes(tmp_path: Path) -> None:
    make(tmp_path, 3)
    listed = json.loads((tmp_path / "iter_0000003" / MANIFEST).read_text())["files"]
    assert sorted(listed) == ["state.json", "tokenizer/vocab.txt", "weights.distcp"]
    # printf 'a\nb\n' | sha256sum
    digest = "911169ddaaf146aff539f58c26c489af3b892dff0fe283c1c264c65ae5aa59a2"
    assert listed["tokenizer/vocab.txt"] == {"bytes": 4, "sha256": digest}


def test_every_flipped_byte_is_found(tmp_path: Path) -> None:
    make(tmp_path, 3)
    checkpoint = checkpoint_directory(tmp_path, 3)
    for path in list_files(checkpoint):
        content = path.read_bytes()
        for position in range(len(content)):
            for mask in (0x01, 0x80):
                changed = bytearray(content)
                changed[position] ^= mask
                path.write_bytes(changed)
                assert (
                    problem_with(checkpoint, hashes=True) == f"{path} has changed since it was written (hash differs)"
                )
                assert problem_with(checkpoint, hashes=False) is None  # sizes alone cannot see it
        path.write_bytes(content)
    assert problem_with(checkpoint, hashes=True) is None


def test_every_truncation_growth_and_deletion_is_found(tmp_path: Path) -> None:
    make(tmp_path, 3)
    checkpoint = checkpoint_directory(tmp_path, 3)
    for path in list_files(checkpoint):
        content = path.read_bytes()
        for length in range(len(content)):
            path.write_bytes(content[:length])
            expected = f"{path} has {length} bytes instead of {len(content)}"
            assert problem_with(checkpoint, hashes=False) == expected
        path.write_bytes(content + b"x")
        assert "bytes instead of" in str(problem_with(checkpoint, hashes=False))
        path.unlink()
        assert problem_with(checkpoint, hashes=False) == f"{path} is missing"
        path.write_bytes(content)


def test_a_damaged_manifest_is_found(tmp_path: Path) -> None:
    make(tmp_path, 3)
    checkpoint = checkpoint_directory(tmp_path, 3)
    manifest = checkpoint / MANIFEST
    content = manifest.read_bytes()
    for position in range(len(content)):
        changed = bytearray(content)
        changed[position] ^= 0x01
        manifest.write_bytes(changed)
        assert problem_with(checkpoint, hashes=True) is not None, (position, bytes(changed))
    for text in ("", "[]", "{}", '{"files": 3}', '{"files": {"a": 3}}', '{"files": {"a": {"bytes": 1}}}', "{"):
        manifest.write_text(text)
        assert f"{manifest} cannot be read" in str(problem_with(checkpoint, hashes=False)), text
    manifest.unlink()
    assert f"{manifest} cannot be read" in str(problem_with(checkpoint, hashes=False))


# What is loaded


@pytest.mark.parametrize(
    "text",
    [
        "",
        "garbage",
        "-20",
        "20.0",
        "30",
        "1" + "0" * 30,
        "9" * 5000,
        "release",
        "\u0662\u0660",
        "20 10",
    ],
    ids=["empty", "garbage", "negative", "fraction", "missing", "huge", "huger", "release", "arabic", "two"],
)
def test_a_bad_tracker_falls_back_to_the_newest_with_a_warning(tmp_path: Path, text: str) -> None:
    make(tmp_path, 10, 20)
    (tmp_path / TRACKER).write_text(text, encoding="utf-8")
    found, warnings = find_checkpoint(tmp_path, None)
    assert found == checkpoint_directory(tmp_path, 20)
    assert len(warnings) == 1 and warnings[0].startswith(f"{tmp_path / TRACKER} names no checkpoint")
    assert len(warnings[0]) < len(str(tmp_path)) + 200


def test_a_binary_or_missing_tracker_falls_back(tmp_path: Path) -> None:
    make(tmp_path, 10, 20)
    (tmp_path / TRACKER).write_bytes(b"\xff\xfe\x00")
    assert find_checkpoint(tmp_path, None)[0].name == "iter_0000020"
    (tmp_path / TRACKER).unlink()
    found, warnings = find_checkpoint(tmp_path, None)
    assert found.name == "iter_0000020" and len(warnings) == 1


def test_a_bad_tracker_takes_the_newest_complete_one(tmp_path: Path) -> None:
    make(tmp_path, 10, 20)
    (checkpoint_directory(tmp_path, 20) / "weights.distcp").unlink()
    (tmp_path / TRACKER).unlink()
    found, warnings = find_checkpoint(tmp_path, None)
    assert found.name == "iter_0000010" and len(warnings) == 2 and "weights.distcp is missing" in warnings[1]


def test_the_tracker_decides_even_when_a_newer_one_is_there(tmp_path: Path) -> None:
    make(tmp_path, 10, 20)
    write_text(tmp_path / TRACKER, "10\n")
    assert find_checkpoint(tmp_path, None) == (checkpoint_directory(tmp_path, 10), [])


def test_an_incomplete_newest_is_an_error_unless_one_may_fall_back(tmp_path: Path) -> None:
    make(tmp_path, 10, 20, 30)
    broken = checkpoint_directory(tmp_path, 30) / "state.json"
    broken.unlink()
    with pytest.raises(ValueError) as caught:
        find_checkpoint(tmp_path, None)
    assert str(caught.value) == f"--load {tmp_path}: {broken} is missing; --ckpt-step loads another: 10, 20"
    found, warnings = find_checkpoint(tmp_path, None, fall_back=True)
    assert found.name == "iter_0000020" and warnings == [f"{broken} is missing"]


def test_a_step_is_taken_by_name(tmp_path: Path) -> None:
    make(tmp_path, 10, 20)
    assert find_checkpoint(tmp_path, 10) == (checkpoint_directory(tmp_path, 10), [])
    with pytest.raises(ValueError, match=r"--ckpt-step 15: .* holds iterations 10, 20"):
        find_checkpoint(tmp_path, 15)


def test_nothing_to_load_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such directory"):
        find_checkpoint(tmp_path / "missing", None)
    with pytest.raises(ValueError, match=r"holds no checkpoint \(iter_\* directory\)"):
        find_checkpoint(tmp_path, None)


def test_names_are_megatron_lms(tmp_path: Path) -> None:
    assert checkpoint_directory(tmp_path, 100).name == "iter_0000100"
    assert checkpoint_directory(tmp_path, 12345678).name == "iter_12345678"
    for name in ("iter_0000100", "iter_12345678", "iter_0000005.tmp", "iter_0000100.old", "iter_7", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "iter_0000300").write_text("a file")
    assert published(tmp_path) == [100, 12345678]


# Retention


@pytest.mark.parametrize(
    ("keep", "left"), [(None, [1, 2, 3, 12]), (1, [12]), (2, [3, 12]), (4, [1, 2, 3, 12]), (9, [1, 2, 3, 12])]
)
def test_retention_keeps_the_newest(tmp_path: Path, keep: int | None, left: list[int]) -> None:
    make(tmp_path, 1, 2, 3, 12)
    remove_old(tmp_path, keep)
    assert published(tmp_path) == left
    assert find_checkpoint(tmp_path, None) == (checkpoint_directory(tmp_path, 12), [])


def test_retention_counts_only_whole_ones_and_leaves_broken_ones(tmp_path: Path) -> None:
    make(tmp_path, 1, 2, 3)
    (checkpoint_directory(tmp_path, 3) / "weights.distcp").unlink()
    remove_old(tmp_path, 1)
    assert published(tmp_path) == [2, 3]


def test_retention_never_removes_what_the_tracker_names(tmp_path: Path) -> None:
    """A run that went back to an earlier step saves iterations below those of the run it replaces."""
    make(tmp_path, 10, 20, 30)
    publish(tmp_path, 15, write(tmp_path, 15))
    remove_old(tmp_path, 1)
    assert 15 in published(tmp_path)
    assert find_checkpoint(tmp_path, None) == (checkpoint_directory(tmp_path, 15), [])


def test_leftovers_are_removed_and_nothing_else(tmp_path: Path) -> None:
    make(tmp_path, 10)
    write(tmp_path, 20)
    (tmp_path / "iter_0000010.old").mkdir()
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    (tmp_path / "iter_notes.tmp").write_text("a file of the user")
    (tmp_path / "wandb").mkdir()
    remove_leftovers(tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["iter_0000010", "iter_notes.tmp", TRACKER, "metrics.jsonl", "wandb"]
    assert problem_with(checkpoint_directory(tmp_path, 10), hashes=True) is None


def test_text_files_are_replaced_whole(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    write_json(path, {"name": "\u6a21\u578b", "n": 1})
    assert json.loads(path.read_text(encoding="utf-8")) == {"name": "\u6a21\u578b", "n": 1}
    before = path.read_text(encoding="utf-8")
    for number in range(20):
        for halfway in (False, True):
            with killed_at(monkeypatch, number, halfway) as steps:
                write_text(path, "entirely new text")
            assert path.read_text(encoding="utf-8") in (before, "entirely new text")
            path.write_text(before, encoding="utf-8")
        if steps[-1] != "killed":
            return
    raise AssertionError("the replacement never ended")
