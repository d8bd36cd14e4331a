"""Chat formats: what a record says is what a conversation holds, and a record that is none is told, with its place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_steel.data.chat_formats import BadRow, RowFormat, read_record
from megatron_steel.data.chat_rows import count_rows, read_chat
from megatron_steel.text.conversation import Conversation, Message

LIMIT = 1000
WEATHER = {"name": "weather", "description": "Of a city", "parameters": {"type": "object", "properties": {}}}


def read(value: Any) -> Conversation | BadRow:
    return read_record(value, "file:7", RowFormat(), LIMIT)


def good(value: Any) -> Conversation:
    found = read(value)
    assert isinstance(found, Conversation), found
    return found


def turns(value: Any) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in good(value).messages]


def reason(value: Any) -> str:
    found = read(value)
    assert isinstance(found, BadRow), found
    assert found.place == "file:7"
    return found.reason


def said(*texts: str, first: str = "user") -> list[dict[str, str]]:
    """Turns of user and assistant."""
    roles = ("user", "assistant") if first == "user" else ("assistant", "user")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


def shared(*pairs: tuple[str, str]) -> list[dict[str, str]]:
    """Turns of ShareGPT."""
    return [{"from": role, "value": text} for role, text in pairs]


# F1: Alpaca and BELLE.


def test_alpaca_joins_instruction_and_input_by_a_newline() -> None:
    both = {"instruction": "Add.", "input": "1 + 1", "output": "2"}
    assert turns(both) == [("user", "Add.\n1 + 1"), ("assistant", "2")]
    assert turns({**both, "input": ""}) == turns({**both, "input": None}) == [("user", "Add."), ("assistant", "2")]
    assert turns({**both, "instruction": ""}) == [("user", "1 + 1"), ("assistant", "2")]
    assert good(both).place == "file:7"


def test_alpaca_texts_are_not_touched() -> None:
    assert turns({"instruction": " a\n", "output": "\nb \\n\n"}) == [("user", " a\n"), ("assistant", "\nb \\n\n")]


def test_alpaca_history_comes_first_and_leaves_training_to_the_options() -> None:
    row = {
        "instruction": "And 2 + 2?",
        "input": "",
        "output": "4",
        "system": "You count.",
        "history": [["1 + 1?", "2"], ["Sure?", "Yes"]],
    }
    chat = good(row)
    assert [(message.role, message.content) for message in chat.messages] == [
        ("system", "You count."),
        ("user", "1 + 1?"),
        ("assistant", "2"),
        ("user", "Sure?"),
        ("assistant", "Yes"),
        ("user", "And 2 + 2?"),
        ("assistant", "4"),
    ]
    assert {message.trained for message in chat.messages} == {None}
    assert turns({**row, "system": "", "history": []}) == [("user", "And 2 + 2?"), ("assistant", "4")]


def test_belle_dialogues_in_one_text_become_turns() -> None:
    row = {"instruction": "Human:你好\nAssistant:你好！\nHuman: 写诗\nAssistant:", "input": "", "output": "春眠"}
    assert turns(row) == [("user", "你好"), ("assistant", "你好！"), ("user", "写诗"), ("assistant", "春眠")]
    single = {"instruction": "判断正误", "input": "地球是方的", "output": "错"}
    assert turns(single) == [("user", "判断正误\n地球是方的"), ("assistant", "错")]
    newer = {"id": "1", "conversations": shared(("human", "你好"), ("assistant", "你好！"))}
    assert turns(newer) == [("user", "你好"), ("assistant", "你好！")]


@pytest.mark.parametrize(
    "text",
    ["Human: a", "Say Human: a\nAssistant:", "Human: a\nAssistant: b", "Human: a\nHuman: b\nAssistant:"],
)
def test_what_only_looks_like_a_dialogue_stays_one_prompt(text: str) -> None:
    assert turns({"instruction": text, "output": "b"}) == [("user", text), ("assistant", "b")]


# F2: lists of turns.


def test_sharegpt_and_infinity_instruct() -> None:
    row = {
        "id": 5,
        "conversations": shared(("human", "Hi"), ("gpt", "Hello"), ("human", "Bye"), ("gpt", "See you")),
        "label": {"ability_en": ["chat"]},
        "langdetect": "en",
    }
    expected = [("user", "Hi"), ("assistant", "Hello"), ("user", "Bye"), ("assistant", "See you")]
    assert turns(row) == turns({**row, "id": "5", "label": "chat"}) == expected


def test_a_system_turn_says_more_than_the_column() -> None:
    dialogue = shared(("human", "Hi"), ("gpt", "Hello"))
    row = {"conversations": dialogue, "system": "column"}
    assert turns(row)[0] == ("system", "column")
    assert turns({**row, "conversations": shared(("system", "turn")) + dialogue})[0] == ("system", "turn")
    assert turns({"conversations": shared(("system", "")) + dialogue}) == [("user", "Hi"), ("assistant", "Hello")]


def test_sharegpt_calls_and_observations() -> None:
    call = '{"name": "weather", "arguments": {"city": "北京"}}'
    row = {
        "conversations": shared(
            ("human", "Weather?"), ("function_call", call), ("observation", '{"sun": 1}'), ("gpt", "Sunny.")
        ),
        "tools": json.dumps([WEATHER]),
    }
    chat = good(row)
    assert chat.messages == (
        Message(role="user", content="Weather?"),
        Message(role="assistant", content="", tool_calls=({"name": "weather", "arguments": {"city": "北京"}},)),
        Message(role="tool", content='{"sun": 1}'),
        Message(role="assistant", content="Sunny."),
    )
    assert chat.tools == ({"type": "function", "function": WEATHER},)


def test_openai_calls_weights_and_parts() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    row = {
        "messages": [
            {"role": "developer", "content": "Be short."},
            {"role": "user", "content": [{"type": "text", "text": "Rain "}, {"type": "text", "text": "today?"}]},
            {"role": "assistant", "content": None, "tool_calls": [call, call], "weight": 0},
            {"role": "tool", "tool_call_id": "c1", "content": "sun"},
            {"role": "tool", "tool_call_id": "c1", "content": ""},
            {"role": "assistant", "content": "Sunny.", "weight": 0.5},
            {"role": "user", "content": "Thanks", "train": False},
            {"role": "assistant", "content": "Yes.", "train": True},
        ],
        "tools": [{"type": "function", "function": WEATHER}],
    }
    chat = good(row)
    called = {"name": "weather", "arguments": {"city": "Rome"}}
    assert chat.messages == (
        Message(role="system", content="Be short."),
        Message(role="user", content="Rain today?"),
        Message(role="assistant", content="", tool_calls=(called, called), trained=False),
        Message(role="tool", content="sun"),
        Message(role="tool", content=""),
        Message(role="assistant", content="Sunny.", weight=0.5),
        Message(role="user", content="Thanks"),
        Message(role="assistant", content="Yes.", trained=True),
    )
    assert chat.tools == ({"type": "function", "function": WEATHER},)


def test_prompt_and_completion() -> None:
    assert turns({"prompt": "1 + 1 =", "completion": " 2"}) == [("user", "1 + 1 ="), ("assistant", " 2")]
    row = {"prompt": said("Hi", "Hello", "Bye"), "completion": said("See you", first="assistant")}
    assert good(row).messages == (
        Message(role="user", content="Hi"),
        Message(role="assistant", content="Hello", trained=False),
        Message(role="user", content="Bye"),
        Message(role="assistant", content="See you"),
    )
    swapped = {"prompt": said("Hi", "Hello"), "completion": said("Bye", "See you")}
    assert reason(swapped).startswith("role order:")
    assert reason({**row, "completion": "See you"}).startswith("wrong type:")


BAD: list[tuple[Any, str]] = [
    ({"messages": said("a", "b", "c")}, "no answer: the last turn is turn 3 (user)"),
    ({"conversations": shared(("human", "a"))}, "no answer: the last turn is turn 1 (user)"),
    ({"messages": said("a", "b", first="assistant")}, "role order: turn 1 (assistant) is the first"),
    ({"messages": said("a") + said("b", "c")}, "role order: turn 2 (user) follows user"),
    ({"messages": said("a", "b") + said("c", first="assistant")}, "role order: turn 3 (assistant) follows assistant"),
    (
        {"messages": [*said("a", "b"), {"role": "system", "content": "c"}]},
        "role order: turn 3 (system) follows assistant",
    ),
    ({"conversations": shared(("observation", "a"), ("gpt", "b"))}, "role order: turn 1 (tool) is the first"),
    ({"messages": said("a", " \n")}, "empty answer: turn 2 (assistant) has no text"),
    ({"instruction": "a", "output": ""}, "empty answer: turn 2 (assistant) has no text"),
    ({"instruction": "", "output": "b"}, "empty prompt: turn 1 (user) has no text"),
    ({"messages": []}, "no turns: 'messages' is empty"),
    ({"messages": [{"role": "system", "content": ""}]}, "no turns: there is only an empty system turn"),
    ({"messages": "a"}, "wrong type: 'messages' must be a list of turns, not text"),
    ({"messages": ["a"]}, "wrong type: turn 1 must be an object, not text"),
    ({"messages": [{"role": "user"}]}, "missing key: turn 1 has no 'content' or 'value'; its keys are 'role'"),
    ({"messages": [{"content": "a"}]}, "missing key: turn 1 has no 'role' or 'from'; its keys are 'content'"),
    (
        {"conversations": shared(("bot", "a"))},
        "unknown role: turn 1 is of 'bot'; give its tag in a dataset_info.json",
    ),
    ({"messages": [{"role": "user", "content": 3}]}, "wrong type: the text of turn 1 must be text, not a number"),
    ({"instruction": "a", "output": 3}, "wrong type: 'output' must be text, not a number"),
    ({"instruction": "a"}, "missing key: the row has no 'output'"),
    ({"prompt": "a"}, "missing key: the row has no 'completion'"),
    (
        {"instruction": "a", "output": "b", "history": [["c"]]},
        "wrong type: 'history' must be a list of [prompt, answer]",
    ),
    ({"text": "a"}, "missing key: none of 'messages', "),
    ({}, "missing key: none of 'messages', "),
    ([1], "wrong type: the row must be an object, not a list"),
    ({"messages": said("a" * 1001, "b")}, "long turn: turn 1 (user) has 1,001 bytes, more than --max-turn-bytes 1,000"),
    ({"messages": said("a", "我" * 334)}, "long turn: turn 2 (assistant) has 1,002 bytes"),
    ({"messages": said("a", "\ud800")}, "not text: turn 2 (assistant) holds half of a surrogate pair"),
    ({"prompt": "a", "chosen": "b", "rejected": "c"}, "other data: the row has 'chosen'; it is a preference pair"),
    ({"messages": said("a", "b"), "kto_tag": False}, "other data: the row has 'kto_tag'; it is feedback"),
    ({"messages": said("a", "b"), "label": False}, "other data: the row has a 'label' of true or false"),
    ({"messages": said("a", "b"), "images": ["a.png"]}, "other data: the row has 'images'; only text is read"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        "unread part: turn 1 holds a part of type 'image_url'; only text is read",
    ),
    (
        {"messages": [*said("a"), {"role": "assistant", "content": "b", "reasoning_content": "c"}]},
        "unread key: turn 2 has 'reasoning_content'; put it into the text",
    ),
    ({"messages": [{"role": "user", "content": "a", "train": True}]}, "trained prompt: turn 1 (user) asks to be"),
    ({"messages": [{"role": "user", "content": "a", "weight": 2}]}, "trained prompt: turn 1 (user) asks to be"),
    (
        {"messages": [*said("a"), {"role": "assistant", "content": "b", "weight": -1}]},
        "weight: 'weight' of turn 2 is not from 0 to 1,000,000",
    ),
    (
        {"messages": [*said("a"), {"role": "assistant", "content": "b", "weight": 10**400}]},
        "weight: 'weight' of turn 2 is not from 0 to 1,000,000",
    ),
    (
        {"messages": [*said("a"), {"role": "assistant", "content": "b", "weight": True}]},
        "wrong type: 'weight' of turn 2 must be a number, not true or false",
    ),
    (
        {"messages": [*said("a"), {"role": "assistant", "content": "b", "train": 1}]},
        "wrong type: 'train' of turn 2 must be true or false, not a number",
    ),
    (
        {"conversations": shared(("human", "a"), ("function_call", "{name"))},
        "tool call: the call of turn 2 is not JSON (",
    ),
    ({"conversations": shared(("human", "a"), ("function_call", "[{}]"))}, "tool call: a call of turn 2 has no name"),
    (
        {"messages": [*said("a"), {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "[]"}]}]},
        "tool call: the arguments of turn 2 must be an object, not a list",
    ),
    (
        {"messages": [{"role": "user", "content": "a", "tool_calls": [{"name": "f"}]}]},
        "tool call: turn 1 (user) calls a function; only answers can",
    ),
    ({"messages": said("a", "b"), "tools": "weather"}, "tools: the text is not JSON"),
    ({"messages": said("a", "b"), "tools": [{"type": "function"}]}, "tools: each must be an object with a name"),
]


@pytest.mark.parametrize(("row", "expected"), BAD)
def test_bad_records_say_why(row: Any, expected: str) -> None:
    assert reason(row).startswith(expected)


# Files.


def write_lines(path: Path, lines: list[bytes]) -> Path:
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def test_rows_of_a_file_name_their_lines(tmp_path: Path) -> None:
    fine = json.dumps({"messages": said("a", "b")}).encode()
    lines = [fine, b"", b'{"messages": [', b"\xff", json.dumps([1]).encode(), fine, b'{"instruction": "a\\ud800"}']
    path = write_lines(tmp_path / "rows.jsonl", lines)
    rows = list(read_chat([path], RowFormat(), LIMIT))
    assert [row.place for row in rows] == [f"{path}:{line}" for line in (1, 3, 4, 5, 6, 7)]
    assert [type(row) for row in rows] == [Conversation, BadRow, BadRow, BadRow, Conversation, BadRow]
    reasons = [row.reason.split(":")[0] for row in rows if isinstance(row, BadRow)]
    assert reasons == ["malformed JSON", "unreadable", "wrong type", "unreadable"]
    assert count_rows([path], RowFormat()) == 6


def test_tables_lists_and_lines_with_other_types_beside_load_together(tmp_path: Path) -> None:
    chat = shared(("human", "a"), ("gpt", "b"))
    rows: list[dict[str, Any]] = [
        {"id": 1, "conversations": chat, "label": {"x": ["y"]}},
        {"id": "one", "conversations": chat, "label": "y"},
    ]
    files = []
    for number, row in enumerate(rows):
        files.append(tmp_path / f"{number}.parquet")
        pq.write_table(pa.Table.from_pylist([row, row]), files[-1])
    files.append(tmp_path / "list.json")
    files[-1].write_text(json.dumps([rows[0], "no row", rows[1]]), encoding="utf-8")
    files.append(write_lines(tmp_path / "lines.jsonl", [json.dumps(row).encode() for row in rows]))
    files.append(tmp_path / "alpaca.csv")
    files[-1].write_text("instruction,input,output,history\nAdd.,1 + 1,2,\n", encoding="utf-8")
    found = list(read_chat(files, RowFormat(), LIMIT))
    assert [row.place for row in found if isinstance(row, BadRow)] == [f"{tmp_path}/list.json:2"]
    chats = [[m.content for m in row.messages] for row in found if isinstance(row, Conversation)]
    assert chats == [["a", "b"]] * 8 + [["Add.\n1 + 1", "2"]]


def test_a_table_without_any_of_the_columns_is_one_error(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist([{"text": "a"}]), tmp_path / "text.parquet")
    with pytest.raises(ValueError, match="no column 'messages' or .*its columns are 'text' .say what .*dataset_info"):
        list(read_chat([tmp_path / "text.parquet"], RowFormat(), LIMIT))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
NAMES = ("role", "from", "content", "value", "weight", "train", "tool_calls", "name", "arguments", "function")
TURN = st.fixed_dictionaries(
    {"role": st.sampled_from(("user", "assistant", "system", "tool", "function_call", "x")), "content": JSON},
    optional={name: JSON for name in NAMES[4:]},
)
KEYS = ("messages", "conversations", "prompt", "completion", "instruction", "input", "output", "history", "tools")
RECORD = st.dictionaries(st.sampled_from((*KEYS, "system", "label")), JSON | st.lists(TURN, max_size=4), max_size=5)


@settings(max_examples=300, deadline=None)
@given(st.one_of(RECORD, JSON))
def test_any_record_is_a_conversation_or_a_reason(value: Any) -> None:
    found = read(value)
    if isinstance(found, BadRow):
        assert found.reason and found.reason.isprintable() and ": " in found.reason
        return
    roles = [message.role for message in found.messages]
    assert roles[-1] == "assistant" and roles[roles[0] == "system"] == "user" and "system" not in roles[1:]
    assert all(message.content.strip() or message.tool_calls for message in found.messages if message.role != "tool")


@settings(max_examples=40, deadline=None)
@given(rows=st.lists(st.one_of(RECORD, JSON, st.binary(max_size=8)), max_size=12))
def test_every_line_becomes_a_conversation_or_a_bad_row(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Any]
) -> None:
    lines = [r.replace(b"\n", b"x") if isinstance(r, bytes) else json.dumps(r).encode() for r in rows]
    path = write_lines(tmp_path_factory.mktemp("rows") / "a.jsonl", lines)
    found = list(read_chat([path], RowFormat(), LIMIT))
    written = [number for number, line in enumerate(lines, start=1) if line.strip()]
    assert [row.place for row in found] == [f"{path}:{number}" for number in written]
