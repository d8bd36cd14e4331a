"""Turns as data sets write them to `Message`, and the rules of their order; every chat format is parsed through here.

A turn that cannot be read, or would be read to something else than was meant, raises `BadRecord`: nothing is repaired.
Its reason begins with its kind, up to a colon, under which rows are counted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_steel.text.conversation import Message, Role

CALL = "call"
ROLES: Mapping[str, str] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "tool_response": "tool",
    "function_call": CALL,
    "tool_call": CALL,
}
"""What the roles of OpenAI, ShareGPT and ms-swift are; a call is an answer whose text is the JSON of calls."""

# Keys of a turn by which it says whether, and how much, it is trained: ms-swift, axolotl, OpenAI, LLaMA-Factory.
TRAINED_KEYS, WEIGHT_KEYS = ("train", "loss"), ("weight", "loss_weight")
MAX_WEIGHT = 1_000_000
# What a turn would lose without a word.
REFUSED_KEYS = ("reasoning_content", "reasoning", "thinking", "images", "videos", "audios")

# Roles that may follow a role, and begin.
FOLLOWS: Mapping[str | None, tuple[str, ...]] = {
    None: ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}


class BadRecord(ValueError):
    """A record that is no conversation; the text is the reason."""


@dataclass(kw_only=True, frozen=True)
class Tags:
    """Under which keys a turn holds its role and its text, and what roles are called beside `ROLES`."""

    role_keys: tuple[str, ...] = ("role", "from")
    content_keys: tuple[str, ...] = ("content", "value")
    roles: tuple[tuple[str, str], ...] = ()
    """(name, role) pairs."""

    def role(self, name: Any) -> str | None:
        """The role of that name."""
        if not isinstance(name, str):
            return None
        return dict(self.roles).get(name) or ROLES.get(name)


def parse_messages(values: Any, tags: Tags, key: str) -> list[Message]:
    """The turns under ``key`` of a record, in order. Raises `BadRecord`; turns are counted from 1 in its reason."""
    if not isinstance(values, list):
        raise BadRecord(f"wrong type: {key!r} must be a list of turns, not {kind(values)}")
    if not values:
        raise BadRecord(f"no turns: {key!r} is empty")
    return [parse_message(value, tags, f"turn {number}") for number, value in enumerate(values, start=1)]


def parse_message(value: Any, tags: Tags, where: str) -> Message:
    """One turn. Raises `BadRecord`."""
    if not isinstance(value, Mapping):
        raise BadRecord(f"wrong type: {where} must be an object, not {kind(value)}")
    name = _first(value, tags.role_keys, where, required=True)
    role = tags.role(name)
    if role is None:
        raise BadRecord(f"unknown role: {where} is of {str(name)[:40]!r}; give its tag in a dataset_info.json")
    for key in REFUSED_KEYS:
        if value.get(key):
            hint = "put it into the text, as <think>...</think>" if key in REFUSED_KEYS[:3] else "only text is read"
            raise BadRecord(f"unread key: {where} has {key!r}; {hint}")
    calls = [] if value.get("tool_calls") is None else parse_calls(value["tool_calls"], where)
    if value.get("function_call") is not None:
        calls += parse_calls(value["function_call"], where)
    content = _first(value, tags.content_keys, where, required=not calls)
    if role == CALL:
        calls, content, role = calls + parse_calls(content, where), "", "assistant"
    if calls and role != "assistant":
        raise BadRecord(f"tool call: {where} ({role}) calls a function; only answers can")
    trained, weight = _training(value, role, where)
    text = "" if content is None else _text(content, where)
    return Message(role=_role(role), content=text, trained=trained, weight=weight, tool_calls=tuple(calls))


def parse_calls(value: Any, where: str) -> list[dict[str, Any]]:
    """Calls of functions, each with ``name`` and ``arguments``: a JSON text, a call, or a list of calls of any kind."""
    value = _json(value, f"tool call: the call of {where}")
    calls = []
    for call in value if isinstance(value, list) else [value]:
        inner = (
            call.get("function") if isinstance(call, Mapping) and isinstance(call.get("function"), Mapping) else call
        )
        if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str) or not inner["name"]:
            raise BadRecord(f"tool call: a call of {where} has no name")
        arguments = inner.get("arguments")
        arguments = {} if arguments in (None, "") else _json(arguments, f"tool call: the arguments of {where}")
        if not isinstance(arguments, Mapping):
            raise BadRecord(f"tool call: the arguments of {where} must be an object, not {kind(arguments)}")
        calls.append({"name": inner["name"], "arguments": dict(arguments)})
    return calls


def parse_tools(value: Any) -> tuple[Mapping[str, Any], ...]:
    """Functions as the JSON schemas of OpenAI, from a list of them or its JSON text; without the outer level too."""
    if value in (None, "", []):
        return ()
    value = _json(value, "tools: the text")
    tools = []
    for tool in value if isinstance(value, list) else [value]:
        inner = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
            raise BadRecord("tools: each must be an object with a name")
        tools.append(dict(tool) if "function" in tool else {"type": "function", "function": dict(tool)})
    text_bytes(_dumps(tools), "a tool")
    return tuple(tools)


def check_turns(messages: Sequence[Message], max_turn_bytes: int) -> None:
    """Raises `BadRecord` for turns in a wrong order, and for one that is empty, too long or not text.

    A user or tool turn and an answer take turns; several tool turns may follow a call. The last may be of any role.
    """
    before: str | None = None
    for number, message in enumerate(messages, start=1):
        where = f"turn {number} ({message.role})"
        if message.role not in FOLLOWS[before]:
            raise BadRecord(f"role order: {where} " + ("is the first" if before is None else f"follows {before}"))
        if not message.content.strip() and not message.tool_calls and message.role in ("user", "assistant"):
            what = "answer" if message.role == "assistant" else "prompt"
            raise BadRecord(f"empty {what}: {where} has no text")
        before = message.role
        size = text_bytes(message.content, where) + sum(text_bytes(_dumps(call), where) for call in message.tool_calls)
        if size > max_turn_bytes:
            raise BadRecord(f"long turn: {where} has {size:,} bytes, more than --max-turn-bytes {max_turn_bytes:,}")


def check_answered(messages: Sequence[Message]) -> None:
    """Raises `BadRecord` where the last turn is no answer: nothing would be trained after it."""
    if messages[-1].role != "assistant":
        raise BadRecord(f"no answer: the last turn is turn {len(messages)} ({messages[-1].role})")


def text_bytes(text: str, where: str) -> int:
    """Size in UTF-8. Raises `BadRecord` for what cannot be written so."""
    try:
        return len(text.encode())
    except UnicodeEncodeError as error:
        raise BadRecord(f"not text: {where} holds half of a surrogate pair") from error


def kind(value: Any) -> str:
    """The type of a JSON value, for messages."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _dumps(value: Any) -> str:
    """JSON with characters as they are."""
    return json.dumps(value, ensure_ascii=False, default=str)


