"""The filters of ``clean_data.py``: each is a frozen dataclass whose fields are its YAML options.

``apply`` returns None (the document stays as it is), a string (its new text), or an :class:`Outcome`. Measures follow
data-juicer (Chen et al., 2024) and ROOTS (Laurencon et al., 2022), so that their published limits can be used.
"""

from __future__ import annotations

import ipaddress
import math
import re
import unicodedata
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from megatron_steel.data.clean_text import HAN, WORD, Text


@dataclass(frozen=True)
class Outcome:
    """A verdict other than kept or changed: dropped, or kept with a note for the report."""

    detail: dict[str, Any]
    dropped: bool = True


Result = str | Outcome | None


@dataclass(frozen=True)
class Range:
    """Common to the measures: a document is dropped when its value is outside [min, max]."""

    min: float = -math.inf
    max: float = math.inf

    def check(self, value: float) -> Outcome | None:
        """Drop with the value, rounded for the report, or None."""
        return None if self.min <= value <= self.max else Outcome({"value": round(value, 6)})


@dataclass(frozen=True)
class Length(Range):
    """Characters in the text."""

    def apply(self, text: Text) -> Result:
        """Measure and judge."""
        return self.check(len(text.text))


@dataclass(frozen=True)
class Words(Range):
    """Tokens in the text: Chinese characters, and words of other scripts."""

    def apply(self, text: Text) -> Result:
        """Measure and judge."""
        return self.check(len(text.tokens[0]))


@dataclass(frozen=True)
class AverageLineLength(Range):
    """Mean characters of the lines that are not blank; 0 without any."""

    def apply(self, text: Text) -> Result:
        """Measure and judge."""
        return self.check(sum(map(len, text.lines)) / max(len(text.lines), 1))


@dataclass(frozen=True)
class MaximumLineLength(Range):
    """Characters of the longest line."""

    def apply(self, text: Text) -> Result:
        """Measure and judge."""
        return self.check(max(map(len, text.lines), default=0))


@dataclass(frozen=True)
class AlphanumericShare(Range):
    """Share of characters that are letters of any script or digits."""

    def apply(self, text: Text) -> Result:
        """Measure and judge."""
        count = np.count_nonzero((text.classes == HAN) | (text.classes == WORD))
        return self.check(count / max(len(text.text), 1))


@dataclass(frozen=True)
class SpecialCharacterShare(Range):
    """Share of characters that are no letters: digits, punctuation, white space, symbols."""

    def apply(self, text: Text) -> Result:
        """Measure and judge."""
        return self.check(int(text.letters[0]) / max(len(text.text), 1))


@dataclass(frozen=True)
class CharacterRepetition(Range):
    """Share the most frequent character n-grams have of all: the sqrt(number of different ones) most frequent,
    among those that occur more than once (ROOTS, Laurencon et al., 2022, appendix)."""

    n: int = 10

    def apply(self, text: Text) -> Result:
        """Measure and judge."""
        counts = np.unique(text.character_ngrams(self.n), return_counts=True)[1]
        if not len(counts):
            return self.check(0.0)
        top = min(math.isqrt(len(counts)), int(np.count_nonzero(counts > 1)))
        return self.check(float(np.sort(counts)[len(counts) - top :].sum() / counts.sum()))


@dataclass(frozen=True)
class WordRepetition(Range):
    """Share of token n-grams that occur more than once; for Chinese n-grams of characters."""

    n: int = 10

    def apply(self, text: Text) -> Result:
        """Measure and judge."""
        counts = np.unique(text.token_ngrams(self.n), return_counts=True)[1]
        return self.check(float(counts[counts > 1].sum() / max(counts.sum(), 1)))


@dataclass(frozen=True)
class LanguageShare(Range):
    """Share of letters that belong to the named scripts: zh (Chinese characters), en (ASCII), other. 0 without any."""

    scripts: tuple[str, ...] = ("zh", "en")
    NAMES: ClassVar[tuple[str, ...]] = ("zh", "en", "other")

    def __post_init__(self) -> None:
        if unknown := [name for name in self.scripts if name not in self.NAMES]:
            raise ValueError(f"scripts: {unknown[0]!r} is not one of {', '.join(self.NAMES)}")

    def apply(self, text: Text) -> Result:
        """Measure and judge."""
        counted = sum(int(text.letters[1 + self.NAMES.index(name)]) for name in self.scripts)
        return self.check(counted / max(int(text.letters[1:].sum()), 1))


@dataclass(frozen=True)
class Field:
    """Keep documents whose record has one of ``values`` under ``key``; a dot leads into a record inside (meta.lang)."""

    key: str
    values: tuple[str, ...]

    def apply(self, text: Text) -> Result:
        """Compare as text, so that 3 is "3"; a record without the field is dropped."""
        value: Any = text.row
        for name in self.key.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        if value is None:
            return Outcome({"value": None})
        return None if str(value) in self.values else Outcome({"value": str(value)[:80]})


@dataclass(frozen=True)
class Nfkc:
    """Unicode NFKC. It also turns Chinese punctuation into ASCII, which is why the example leaves it out."""

    def apply(self, text: Text) -> Result:
        """The normalised text when it differs."""
        return None if unicodedata.is_normalized("NFKC", text.text) else unicodedata.normalize("NFKC", text.text)


