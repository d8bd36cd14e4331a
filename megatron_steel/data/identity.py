"""Which content a source has: enough to refuse it twice and to find it again, without reading terabytes at each start.

The fast key of a dataset (sizes, head and tail of both files) costs no more than opening it. The full hash is the
sha256 of its tokens; preprocessing records it beside the data, so usually nothing has to be read for it. A source is
named by both where the hash is known. Sources of a checkpoint that were named by the fast key alone keep that name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from megatron_steel.data.duplicates import hash_file
from megatron_steel.data.indexed import IndexedReader
from megatron_steel.data.windows import WindowedDataset

SIDECAR_FIELD = "bin_sha256"


@dataclass(frozen=True)
class Known:
    """A source of the checkpoint."""

    name: str
    windows: int


@dataclass
class Candidate:
    """A source that is being opened."""

    name: str
    dataset: WindowedDataset
    recorded: str | None
    """Full hash from the sidecar or, with --data-fingerprint full, from the file."""

    @cached_property
    def fast(self) -> str:
        """Name by the fast key alone."""
        return self.dataset.content_name(None)

    @cached_property
    def sha256(self) -> str:
        """The full hash; reads the file where it is not recorded."""
        return self.recorded or hash_file(self.dataset.reader.bin_path)

    @cached_property
    def full(self) -> str:
        """Name by the full hash."""
        return self.dataset.content_name(self.sha256)


def known_hash(reader: IndexedReader, read_all: bool, verify: bool) -> str | None:
    """The full hash as far as it is known: from the sidecar, or from the file when `read_all`.

    verify: read the files even if the sidecar has their hashes. Raises ValueError if they differ.
    """
    facts = reader.sidecar or {}
    recorded, index = facts.get(SIDECAR_FIELD), facts.get("idx_sha256")
    # The name of a source does not hold the hash of the index, as those of older checkpoints do not.
    if read_all and verify and index is not None and hash_file(reader.idx_path) != index:
        raise ValueError(
            f"{reader.idx_path}: it is not the index that was written ({reader.prefix}.json has another sha256); "
            "restore the file, or preprocess the text again"
        )
    if recorded is not None and not (read_all and verify):
        return str(recorded)
    if not read_all:
        return None
    found = hash_file(reader.bin_path)
    if recorded not in (None, found):
        raise ValueError(
            f"{reader.bin_path}: its tokens are not those that were written (sha256 {found[:12]}, "
            f"{reader.prefix}.json says {str(recorded)[:12]}); restore the file, or preprocess the text again"
        )
    return found


def content_hashes(candidates: Sequence[Candidate], known: Mapping[str, Known]) -> list[str | None]:
    """Return for each source the full hash that belongs into its name, or None where the fast key is its name.

    known: sources of the checkpoint by name of their content. Two sources of the same content get the same name, which
    the ledger refuses; two with the same fast key and other tokens get two names.
    Raises ValueError if it cannot be told which of those the checkpoint was trained on.
    """
    twins: dict[str, list[Candidate]] = {}
    for candidate in candidates:
        twins.setdefault(candidate.fast, []).append(candidate)
    return [
        _alone(candidate, known) if len(group := twins[candidate.fast]) == 1 else _among(candidate, group, known)
        for candidate in candidates
    ]


def _alone(candidate: Candidate, known: Mapping[str, Known]) -> str | None:
    """The hash in the name of a source whose fast key no other source has."""
    if candidate.recorded is None:
        # A sidecar may have been lost; the file is read only where a source of the checkpoint could be this one.
        like = any(source.windows == len(candidate.dataset) for source in known.values())
        if candidate.fast in known or not like:
            return None
        return candidate.sha256 if candidate.full in known else None
    return None if candidate.fast in known and candidate.full not in known else candidate.recorded


def _among(candidate: Candidate, group: Sequence[Candidate], known: Mapping[str, Known]) -> str | None:
    """The hash in the name of one of several sources with the same fast key."""
    if candidate.fast not in known:
        return candidate.sha256
    # One of them may be the source that the checkpoint knows by the fast key alone.
    open_ones = {one.sha256: one for one in group if one.full not in known}
    named = [one for one in open_ones.values() if one.name == known[candidate.fast].name]
    if len(open_ones) > 1 and len(named) != 1:
        raise ValueError(
            f"sources {' and '.join(repr(one.name) for one in open_ones.values())} agree in size, head and tail, and "
            "the checkpoint does not tell which of them it was trained on; give the one of them its old name"
        )
    trained = named or list(open_ones.values())
    return None if trained and candidate.sha256 == trained[0].sha256 else candidate.sha256
