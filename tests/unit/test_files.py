"""Files are whole under their name or not there: after an error of the disk, and after a kill."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from megatron_steel.text.files import copy_file, replacement, write_bytes, write_json, write_text


def test_content_and_nothing_else(tmp_path: Path) -> None:
    write_bytes(tmp_path / "a", b"\x00\r\n")
    write_text(tmp_path / "b", "\u6a21\r\n", sync_folder=True)
    write_json(tmp_path / "c", {"\u6a21": [1]}, indent=1)
    copy_file(tmp_path / "a", tmp_path / "d")
    copy_file(tmp_path / "d", tmp_path / "d")
    with replacement(tmp_path / "e", unique=True) as one, replacement(tmp_path / "e", unique=True) as other:
        assert one != other and {one.parent, other.parent} == {tmp_path}
        one.write_bytes(b"1")
        other.write_bytes(b"2")
    found = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    text = '{\n "\u6a21": [\n  1\n ]\n}\n'.encode()
    assert found == {"a": b"\x00\r\n", "b": "\u6a21\r\n".encode(), "c": text, "d": b"\x00\r\n", "e": b"1"}
    assert json.loads((tmp_path / "c").read_text("utf-8")) == {"\u6a21": [1]}


@pytest.mark.parametrize("moment", ["fsync", "replace"])
@pytest.mark.parametrize("there", [False, True])
def test_an_error_of_the_disk_leaves_what_was_there(
    moment: str, there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a"
    if there:
        path.write_bytes(b"before")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, moment, full)
    with pytest.raises(OSError, match="No space left"):
        write_bytes(path, b"after")
    assert [(found.name, found.read_bytes()) for found in tmp_path.iterdir()] == [("a", b"before")] * there


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_a_kill_leaves_what_was_there(moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"before")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, moment, killed)
        with pytest.raises(KeyboardInterrupt):
            write_bytes(path, b"after")
    assert path.read_bytes() == b"before"
    write_bytes(path, b"after")  # what a kill left does not disturb
    assert [(found.name, found.read_bytes()) for found in tmp_path.iterdir()] == [("a", b"after")]


def test_the_content_is_on_the_disk_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(
        os, "fsync", lambda handle: (events.append(os.readlink(f"/proc/self/fd/{handle}")), fsync(handle))
    )
    monkeypatch.setattr(os, "replace", lambda *names: (events.append("renamed"), replace(*names)))
    write_text(tmp_path / "a", "text", sync_folder=True)
    assert events == [str(tmp_path / "a.tmp"), "renamed", str(tmp_path)]
