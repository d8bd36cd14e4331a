"""Pairs in tokens: one prompt for both, cut so that both fit, no answer ever empty."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_steel.data.chat_length import LengthPolicy
from megatron_steel.data.pair_store import encode_pairs, fit_pair, with_mismatched
from megatron_steel.text.conversation import IGNORED, Conversation, EncodedChat, Judged, Message, Pair, Round


def encoded(prompt: int, answer: int, first: int = 200) -> EncodedChat:
    """Prompt tokens 100.., answer tokens ``first``.. of which the last is 2, and a newline 9 behind."""
    ids = [*range(100, 100 + prompt), *range(first, first + answer - 1), 2, 9]
    labels = np.array([IGNORED] * prompt + ids[prompt : prompt + answer] + [IGNORED], dtype=np.int32)
    weights = (labels != IGNORED).astype(np.float32)
    turn = Round(begin=0, answer=prompt, end=prompt + answer)
    return EncodedChat(ids_T=np.array(ids, dtype=np.int32), labels_T=labels, weights_T=weights, rounds=(turn,))


def lengths(seq_length: int, truncation: str = "keep_header", least: int = 1) -> LengthPolicy:
    return LengthPolicy(seq_length=seq_length, truncation=truncation, min_answer_tokens=least)  # type: ignore[arg-type]


def test_what_fits_loses_only_what_is_behind_the_answer() -> None:
    first, second, lost = fit_pair(encoded(3, 2), encoded(3, 4, 300), lengths(12))
    assert first.ids_T.tolist() == [100, 101, 102, 200, 2]
    assert second.ids_T.tolist() == [100, 101, 102, 300, 301, 302, 2] and not lost
    assert first.labels_T.tolist() == [IGNORED] * 3 + [200, 2]


def test_both_lose_the_same_of_the_prompt() -> None:
    first, second, lost = fit_pair(encoded(10, 2), encoded(10, 4, 300), lengths(16, "keep_eos"))
    assert first.ids_T.tolist() == [100, 101, 107, 108, 109, 200, 2]
    assert second.ids_T.tolist() == [100, 101, 107, 108, 109, 300, 301, 302, 2]
    assert (lost.conversations, lost.prompt_tokens, lost.answer_tokens, lost.ends) == (1, 10, 0, 0)


def test_a_short_answer_leaves_room_to_the_other() -> None:
    first, second, lost = fit_pair(encoded(2, 2), encoded(2, 20, 300), lengths(14))
    assert (len(first.ids_T), len(second.ids_T)) == (4, 10)
    assert (lost.answer_tokens, lost.ends) == (12, 1)
    kept_end = fit_pair(encoded(2, 2), encoded(2, 20, 300), lengths(14, "keep_eos"))
    assert kept_end[1].ids_T[-1] == 2 and kept_end[2].ends == 0


@given(
    prompt=st.integers(1, 300),
    answers=st.tuples(st.integers(1, 200), st.integers(1, 200)),
    length=st.integers(8, 256),
    truncation=st.sampled_from(["keep_header", "keep_eos"]),
)
def test_no_answer_is_ever_empty(prompt: int, answers: tuple[int, int], length: int, truncation: str) -> None:
    whole = encoded(prompt, answers[0]), encoded(prompt, answers[1], 500)
    first, second, lost = fit_pair(*whole, lengths(length, truncation))
    assert len(first.ids_T) + len(second.ids_T) <= length
    heads = [chat.ids_T[: chat.rounds[0].answer].tolist() for chat in (first, second)]
    assert heads[0] == heads[1]
    for chat, answer in zip((first, second), answers, strict=True):
        kept = chat.rounds[0].end - chat.rounds[0].answer
        assert 1 <= kept <= answer and (chat.labels_T != IGNORED).sum() >= min(kept, 1)
        if truncation == "keep_eos":
            assert chat.ids_T[-1] == 2
    cut = (
        2 * (prompt - len(heads[0]))
        + sum(answers)
        - sum(chat.rounds[0].end - chat.rounds[0].answer for chat in (first, second))
    )
    assert cut == lost.prompt_tokens + lost.answer_tokens


@dataclass(frozen=True)
class Bad:
    place: str
    reason: str


def talk(number: int, answer: int, prompt: int = 2) -> Conversation:
    messages = (Message(role="user", content=str(prompt)), Message(role="assistant", content=str(answer)))
    return Conversation(messages=messages, place=f"f:{number}")


def encode(conversation: Conversation) -> EncodedChat:
    prompt, answer = (int(message.content) for message in conversation.messages)
    return encoded(prompt, answer, 200 + 10 * answer)


def test_pairs_are_neighbours_in_the_store() -> None:
    rows = [
        Pair(chosen=talk(1, 2), rejected=talk(1, 3), place="f:1"),
        Bad("f:2", "same answers: really"),
        Pair(chosen=talk(3, 2), rejected=talk(3, 4), place="f:3"),
        Pair(chosen=talk(4, 2), rejected=talk(4, 2, prompt=3), place="f:4"),
    ]
    store = encode_pairs(rows, encode, lengths(64), 1, judged=False)
    assert store.lengths_n.tolist() == [4, 5, 4, 6] and store.desirable is None
    assert store.ids_N[:9].tolist() == [100, 101, 220, 2, 100, 101, 230, 231, 2]
    report = store.report
    assert (report.rows, report.kept, report.bad_rows, report.tokens, report.trained_tokens) == (4, 2, 2, 19, 11)
    assert report.bad == {"same answers": 1, "other prompt": 1}


def test_a_pair_that_leaves_nothing_to_train_is_counted() -> None:
    row = Pair(chosen=talk(1, 2, prompt=0), rejected=talk(1, 1, prompt=0), place="f:1")
    report = encode_pairs([row], encode, lengths(64), 1, judged=False).report
    assert (report.kept, report.untrained, report.untrained_examples) == (0, 1, ["f:1 (5 tokens)"])


@pytest.mark.parametrize("workers", [1, 2])
def test_judged_answers_lie_beside_mismatched_ones(workers: int) -> None:
    rows = [
        Judged(conversation=talk(1, 2), desirable=True, place="f:1"),
        Bad("f:2", "missing key: x"),
        Judged(conversation=talk(3, 3), desirable=False, place="f:3"),
        Judged(conversation=talk(4, 4), desirable=True, place="f:4"),
    ]
    store = encode_pairs(rows, encode, lengths(64), workers, judged=True)
    assert store.lengths_n.tolist() == [4, 5, 5, 6, 6, 4]
    assert store.desirable is not None and store.desirable.tolist() == [True, False, True]
    assert store.report.rows == 4 and store.report.bad_rows == 1
    assert [row.place for row in with_mismatched(rows)] == ["f:2", "f:1", "f:3", "f:4"]


def test_one_judged_answer_is_its_own_neighbour() -> None:
    (row,) = with_mismatched([Judged(conversation=talk(1, 2), desirable=True, place="f:1")])
    assert row.own == row.other
