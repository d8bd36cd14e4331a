"""Counts of letters by script: how languages are told apart here."""

from __future__ import annotations

import functools

import numpy as np

SCRIPTS = ("zh", "en", "other")
ASTRAL_HAN = 0x20000
ASCII = bytes(range(128))
ASCII_LETTERS = bytes([*range(ord("A"), ord("Z") + 1), *range(ord("a"), ord("z") + 1)])


@functools.cache
def script_table() -> np.ndarray:
    """For every code point below 0x20000: 0 not a letter, else 1 + the index in ``SCRIPTS``."""
    table = np.zeros(ASTRAL_HAN + 1, dtype=np.uint8)
    for code in range(ASTRAL_HAN):
        if chr(code).isalpha():
            table[code] = 3
    for first, last in ((0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF)):
        table[first : last + 1] = 1
    for first, last in ((ord("A"), ord("Z")), (ord("a"), ord("z"))):
        table[first : last + 1] = 2
    table[ASTRAL_HAN] = 1
    return table


def no_letters() -> np.ndarray:
    """Zero counts in the form of :func:`count_letters`."""
    return np.zeros(len(SCRIPTS) + 1, dtype=np.int64)


def count_letters(text: str) -> np.ndarray:
    """int64 (4,): characters that are no letters, Chinese characters, ASCII letters, letters of other scripts."""
    return letters_of(text.encode())


def letters_of(data: bytes) -> np.ndarray:
    """:func:`count_letters` of UTF-8, quicker: what is ASCII is counted without decoding it."""
    wide = data.translate(None, ASCII)
    latin = len(data) - len(data.translate(None, ASCII_LETTERS))
    codes = np.frombuffer(wide.decode().encode("utf-32-le"), dtype=np.uint32)
    counts = np.bincount(script_table()[np.minimum(codes, ASTRAL_HAN)], minlength=len(SCRIPTS) + 1)
    return counts + np.array([len(data) - len(wide) - latin, 0, latin, 0])


def main_script(text: str) -> str:
    """The script in ``SCRIPTS`` that most letters of a text belong to; "other" when it has none."""
    letters = count_letters(text)[1:]
    return SCRIPTS[int(letters.argmax())] if letters.any() else "other"
