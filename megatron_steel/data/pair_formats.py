"""One record of a preference data set to two conversations with one prompt, to a judged one, or to a reason why not.

    prompt, chosen, rejected           TRL, mini_qwen: texts or lists of turns; the lists may repeat the prompt, and
                                       without a prompt it is what both lists begin with
    instruction, input, chosen, ...    Alpaca ranking; also output: [chosen, rejected]
    conversations, chosen, rejected    ShareGPT ranking: each answer one turn
    messages, rejected_response        ms-swift: the last answer of the messages is the chosen one
    any chat format, label / kto_tag   judged: true for a good answer (TRL, LLaMA-Factory)

Which of them a record has is seen from its keys. Answers within the prompt are not trained.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from megatron_steel.data.chat_formats import FEEDBACK, BadRow, RowFormat, parse_record
from megatron_steel.data.chat_messages import BadRecord, check_turns, kind, parse_message, parse_messages
from megatron_steel.text.conversation import Conversation, Judged, Message, Pair

PairKind = Literal["pair", "judged"]
CHOSEN, REJECTED, RESPONSE = "chosen", "rejected", "rejected_response"
JUDGEMENTS = (FEEDBACK, "kto_tag")
KEYS = (CHOSEN, REJECTED, RESPONSE, *JUDGEMENTS, "prompt", "completion")


def row_keys(form: RowFormat) -> list[str]:
    """Every key of a record that is looked at, for readers of tables."""
    named = [form.columns.chosen, form.columns.rejected, form.columns.kto_tag]
    return list(dict.fromkeys([*form.keys(), *KEYS, *(key for key in named if key is not None)]))


def read_pair(value: Any, place: str, form: RowFormat, max_turn_bytes: int) -> Pair | BadRow:
    """The pair of a record, or why it is none; ``place`` is where it was read."""
    try:
        if not isinstance(value, Mapping):
            raise BadRecord(f"wrong type: the row must be an object, not {kind(value)}")
        prompt, chosen, rejected, tools = parse_pair(value, form)
        if answer_text(chosen) == answer_text(rejected):
            raise BadRecord("same answers: the chosen and the rejected one do not differ")
        both = []
        for name, answer in ((CHOSEN, chosen), (REJECTED, rejected)):
            messages = [*untrained(prompt), dataclasses.replace(answer, trained=True, weight=1.0)]
            try:
                check_turns(messages, max_turn_bytes)
            except BadRecord as error:
                raise BadRecord(f"{error} (the {name} answer is turn {len(messages)})") from error
            both.append(Conversation(messages=tuple(messages), place=place, tools=tools))
    except BadRecord as error:
        return BadRow(place, str(error))
    return Pair(chosen=both[0], rejected=both[1], place=place)


def read_judged(value: Any, place: str, form: RowFormat, max_turn_bytes: int) -> Judged | BadRow:
    """The judged answer of a record, or why it is none."""
    try:
        if not isinstance(value, Mapping):
            raise BadRecord(f"wrong type: the row must be an object, not {kind(value)}")
        known = JUDGEMENTS if form.columns.kto_tag is None else (form.columns.kto_tag,)
        names = [name for name in known if value.get(name) is not None]
        if not names:
            raise BadRecord(f"missing key: the row has no {' or '.join(map(repr, known))}, true for a good answer")
        good = value[names[0]]
        if not isinstance(good, bool):
            raise BadRecord(f"wrong type: {names[0]!r} must be true or false, not {kind(good)}")
        rest = {key: item for key, item in value.items() if key not in (*JUDGEMENTS, *known)}
        messages, tools = parse_record(rest, form)
        *prompt, answer = messages
        if answer.role != "assistant":
            raise BadRecord(f"no answer: the last turn is turn {len(messages)} ({answer.role})")
        whole = [*untrained(prompt), dataclasses.replace(answer, trained=True, weight=1.0)]
        check_turns(whole, max_turn_bytes)
    except BadRecord as error:
        return BadRow(place, str(error))
    return Judged(
        conversation=Conversation(messages=tuple(whole), place=place, tools=tools), desirable=good, place=place
    )


def parse_pair(
    value: Mapping[str, Any], form: RowFormat
) -> tuple[list[Message], Message, Message, tuple[Mapping[str, Any], ...]]:
    """Prompt, chosen and rejected answer, and tools of a record. Raises `BadRecord`."""
    if value.get(RESPONSE) is not None:
        rest = {key: item for key, item in value.items() if key != RESPONSE}
        (*prompt, last), tools = parse_record(rest, form)
        return prompt, one_answer([last], CHOSEN), one_answer(turns(value[RESPONSE], form, RESPONSE), RESPONSE), tools
    value = ranked_outputs(value, form)
    names = {form.columns.chosen: CHOSEN, form.columns.rejected: REJECTED}
    value = {names.get(key, key): item for key, item in value.items()}
    for key in (CHOSEN, REJECTED):
        if value.get(key) is None:
            raise BadRecord(f"missing key: the row has no {key!r}")
    chosen, rejected = (turns(value[key], form, key) for key in (CHOSEN, REJECTED))
    rest = {key: item for key, item in value.items() if key not in (CHOSEN, REJECTED, *JUDGEMENTS)}
    prompt, tools = parse_prompt(rest, form)
    if not prompt:
        prompt = common_prompt(chosen, rejected)
    if not prompt:
        raise BadRecord("missing key: the row has no prompt, and its answers have no turns in common")
    chosen, rejected = without_prompt(chosen, prompt, CHOSEN), without_prompt(rejected, prompt, REJECTED)
    return prompt, one_answer(chosen, CHOSEN), one_answer(rejected, REJECTED), tools


def ranked_outputs(value: Mapping[str, Any], form: RowFormat) -> Mapping[str, Any]:
    """Alpaca's list of two outputs, the better one first, under the names of the others."""
    outputs = value.get(form.columns.response)
    if value.get(form.columns.chosen) is not None or not isinstance(outputs, list):
        return value
    if len(outputs) != 2:
        raise BadRecord(f"wrong type: {form.columns.response!r} must be the chosen and the rejected answer")
    rest = {key: item for key, item in value.items() if key != form.columns.response}
    return {**rest, form.columns.chosen: outputs[0], form.columns.rejected: outputs[1]}


