"""What opening an indexed dataset found, so that a later opening of the very same files need not look again."""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Opened:
    """What opening a dataset found; a later opening may trust it while the files have the same `stamp`."""

    stamp: list[int]
    """Of the files when they were opened; see :func:`stamp_of`."""
    dtype: str
    num_tokens: int
    num_sequences: int
    num_documents: int
    fingerprint: str
    sidecar: dict[str, Any] | None
    counts: dict[str, list[int]] = field(default_factory=dict)
    """Numbers that were derived from the whole index, by a name of what they count; see IndexedReader.count."""


def stamp_of(prefix: str) -> list[int]:
    """Size, time of change (ns) and inode of the index, of the data and of the sidecar (zeros where there is none).

    Raises ``OSError`` when one of the first two is missing.
    """
    stats = [os.stat(f"{prefix}.idx"), os.stat(f"{prefix}.bin")]
    stamp = [number for stat in stats for number in (stat.st_size, stat.st_mtime_ns, stat.st_ino)]
    try:
        stat = os.stat(f"{prefix}.json")
    except FileNotFoundError:
        return [*stamp, 0, 0, 0]
    return [*stamp, stat.st_size, stat.st_mtime_ns, stat.st_ino]


def mapped(path: Path, stamp: list[int]) -> mmap.mmap:
    """Map a file read-only. ValueError if it is not the file any more that was looked at first."""
    with open(path, "rb", buffering=0) as stream:
        stat = os.fstat(stream.fileno())
        if [stat.st_size, stat.st_mtime_ns, stat.st_ino] != stamp:
            raise ValueError(f"{path} was changed after this run began to read it; start again")
        return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
