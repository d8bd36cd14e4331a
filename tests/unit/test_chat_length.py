"""Cutting conversations to a length: LLaMA-Factory's budget, and what our variants keep."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_steel.data.chat_length import LengthPolicy, Lost, fit, share_tokens, trained_tokens
from megatron_steel.text.conversation import IGNORED, EncodedChat, Round


def chat(*rounds: tuple[int, int]) -> EncodedChat:
    """Rounds of (prompt tokens, answer tokens): ids 100.. for prompts, 200.. for answers, each answer's last is 2."""
    ids: list[int] = []
    labels: list[int] = []
    found = []
    for prompt, answer in rounds:
        begin = len(ids)
        ids += [100 + i for i in range(prompt)] + [200 + i for i in range(answer - 1)] + [2] * (answer > 0)
        labels += [IGNORED] * prompt + ids[begin + prompt :]
        found.append(Round(begin=begin, answer=begin + prompt, end=len(ids)))
    labels_T = np.array(labels, dtype=np.int32)
    weights_T = (labels_T != IGNORED).astype(np.float32)
    return EncodedChat(ids_T=np.array(ids, dtype=np.int32), labels_T=labels_T, weights_T=weights_T, rounds=tuple(found))


def policy(length: int, truncation: str = "keep_header", **more: object) -> LengthPolicy:
    return LengthPolicy(seq_length=length, truncation=truncation, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("prompt", "answer", "room", "wanted"),
    [
        (3000, 2000, 1000, (600, 400)),
        (2000, 3000, 1000, (400, 600)),
        (1000, 100, 1000, (900, 100)),
        (100, 1000, 1000, (100, 900)),
        (100, 500, 1000, (100, 500)),
        (500, 100, 1000, (500, 100)),
        (10, 10, 1000, (10, 10)),
    ],
)
def test_prompt_and_answer_share_the_room(prompt: int, answer: int, room: int, wanted: tuple[int, int]) -> None:
    """The vectors of LLaMA-Factory's infer_seqlen."""
    assert share_tokens(prompt, answer, room) == wanted


def test_an_answer_keeps_its_least() -> None:
    assert share_tokens(990, 10, 20) == (20, 0)
    assert share_tokens(990, 10, 20, min_answer=1) == (19, 1)
    assert share_tokens(1000, 1000, 20, min_answer=15) == (5, 15)
    assert share_tokens(1000, 12, 20, min_answer=15) == (8, 12)  # it has no more
    assert share_tokens(1000, 1000, 20, min_answer=50) == (0, 20)


def test_short_conversations_are_left_alone() -> None:
    whole = chat((3, 4), (2, 2))
    assert fit(whole, policy(11)) == (whole, Lost())


def test_proportional_keeps_the_first_tokens() -> None:
    cut, lost = fit(chat((10, 10)), policy(8, "proportional"))
    assert cut.ids_T.tolist() == [100, 101, 102, 103, 200, 201, 202, 203]
    assert cut.labels_T.tolist() == [IGNORED] * 4 + [200, 201, 202, 203]
    assert cut.rounds == (Round(begin=0, answer=4, end=8),)
    assert lost == Lost(conversations=1, prompt_tokens=6, answer_tokens=6, ends=1)


def test_header_stays() -> None:
    """A prompt loses its middle: its last tokens are the header of the answer."""
    cut, lost = fit(chat((10, 10)), policy(8))
    assert cut.ids_T.tolist() == [100, 101, 108, 109, 200, 201, 202, 203]
    assert lost == Lost(conversations=1, prompt_tokens=6, answer_tokens=6, ends=1)


def test_end_token_stays() -> None:
    cut, lost = fit(chat((10, 10)), policy(8, "keep_eos"))
    assert cut.ids_T.tolist() == [100, 101, 108, 109, 200, 201, 202, 2]
    assert cut.labels_T.tolist() == [IGNORED] * 4 + [200, 201, 202, 2]
    assert lost.ends == 0


