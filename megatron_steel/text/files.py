"""Small files that are either there whole or not at all: a temporary name beside them, fsync, rename."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacement(path: Path, unique: bool = False, sync_folder: bool = False) -> Iterator[Path]:
    """A temporary name beside ``path`` to write to; afterwards the file is brought to the disk and gets its name.

    unique: a name that no other process uses at the same time. sync_folder: the rename, too, is on the disk before
    this returns. On an error of the disk nothing is left and ``OSError`` goes on.
    """
    mark = f".{os.getpid()}-{uuid.uuid4().hex[:8]}" if unique else ""
    temporary = path.with_name(f"{path.name}{mark}.tmp")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    if sync_folder:
        sync(path.parent)


def write_bytes(path: Path, content: bytes, sync_folder: bool = False) -> None:
    """Write or replace a file atomically."""
    with replacement(path, sync_folder=sync_folder) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, text: str, sync_folder: bool = False) -> None:
    """Write or replace a UTF-8 file atomically; line ends stay as they are."""
    write_bytes(path, text.encode(), sync_folder)


def write_json(path: Path, value: Any, indent: int = 2, sync_folder: bool = False) -> None:
    """Write or replace a JSON file for people to read, atomically."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=indent) + "\n", sync_folder)


def copy_file(source: Path, target: Path) -> None:
    """Copy a file atomically; copying a file onto itself leaves it as it is."""
    if target.exists() and source.samefile(target):
        return
    with replacement(target) as temporary:
        shutil.copyfile(source, temporary)


def sync(path: Path) -> None:
    """Bring a file to the disk, or what a folder's files are called."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
