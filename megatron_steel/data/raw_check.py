"""Checks of raw rows before anything is trained on them: schema, empty texts, chats, evaluation sets, self-identity.

Every finding is one line that begins with file:line. Nothing is changed or dropped.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_steel.data.clean_text import Text
from megatron_steel.data.contamination import build_index, record_strings, strings
from megatron_steel.data.raw_rows import RawRow

ANSWER_KEYS = ("output", "response", "completion", "answer", "chosen", "rejected")
QUESTION_KEYS = ("text", "content", "instruction", "prompt", "question", "query")
CHAT_KEYS = ("messages", "conversations", "conversation")
SIDES = {
    "ask": ("user", "human"),
    "tool": ("tool", "observation", "function", "ipython"),
    "answer": ("assistant", "gpt", "bot", "chatgpt", "function_call"),
    "system": ("system",),
}
MAY_FOLLOW = {"ask": ("start", "answer"), "tool": ("answer", "tool"), "answer": ("ask", "tool")}
SIDE_OF = {role: side for side, roles in SIDES.items() for role in roles}
# What a model says that believes to be another one. Compared in lower case, without white space.
IDENTITY_STRINGS = (
    "created by openai",
    "developed by openai",
    "trained by openai",
    "made by openai",
    "i am chatgpt",
    "i'm chatgpt",
    "created by anthropic",
    "as an ai language model",
    "\u7531openai",  # "by OpenAI"
    "openai\u5f00\u53d1",  # "developed by OpenAI"
    "openai\u8bad\u7ec3",  # "trained by OpenAI"
    "\u6211\u662fchatgpt",  # "I am ChatGPT"
    "\u4f5c\u4e3a\u4e00\u4e2aai\u8bed\u8a00\u6a21\u578b",  # "as an AI language model"
    "\u4f5c\u4e3a\u4e00\u4e2a\u4eba\u5de5\u667a\u80fd\u8bed\u8a00\u6a21\u578b",  # the same, spelled out
    "\u6211\u662f\u901a\u4e49\u5343\u95ee",  # "I am Tongyi Qianwen"
    "\u6211\u662f\u6587\u5fc3\u4e00\u8a00",  # "I am Ernie Bot"
)
# Shorter strings of an evaluation record ("A", "true") are everywhere and prove nothing.
MIN_EXACT_CHARACTERS = 8
PLACES_PER_SCHEMA = 1000
Schema = tuple[tuple[str, str], ...]
WHITE = re.compile(r"\s+")


@dataclass(frozen=True)
class CheckOptions:
    """What is looked for. ``evaluation`` are .jsonl files; ``ngram`` the tokens that count as taken from one."""

    evaluation: tuple[str, ...] = ()
    ngram: int = 13
    identity_strings: tuple[str, ...] = IDENTITY_STRINGS
    text_keys: tuple[str, ...] = ()
    """Keys, besides the usual ones, whose text must not be empty and must be there."""


@dataclass
class Seen:
    """Rows of one schema: how many, and the places of the first of them."""

    rows: int = 0
    places: list[str] = field(default_factory=list)


def check_rows(rows: Iterable[RawRow], options: CheckOptions) -> Iterator[str]:
    """Yield a line per finding, those about single rows in order, then the schemas that differ from the commonest."""
    schemas: dict[Schema, Seen] = {}
    evaluation = Evaluation(options) if options.evaluation else None
    identity = [squeeze(text) for text in options.identity_strings]
    for row in rows:
        if row.error is not None:
            yield f"{row.place}: {row.error}"
            continue
        if not isinstance(row.value, dict):
            yield f"{row.place}: the row is {type_name(row.value)}, not an object"
            continue
        seen = schemas.setdefault(schema_of(row.value), Seen())
        seen.rows += 1
        if len(seen.places) < PLACES_PER_SCHEMA:
            seen.places.append(row.place)
        for problem in [*empty_texts(row.value, options.text_keys), *chat_problems(row.value)]:
            yield f"{row.place}: {problem}"
        found = squeeze("\n".join(strings(row.value)))
        for text, wanted in zip(options.identity_strings, identity, strict=True):
            if wanted and wanted in found:
                yield f"{row.place}: says {text!r}, which a model would repeat about itself"
        for problem in evaluation.problems(row.value) if evaluation else ():
            yield f"{row.place}: {problem}"
    yield from schema_problems(schemas)


def schema_of(row: dict[str, Any]) -> Schema:
    """Keys and types of a row, sorted by key."""
    return tuple(sorted((key, type_name(value)) for key, value in row.items()))


def type_name(value: Any) -> str:
    """JSON's name of a value's type; a list with those of its items."""
    if isinstance(value, list):
        return f"list of {' or '.join(sorted({type_name(item) for item in value})) or 'nothing'}"
    names = {bool: "boolean", int: "integer", float: "number", str: "text", dict: "object", type(None): "null"}
    return names.get(type(value), type(value).__name__)


def schema_problems(schemas: dict[Schema, Seen]) -> Iterator[str]:
    """A line per row whose schema is not the commonest one (the first of them at a tie)."""
    if not schemas:
        return
    usual = max(schemas, key=lambda schema: schemas[schema].rows)
    for schema, seen in schemas.items():
        if schema == usual:
            continue
        difference = schema_difference(dict(usual), dict(schema))
        against = f"unlike {schemas[usual].rows} rows (as {schemas[usual].places[0]})"
        for place in seen.places:
            yield f"{place}: {difference}, {against}"
        if seen.rows > len(seen.places):
            yield f"{seen.places[-1]}: ... and {seen.rows - len(seen.places)} more rows after it: {difference}"


def schema_difference(usual: dict[str, str], other: dict[str, str]) -> str:
    """What is missing, added or of another type."""
    parts = [f"no key {key!r}" for key in usual if key not in other]
    parts += [f"extra key {key!r} ({other[key]})" for key in other if key not in usual]
    parts += [f"{key!r} is {other[key]}, not {usual[key]}" for key in usual if other.get(key, usual[key]) != usual[key]]
    return "; ".join(parts)


def empty_texts(row: dict[str, Any], text_keys: tuple[str, ...]) -> Iterator[str]:
    """A phrase per text of a row that is missing or blank. An empty ``input`` of an instruction is fine."""
    for key in text_keys:
        if key not in row:
            yield f"no text: no key {key!r}"
    for key in dict.fromkeys((*text_keys, *QUESTION_KEYS, *ANSWER_KEYS)):
        if key in row and is_blank(row[key]):
            yield f"empty {'answer' if key in ANSWER_KEYS else 'text'}: {key!r}"


def is_blank(value: Any) -> bool:
    """Whether a value is no text at all: null, blank, or a list of nothing else."""
    if isinstance(value, list):
        return all(map(is_blank, value))
    return value is None or (isinstance(value, str) and not value.strip())


def chat_problems(row: dict[str, Any]) -> Iterator[str]:
    """A phrase per fault in the messages of a chat record; records without messages have none."""
    for key in CHAT_KEYS:
        if isinstance(row.get(key), list):
            yield from message_problems(row[key])


def message_problems(messages: list[Any]) -> Iterator[str]:
    """Roles must be: system at most first, then a question or tool result and an answer in turn, an answer last."""
    if not messages:
        yield "a chat without messages"
        return
    before, before_role = "start", "nothing"
    for number, message in enumerate(messages):
        role, content = role_and_content(message)
        if role is None:
            yield f"message {number} has no role"
            continue
        side = SIDE_OF.get(role.lower())
        if side is None:
            yield f"message {number} has the unknown role {role!r}"
            continue
        if is_blank(content) and not (isinstance(message, dict) and message.get("tool_calls")):
            yield f"empty {'answer' if side == 'answer' else 'message'}: message {number} ({role})"
        if side == "system":
            if number:
                yield f"role order: message {number} is {role}, which may only come first"
            continue
        if before not in MAY_FOLLOW[side]:
            yield f"role order: message {number} ({role}) follows {before_role}"
        before, before_role = side, role
    if before != "answer":
        yield "role order: the last message is no answer"


def role_and_content(message: Any) -> tuple[str | None, Any]:
    """Role and content of a message in the forms of OpenAI (role, content) and ShareGPT (from, value)."""
    if not isinstance(message, dict):
        return None, None
    role = message.get("role", message.get("from"))
    return (role if isinstance(role, str) else None), message.get("content", message.get("value"))


def squeeze(text: str) -> str:
    """Lower case without white space: how texts are compared here."""
    return WHITE.sub("", text.lower())


class Evaluation:
    """Evaluation records that training rows are compared with: whole strings, and n-grams of tokens."""

    def __init__(self, options: CheckOptions) -> None:
        self.n = options.ngram
        if self.n < 1:
            raise ValueError(f"--ngram {self.n}: must be at least 1")
        self.index = build_index(options.evaluation, (), self.n)
        self.exact: dict[bytes, str] = {}
        for file in options.evaluation:
            with open(Path(file), encoding="utf-8") as stream:
                for number, line in enumerate(stream, start=1):
                    place = f"{file}:{number}"
                    for text in record_strings(line, (), place) if line.strip() else ():
                        if (key := self._key(text)) is not None:
                            self.exact.setdefault(key, place)

    @staticmethod
    def _key(text: str) -> bytes | None:
        """Hash of a text as it is compared; None for one that is too short to prove anything."""
        squeezed = squeeze(text)
        if len(squeezed) < MIN_EXACT_CHARACTERS:
            return None
        return hashlib.blake2b(squeezed.encode("utf-8", "surrogatepass"), digest_size=16).digest()

    def problems(self, row: dict[str, Any]) -> Iterator[str]:
        """A phrase per string of a row that is in an evaluation record, whole or with at least one n-gram."""
        for text in strings(row):
            key = self._key(text)
            if key is not None and key in self.exact:
                yield f"in the evaluation set: the same text as {self.exact[key]}"
                continue
            measured = Text(text)
            found, records = self.index.find(measured.token_ngrams(self.n))
            if len(found):
                yield (
                    f"in the evaluation set: shares {len(found)} {self.n}-grams with "
                    f"{self.index.places[int(records[0])]}: {measured.excerpt(int(found[0]), self.n)!r}"
                )
