"""Which files a data path names, with which weight, and how much of each: the forms of --data-path.

A value is PREFIX, or a PATTERN of prefixes with `*`, `?` or `[...]`, each with a WEIGHT before it or none of them.
After a pattern, `:K` takes the first K files of each folder and `:K@SEED` K files of each folder by lot. After either,
one of `:max_samples=N`, `:max_tokens=N` and `:fraction=F` takes a part of each file (data/windows.py, `Limit`).
"""

from __future__ import annotations

import glob
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal, cast

import numpy as np

from megatron_steel.data.shuffle import permute, round_keys
from megatron_steel.data.windows import Limit

PATTERN = re.compile(r"[*?[]")
LIMIT = re.compile(r"(?P<path>.*?):(?P<kind>max_samples|max_tokens|fraction|num_samples)=(?P<value>.*)")
CHOICE = re.compile(r"(?P<path>.*):(?P<count>\d+)(?:@(?P<seed>\d+))?")


@dataclass(frozen=True)
class Selected:
    """A file that a data path names."""

    prefix: str
    weight: float | None
    """As it is written before the value; None if no weights are."""
    entry: int
    """Number of the value that names it: the files of a pattern share its weight."""
    limit: Limit | None

    @property
    def value(self) -> str:
        """A value of a data path that names this file and this part of it."""
        return self.prefix if self.limit is None else f"{self.prefix}:{self.limit}"


def parse_data_path(values: Sequence[str], flag: str = "--data-path") -> list[Selected]:
    """Return the files that a data path names, in its order.

    Weights are paired with prefixes as Megatron-LM does (`pair_weights`). Raises ValueError for a mixture, a weight
    below 0, a choice that cannot be made, or a prefix that is listed twice.
    """
    selected = []
    for entry, (weight, value) in enumerate(pair_weights(values, flag, "prefixes")):
        path, limit = _split_limit(value.strip(), flag)
        selected += [Selected(prefix, weight, entry, limit) for prefix in expand_pattern(path, flag)]
    for prefix, count in Counter(file.prefix for file in selected).items():
        if count > 1:
            raise ValueError(f"{flag} lists {prefix} {count} times; list it once, with a higher weight")
    return selected


def pair_weights(values: Sequence[str], flag: str, what: str) -> list[tuple[float | None, str]]:
    """Return (weight, value) pairs, the weights None if there are none; ``what`` says in errors what values are.

    Values are read as pairs of weight and value if one of them is a number. Raises ValueError for a mixture or a weight
    below 0.
    """
    numbers = [_number(value) for value in values]
    if len(values) < 2 or all(number is None for number in numbers):
        return [(None, value) for value in values]
    if len(values) % 2 or None in numbers[0::2]:
        raise ValueError(f"{flag} {' '.join(values)}: give {what} only, or a weight before each of them")
    pairs = list(zip(numbers[0::2], values[1::2], strict=True))
    for weight, value in pairs:
        if weight is not None and not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"{flag}: the weight {weight:g} of {value} must be a number of 0 or more")
    return pairs


def share_weights(selected: Sequence[Selected], windows: Sequence[int]) -> list[float | None]:
    """Return the weight of each file: that of its value, in proportion to the windows of the value's files."""
    totals: Counter[int] = Counter()
    for file, count in zip(selected, windows, strict=True):
        totals[file.entry] += count
    return [
        None if file.weight is None else float(Fraction(repr(file.weight)) * count / totals[file.entry])
        for file, count in zip(selected, windows, strict=True)
    ]


def expand_pattern(value: str, flag: str = "--data-path") -> list[str]:
    """Return the prefixes that a pattern matches, sorted; any other value as it is.

    PATTERN:K takes the first K of each folder, PATTERN:K@SEED draws K of each. Raises ValueError if nothing matches or
    a folder has fewer than are to be drawn.
    """
    if not PATTERN.search(value) or _exists(value):
        chosen = CHOICE.fullmatch(value)
        if chosen and not _exists(value) and _exists(chosen["path"]):
            raise ValueError(
                f"{flag} {value}: :{chosen['count']} chooses among the files of a pattern, this is one file"
            )
        return [value]
    chosen = CHOICE.fullmatch(value)
    pattern, count = (chosen["path"], int(chosen["count"])) if chosen else (value, None)
    if count == 0:
        raise ValueError(f"{flag} {value} takes 0 files; leave the pattern out, or give it the weight 0")
    folders: dict[Path, list[str]] = {}
    for path in sorted(glob.glob(f"{pattern}.idx", recursive=True)):
        folders.setdefault(Path(path).parent, []).append(path.removesuffix(".idx"))
    if not folders:
        raise ValueError(
            f"{flag} {value}: no {pattern}.idx; give prefixes of .bin and .idx files, or a pattern of them"
        )
    if chosen is None or chosen["seed"] is None:
        return [prefix for prefixes in folders.values() for prefix in prefixes[:count]]
    assert count is not None
    return [p for prefixes in folders.values() for p in _draw(prefixes, count, int(chosen["seed"]), f"{flag} {value}")]


def _draw(prefixes: Sequence[str], count: int, seed: int, where: str) -> list[str]:
    """`count` files of a folder by lot, sorted: a function of the seed and of the names that match in the folder."""
    if count > len(prefixes):
        raise ValueError(f"{where}: {Path(prefixes[0]).parent} has only {len(prefixes)} matching files; choose fewer")
    keys = round_keys("files", seed, *(Path(prefix).name for prefix in prefixes))
    order = permute(np.arange(count, dtype=np.int64), len(prefixes), keys)
    return [prefixes[i] for i in sorted(order.tolist())]


def _split_limit(value: str, flag: str) -> tuple[str, Limit | None]:
    """The value without its limit, and the limit."""
    found = LIMIT.fullmatch(value)
    if found is None or _exists(value):
        return value, None
    path, kind, text = found["path"], found["kind"], found["value"]
    if kind == "num_samples":
        raise ValueError(
            f"{flag} {value}: take at most so many samples with :max_samples={text}; to see a source more often than "
            "once, give --target-epochs"
        )
    if ":" in text:
        raise ValueError(f"{flag} {value}: give one limit, as the last thing after the path")
    try:
        number = Fraction(text)
    except (ValueError, ZeroDivisionError):
        number = Fraction(0)
    whole = kind == "fraction" or number.denominator == 1
    if not whole or number <= 0 or (kind == "fraction" and number > 1):
        wanted = "a number above 0 and up to 1, or a ratio such as 70/340" if kind == "fraction" else "a whole number"
        raise ValueError(f"{flag} {value}: {kind} is {wanted}, not {text!r}")
    return path, Limit(cast(Literal["max_samples", "max_tokens", "fraction"], kind), number)


def _exists(prefix: str) -> bool:
    """Whether a file has this very name, whatever characters it holds."""
    return Path(f"{prefix}.idx").is_file()


def _number(value: str) -> float | None:
    """The value as a number, or None."""
    try:
        return float(value)
    except ValueError:
        return None
