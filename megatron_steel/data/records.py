"""Rows of named source formats as ``Record(text, source, lang)``: one function per format, listed in ``FORMATS``.

    baike      {title, summary, sections: [{title, content}]}   Baidu Baike
    baidu_qa   {title, answer}, desc                            Baidu QA
    belle      {instruction, input, output}, system, history    BELLE and other alpaca files
    sharegpt   {conversations: [{from, value}]}, system         BELLE and ShareGPT conversations
    messages   {messages: [{role, content}]}, system            the same in OpenAI's words
    firefly    {input, target}
    moss       {conversation: [{human, assistant}]}, meta_instruction
    zhihu      {INSTRUCTION, RESPONSE, METADATA}                answers with 100 upvotes or more
    wiki       {completion}                                     items of a JSON list
    starcoder  {content}                                        language "code"
    wanjuan    {content}, or an exam {q_main, option_a..., std_ans, answer_detail}
    wudao      {title, content}
    pile       {text, meta: {pile_set_name}}                    source "pile/NAME"

Keys in braces must be there; those behind them are used where there. A conversation becomes ChatML, trained on as a
whole. Nothing else is changed in a text, but carriage returns are removed from prose: no Unicode normalisation, which
would turn Chinese punctuation into ASCII, and no stripping of characters, which would take the last letters of answers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from megatron_steel.data.letters import main_script
from megatron_steel.data.read_text import is_text

SYSTEM = "You are a helpful assistant."
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
    "system": "system",
}
MIN_UPVOTES = 100
COLON = "\uff1a"  # fullwidth
TEN_THOUSAND = "\u4e07"
# An option that brings its letter gets no second one.
LETTERED = re.compile("\\s*[A-Ea-e]\\s*[.:)\uff0e\u3001\uff1a\uff09]")
UPVOTES = re.compile(rf"([0-9][0-9,.]*)\s*({TEN_THOUSAND}?)")
EXAM_PARTS = {
    "q_main": "",
    **{f"option_{letter}": f"{letter.upper()}. " for letter in "abcde"},
    "std_ans": f"\u6807\u51c6\u7b54\u6848{COLON}",
    "answer_detail": f"\u89e3\u6790{COLON}",
}


class Record(NamedTuple):
    """One training document: its text, the name of its source, and its language: zh, en, other or code."""

    text: str
    source: str
    lang: str


class Turn(NamedTuple):
    """One message of a conversation; ``role`` is a ChatML role."""

    role: str
    text: str


def baike(row: dict[str, Any]) -> Record | None:
    """Title and summary, then title and content of each section, a line each."""
    parts = [(prose(row, "title"), prose(row, "summary"))]
    for number, section in enumerate(items(row, "sections"), start=1):
        where = f"section {number}: "
        parts.append((prose(section, "title", where), prose(section, "content", where)))
    return document("\n".join(f"{title}{COLON}{text}" for title, text in parts if text.strip()), "baike")


def baidu_qa(row: dict[str, Any]) -> Record | None:
    """A question with its description, where that says more, and its answer."""
    question, more = prose(row, "title"), optional(row, "desc")
    if more.strip().startswith(question.strip()):
        question = more
    elif more.strip():
        question = f"{question}\n{more}"
    return chat([Turn("user", question), Turn("assistant", prose(row, "answer"))], "baidu_qa")


def belle(row: dict[str, Any]) -> Record | None:
    """An instruction, with its input on the next line, and the output; earlier rounds in ``history`` come first."""
    turns = [Turn("system", text) for text in [optional(row, "system")] if text]
    for number, round_ in enumerate(row.get("history") or (), start=1):
        if not isinstance(round_, list) or len(round_) != 2 or not all(isinstance(text, str) for text in round_):
            raise ValueError(f"history {number} must be a question and an answer")
        turns += [Turn("user", round_[0]), Turn("assistant", round_[1])]
    question, more = prose(row, "instruction"), prose(row, "input")
    turns += [Turn("user", f"{question}\n{more}" if more else question), Turn("assistant", prose(row, "output"))]
    return chat(turns, "belle")


def sharegpt(row: dict[str, Any]) -> Record | None:
    """The messages in their order."""
    return conversation(row, "conversations", "from", "value", "sharegpt")


def messages(row: dict[str, Any]) -> Record | None:
    """The messages in their order."""
    return conversation(row, "messages", "role", "content", "messages")


def conversation(row: dict[str, Any], key: str, role_key: str, text_key: str, source: str) -> Record | None:
    """Messages with roles. A system message of their own counts, otherwise the row's ``system``."""
    turns: list[Turn] = []
    for number, message in enumerate(items(row, key), start=1):
        where = f"message {number}: "
        role = prose(message, role_key, where)
        if role not in ROLES:
            raise ValueError(f"message {number} has the role {role!r}; known are {', '.join(ROLES)}")
        turns.append(Turn(ROLES[role], prose(message, text_key, where)))
    if not (turns and turns[0].role == "system") and (system := optional(row, "system")):
        turns.insert(0, Turn("system", system))
    roles = [turn.role for turn in turns if turn.role != "system"]
    asked, answered = set(roles[::2]), set(roles[1::2])
    late = any(turn.role == "system" for turn in turns[1:])
    if not roles or len(roles) % 2 or late or not asked <= {"user", "tool"} or answered != {"assistant"}:
        there = ", ".join(turn.role for turn in turns) or "no turns"
        raise ValueError(f"{key!r} must go user, assistant, user, assistant ...; it holds {there}")
    return chat(turns, source)