def test_the_token_behind_a_gap_is_not_trained() -> None:
    """It would be predicted from tokens that it did not follow: here with prompts trained."""
    whole = chat((10, 10))
    whole = EncodedChat(
        ids_T=whole.ids_T, labels_T=whole.ids_T, weights_T=np.ones(20, dtype=np.float32), rounds=whole.rounds
    )
    cut, _ = fit(whole, policy(8))
    assert cut.labels_T.tolist() == [100, 101, IGNORED, 109, 200, 201, 202, 203]
    assert cut.weights_T.tolist() == [1, 1, 0, 1, 1, 1, 1, 1]


def test_turns_take_the_room_in_their_order() -> None:
    cut, lost = fit(chat((4, 4), (4, 4), (4, 4)), policy(16, "proportional"))
    assert cut.rounds == (Round(begin=0, answer=4, end=8), Round(begin=8, answer=12, end=16))
    assert (lost.turns, lost.prompt_tokens, lost.answer_tokens) == (1, 0, 0)


def test_the_oldest_turns_go_first_when_only_the_last_answer_counts() -> None:
    cut, lost = fit(chat((4, 4), (5, 5)), policy(10, oldest_first=True))
    assert cut.ids_T.tolist() == [100, 101, 102, 103, 104, 200, 201, 202, 203, 2]
    assert cut.rounds == (Round(begin=0, answer=5, end=10),) and lost.turns == 1


def test_a_later_turn_that_gets_too_little_is_left_out() -> None:
    cut, lost = fit(chat((4, 4), (20, 20)), policy(12, min_answer_tokens=6))
    assert len(cut.rounds) == 1 and lost.turns == 1
    cut, lost = fit(chat((4, 4), (20, 20)), policy(14, min_answer_tokens=6))
    assert cut.rounds[1] == Round(begin=8, answer=8, end=14) and lost.turns == 0


def test_a_prompt_can_eat_everything_only_without_a_least_answer() -> None:
    """The zero-label sample: counted by the store, never trained."""
    nothing, lost = fit(chat((1000, 3)), policy(4, "proportional"))
    assert (trained_tokens(nothing), lost.answer_tokens) == (0, 3)
    assert trained_tokens(fit(chat((1000, 3)), policy(4, "keep_header"))[0]) == 1
    # The first token of a sample is never predicted.
    assert trained_tokens(fit(chat((1000, 3)), policy(1, "keep_header"))[0]) == 0


@given(
    rounds=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=4),
    length=st.integers(1, 60),
    truncation=st.sampled_from(["keep_header", "keep_eos", "proportional"]),
    least=st.integers(1, 8),
    oldest=st.booleans(),
)
def test_what_stays_is_in_order_and_fits(
    rounds: list[tuple[int, int]], length: int, truncation: str, least: int, oldest: bool
) -> None:
    whole = chat(*rounds)
    cut, lost = fit(whole, policy(length, truncation, min_answer_tokens=least, oldest_first=oldest))
    total = sum(map(sum, rounds))
    assert len(cut.ids_T) <= length and bool(lost) == (total > length)
    assert cut.rounds == () or cut.rounds[-1].end == len(cut.ids_T)
    left_out = rounds[: lost.turns] if oldest else rounds[len(rounds) - lost.turns :]
    dropped = sum(map(sum, left_out)) if lost.turns else 0
    assert total - len(cut.ids_T) == lost.prompt_tokens + lost.answer_tokens + dropped
    # Each label is its own token or none, and counts where it is one.
    trained = cut.labels_T != IGNORED
    assert (cut.labels_T[trained] == cut.ids_T[trained]).all() and ((cut.weights_T > 0) == trained).all()
    if truncation == "keep_eos":
        assert all(cut.ids_T[turn.end - 1] == 2 for turn in cut.rounds if turn.end > turn.answer)
