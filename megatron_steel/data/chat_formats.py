"""One record of a chat data set to a `Conversation`, or to the reason why it is none.

    messages            OpenAI: role, content, tool_calls; weight, train, loss of a turn
    conversations       ShareGPT, Infinity-Instruct, BELLE 3.5M: from, value
    instruction, output Alpaca: with input, system, history; BELLE, also its dialogues written as "Human:... Assistant:"
    prompt, completion  texts, or lists of turns

Which of them a record has is seen from its keys (the first of these that it has), or said by a `RowFormat`. Keys
without a value count as absent, as tables have every key in every row. Other keys are not looked at, so data sets whose
ids or labels differ in type are read alike.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_steel.data.chat_messages import (
    BadRecord,
    Tags,
    check_answered,
    check_turns,
    kind,
    parse_messages,
    parse_tools,
)
from megatron_steel.text.conversation import Conversation, Message

Kind = Literal["messages", "alpaca", "completion"]
MESSAGE_KEYS = ("messages", "conversations")
# Columns of other stages and of other senses than text: a record with them means something else.
REFUSED: Mapping[str, str] = {
    "chosen": "it is a preference pair, which finetuning does not take",
    "rejected": "it is a preference pair, which finetuning does not take",
    "rejected_response": "it is a preference pair, which finetuning does not take",
    "kto_tag": "it is feedback, which finetuning does not take",
    "images": "only text is read",
    "videos": "only text is read",
    "audios": "only text is read",
}
FEEDBACK = "label"
"""Says in some sets which answers are bad, and anything but true and false in others."""
BELLE_TURN = re.compile(r"(?:^|\n)(Human|Assistant):")


@dataclass(frozen=True)
class BadRow:
    """A row that is no conversation."""

    place: str
    reason: str


@dataclass(kw_only=True, frozen=True)
class Columns:
    """Under which keys a record holds what; None where it is not looked for."""

    prompt: str = "instruction"
    query: str | None = "input"
    response: str = "output"
    history: str | None = "history"
    messages: str | None = None
    """None for the first of `MESSAGE_KEYS`."""
    system: str | None = "system"
    tools: str | None = "tools"
    chosen: str = "chosen"
    rejected: str = "rejected"
    kto_tag: str | None = None
    """None for the first of pair_formats.JUDGEMENTS."""


@dataclass(kw_only=True, frozen=True)
class RowFormat:
    """How records are to be read; the default reads any of the formats by its own names."""

    kind: Kind | None = None
    """None to look at each record."""
    columns: Columns = field(default_factory=Columns)
    tags: Tags = field(default_factory=Tags)

    def keys(self) -> list[str]:
        """Every key of a record that is looked at, for readers of tables."""
        columns = self.columns
        turns: list[str | None] = [columns.messages] if columns.messages else list(MESSAGE_KEYS)
        alpaca: list[str | None] = [columns.prompt, columns.query, columns.response, columns.history]
        keys: dict[str, list[str | None]] = {
            "messages": turns,
            "alpaca": alpaca,
            "completion": ["prompt", "completion"],
        }
        chosen = keys[self.kind] if self.kind else [key for names in keys.values() for key in names]
        keys_of_all = [columns.system, columns.tools, FEEDBACK, *REFUSED]
        return [key for key in dict.fromkeys([*chosen, *keys_of_all]) if key is not None]


def read_record(value: Any, place: str, form: RowFormat, max_turn_bytes: int) -> Conversation | BadRow:
    """The conversation of a record, or why it is none; ``place`` is where it was read."""
    try:
        messages, tools = parse_record(value, form)
        check_turns(messages, max_turn_bytes)
        check_answered(messages)
    except BadRecord as error:
        return BadRow(place, str(error))
    return Conversation(messages=tuple(messages), place=place, tools=tools)


def parse_record(value: Any, form: RowFormat) -> tuple[list[Message], tuple[Mapping[str, Any], ...]]:
    """Turns and tools of a record, of which the order is not checked. Raises `BadRecord`."""
    if not isinstance(value, Mapping):
        raise BadRecord(f"wrong type: the row must be an object, not {kind(value)}")
    for key, reason in REFUSED.items():
        if value.get(key) not in (None, [], ""):
            raise BadRecord(f"other data: the row has {key!r}; {reason}")
    if form.kind is None and isinstance(value.get(FEEDBACK), bool):
        raise BadRecord(
            f"other data: the row has a {FEEDBACK!r} of true or false; it is feedback, which finetuning does not take"
        )
    columns = form.columns
    chosen = form.kind or _find_kind(value, columns)
    if chosen == "messages":
        messages = _messages(value, form)
    elif chosen == "alpaca":
        messages = _alpaca(value, columns)
    else:
        messages = _completion(value, form.tags)
    system = _text(value, columns.system) if columns.system else ""
    if messages[0].role == "system":
        # As in LLaMA-Factory a turn says more than a column.
        messages = messages if messages[0].content.strip() else messages[1:]
    elif system.strip():
        messages = [Message(role="system", content=system), *messages]
    if not messages:
        raise BadRecord("no turns: there is only an empty system turn")
    tools = parse_tools(value.get(columns.tools)) if columns.tools else ()
    return messages, tools


def _find_kind(value: Mapping[str, Any], columns: Columns) -> Kind:
    """The format of a record by its keys."""
    there = {key for key, item in value.items() if item is not None}
    if there.intersection(MESSAGE_KEYS):
        return "messages"
    if columns.prompt in there or columns.response in there:
        return "alpaca"
    if "prompt" in there or "completion" in there:
        return "completion"
    shown = ", ".join(map(repr, sorted(there))) or "none"
    raise BadRecord(
        "missing key: none of 'messages', 'conversations', 'instruction' and 'output', 'prompt' and 'completion'; the "
        f"keys are {shown} (say what they are in a dataset_info.json)"
    )


def _messages(value: Mapping[str, Any], form: RowFormat) -> list[Message]:
    """Turns of a list of turns."""
    keys = [form.columns.messages] if form.columns.messages else [k for k in MESSAGE_KEYS if value.get(k) is not None]
    if not keys or value.get(keys[0]) is None:
        raise BadRecord(f"missing key: the row has no {(keys or MESSAGE_KEYS)[0]!r}")
    return parse_messages(value[keys[0]], form.tags, keys[0])


def _alpaca(value: Mapping[str, Any], columns: Columns) -> list[Message]:
    """Turns of instruction [+ newline + input] and output, after those of the history."""
    for key in (columns.prompt, columns.response):
        if value.get(key) is None and not (key == columns.prompt and columns.query and value.get(columns.query)):
            raise BadRecord(f"missing key: the row has no {key!r}")
    instruction, answer = _text(value, columns.prompt), _text(value, columns.response)
    query = _text(value, columns.query) if columns.query else ""
    before = _history(value.get(columns.history), columns.history) if columns.history else []
    spoken = _belle(instruction) if not query and not before else None
    prompt = spoken or [Message(role="user", content="\n".join(part for part in (instruction, query) if part))]
    return [*before, *prompt, Message(role="assistant", content=answer)]


def _history(value: Any, key: str) -> list[Message]:
    """Turns of [prompt, answer] pairs."""
    if value in (None, "", []):
        return []
    messages = []
    for pair in value if isinstance(value, list) else [value]:
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise BadRecord(f"wrong type: {key!r} must be a list of [prompt, answer] pairs of text")
        messages += [Message(role="user", content=pair[0]), Message(role="assistant", content=pair[1])]
    return messages


def _belle(text: str) -> list[Message] | None:
    """Turns of a dialogue in one text, as in BELLE's multiturn_chat: from "Human:" to an "Assistant:" without text.

    None for any other text.
    """
    parts = BELLE_TURN.split(text.strip())
    speakers = parts[1::2]
    turns = len(speakers)
    if parts[0] or turns < 2 or turns % 2 or parts[-1].strip() or speakers != ["Human", "Assistant"] * (turns // 2):
        return None
    texts = [part.strip() for part in parts[2:-1:2]]
    return [Message(role="assistant" if i % 2 else "user", content=said) for i, said in enumerate(texts)]


def _completion(value: Mapping[str, Any], tags: Tags) -> list[Message]:
    """Turns of a prompt and its completion; answers within the prompt are not trained, as in TRL."""
    for key in ("prompt", "completion"):
        if value.get(key) is None:
            raise BadRecord(f"missing key: the row has no {key!r}")
    prompt, completion = value["prompt"], value["completion"]
    if isinstance(prompt, list) != isinstance(completion, list):
        raise BadRecord("wrong type: 'prompt' and 'completion' must be both text, or both lists of turns")
    if not isinstance(prompt, list):
        texts = _text(value, "prompt"), _text(value, "completion")
        return [Message(role="user", content=texts[0]), Message(role="assistant", content=texts[1])]
    before, after = parse_messages(prompt, tags, "prompt"), parse_messages(completion, tags, "completion")
    if before[-1].role == "assistant" or after[0].role != "assistant":
        raise BadRecord("role order: 'completion' must begin with the answer that 'prompt' ends before")
    untrained = [dataclasses.replace(m, trained=False) if m.role == "assistant" else m for m in before]
    return [*untrained, *after]


def _text(value: Mapping[str, Any], key: str) -> str:
    """The text under a key, empty where there is none."""
    text = value.get(key)
    if text is not None and not isinstance(text, str):
        raise BadRecord(f"wrong type: {key!r} must be text, not {kind(text)}")
    return text or ""