def firefly(row: dict[str, Any]) -> Record | None:
    """The input and the target; the kind of task is not part of the text."""
    return chat([Turn("user", prose(row, "input")), Turn("assistant", prose(row, "target"))], "firefly")


def moss(row: dict[str, Any]) -> Record | None:
    """Every round of the conversation."""
    turns = [Turn("system", text) for text in [optional(row, "meta_instruction")] if text]
    for number, round_ in enumerate(items(row, "conversation"), start=1):
        where = f"round {number}: "
        turns += [Turn("user", prose(round_, "human", where)), Turn("assistant", prose(round_, "assistant", where))]
    if not row["conversation"]:
        raise ValueError("'conversation' has no turns")
    return chat(turns, "moss")


def zhihu(row: dict[str, Any]) -> Record | None:
    """A question and its answer; dropped below ``MIN_UPVOTES``."""
    question, answer, meta = prose(row, "INSTRUCTION"), prose(row, "RESPONSE"), value(row, "METADATA")
    if isinstance(meta, str):
        try:
            meta = json.loads(meta)
        except json.JSONDecodeError as error:
            raise ValueError(f"'METADATA' is not JSON: {error.msg}") from error
    if not isinstance(meta, dict):
        raise ValueError(f"'METADATA' must hold a JSON object, not {type(meta).__name__}")
    if upvotes(value(meta, "upvotes", "METADATA: ")) < MIN_UPVOTES:
        return None
    return chat([Turn("user", question), Turn("assistant", answer)], "zhihu")


def upvotes(written: Any) -> float:
    """The number in a button's text, which may be in ten thousands; 0 when it shows none."""
    found = UPVOTES.search(str(written))
    if not found:
        return 0
    return float(found[1].replace(",", "").rstrip(".")) * (10_000 if found[2] else 1)


def wiki(row: dict[str, Any]) -> Record | None:
    """One article."""
    return document(prose(row, "completion"), "wiki")


def starcoder(row: dict[str, Any]) -> Record | None:
    """One file, unchanged."""
    text = string(row, "content")
    return Record(text, "starcoder", "code") if text.strip() else None


def wanjuan(row: dict[str, Any]) -> Record | None:
    """An article, or the parts of an exam question, a line each."""
    if "q_main" not in row:
        if "content" not in row:
            raise ValueError(f"no key 'content' or 'q_main'; its keys are {keys(row)}")
        return document(prose(row, "content"), "wanjuan")
    prose(row, "q_main"), prose(row, "std_ans")
    parts = [(label, optional(row, key)) for key, label in EXAM_PARTS.items()]
    parts = [("" if label[1:] == ". " and LETTERED.match(text) else label, text) for label, text in parts]
    return document("\n".join(label + text for label, text in parts if text.strip()), "wanjuan")