def _role(name: str) -> Role:
    """A name that is known to be a role."""
    roles: dict[str, Role] = {"system": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
    return roles[name]


def _first(value: Mapping[str, Any], keys: Sequence[str], where: str, required: bool) -> Any:
    """The value of the first of the keys that has one."""
    for key in keys:
        if value.get(key) is not None:
            return value[key]
    if required:
        there = ", ".join(repr(key) for key in value if value[key] is not None) or "none"
        raise BadRecord(f"missing key: {where} has no {' or '.join(map(repr, keys))}; its keys are {there}")
    return None


def _text(content: Any, where: str) -> str:
    """The text of a turn: as it is, or parts of text one behind the other."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise BadRecord(f"wrong type: the text of {where} must be text, not {kind(content)}")
    texts = []
    for part in content:
        if not isinstance(part, Mapping) or part.get("type") != "text":
            found = part.get("type") if isinstance(part, Mapping) else kind(part)
            raise BadRecord(f"unread part: {where} holds a part of type {str(found)[:40]!r}; only text is read")
        text = part.get("text", part.get("value"))
        if not isinstance(text, str):
            raise BadRecord(f"wrong type: a part of {where} must hold text, not {kind(text)}")
        texts.append(text)
    return "".join(texts)


def _json(value: Any, what: str) -> Any:
    """The value of a JSON text; any other value as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (json.JSONDecodeError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deep"
        raise BadRecord(f"{what} is not JSON ({reason})") from error


def _training(value: Mapping[str, Any], role: str, where: str) -> tuple[bool | None, float]:
    """What a turn says about its training: yes, no or nothing, and the weight of its tokens."""
    trained: bool | None = None
    weight = 1.0
    for key in TRAINED_KEYS:
        if value.get(key) is not None:
            if not isinstance(value[key], bool):
                raise BadRecord(f"wrong type: {key!r} of {where} must be true or false, not {kind(value[key])}")
            trained = value[key]
    for key in WEIGHT_KEYS:
        number = value.get(key)
        if number is None:
            continue
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise BadRecord(f"wrong type: {key!r} of {where} must be a number, not {kind(number)}")
        if not 0 <= number <= MAX_WEIGHT:
            raise BadRecord(f"weight: {key!r} of {where} is not from 0 to {MAX_WEIGHT:,}")
        weight = float(number)
        if weight == 0 or role != "assistant":
            trained, weight = weight > 0, 1.0
    if role == "assistant":
        return trained, weight
    if trained:
        raise BadRecord(f"trained prompt: {where} ({role}) asks to be trained; only answers can, or --train-on-prompt")
    return None, 1.0
