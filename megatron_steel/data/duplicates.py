"""Telling datasets apart by content: a fast key of sizes, heads and tails, and a hash of every byte.

Two datasets with one fast key are only possibly the same: they may differ in the middle, and only the full hash tells.
Nothing here drops a dataset; callers get groups and decide.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_steel.data.indexed import FINGERPRINT_WINDOW, content_fingerprint, read_sidecar
from megatron_steel.data.progress import ByteProgress

HASH_CHUNK = 1 << 24
Verdict = Literal["same", "different", "possible"]


@dataclass(frozen=True)
class Pair:
    """Two datasets with one fast key; ``possible`` when the full hash was not asked for."""

    first: str
    second: str
    verdict: Verdict

    def one_line(self) -> str:
        """What a person reads."""
        reason = {
            "same": "the same content, byte for byte",
            "different": "equal sizes, heads and tails, but different in the middle",
            "possible": "equal sizes, heads and tails; the middle was not compared",
        }[self.verdict]
        return f"{self.verdict}: {self.first} and {self.second}: {reason}"


def fast_key(prefix: str, window: int = FINGERPRINT_WINDOW) -> str:
    """Key (hex) of sizes, first and last ``window`` bytes of ``prefix``.bin and .idx, wherever they lie.

    With the default window it is what the data ledger knows a file by (``IndexedReader.fingerprint``). Raises
    ``ValueError`` for a missing file.
    """
    check_files(prefix)
    if window < 1:
        raise ValueError(f"window {window} of the fast key: must be at least 1 byte")
    return content_fingerprint(prefix, window)


def full_hash(prefix: str, trust_sidecar: bool = True) -> str:
    """Hash (hex) of every byte of ``prefix``.bin and .idx.

    The hash of the .bin comes from the sidecar where one is there that was written after the .bin was last changed and
    knows its size; ``trust_sidecar=False`` reads the file in any case. Raises ``ValueError`` for a missing file.
    """
    check_files(prefix)
    tokens = recorded_hash(prefix) if trust_sidecar else None
    if tokens is None:
        tokens = hash_file(Path(f"{prefix}.bin"))
    index = hash_file(Path(f"{prefix}.idx"))
    return hashlib.sha256(f"indexed 1|{tokens}|{index}".encode()).hexdigest()


def recorded_hash(prefix: str) -> str | None:
    """``bin_sha256`` of the sidecar, or None when there is none or the .bin may have been changed after it.

    Times that are equal prove nothing (a file system counts them in steps), so the sidecar has to be newer.
    """
    sidecar = read_sidecar(prefix) or {}
    recorded, tokens, dtype = (sidecar.get(key) for key in ("bin_sha256", "tokens", "dtype"))
    itemsize = {"uint16": 2, "int32": 4, "int64": 8}.get(str(dtype))
    if not isinstance(recorded, str) or not isinstance(tokens, int) or itemsize is None:
        return None
    data, written = Path(f"{prefix}.bin").stat(), Path(f"{prefix}.json").stat()
    known = data.st_size == tokens * itemsize and data.st_mtime_ns < written.st_mtime_ns
    return recorded if known else None


def hash_file(path: Path, progress: ByteProgress | None = None) -> str:
    """sha256 hex of a file, read in pieces."""
    progress = progress or ByteProgress(f"hash {path}", path.stat().st_size)
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while piece := stream.read(HASH_CHUNK):
            digest.update(piece)
            progress.add(len(piece))
    return digest.hexdigest()


def find_duplicates(
    prefixes: Sequence[str], full: bool = True, window: int = FINGERPRINT_WINDOW, trust_sidecar: bool = True
) -> list[Pair]:
    """Every pair of datasets with one fast key, in the order given; ``full`` compares those by the full hash.

    A dataset without a twin is only read at both ends. Raises ``ValueError`` for a missing file.
    """
    by_key: dict[str, list[str]] = {}
    for prefix in prefixes:
        by_key.setdefault(fast_key(prefix, window), []).append(prefix)
    pairs: list[Pair] = []
    for group in by_key.values():
        hashes = {prefix: full_hash(prefix, trust_sidecar) for prefix in group} if full and len(group) > 1 else {}
        for place, first in enumerate(group):
            pairs += [Pair(first, second, compare(first, second, hashes.get)) for second in group[place + 1 :]]
    return pairs


def compare(first: str, second: str, hash_of: Callable[[str], str | None]) -> Verdict:
    """The verdict on two datasets with one fast key, by their full hashes where both are known."""
    one, other = hash_of(first), hash_of(second)
    if one is None or other is None:
        return "possible"
    return "same" if one == other else "different"


def check_files(prefix: str) -> None:
    """Raise ``ValueError`` unless both files of a dataset are there."""
    for suffix in (".bin", ".idx"):
        if not Path(prefix + suffix).is_file():
            raise ValueError(f"{prefix}{suffix}: no such file; {prefix} must be the prefix of a .bin and an .idx file")