def wudao(row: dict[str, Any]) -> Record | None:
    """Title and content, a line each."""
    parts = [prose(row, "title"), prose(row, "content")]
    return document("\n".join(text for text in parts if text.strip()), "wudao")


def pile(row: dict[str, Any]) -> Record | None:
    """The text; its subset becomes part of the source's name, and Github's is code."""
    meta = value(row, "meta")
    if not isinstance(meta, dict):
        raise ValueError(f"'meta' must be a JSON object, not {type(meta).__name__}")
    name = string(meta, "pile_set_name", "meta: ")
    if name == "Github":
        text = string(row, "text")
        return Record(text, f"pile/{name}", "code") if text.strip() else None
    return document(prose(row, "text"), f"pile/{name}")


FORMATS: dict[str, Callable[[dict[str, Any]], Record | None]] = {
    "baike": baike,
    "baidu_qa": baidu_qa,
    "belle": belle,
    "sharegpt": sharegpt,
    "messages": messages,
    "firefly": firefly,
    "moss": moss,
    "zhihu": zhihu,
    "wiki": wiki,
    "starcoder": starcoder,
    "wanjuan": wanjuan,
    "wudao": wudao,
    "pile": pile,
}


# What each format looks at, so that the other columns of a table are not read.
COLUMNS: dict[str, tuple[str, ...]] = {
    "baike": ("title", "summary", "sections"),
    "baidu_qa": ("title", "desc", "answer"),
    "belle": ("instruction", "input", "output", "system", "history"),
    "sharegpt": ("conversations", "system"),
    "messages": ("messages", "system"),
    "firefly": ("input", "target"),
    "moss": ("conversation", "meta_instruction"),
    "zhihu": ("INSTRUCTION", "RESPONSE", "METADATA"),
    "wiki": ("completion",),
    "starcoder": ("content",),
    "wanjuan": ("content", *EXAM_PARTS),
    "wudao": ("title", "content"),
    "pile": ("text", "meta"),
}


def document(text: str, source: str) -> Record | None:
    """A record of prose; None for a blank text."""
    return Record(text, source, main_script(text)) if text.strip() else None


def chat(turns: list[Turn], source: str) -> Record | None:
    """A conversation in ChatML, with ``SYSTEM`` unless it brings its own; None when no answer says anything.

    The text ends with the mark that ends a message, so the end of the last answer is learned too. The language is
    that of the messages, not of the marks around them.
    """
    if not any(turn.role == "assistant" and turn.text.strip() for turn in turns):
        return None
    if turns[0].role != "system":
        turns = [Turn("system", SYSTEM), *turns]
    text = "\n".join(f"<|im_start|>{turn.role}\n{turn.text}<|im_end|>" for turn in turns)
    return Record(text, source, main_script("\n".join(turn.text for turn in turns if turn.role != "system")))


def value(row: dict[str, Any], key: str, where: str = "") -> Any:
    """The value of a key; ``ValueError`` names a missing one."""
    if key not in row:
        raise ValueError(f"{where}no key {key!r}; its keys are {keys(row)}")
    return row[key]


def string(row: dict[str, Any], key: str, where: str = "") -> str:
    """The text under a key, "" for null."""
    text = value(row, key, where)
    if text is None:
        return ""
    if not isinstance(text, str):
        raise ValueError(f"{where}{key!r} must be text, not {type(text).__name__}")
    if not is_text(text):
        raise ValueError(f"{where}{key!r} holds half of a surrogate pair, which is not text")
    return text


def prose(row: dict[str, Any], key: str, where: str = "") -> str:
    """The text under a key, without carriage returns."""
    return string(row, key, where).replace("\r", "")


def optional(row: dict[str, Any], key: str) -> str:
    """The text under a key that may be missing."""
    return prose(row, key) if key in row else ""


def items(row: dict[str, Any], key: str) -> list[dict[str, Any]]:
    """The objects of the list under a key."""
    found = value(row, key)
    if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
        raise ValueError(f"{key!r} must be a list of objects")
    return found


def keys(row: dict[str, Any]) -> str:
    """The keys of a row, for messages."""
    return ", ".join(map(repr, row)) or "none"
