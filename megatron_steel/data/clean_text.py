"""What cleaning measures of a text: characters, lines, tokens and their n-grams, as numpy arrays.

A token is one Chinese character, or a run of letters, digits and marks of any other script, in lower case. So "words"
mean the same for both languages without a dictionary, and a Chinese n-gram is an n-gram of characters.
"""

from __future__ import annotations

import functools
import unicodedata
from functools import cached_property

import numpy as np

from megatron_steel.data.letters import ASTRAL_HAN, count_letters, script_table

SEPARATOR, HAN, WORD, MARK = range(4)
# splitmix64 (Steele, Lea, Flood, 2014): constants of its output function.
MIX_A, MIX_B = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
# Any odd number has an inverse modulo 2**64; these are arbitrary.
CHARACTER_BASE, TOKEN_BASE = 0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93
CHARACTER_INVERSE, TOKEN_INVERSE = pow(CHARACTER_BASE, -1, 1 << 64), pow(TOKEN_BASE, -1, 1 << 64)
# Longer texts are rare, and their powers are computed anew.
CACHED_POWERS = 1 << 16


@functools.cache
def class_table() -> np.ndarray:
    """uint8 class of every code point below 0x20000 (last entry: all above): separator, Han, word, mark."""
    table = np.zeros(ASTRAL_HAN + 1, dtype=np.uint8)
    for code in range(ASTRAL_HAN):
        if chr(code).isalnum():
            table[code] = WORD
        elif unicodedata.category(chr(code)).startswith("M"):
            table[code] = MARK
    table[script_table() == 1] = HAN
    return table


def mix(values: np.ndarray) -> np.ndarray:
    """Spread uint64 values over all 64 bits (the output function of splitmix64)."""
    values = (values ^ (values >> np.uint64(30))) * MIX_A
    values = (values ^ (values >> np.uint64(27))) * MIX_B
    return values ^ (values >> np.uint64(31))


def powers(base: int, count: int) -> np.ndarray:
    """uint64 ``base**0 .. base**(count - 1)`` modulo 2**64."""
    return cached_powers(base)[:count] if count <= CACHED_POWERS else compute_powers(base, count)


@functools.cache
def cached_powers(base: int) -> np.ndarray:
    """The powers that almost every text needs."""
    return compute_powers(base, CACHED_POWERS)


def compute_powers(base: int, count: int) -> np.ndarray:
    """:func:`powers` without the cache."""
    steps = np.full(count, base, dtype=np.uint64)
    steps[:1] = 1
    return np.cumprod(steps, dtype=np.uint64)


def code_points(text: str) -> np.ndarray:
    """uint32 code points of a text."""
    return np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)


def prefix_sums(values: np.ndarray, base: int) -> np.ndarray:
    """uint64 sums of ``values[i] * base**i`` over the first 0, 1, ... values."""
    sums = np.zeros(len(values) + 1, dtype=np.uint64)
    np.cumsum(values * powers(base, len(values)), dtype=np.uint64, out=sums[1:])
    return sums


def ngram_hashes(hashes: np.ndarray, n: int) -> np.ndarray:
    """uint64 hashes of all windows of ``n`` consecutive values; empty when there are fewer."""
    count = len(hashes) - n + 1
    if count <= 0:
        return np.empty(0, dtype=np.uint64)
    sums = prefix_sums(hashes, TOKEN_BASE)
    # A difference of prefix sums still depends on where it stands; base**-i moves it back to the beginning.
    return mix((sums[n:] - sums[:-n]) * powers(TOKEN_INVERSE, count))


class Text:
    """One text and what is measured of it, each computed once and only when a filter asks.

    ``row`` is the record it is from, for the filters that look at its fields.
    """

    def __init__(self, text: str, row: object = None) -> None:
        self.text, self.row = text, row

    @cached_property
    def codes(self) -> np.ndarray:
        """uint32 code points."""
        return code_points(self.text)

    @cached_property
    def classes(self) -> np.ndarray:
        """uint8 class of every character."""
        return class_table()[np.minimum(self.codes, ASTRAL_HAN)]

    @cached_property
    def letters(self) -> np.ndarray:
        """int64 (4,): no letters, Chinese characters, ASCII letters, letters of other scripts."""
        return count_letters(self.text)

    @cached_property
    def lines(self) -> list[str]:
        """The lines that are not blank, without the white space around them."""
        return [line for line in map(str.strip, self.text.split("\n")) if line]

    @cached_property
    def lowered(self) -> str:
        """The text in lower case; token positions count in it (a capital can become two characters)."""
        return self.text.lower()

    @cached_property
    def tokens(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """int64 starts, int64 ends in ``lowered``, and uint64 hashes of the tokens, in order."""
        codes = self.codes if self.lowered == self.text else code_points(self.lowered)
        # One separator before and behind, so that every character has neighbours.
        padded = np.zeros(len(codes) + 2, dtype=np.uint8)
        padded[1:-1] = class_table()[np.minimum(codes, ASTRAL_HAN)]
        # A character begins a token when it is Chinese, or follows a separator or a Chinese character.
        inside, single = padded != SEPARATOR, padded == HAN
        starting = inside[1:] & (single[1:] | ~inside[:-1] | single[:-1])
        starts = np.flatnonzero(starting[:-1])
        ends = np.flatnonzero(inside[1:-1] & (starting[1:] | ~inside[2:])) + 1
        sums = prefix_sums(self.character_hashes(codes), CHARACTER_BASE)
        back = powers(CHARACTER_INVERSE, len(codes))
        return starts, ends, mix((sums[ends] - sums[starts]) * back[starts])

    @staticmethod
    def character_hashes(codes: np.ndarray) -> np.ndarray:
        """A uint64 for every code point, never the 0 that would vanish in a sum."""
        return mix(codes.astype(np.uint64) + np.uint64(1))

    def token_ngrams(self, n: int) -> np.ndarray:
        """uint64 hashes of the token n-grams, in order."""
        return ngram_hashes(self.tokens[2], n)

    def character_ngrams(self, n: int) -> np.ndarray:
        """uint64 hashes of the character n-grams, in order."""
        return ngram_hashes(self.character_hashes(self.codes), n)

    def excerpt(self, first: int, n: int) -> str:
        """The lowered text from token ``first`` to token ``first + n - 1``."""
        starts, ends, _ = self.tokens
        return self.lowered[int(starts[first]) : int(ends[first + n - 1])]
