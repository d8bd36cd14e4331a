"""Pairs and judged answers in tokens: two conversations each, cut together, one behind the other in a store.

Shapes: T tokens of a conversation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from megatron_steel.data.chat_length import LengthPolicy, Lost, kept, share_tokens, take
from megatron_steel.data.chat_store import ChatReport, ChatStore, Encode, encode_in_chunks, join, note_bad
from megatron_steel.text.conversation import Conversation, EncodedChat, Judged, Pair, Round


class EncodedPair(NamedTuple):
    """Two conversations that stay together."""

    first: EncodedChat
    second: EncodedChat
    desirable: bool
    """Of a judged answer, which is the first; True for pairs."""


def encode_pairs(rows: Iterable[Any], encode: Encode, lengths: LengthPolicy, workers: int, judged: bool) -> ChatStore:
    """The store of pairs, or of judged answers beside mismatched ones; the report counts pairs and their tokens."""
    if judged:
        rows = with_mismatched(rows)
    pairs, report = encode_in_chunks(rows, lambda part: encode_part(part, encode, lengths), workers)
    store = join([chat for pair in pairs for chat in (pair.first, pair.second)], report)
    # Their weights are those of the loss, not of their tokens.
    desirable = np.array([pair.desirable for pair in pairs], dtype=bool) if judged else None
    return dataclasses.replace(store, weights_N=None, desirable=desirable)


class Matched(NamedTuple):
    """A judged answer and, behind the same prompt, the answer of another row."""

    own: Conversation
    other: Conversation
    desirable: bool
    place: str


def with_mismatched(rows: Iterable[Any]) -> Iterator[Any]:
    """Each judged answer with the answer of the next one, the last with that of the first; bad rows as they are."""
    first: Judged | None = None
    last: Judged | None = None
    for row in rows:
        if not isinstance(row, Judged):
            yield row
            continue
        if last is not None:
            yield match(last, row)
        first, last = first or row, row
    if last is not None and first is not None:
        yield match(last, first)


def match(row: Judged, other: Judged) -> Matched:
    """A judged answer with the answer of another row."""
    *prompt, _ = row.conversation.messages
    mixed = dataclasses.replace(row.conversation, messages=(*prompt, other.conversation.messages[-1]))
    return Matched(row.conversation, mixed, row.desirable, row.place)


def encode_part(part: list[Any], encode: Encode, lengths: LengthPolicy) -> tuple[list[EncodedPair], ChatReport]:
    """Pairs that can be trained, cut to length, and what became of the others."""
    report, pairs = ChatReport(), []
    for row in part:
        both = (row.chosen, row.rejected) if isinstance(row, Pair) else (row.own, row.other)
        try:
            chats = [encode(conversation) for conversation in both]
            if not np.array_equal(prompt_ids(chats[0]), prompt_ids(chats[1])):
                raise ValueError("other prompt: the template writes the prompt of the two answers in two ways")
        except ValueError as error:
            note_bad(report, row.place, str(error).removeprefix(f"{row.place}: "))
            continue
        whole = sum(len(chat.ids_T) for chat in chats)
        first, second, lost = fit_pair(chats[0], chats[1], lengths)
        report.longest = max(report.longest, whole)
        if min(answer_tokens(first), answer_tokens(second)) < 1:
            report.untrained += 1
            report.untrained_examples.append(f"{row.place} ({whole} tokens)")
            continue
        report.lost.add(lost)
        report.kept += 1
        report.tokens += len(first.ids_T) + len(second.ids_T)
        report.trained_tokens += answer_tokens(first) + answer_tokens(second)
        pairs.append(EncodedPair(first, second, getattr(row, "desirable", True)))
    return pairs, report


def last_round(chat: EncodedChat) -> Round:
    """The answer of a conversation, with everything before it as its prompt."""
    return Round(begin=0, answer=chat.rounds[-1].answer, end=chat.rounds[-1].end)


def prompt_ids(chat: EncodedChat) -> np.ndarray:
    """The tokens before the answer."""
    return chat.ids_T[: last_round(chat).answer]


def answer_tokens(chat: EncodedChat) -> int:
    """Tokens of the answer that can be predicted: not the first of a sample."""
    return 0 if not chat.rounds else chat.rounds[-1].end - max(chat.rounds[-1].answer, 1)


def fit_pair(first: EncodedChat, second: EncodedChat, lengths: LengthPolicy) -> tuple[EncodedChat, EncodedChat, Lost]:
    """Both conversations in together at most ``seq_length`` tokens, with one and the same prompt, and what they lost.

    Two prompts and two answers share the room as a prompt and an answer do (:func:`share_tokens`), the answers in
    halves, of which a short one leaves the rest to the other. What is behind the answer is left out.
    """
    turns = [last_round(chat) for chat in (first, second)]
    prompt, answers = turns[0].answer, [turn.end - turn.answer for turn in turns]
    of_prompt, of_answers, lost = prompt, list(answers), Lost()
    if 2 * prompt + sum(answers) > lengths.seq_length:
        strict = lengths.truncation != "proportional"
        least = 2 * lengths.min_answer_tokens if strict else 0
        both, room = share_tokens(2 * prompt, sum(answers), lengths.seq_length, least)
        of_prompt, half = both // 2, room // 2
        of_answers[0] = min(answers[0], max(half, room - answers[1]))
        of_answers[1] = min(answers[1], room - of_answers[0])
        lost = Lost(
            conversations=1,
            prompt_tokens=2 * (prompt - of_prompt),
            answer_tokens=sum(answers) - sum(of_answers),
            ends=sum(n < m for n, m in zip(of_answers, answers, strict=True)) * (lengths.truncation != "keep_eos"),
        )
    cut = [
        take(chat, [(kept(turn, of_prompt, count, lengths), count)])
        for chat, turn, count in zip((first, second), turns, of_answers, strict=True)
    ]
    return cut[0], cut[1], lost
