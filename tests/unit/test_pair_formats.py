"""Preference data in every usual format, and what is refused of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_steel.data.chat_formats import BadRow, RowFormat
from megatron_steel.data.chat_sources import open_chat
from megatron_steel.data.pair_formats import read_judged, read_pair
from megatron_steel.text.conversation import Judged, Pair

LIMIT = 1000
U, A, S = "user", "assistant", "system"


def turn(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


def said(role: str, text: str) -> dict[str, str]:
    return {"from": {U: "human", A: "gpt"}[role], "value": text}


def shown(pair: Any) -> tuple[list[tuple[str, str]], str, str]:
    """Prompt, chosen and rejected answer; the prompts and what is trained are checked."""
    assert isinstance(pair, Pair), pair
    chosen, rejected = pair.chosen.messages, pair.rejected.messages
    assert chosen[:-1] == rejected[:-1] and chosen[-1].role == rejected[-1].role == A
    assert chosen[-1].trained and rejected[-1].trained
    assert not any(message.trained for message in chosen[:-1])
    return [(message.role, message.content) for message in chosen[:-1]], chosen[-1].content, rejected[-1].content


PLAIN = ([(U, "q")], "good", "bad")
LONG = ([(S, "s"), (U, "q"), (A, "a"), (U, "r")], "good", "bad")
LONG_TURNS = [turn(*said) for said in LONG[0]]
FORMATS: dict[str, tuple[dict[str, Any], Any]] = {
    "trl texts": ({"prompt": "q", "chosen": "good", "rejected": "bad"}, PLAIN),
    "trl turns": ({"prompt": LONG_TURNS, "chosen": [turn(A, "good")], "rejected": [turn(A, "bad")]}, LONG),
    "trl, prompt repeated": (
        {
            "prompt": LONG_TURNS,
            "chosen": [*LONG_TURNS, turn(A, "good")],
            "rejected": [*LONG_TURNS, turn(A, "bad")],
        },
        LONG,
    ),
    "trl, prompt implicit": (
        {"chosen": [*LONG_TURNS, turn(A, "good")], "rejected": [*LONG_TURNS, turn(A, "bad")]},
        LONG,
    ),
    "prompt text, answers with it as turns": (
        {"prompt": "q", "chosen": [turn(U, "q"), turn(A, "good")], "rejected": [turn(U, "q"), turn(A, "bad")]},
        PLAIN,
    ),
    "alpaca ranking": ({"instruction": "q", "input": "", "chosen": "good", "rejected": "bad"}, PLAIN),
    "alpaca ranking, two outputs": ({"instruction": "q", "output": ["good", "bad"]}, PLAIN),
    "alpaca ranking, input": (
        {"instruction": "q", "input": "x", "chosen": "good", "rejected": "bad", "system": "s"},
        ([(S, "s"), (U, "q\nx")], "good", "bad"),
    ),
    "sharegpt ranking": (
        {"conversations": [said(U, "q")], "chosen": said(A, "good"), "rejected": said(A, "bad")},
        PLAIN,
    ),
    "ms-swift": ({"messages": [*LONG_TURNS, turn(A, "good")], "rejected_response": "bad"}, LONG),
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats(name: str) -> None:
    record, wanted = FORMATS[name]
    assert shown(read_pair(record, "f:1", RowFormat(), LIMIT)) == wanted


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "missing answer": ({"prompt": "q", "chosen": "good"}, "missing key: the row has no 'rejected'"),
    "no prompt": ({"chosen": "good", "rejected": "bad"}, "missing key: the row has no prompt"),
    "empty answer": ({"prompt": "q", "chosen": "good", "rejected": " "}, "empty answer: 'rejected' has no text"),
    "same answers": ({"prompt": "q", "chosen": "x", "rejected": "x"}, "same answers"),
    "other prompt": (
        {"prompt": [turn(U, "q")], "chosen": [turn(U, "z"), turn(A, "good")], "rejected": [turn(A, "bad")]},
        "other prompt: 'chosen' does not begin with the prompt",
    ),
    "two answers": (
        {"prompt": "q", "chosen": [turn(A, "a"), turn(U, "b"), turn(A, "c")], "rejected": "bad"},
        "other prompt",
    ),
    "wrong type": ({"prompt": "q", "chosen": 3, "rejected": "bad"}, "wrong type: 'chosen' must be a list of turns"),
    "no object": ([], "wrong type: the row must be an object"),  # type: ignore[dict-item]
    "user answers": (
        {"prompt": "q", "chosen": [turn(U, "x")], "rejected": "bad"},
        "role order: 'chosen' must be one answer behind the prompt, not user",
    ),
    "prompt ends with an answer": (
        {"prompt": [turn(U, "q"), turn(A, "a")], "chosen": "good", "rejected": "bad"},
        "role order: turn 3 (assistant) follows assistant",
    ),
    "long turn": ({"prompt": "q", "chosen": "g" * 2000, "rejected": "bad"}, "long turn"),
    "three outputs": ({"instruction": "q", "output": ["a", "b", "c"]}, "wrong type: 'output' must be the chosen"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_rows(name: str) -> None:
    record, reason = BAD[name]
    found = read_pair(record, "f:1", RowFormat(), LIMIT)
    assert isinstance(found, BadRow) and found.place == "f:1" and reason in found.reason, found


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "q", "completion": "a"},
        {"prompt": [turn(U, "q")], "completion": [turn(A, "a")]},
        {"messages": [turn(U, "q"), turn(A, "a")]},
        {"instruction": "q", "output": "a"},
        {"conversations": [said(U, "q"), said(A, "a")]},
    ],
)
@pytest.mark.parametrize("key", ["label", "kto_tag"])
@pytest.mark.parametrize("good", [True, False])
def test_judged_answers(record: dict[str, Any], key: str, good: bool) -> None:
    found = read_judged({**record, key: good}, "f:1", RowFormat(), LIMIT)
    assert isinstance(found, Judged), found
    assert [message.content for message in found.conversation.messages] == ["q", "a"]
    assert found.desirable is good and found.place == "f:1"


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"prompt": "q", "completion": "a"}, "missing key: the row has no 'label' or 'kto_tag'"),
        ({"prompt": "q", "completion": "a", "label": 1}, "wrong type: 'label' must be true or false"),
        ({"messages": [turn(U, "q")], "label": True}, "no answer"),
        ({"prompt": "q", "completion": "", "label": True}, "empty answer"),
        ("x", "wrong type"),
    ],
)
def test_bad_judged_rows(record: Any, reason: str) -> None:
    found = read_judged(record, "f:1", RowFormat(), LIMIT)
    assert isinstance(found, BadRow) and reason in found.reason


texts = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=5)
values = st.recursive(st.none() | st.booleans() | texts, lambda inner: st.lists(inner, max_size=3), max_leaves=4)
turns_like = st.lists(st.fixed_dictionaries({"role": st.sampled_from([U, A, S, "x"]), "content": texts}), max_size=4)
records = st.dictionaries(
    st.sampled_from(["prompt", "chosen", "rejected", "messages", "conversations", "instruction", "output", "label"]),
    values | turns_like,
)


@given(rows=st.lists(records, max_size=5), kind=st.sampled_from(["pair", "judged"]))
def test_every_row_is_something(tmp_path_factory: pytest.TempPathFactory, rows: list[Any], kind: Any) -> None:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (source,) = open_chat([str(path)], None, LIMIT, row_kind=kind)
    found = list(source.rows())
    assert len(found) == len(rows)
    assert all(isinstance(row, BadRow | Pair | Judged) for row in found)
    assert [row.place for row in found] == [f"{path}:{number}" for number in range(1, len(rows) + 1)]


def test_entries_of_a_registry(tmp_path: Path) -> None:
    """As LLaMA-Factory's dpo_en_demo, a ranking of Alpaca's and its kto_en_demo."""
    columns = {"messages": "talk", "chosen": "better", "rejected": "worse"}
    registry = {
        "sharegpt": {"file_name": "s.jsonl", "ranking": True, "formatting": "sharegpt", "columns": columns},
        "alpaca": {
            "file_name": "a.jsonl",
            "ranking": True,
            "columns": {"prompt": "q", "chosen": "yes", "rejected": "no"},
        },
        "kto": {
            "file_name": "k.jsonl",
            "formatting": "sharegpt",
            "columns": {"messages": "messages", "kto_tag": "liked"},
            "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
        },
    }
    rows = {
        "s": {"talk": [said(U, "q")], "better": said(A, "good"), "worse": said(A, "bad")},
        "a": {"q": "q", "yes": "good", "no": "bad"},
        "k": {"messages": [turn(U, "q"), turn(A, "a")], "liked": False},
    }
    path = tmp_path / "dataset_info.json"
    path.write_text(json.dumps(registry))
    for name, row in rows.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    for name in ("sharegpt", "alpaca"):
        (source,) = open_chat([name], path, LIMIT, row_kind="pair")
        assert shown(next(source.rows())) == PLAIN
        with pytest.raises(ValueError, match="has ranking: pairs of answers are for"):
            open_chat([name], path, LIMIT)
    (source,) = open_chat(["kto"], path, LIMIT, row_kind="judged")
    found = next(source.rows())
    assert isinstance(found, Judged) and found.desirable is False
    with pytest.raises(ValueError, match="has a column of kto_tag: judged answers are for --loss-type kto"):
        open_chat(["kto"], path, LIMIT)


def test_kinds_of_rows_are_told_apart(tmp_path: Path) -> None:
    """The same bytes read as something else are something else."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "q", "chosen": "good", "rejected": "bad", "label": true}\n')
    names = {kind: open_chat([str(path)], None, LIMIT, row_kind=kind)[0].fingerprint for kind in ("chat", "pair")}
    assert len(set(names.values())) == 2
