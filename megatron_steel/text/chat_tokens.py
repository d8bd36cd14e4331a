"""Text of a chat template to ids: control tokens only where the template wrote them, never where somebody typed them.

Before a template is rendered, a mark goes into every control token that stands in a message. So the rendered text
holds control tokens of the template alone; it is split at those, and what lies between is encoded as plain text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from megatron_steel.text.tokenizer import AddedToken, Tokenizer

# Code points that Unicode keeps for inside a program; a message that holds one is refused.
HIDDEN, CUT, BEGIN, END = "\ufdd0", "\ufdd1", "\ufdd2", "\ufdd3"
MARKS = re.compile(f"[{HIDDEN}{CUT}{BEGIN}{END}]")
# A mark as json.dumps writes it with ensure_ascii.
ESCAPED_MARK = "\\ufdd"


class ChatTokens:
    """Encodes what a template rendered. ``written`` is the template's own text."""

    def __init__(self, tokenizer: Tokenizer, written: str) -> None:
        added = tokenizer.added_tokens()
        # Words that were added to the vocabulary are text like any other, unless the template builds turns from them.
        # (Some vocabularies hold runs of newlines.)
        controls = [token for token in added if token.control or (token.text in written and token.text.strip())]
        self._tokenizer = tokenizer
        self.ids = {token.text: token.index for token in controls}
        self._control_ids = set(self.ids.values())
        self._in_prompts = any_of([re.escape(token.text) for token in longest_first(controls)])
        special = [token for token in controls if token.control]
        self._in_answers = any_of([re.escape(token.text) for token in longest_first(special)])
        self._special = {token.text for token in special}
        self._split = any_of([pattern(token) for token in longest_first(controls)])
        self._newline = tokenizer.encode_typed("\n")
        joined = tokenizer.encode_typed("\na")
        self._puts_space = joined != self._newline + tokenizer.encode_typed("a")
        space = puts_space_after(tokenizer, controls)
        # SentencePiece itself knows no control tokens in text; by the convention of Llama 2 and Mistral what stands
        # between two is a text of its own, with a space before it.
        self._space_after_control, self._joins_space = space is not False, space is None

    def hide(self, text: str, answer: bool) -> str:
        """A message in which no control token is left; :meth:`encode` gives the ids of its plain text.

        Of an answer only tokens that stand for no text are hidden: a model writes ``<think>`` and ``<tool_call>``
        itself.
        """
        if MARKS.search(text):
            raise ValueError("the text holds code points U+FDD0 to U+FDD3, which Unicode keeps for programs")
        return (self._in_answers if answer else self._in_prompts).sub(self._hide, text)

    def _hide(self, match: re.Match[str]) -> str:
        text = match.group()
        return text[0] + (HIDDEN if text in self._special else CUT) + text[1:]

    def encode(self, text: str, before: Sequence[int]) -> list[int]:
        """Ids of a stretch of rendered text that goes on after the ids ``before``."""
        ids: list[int] = []
        position = 0
        for match in self._split.finditer(text):
            if match.start() > position:
                ids += self._plain(text[position : match.start()], ids or before)
            ids.append(self._id(match))
            position = match.end()
        if position < len(text):
            ids += self._plain(text[position:], ids or before)
        return ids

    def blank(self, text: str) -> str:
        """The white space ``text`` begins with, if a control token or nothing comes after it."""
        space = text[: len(text) - len(text.lstrip())]
        return space if space == text or self._split.match(text, len(space)) else ""

    def without_blank_end(self, text: str) -> str:
        """``text`` without the white space that follows its last control token."""
        last = self._last(text)
        return text if last is None else text[: last.end()]

    def last_control(self, text: str) -> int | None:
        """Id of the control token that ends ``text``, but for white space."""
        last = self._last(text)
        return None if last is None else self._id(last)

    def first_control(self, text: str) -> int | None:
        """Id of the control token that ``text`` begins with."""
        first = self._split.match(text)
        return None if first is None else self._id(first)

    def _last(self, text: str) -> re.Match[str] | None:
        matches = list(self._split.finditer(text))
        return matches[-1] if matches and not text[matches[-1].end() :].strip() else None

    def _id(self, match: re.Match[str]) -> int:
        text = match.group()
        return self.ids[text] if text in self.ids else self.ids[text.strip()]

    def _plain(self, text: str, before: Sequence[int]) -> list[int]:
        hidden = HIDDEN in text
        begins = not before or (before[-1] in self._control_ids and self._space_after_control)
        ids: list[int] = []
        for number, part in enumerate(text.replace(HIDDEN, "").split(CUT)):
            # A word of the vocabulary that is to stay text is encoded in two parts.
            alone = number == 0 and begins and not (self._joins_space and text.startswith(" "))
            ids += self._tokenizer.encode_typed(part) if alone or not self._puts_space else self._continued(part)
        if hidden and not {self.ids[token] for token in self._special}.isdisjoint(ids):
            raise ValueError("the tokenizer makes a control token of plain text that names one")
        return ids

    def _continued(self, text: str) -> list[int]:
        """Ids without the space that some tokenizers put before every text, for text in the middle of a text."""
        for before in ("\n", "x", "."):
            first = self._tokenizer.encode_typed(before)
            ids = self._tokenizer.encode_typed(before + text)
            if ids[: len(first)] == first:
                return ids[len(first) :]
        return self._tokenizer.encode_typed(text)


def puts_space_after(tokenizer: Tokenizer, controls: Sequence[AddedToken]) -> bool | None:
    """Whether the tokenizer puts its space also before what follows a control token in a text; None if it knows none.

    A tokenizer that puts no space anywhere counts as one that does.
    """
    for token in controls:
        if token.control and (ids := tokenizer.encode(token.text + "a"))[:1] == [token.index]:
            return ids[1:] == tokenizer.encode_typed("a")
    return None


def longest_first(tokens: Sequence[AddedToken]) -> list[AddedToken]:
    """Tokens in the order in which a text is searched for them."""
    return sorted(tokens, key=lambda token: (-len(token.text), token.text))


def pattern(token: AddedToken) -> str:
    """What of a text a token takes."""
    return (r"\s*" if token.eats_left else "") + re.escape(token.text) + (r"\s*" if token.eats_right else "")


def any_of(patterns: Sequence[str]) -> re.Pattern[str]:
    """One of the patterns; nothing if there are none."""
    return re.compile("|".join(patterns) or "(?!)")
