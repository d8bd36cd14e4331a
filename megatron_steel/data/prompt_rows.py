"""One record of a set of prompts to turns that wait for an answer and what answers are compared with.

    prompt, answer      text, or a list of turns; `messages`, `conversations` and Alpaca's columns are prompts too

The answer is any JSON value, which a reward makes something of.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_steel.data.chat_formats import BadRow, RowFormat
from megatron_steel.data.chat_messages import BadRecord, check_turns, kind
from megatron_steel.data.pair_formats import parse_prompt, untrained
from megatron_steel.text.conversation import Conversation, Prompt

ANSWER = "answer"


def read_prompt(value: Any, place: str, form: RowFormat, max_turn_bytes: int) -> Prompt | BadRow:
    """The prompt of a record, or why it is none; ``place`` is where it was read."""
    try:
        if not isinstance(value, Mapping):
            raise BadRecord(f"wrong type: the row must be an object, not {kind(value)}")
        if value.get(ANSWER) is None:
            raise BadRecord(f"missing key: the row has no {ANSWER!r}, which rewards compare with")
        rest = {key: item for key, item in value.items() if key != ANSWER}
        messages, tools = parse_prompt(rest, form)
        if not messages:
            raise BadRecord("missing key: the row has no 'prompt'")
        check_turns(messages, max_turn_bytes)
        if messages[-1].role not in ("user", "tool"):
            raise BadRecord(f"answered prompt: the last turn is turn {len(messages)} ({messages[-1].role})")
    except BadRecord as error:
        return BadRow(place, str(error))
    return Prompt(
        conversation=Conversation(messages=tuple(untrained(messages)), place=place, tools=tools),
        answer=value[ANSWER],
        place=place,
    )
