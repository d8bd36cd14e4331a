"""Evaluation questions inside training text: token n-grams that a document shares with evaluation files.

The n-gram test of GPT-3 (Brown et al., 2020, appendix C), 13 tokens by default. For Chinese a token is a character.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_steel.data.clean_filters import Outcome, Result
from megatron_steel.data.clean_text import Text

ACTIONS = ("report", "drop")


@dataclass(frozen=True)
class Index:
    """n-grams of the evaluation files: sorted uint64 hashes, and for each the number of a record in ``places``.

    ``too_short`` counts records without a single n-gram: they cannot be looked for.
    """

    hashes: np.ndarray
    records: np.ndarray
    places: list[str]
    too_short: int

    def find(self, ngrams: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Positions in ``ngrams`` that are in the index, and the record each belongs to."""
        if not len(self.hashes) or not len(ngrams):
            return np.empty(0, np.int64), np.empty(0, np.int64)
        where = np.minimum(np.searchsorted(self.hashes, ngrams), len(self.hashes) - 1)
        found = np.flatnonzero(self.hashes[where] == ngrams)
        return found, self.records[where[found]]


@dataclass(frozen=True)
class Contamination:
    """Reports or drops documents that share at least ``min_matches`` token n-grams with evaluation files.

    ``files`` are .jsonl files; ``keys`` the keys to look at, all strings of a record when left out.
    """

    files: tuple[str, ...]
    keys: tuple[str, ...] = ()
    n: int = 13
    min_matches: int = 1
    action: str = "report"

    def __post_init__(self) -> None:
        if self.action not in ACTIONS:
            raise ValueError(f"action: {self.action!r} is not one of {', '.join(ACTIONS)}")
        if self.n < 1 or self.min_matches < 1:
            raise ValueError("n and min_matches must be at least 1")

    def index(self) -> Index:
        """The index of the files, built once per process. ``ValueError`` for a file that cannot be read."""
        return build_index(self.files, self.keys, self.n)

    def apply(self, text: Text) -> Result:
        """A note or a drop that names the evaluation record with the most shared n-grams."""
        index = self.index()
        found, records = index.find(text.token_ngrams(self.n))
        if len(found) < self.min_matches:
            return None
        numbers, counts = np.unique(records, return_counts=True)
        record = int(numbers[np.argmax(counts)])
        first = int(found[records == record][0])
        detail = {
            "evaluation": index.places[record],
            "matches": int(counts.max()),
            "ngram": text.excerpt(first, self.n),
        }
        return Outcome(detail, dropped=self.action == "drop")


@functools.cache
def build_index(files: tuple[str, ...], keys: tuple[str, ...], n: int) -> Index:
    """Read evaluation files into an :class:`Index`; of an n-gram in several records the first record counts."""
    hashes: list[np.ndarray] = []
    records: list[np.ndarray] = []
    places: list[str] = []
    too_short = 0
    for file in files:
        if not Path(file).is_file():
            raise ValueError(f"contamination: {file}: no such file")
        with open(file, encoding="utf-8") as stream:
            for number, line in enumerate(stream, start=1):
                if not line.strip():
                    continue
                place = f"{file}:{number}"
                parts = [Text(string).token_ngrams(n) for string in record_strings(line, keys, place)]
                ngrams = np.concatenate([np.empty(0, np.uint64), *parts])
                too_short += not len(ngrams)
                hashes.append(ngrams)
                records.append(np.full(len(ngrams), len(places), dtype=np.int64))
                places.append(place)
    if not places:
        raise ValueError(f"contamination: {', '.join(files)}: no evaluation records")
    unique, first = np.unique(np.concatenate(hashes), return_index=True)
    return Index(unique, np.concatenate(records)[first], places, too_short)


def record_strings(line: str, keys: tuple[str, ...], place: str) -> list[str]:
    """The strings of one evaluation record; ``ValueError`` with file:line when it is none or lacks a key."""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"contamination: {place}: malformed JSON: {error}") from error
    if keys and not isinstance(row, dict):
        raise ValueError(f"contamination: {place}: each line must be a JSON object, not {type(row).__name__}")
    for key in keys:
        if key not in row:
            raise ValueError(f"contamination: {place}: no key {key!r}; its keys are {', '.join(map(repr, row))}")
    return list(strings({key: row[key] for key in keys} if keys else row))


def strings(value: Any) -> Iterator[str]:
    """Every string in a JSON value, at any depth."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from strings(item)