SPACES = re.compile("[\u00a0\u1680\u2000-\u200a\u202f\u205f\u3000]")
INVISIBLE = re.compile("[\u200b\u2060\ufeff\u00ad]")
LINE_ENDS = re.compile("\r\n?|[\u2028\u2029\u0085\x0b\x0c]")
TRAILING = re.compile(r"[ \t]+$", re.MULTILINE)
BLANK_LINES = re.compile(r"\n{3,}")
CONTROL = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f]")


@dataclass(frozen=True)
class Whitespace:
    """One kind of space and line end, no invisible characters, nothing at line ends, at most one blank line in a row.
    Spaces at the start of a line stay: they are code."""

    def apply(self, text: Text) -> Result:
        """The normalised text when it differs."""
        new = LINE_ENDS.sub("\n", INVISIBLE.sub("", SPACES.sub(" ", text.text)))
        return changed(text, BLANK_LINES.sub("\n\n", TRAILING.sub("", new)).strip("\n"))


@dataclass(frozen=True)
class ControlCharacters:
    """Removes control characters other than tabs and line ends."""

    def apply(self, text: Text) -> Result:
        """The new text when it differs."""
        return changed(text, CONTROL.sub("", text.text))


@dataclass(frozen=True)
class RemoveCharacters:
    """Removes every character of a list."""

    characters: str

    def __post_init__(self) -> None:
        if not self.characters:
            raise ValueError("characters: name at least one")

    def apply(self, text: Text) -> Result:
        """The new text when it differs."""
        return changed(text, re.sub(f"[{re.escape(self.characters)}]", "", text.text))


# \b and \w take Chinese characters for parts of a word, so these name ASCII, and a text can touch a link on both sides.
LINK = re.compile(r"(?:(?:https?|ftp)://|(?<![A-Za-z0-9.])www\.)[A-Za-z0-9._~:/?#@!$&*+,;=%-]*[A-Za-z0-9/#&=_~]")
EMAIL = re.compile(
    r"(?<![A-Za-z0-9._%+-])[A-Za-z0-9._%+-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.)+[A-Za-z]{2,24}(?![A-Za-z0-9])"
)
IP = re.compile(
    r"(?<![A-Za-z0-9.])[0-9]{1,3}(?:\.[0-9]{1,3}){3}(?![A-Za-z0-9]|\.[0-9])"
    r"|(?<![A-Za-z0-9:.])(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{1,4}(?![A-Za-z0-9:]|\.[0-9])"
)


@dataclass(frozen=True)
class Links:
    """Replaces http, https, ftp and www addresses."""

    replacement: str = ""

    def apply(self, text: Text) -> Result:
        """The new text when it differs."""
        return changed(text, LINK.sub(lambda _: self.replacement, text.text))


@dataclass(frozen=True)
class Emails:
    """Replaces email addresses."""

    replacement: str = ""

    def apply(self, text: Text) -> Result:
        """The new text when it differs."""
        # Without the sign there is nothing to find, and the pattern is slow on long words.
        return changed(text, EMAIL.sub(lambda _: self.replacement, text.text)) if "@" in text.text else None


@dataclass(frozen=True)
class Ips:
    """Replaces IPv4 and IPv6 addresses; four numbers above 255 and times like 10:20:30 are none."""

    replacement: str = ""

    def apply(self, text: Text) -> Result:
        """The new text when it differs."""
        return changed(text, IP.sub(self._replace, text.text))

    def _replace(self, match: re.Match[str]) -> str:
        try:
            ipaddress.ip_address(match.group())
        except ValueError:
            return match.group()
        return self.replacement


# A sentence ends after Chinese or ASCII end marks (a full stop only before white space) with the closing quotes and
# spaces behind them, or at a line end.
SENTENCE = re.compile(
    "[^\n]*?(?:[\u3002\uff01\uff1f\u2026!?]+|\\.(?=[\\s\"'\\)\u201d\u2019]|$))"
    "[\u201d\u2019\u300d\u300f\uff09\"')]*[ \t]*\n*"
    "|[^\n]+\n*|\n+"
)


@dataclass(frozen=True)
class RepeatedLines:
    """Removes a line that stood in the text before; shorter ones than ``min_length`` characters may repeat."""

    min_length: int = 10

    def apply(self, text: Text) -> Result:
        """The new text when it differs."""
        return changed(text, without_repeats(text.text.splitlines(keepends=True), self.min_length))


@dataclass(frozen=True)
class RepeatedSentences:
    """Removes a sentence that stood in the text before; shorter ones than ``min_length`` characters may repeat."""

    min_length: int = 10

    def apply(self, text: Text) -> Result:
        """The new text when it differs."""
        return changed(text, without_repeats(SENTENCE.findall(text.text), self.min_length))


def changed(text: Text, new: str) -> str | None:
    """``new`` when it differs from the text."""
    return None if new == text.text else new


def without_repeats(parts: list[str], min_length: int) -> str:
    """The parts joined, without those seen before; case and the white space around a part do not count."""
    seen: set[str] = set()
    kept = []
    for part in parts:
        key = part.strip().lower()
        if len(key) >= min_length:
            if key in seen:
                continue
            seen.add(key)
        kept.append(part)
    return "".join(kept)
