"""Which documents are duplicates: from hashes and MinHash clusters to one removal list per task."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megatron_steel.data.clean_datatrove import Document, PipelineStep
from megatron_steel.data.clean_steps import HASH_BYTES
from megatron_steel.text.files import write_text

EXACT, MINHASH = range(2)
KINDS = ("exact_dedup", "minhash_dedup")
# Exact hashes are looked at in this many passes, so that a pass holds a part of them.
PASSES = 16


class Decide(PipelineStep):
    """One task: removal lists (document, kind, rank and number of the document that stays) and kept counts per task."""

    type, name = "DEDUP", "decide"

    def __init__(self, work: Path, tasks: int, exact: bool, minhash: bool) -> None:
        super().__init__()
        self.work, self.tasks, self.exact, self.minhash = work, tasks, exact, minhash

    def run(self, data: Iterator[Document] | None, rank: int = 0, world_size: int = 1) -> None:
        """Write ``removed/RANK.npy`` and ``plan.json``."""
        removed = np.concatenate([self._exact(), self._minhash()])
        # Exact first: a document that is both is reported as exact.
        order = np.lexsort((removed[:, 2], removed[:, 1], removed[:, 0]))
        removed = removed[order]
        same = np.zeros(len(removed), dtype=bool)
        same[1:] = (removed[1:, :2] == removed[:-1, :2]).all(axis=1)
        removed = removed[~same]
        kept = []
        for task in range(self.tasks):
            mine = removed[removed[:, 0] == task][:, 1:]
            np.save(self.work / "removed" / f"{task:05d}.npy", mine)
            kept.append(len(np.load(self.work / "places" / f"{task:05d}.npy", mmap_mode="r")) - len(mine))
        write_text(self.work / "plan.json", json.dumps({"kept": kept}))

    def _exact(self) -> np.ndarray:
        """int64 (n, 5): rank, document, kind, rank and document of the first with the same hash."""
        if not self.exact:
            return np.empty((0, 5), dtype=np.int64)
        return np.concatenate([self._exact_pass(number) for number in range(PASSES)])

    def _exact_pass(self, number: int) -> np.ndarray:
        hashes, owners = [], []
        for task in range(self.tasks):
            raw = np.fromfile(self.work / "exact" / f"{task:05d}.hash", dtype=np.uint64).reshape(-1, HASH_BYTES // 8)
            mine = np.flatnonzero(raw[:, 0] % np.uint64(PASSES) == number)
            hashes.append(raw[mine])
            owners.append(np.stack([np.full(len(mine), task, dtype=np.int64), mine], axis=1))
        keys, owner = np.concatenate(hashes), np.concatenate(owners)
        order = np.lexsort((keys[:, 1], keys[:, 0]))
        keys, owner = keys[order], owner[order]
        starts = np.ones(len(keys), dtype=bool)
        starts[1:] = (keys[1:] != keys[:-1]).any(axis=1)
        return duplicates(owner, starts, EXACT)

    def _minhash(self) -> np.ndarray:
        """The same for datatrove's clusters: the first document of a cluster stays."""
        parts = [np.empty((0, 3), dtype=np.int64)]
        if self.minhash:
            for task in range(self.tasks):
                path = self.work / "minhash" / "clusters" / f"{task:06d}.clusters"
                if path.exists():
                    pairs = np.fromfile(path, dtype="<u4").reshape(-1, 2).astype(np.int64)
                    parts.append(np.stack([np.full(len(pairs), task, dtype=np.int64), *pairs.T], axis=1))
        rows = np.concatenate(parts)
        rows = rows[np.argsort(rows[:, 2], kind="stable")]
        starts = np.ones(len(rows), dtype=bool)
        starts[1:] = rows[1:, 2] != rows[:-1, 2]
        return duplicates(rows[:, :2], starts, MINHASH)


def duplicates(owner: np.ndarray, starts: np.ndarray, kind: int) -> np.ndarray:
    """int64 (n, 5) for all but the first of each group; ``owner`` (m, 2) in groups that begin where ``starts``."""
    first = np.maximum.accumulate(np.where(starts, np.arange(len(starts)), 0))
    rest = np.flatnonzero(~starts)
    kinds = np.full((len(rest), 1), kind, dtype=np.int64)
    return np.concatenate([owner[rest], kinds, owner[first[rest]]], axis=1)


def removal_examples(work: Path, tasks: int) -> Iterator[dict[str, Any]]:
    """Every removed document in order: kind, and the places of it and of the one that stays."""
    places = [np.load(work / "places" / f"{task:05d}.npy", mmap_mode="r") for task in range(tasks)]
    for task in range(tasks):
        for document, kind, first_rank, first in np.load(work / "removed" / f"{task:05d}.npy").tolist():
            yield {
                "step": KINDS[kind],
                "place": places[task][document].tolist(),
                "duplicate_of": places[first_rank][first].tolist(),
            }
