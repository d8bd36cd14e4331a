"""Cutting a conversation to the length of a sample, answer by answer.

Shapes: T tokens of a conversation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_steel.config.chat_schema import Truncation
from megatron_steel.text.conversation import IGNORED, EncodedChat, Round


@dataclass(kw_only=True, frozen=True, slots=True)
class LengthPolicy:
    """What a conversation loses that is longer than ``seq_length``.

    Each prompt and its answer share what is left, in proportion, and short ones are kept whole
    (:func:`share_tokens`). ``truncation`` says which of their tokens stay:

    * proportional: the first ones of both. The end of a prompt, where the answer's header is, may be lost, and the end
      token of a cut answer is: that is LLaMA-Factory's rule.
    * keep_header: of a prompt as many at both ends, so that the header stays; the first ones of an answer. A cut
      answer has no end token, and so does not teach to stop in the middle.
    * keep_eos: the same, and the last token of a cut answer is its end token.
    """

    seq_length: int
    truncation: Truncation = "keep_header"
    min_answer_tokens: int = 1
    """An answer gets so many tokens, if it has them, before its prompt gets any; later turns that would get fewer are
    left out with all that follow."""
    oldest_first: bool = False
    """Leave out the oldest turns instead of the newest."""


@dataclass(kw_only=True, slots=True)
class Lost:
    """What cutting took, in tokens and turns; sums over conversations."""

    conversations: int = 0
    """Those that were too long."""
    prompt_tokens: int = 0
    answer_tokens: int = 0
    turns: int = 0
    """Rounds left out altogether."""
    ends: int = 0
    """Answers that were cut and lost their end token."""

    def add(self, other: Lost) -> None:
        """Count ``other`` too."""
        self.conversations += other.conversations
        self.prompt_tokens += other.prompt_tokens
        self.answer_tokens += other.answer_tokens
        self.turns += other.turns
        self.ends += other.ends

    def __bool__(self) -> bool:
        return self.conversations > 0


def share_tokens(prompt: int, answer: int, room: int, min_answer: int = 0) -> tuple[int, int]:
    """How many tokens of a prompt and its answer fit into ``room``: (of the prompt, of the answer).

    An answer shorter than half the room stays whole; beside a prompt shorter than half of it, it gets the rest; else
    both get their share of the room (LLaMA-Factory's ``infer_seqlen``), but an answer at least ``min_answer``.
    """
    if 2 * answer < room:
        most = room
    elif 2 * prompt < room:
        most = room - prompt
    else:
        most = int(room * (answer / (prompt + answer)))
    of_answer = min(max(most, min(min_answer, room)), answer)
    return min(max(room - of_answer, 0), prompt), of_answer


def kept(turn: Round, of_prompt: int, of_answer: int, policy: LengthPolicy) -> list[np.ndarray]:
    """Positions of a round that stay, in parts."""
    answer = turn.end - turn.answer
    if policy.truncation == "proportional":
        head = np.arange(turn.begin, turn.begin + of_prompt)
        return [head, np.arange(turn.answer, turn.answer + of_answer)]
    front = of_prompt // 2 if of_prompt < turn.answer - turn.begin else of_prompt
    parts = [np.arange(turn.begin, turn.begin + front), np.arange(turn.answer - (of_prompt - front), turn.answer)]
    if policy.truncation == "keep_eos" and 0 < of_answer < answer:
        parts += [np.arange(turn.answer, turn.answer + of_answer - 1), np.arange(turn.end - 1, turn.end)]
    else:
        parts.append(np.arange(turn.answer, turn.answer + of_answer))
    return parts


def fit(chat: EncodedChat, policy: LengthPolicy) -> tuple[EncodedChat, Lost]:
    """The conversation in at most ``seq_length`` tokens, and what it lost; the same object when it is short enough."""
    total = len(chat.ids_T)
    if total <= policy.seq_length:
        return chat, Lost()
    lost, room = Lost(conversations=1), policy.seq_length
    rounds = chat.rounds[::-1] if policy.oldest_first else chat.rounds
    chosen: list[tuple[list[np.ndarray], int]] = []
    for turn in rounds:
        prompt, answer = turn.answer - turn.begin, turn.end - turn.answer
        strict = policy.truncation != "proportional"
        of_prompt, of_answer = share_tokens(prompt, answer, room, policy.min_answer_tokens if strict else 0)
        if room <= 0 or (strict and chosen and of_answer < min(policy.min_answer_tokens, answer)):
            break
        chosen.append((kept(turn, of_prompt, of_answer, policy), of_answer))
        room -= of_prompt + of_answer
        lost.prompt_tokens += prompt - of_prompt
        lost.answer_tokens += answer - of_answer
        lost.ends += of_answer < answer and policy.truncation != "keep_eos"
    lost.turns = len(rounds) - len(chosen)
    return take(chat, chosen[::-1] if policy.oldest_first else chosen), lost


def take(chat: EncodedChat, chosen: Sequence[tuple[list[np.ndarray], int]]) -> EncodedChat:
    """The chosen positions of each round, with how many of its last ones are the answer."""
    positions, rounds, begin = [], [], 0
    for parts, of_answer in chosen:
        positions += parts
        end = begin + sum(len(part) for part in parts)
        rounds.append(Round(begin=begin, answer=end - of_answer, end=end))
        begin = end
    where = np.concatenate(positions) if positions else np.empty(0, dtype=np.int64)
    labels_T, weights_T = chat.labels_T[where], chat.weights_T[where]
    # A token of a prompt behind a gap would be predicted from what it did not follow, and so would an answer whose
    # whole prompt is gone. LLaMA-Factory trains the answer behind a prompt that was cut: so does "proportional".
    gaps = np.flatnonzero(np.diff(where) != 1) + 1
    lost = [
        gap for gap in gaps.tolist() if any(turn.begin <= gap < max(turn.answer, turn.begin + 1) for turn in rounds)
    ]
    labels_T[lost], weights_T[lost] = IGNORED, 0.0
    return EncodedChat(ids_T=chat.ids_T[where], labels_T=labels_T, weights_T=weights_T, rounds=tuple(rounds))


def trained_tokens(chat: EncodedChat) -> int:
    """Labels that count: the first token of a sample is never predicted."""
    return int((chat.labels_T[1:] != IGNORED).sum())