def parse_prompt(value: Mapping[str, Any], form: RowFormat) -> tuple[list[Message], tuple[Mapping[str, Any], ...]]:
    """The turns before the answers, none if the record has only answers, and its tools."""
    prompt = value.get("prompt")
    if prompt is not None and value.get(form.columns.prompt) is None:
        row = {**value, "messages": prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]}
        row = {key: item for key, item in row.items() if key != "prompt"}
        return parse_record(row, dataclasses.replace(form, kind="messages"))
    if any(value.get(key) is not None for key in ("messages", "conversations", form.columns.messages or "messages")):
        return parse_record(value, form)
    if value.get(form.columns.prompt) is not None:
        # An answer has to be there for the format, and is taken off again.
        messages, tools = parse_record({**value, form.columns.response: "-"}, form)
        return messages[:-1], tools
    return [], ()


def turns(value: Any, form: RowFormat, key: str) -> list[Message]:
    """An answer as it is written: a text, a turn, or a list of turns."""
    if isinstance(value, str):
        return [Message(role="assistant", content=value)]
    if isinstance(value, Mapping):
        return [parse_message(value, form.tags, repr(key))]
    return parse_messages(value, form.tags, key)


def plain(messages: Sequence[Message]) -> list[tuple[str, str, int]]:
    """What turns say."""
    return [(message.role, message.content, len(message.tool_calls)) for message in messages]


def common_prompt(chosen: Sequence[Message], rejected: Sequence[Message]) -> list[Message]:
    """The turns that both lists begin with, without the last turn of either."""
    count = 0
    for mine, other in zip(plain(chosen[:-1]), plain(rejected[:-1]), strict=False):
        if mine != other:
            break
        count += 1
    return list(chosen[:count])


def without_prompt(said: list[Message], prompt: Sequence[Message], key: str) -> list[Message]:
    """The turns of an answer behind the prompt, if it repeats it."""
    if len(said) == 1:
        return said
    spoken = [message for message in prompt if message.role != "system"]
    for before in (prompt, spoken):
        if plain(said[: len(before)]) == plain(before):
            return said[len(before) :]
    raise BadRecord(f"other prompt: {key!r} does not begin with the prompt of the row")


def one_answer(said: Sequence[Message], key: str) -> Message:
    """The one turn of an answer."""
    if len(said) != 1 or said[0].role != "assistant":
        roles = ", ".join(message.role for message in said) or "nothing"
        raise BadRecord(f"role order: {key!r} must be one answer behind the prompt, not {roles}")
    if not said[0].content.strip() and not said[0].tool_calls:
        raise BadRecord(f"empty answer: {key!r} has no text")
    return said[0]


def answer_text(message: Message) -> tuple[str, tuple[Mapping[str, Any], ...]]:
    """What an answer says."""
    return message.content, message.tool_calls


def untrained(messages: Sequence[Message]) -> list[Message]:
    """Turns of a prompt, whose answers are not trained."""
    return [dataclasses.replace(m, trained=False, weight=1.0) if m.role == "assistant" else m for m in messages]
