"""Weights -> which source serves draw n: divisor apportionment in virtual time.

Draw j of a source with share w happens at time (2j + 1) / (2w); the draws of a blend are those of all sources merged by
time, ties by source index. That is the divisor method of Webster and Sainte-Lague (Balinski and Young 1982, "Fair
Representation"), so after n draws the count of source i among S differs from n * w_i by at most

    1/2 + w_i * (S - 2) / 2        (1/2 for two sources, below 1 for three)

because at any time t the count is w_i * t rounded, and the S rounding errors of at most 1/2 add up to t - n.
The result is a pure function of n: nothing is stored and nothing depends on how far a run is meant to go.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

MAX_DRAWS = 1 << 48
MIN_SHARE = 1e-12


def normalise(weights: Sequence[float]) -> list[float]:
    """Return shares that add up to 1, each the double nearest to the exact ratio of the weights as they are written.

    0.1 and 0.2 give the same shares as 1 and 2. Raises ValueError for weights that are not positive and finite.
    """
    for weight in weights:
        if not (math.isfinite(weight) and weight > 0):
            raise ValueError(f"weight {weight!r} of a data source is not a positive number")
    exact = [Fraction(repr(float(weight))) for weight in weights]
    total = sum(exact)
    shares = [float(weight / total) for weight in exact]
    if min(shares) < MIN_SHARE:
        raise ValueError(f"weight {min(weights)!r} of a data source is below {MIN_SHARE:g} of the sum; leave it out")
    return shares


def draws(shares: np.ndarray, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (source index, draw of that source), both int64 (stop - start,), of draws [start, stop) of the blend."""
    _, source, draw, skip = _candidates(shares, start, stop)
    chosen = slice(skip, skip + stop - start)
    assert source[chosen].size == stop - start
    return source[chosen], draw[chosen]


def counts(shares: np.ndarray, n: int) -> np.ndarray:
    """Return how often each source was drawn in the first n draws, int64 (S,)."""
    first, source, _, skip = _candidates(shares, n, n)
    return first + np.bincount(source[:skip], minlength=len(shares))


def _candidates(shares: np.ndarray, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Sort the few draws around [start, stop) by (time, source).

    Returns the draws of each source that surely come before `start` and are left out, the sources and draws of the
    sorted rest, and the position of draw `start` in it. Draw n happens within S/2 of time n; the margin of S + 2 covers
    that and the rounding of doubles up to MAX_DRAWS.
    """
    assert 0 <= start <= stop <= MAX_DRAWS
    margin = len(shares) + 2
    first = np.maximum(0, np.floor(shares * (start - margin) + 0.5).astype(np.int64) - 1)
    last = np.floor(shares * (stop + margin) + 0.5).astype(np.int64) + 1
    source = np.repeat(np.arange(len(shares)), last - first)
    draw = np.concatenate([np.arange(low, high) for low, high in zip(first, last, strict=True)])
    time = (2 * draw + 1) / (2 * shares[source])
    order = np.argsort(time, kind="stable")  # sources are in order, so stable means ties by source index
    skip = start - int(first.sum())
    assert skip >= 0
    return first, source[order], draw[order], skip
