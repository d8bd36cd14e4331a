"""A folder that makes the second start of a run faster (--data-cache-path): what opening found, and built indexes.

Two kinds of files. ``sources-KEY.json`` holds what opening found for one list of prefixes; it counts for a prefix while
its files have the size, the time of change and the inode that they had then. ``index-KEY.bin`` is the index of one
dataset (order of the documents, places where windows begin), memory-mapped, so all ranks of a machine share its memory.
Every file is written under a name of its own and renamed when it is whole. What is missing, cut short or foreign is
made again; a folder that cannot be written costs one line. No process waits for another.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import sys
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from megatron_steel import __version__
from megatron_steel.data.indexed import IndexedReader
from megatron_steel.data.opened import Opened, mapped, stamp_of
from megatron_steel.text.files import replacement

# Raise it when an index of the same data is made differently: files of another version are not looked at.
VERSION = 1
MAGIC = b"MSINDEX1"
# Magic, sha256 of what the index is of, item size and length of the first array, item size, rows and columns of the
# second (0 columns: one-dimensional); then crc32 of all that, and 8 bytes without meaning.
HEADER = struct.Struct("<8s32sqqqqq")
HEADER_BYTES = HEADER.size + 8
INT32_MAX = int(np.iinfo(np.int32).max)

Index = tuple[np.ndarray, np.ndarray]


class IndexCache:
    """The cache of one run in `folder`, which is made if it does not exist.

    prefixes: the datasets of the run, whose openings are remembered in one file. facts: what else decides whether an
    opening succeeds (the tokenizer).
    """

    def __init__(self, folder: Path, prefixes: Sequence[str], facts: str) -> None:
        self.folder = folder
        self._writable = True
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            self._give_up(error)
        key = "\n".join([f"{VERSION}", __version__, os.getcwd(), facts, *prefixes])
        self._path = folder / f"sources-{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
        self._known = self._read_record()
        self._counts = self._counted()
        self._vouched: set[str] = set()

    @property
    def complete(self) -> bool:
        """Whether an earlier start opened these very datasets (their files may have changed since)."""
        return bool(self._known)

    def open(self, prefix: str) -> IndexedReader | None:
        """Return the dataset as it was opened before, or None if it is not known or its files have changed."""
        opened = self._known.get(prefix)
        try:
            if opened is None or stamp_of(prefix) != opened.stamp:
                return None
        except OSError:
            return None
        self._vouched.add(prefix)
        return IndexedReader(prefix, opened)

    def save(self, readers: Sequence[IndexedReader]) -> None:
        """Remember these open datasets if something about them is new."""
        if all(reader.prefix in self._vouched for reader in readers) and self._counted() == self._counts:
            return
        found: dict[str, Opened] = {}
        for reader in readers:
            # One file may be both trained on and evaluated.
            found.setdefault(reader.prefix, reader.opened()).counts.update(reader.counts)
        body = json.dumps({prefix: vars(opened) for prefix, opened in found.items()}).encode()
        self._publish(self._path, [hashlib.sha256(body).hexdigest().encode() + b"\n" + body])

    def index(self, name: str, reader: IndexedReader, make: Callable[[], Index]) -> Index:
        """Return make(), mapped from the cache where it is there, else made and left there.

        name: all that decides the index, but for the file that it is of; that is known here by its stamp. The arrays
        are int32 where their values fit.
        """
        digest, path = self._place(name, reader)
        found = _map_index(path, digest)
        if found is not None:
            return found
        if path.exists():
            self._say(f"{path} is damaged; made again")
        first, second = (_narrow(array) for array in make())
        shape = second.shape if second.ndim == 2 else (len(second), 0)
        header = HEADER.pack(MAGIC, digest, first.itemsize, len(first), second.itemsize, *shape)
        header += struct.pack("<II", zlib.crc32(header), 0)
        self._publish(path, [header, second.data, first.data])
        # Mapped, its memory is shared with the other ranks of this machine.
        return _map_index(path, digest) or (first, second)

    def find(self, name: str, reader: IndexedReader) -> Index | None:
        """Return the index if it is in the cache."""
        digest, path = self._place(name, reader)
        return _map_index(path, digest)

    def _place(self, name: str, reader: IndexedReader) -> tuple[bytes, Path]:
        """What an index is known by, and its file."""
        digest = hashlib.sha256(f"{VERSION}|{__version__}|{name}|{reader.stamp[:6]}".encode()).digest()
        return digest, self.folder / f"index-{digest.hex()[:32]}.bin"

    def _counted(self) -> int:
        """Remembered counts; opening adds those of ranges and window lengths that are new."""
        return sum(len(opened.counts) for opened in self._known.values())

    def _read_record(self) -> dict[str, Opened]:
        """What is remembered; nothing if the file is missing or not whole."""
        try:
            whole = self._path.read_bytes()
        except FileNotFoundError:
            return {}
        except OSError as error:
            self._say(f"{self._path}: {error.strerror}; made again")
            return {}
        digest, _, body = whole.partition(b"\n")
        if hashlib.sha256(body).hexdigest().encode() != digest:
            self._say(f"{self._path} is damaged; made again")
            return {}
        return {prefix: Opened(**row) for prefix, row in json.loads(body).items()}

    def _publish(self, path: Path, parts: Sequence[bytes | memoryview]) -> None:
        """Write a file under a name that no other process uses, and rename it when it is whole on the disk."""
        if not self._writable:
            return
        try:
            with replacement(path, unique=True, sync_folder=True) as temporary, open(temporary, "wb") as stream:
                stream.writelines(parts)
        except OSError as error:
            self._give_up(error)

    def _say(self, text: str) -> None:
        """One line at once, once on each machine: indexes are made while the run goes on."""
        if os.environ.get("LOCAL_RANK", "0") == "0":
            sys.stderr.write(f"warning: --data-cache-path: {text}\n")

    def _give_up(self, error: OSError) -> None:
        """Write nothing more, and say so once on each machine."""
        self._writable = False
        self._say(f"{self.folder}: {error.strerror}; going on without writing")


def _map_index(path: Path, digest: bytes) -> Index | None:
    """The two arrays of an index file, or None if it is not there, not whole, or of something else."""
    try:
        stat = os.stat(path)
        raw = mapped(path, [stat.st_size, stat.st_mtime_ns, stat.st_ino])
    except (OSError, ValueError):
        # Missing, or empty, or just being replaced by another process.
        return None
    if len(raw) < HEADER_BYTES:
        return None
    head = raw[: HEADER.size]
    magic, key, first_size, first_length, second_size, rows, columns = HEADER.unpack(head)
    if struct.unpack_from("<I", raw, HEADER.size)[0] != zlib.crc32(head) or (magic, key) != (MAGIC, digest):
        return None
    second_length = rows * max(columns, 1)
    if len(raw) != HEADER_BYTES + first_size * first_length + second_size * second_length:
        return None
    second = np.frombuffer(raw, np.dtype(f"<i{second_size}"), second_length, HEADER_BYTES)
    first = np.frombuffer(raw, np.dtype(f"<i{first_size}"), first_length, HEADER_BYTES + second.nbytes)
    return first, second.reshape(rows, columns) if columns else second


def _narrow(array: np.ndarray) -> np.ndarray:
    """The array as int32 if its values fit; they are not negative."""
    fits = array.dtype == np.int32 or not array.size or int(array.max()) <= INT32_MAX
    return np.ascontiguousarray(array, dtype=np.int32 if fits else np.int64)
