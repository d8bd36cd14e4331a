"""Encoded conversations: counted, never silently dropped, the same for any number of workers, kept in files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from megatron_steel.data import chat_store
from megatron_steel.data.chat_dataset import ChatDataset, weigh
from megatron_steel.data.chat_length import LengthPolicy
from megatron_steel.data.chat_store import ChatStore, encode_rows, join, read_store, stored, write_store
from megatron_steel.text.conversation import IGNORED, Conversation, EncodedChat, Message, Round

POLICY = LengthPolicy(seq_length=8)


@dataclass(frozen=True)
class Bad:
    place: str
    reason: str


def talk(number: int, prompt: int, answer: int, weight: float = 1.0) -> Conversation:
    """A conversation whose encoding has so many tokens: see `encode`."""
    messages = (
        Message(role="user", content=str(prompt)),
        Message(role="assistant", content=str(answer), weight=weight),
    )
    return Conversation(messages=messages, place=f"a.jsonl:{number}")


def encode(conversation: Conversation) -> EncodedChat:
    """Ids count up from ten times the line's number."""
    prompt, answer = (int(message.content) for message in conversation.messages)
    if answer > 90:
        raise ValueError(f"{conversation.place}: no such token: 91")
    first = 10 * int(conversation.place.split(":")[1])
    ids = np.arange(first, first + prompt + answer, dtype=np.int32)
    labels = np.where(np.arange(len(ids)) < prompt, IGNORED, ids).astype(np.int32)
    weights = np.where(labels == IGNORED, 0, conversation.messages[1].weight).astype(np.float32)
    return EncodedChat(
        ids_T=ids, labels_T=labels, weights_T=weights, rounds=(Round(begin=0, answer=prompt, end=len(ids)),)
    )


ROWS = [
    talk(1, 2, 3),
    Bad("a.jsonl:2", "role order: two user turns"),
    talk(3, 1, 1),
    talk(4, 5, 0),
    talk(5, 1, 99),
    Bad("a.jsonl:6", "role order: ends with user"),
    talk(7, 6, 6),
]


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_every_row_is_counted(monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    monkeypatch.setattr(chat_store, "CHUNK", 2)
    monkeypatch.setattr(chat_store, "WAVE", 4)
    chats, report = encode_rows(ROWS, encode, POLICY, workers)
    assert [chat.ids_T.tolist() for chat in chats] == [
        [10, 11, 12, 13, 14],
        [30, 31],
        [70, 71, 74, 75, 76, 77, 78, 79],
    ]
    assert (report.rows, report.kept, report.bad_rows, report.untrained) == (7, 3, 3, 1)
    assert report.rows == report.kept + report.bad_rows + report.untrained
    assert report.bad == {"role order": 2, "no such token": 1}
    assert report.examples[:1] == ["a.jsonl:2: role order: two user turns"]
    assert report.untrained_examples == ["a.jsonl:4 (5 tokens)"]
    assert (report.tokens, report.trained_tokens, report.longest) == (15, 8, 12)
    assert (report.lost.conversations, report.lost.prompt_tokens, report.lost.answer_tokens) == (1, 2, 2)
    lines = report.lines("a")
    assert lines[0] == "a: 7 rows, 3 conversations of 15 tokens, 53.3% trained"
    assert "3 bad rows left out (1 no such token, 2 role order)" in lines[1] and "a.jsonl:2: role order" in lines[1]
    assert "1 conversations left out, nothing in them is trained: a.jsonl:4 (5 tokens)" in lines[2]
    assert "lost 2 tokens of prompts, 2 of answers, 1 end tokens and 0 turns" in lines[3]


def make(weight: float = 1.0) -> ChatStore:
    chats, report = encode_rows([talk(1, 2, 3, weight), talk(3, 1, 1)], encode, POLICY, 1)
    return join(chats, report)


@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_a_store_comes_back_from_its_files(tmp_path: Path, weight: float) -> None:
    store = make(weight)
    assert (store.weights_N is None) == (weight == 1.0)
    write_store(store, tmp_path / "s")
    back = read_store(tmp_path / "s")
    assert back.ids_N.tolist() == [10, 11, 12, 13, 14, 30, 31] and back.begins_n.tolist() == [0, 5, 7]
    assert back.labels_N.tolist() == [IGNORED, IGNORED, 12, 13, 14, IGNORED, 31]
    assert back.weights(0).tolist() == [0, 0, weight, weight, weight] and back.report == store.report
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_an_empty_store_comes_back_too(tmp_path: Path) -> None:
    write_store(join(*encode_rows(ROWS[1:2], encode, POLICY, 1)), tmp_path / "s")
    assert len(read_store(tmp_path / "s")) == 0


def test_what_is_stored_is_not_made_again(tmp_path: Path) -> None:
    made = []

    def once() -> ChatStore:
        made.append(1)
        return make()

    first, second = (stored(tmp_path / "deep" / "s", once) for _ in range(2))
    assert len(made) == 1 and first.ids_N.tolist() == second.ids_N.tolist()


def test_a_sample_predicts_the_next_token_inside_itself() -> None:
    dataset = ChatDataset("a", make(0.5), "content", 8, packing=True, weighting="token")
    assert (len(dataset), dataset.mean_tokens, dataset.describe()) == (1, 7.0, "of 2 conversations, 87.5% filled")
    tokens, labels, weights, positions = dataset.read(0, 3)
    assert tokens.tolist() == [10, 11, 12, 13, 14, 30, 31]
    assert labels.tolist() == [-1, 12, 13, 14, -1, 31, -1]
    assert weights.view(np.float32).tolist() == [0, 0.5, 0.5, 0.5, 0, 1, 0]
    assert positions.tolist() == [0, 1, 2, 3, 4, 0, 1]
    assert dataset.longest(3) == [(7, 0)]
    single = ChatDataset("a", make(0.5), "content", 8, packing=False, weighting=None)
    assert single.longest(3) == [(5, 0), (2, 1)]
    assert len(single) == 2 and single.read(1, 0)[1].tolist() == [31, -1]
    assert single.read(0, 0)[2].view(np.float32).tolist() == [0, 1, 1, 1, 0]
    assert single.fingerprint != dataset.fingerprint


def test_an_empty_source_is_refused() -> None:
    empty = join(*encode_rows(ROWS[1:2], encode, POLICY, 1))
    with pytest.raises(ValueError, match="a: holds no conversation to train on"):
        ChatDataset("a", empty, "content", 8, packing=True, weighting="token")


def test_weightings() -> None:
    weights = np.array([0, 1, 0.5, 0.5, 2], dtype=np.float32)
    assert weigh(weights, "token").tolist() == weights.tolist()
    assert weigh(weights, None).tolist() == [0, 1, 1, 1, 1]
    assert weigh(weights, "sample").tolist() == [0, 0.25, 0.125, 0.125, 0.5]
    assert weigh(weights, "square").tolist() == [0, 0.5, 0.25, 0.25, 1.0]
    assert weigh(np.zeros(3, dtype=np.float32), "sample").tolist() == [0, 0, 0]
