"""Rows of chat data made of other data: multiple-choice questions, a model's name and maker, samples that are right.

Each function takes one record and gives rows with ``messages``, or of preferences; or raises `BadRecord`: the reason.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from megatron_steel.data.chat_messages import BadRecord, kind
from megatron_steel.text.conversation import Conversation, Message

Row = dict[str, Any]
Language = Literal["zh", "en"]
LETTERS = "ABCDEFGHIJ"
HAN = re.compile("[\u4e00-\u9fff]")
# An explanation as short as this is no chain of thought; the one that only says "omitted" makes a row useless.
# Both as in the data of Steel-LLM.
MIN_EXPLANATION = 10
OMITTED = "\u7565"
# "hence choose ..." or "hence the answer is ..." at the end of an explanation, behind which the answer comes anyway.
HENCE_CHOOSE = re.compile(
    "[\uff0c,\u3002\uff1b;\\s]*\u6545(?:\u9009|\u7b54\u6848[\u4e3a\u662f\u9009])[^\u3002\n]*\u3002?\\s*$"
)


@dataclass(frozen=True)
class ChoiceTexts:
    """What is written around a question."""

    front: str
    plain: str
    """At the end of the prompt."""
    thought: str
    """At the end of the prompt when an explanation comes before the answer."""
    answer: str
    """Of the letter and what follows it."""
    conclusion: str
    """Of the letter, at the end of a thought."""


CHOICE_TEXTS: Mapping[str, ChoiceTexts] = {
    "en": ChoiceTexts(
        front="Here is a multiple-choice question:\n",
        plain="Give the answer.",
        thought="Explain first, then give the answer.",
        answer="{letter}. {text}",
        conclusion="\nThe answer is {letter}.",
    ),
    "zh": ChoiceTexts(
        front="\u4ee5\u4e0b\u662f\u4e00\u9053\u5355\u9009\u9898:\n",
        plain="\u8bf7\u7ed9\u51fa\u7b54\u6848\u3002",
        thought="\u8bf7\u5148\u7ed9\u51fa\u89e3\u91ca\u518d\u7ed9\u51fa\u7b54\u6848\u3002",
        answer="{letter}\u3002{text}",
        conclusion="\u7b54\u6848\u4e3a{letter}",
    ),
}
"""The Chinese ones are those of Steel-LLM."""


@dataclass(kw_only=True, frozen=True)
class Question:
    """A question with options, of which one is right."""

    text: str
    options: tuple[str, ...]
    right: int
    explanation: str = ""


def parse_question(value: Any) -> Question:
    """A question of the forms of MMLU, C-Eval, ARC and WanJuan. Raises `BadRecord`.

    ``question`` or ``q_main``; ``choices`` (texts, or ``text`` and ``label`` lists), ``A``, ``B``, ... or ``option_a``,
    ...; ``label``, ``answer``, ``answerKey`` or ``std_ans`` (a number from 0, or a letter); if there is one,
    ``explanation`` or ``answer_detail``.
    """
    if not isinstance(value, Mapping):
        raise BadRecord(f"wrong type: the row must be an object, not {kind(value)}")
    text = _text(value, ("question", "q_main"))
    options, labels = _options(value)
    if len(options) < 2 or len(options) > len(LETTERS):
        raise BadRecord(f"options: there are {len(options)}, which must be 2 to {len(LETTERS)}")
    key = next((key for key in ("label", "answer", "answerKey", "std_ans") if value.get(key) is not None), None)
    if key is None:
        raise BadRecord("missing key: the row has no 'label', 'answer', 'answerKey' or 'std_ans'")
    right = value[key]
    if isinstance(right, str) and right.strip() in labels:
        right = labels.index(right.strip())
    if isinstance(right, bool) or not isinstance(right, int) or not 0 <= right < len(options):
        raise BadRecord(f"no right option: {key!r} is {value[key]!r}, and there are {len(options)} options")
    explanation = _text(value, ("explanation", "answer_detail"), required=False)
    return Question(text=text, options=tuple(options), right=right, explanation=explanation.strip())


def choice_row(question: Question, thought: bool, language: Language | None = None) -> Row:
    """A row that asks a question and answers it; with ``thought`` the explanation comes before the answer.

    Without an explanation that is one, the answer is given at once, with the text of the option. ``language`` None
    takes Chinese if the question has Chinese characters. Raises `BadRecord` for the explanation "omitted".
    """
    texts = CHOICE_TEXTS[language or ("zh" if HAN.search(question.text) else "en")]
    letter, explanation = LETTERS[question.right], question.explanation
    if explanation == OMITTED:
        raise BadRecord("left out: the explanation only says that it is omitted")
    options = "".join(f"{LETTERS[i]}. {option}\n" for i, option in enumerate(question.options))
    body = f"{texts.front}{question.text}\n{options}"
    if thought and len(explanation) >= MIN_EXPLANATION and (why := HENCE_CHOOSE.sub("", explanation).rstrip()):
        return chat_row(f"{body}{texts.thought}", why + texts.conclusion.format(letter=letter))
    text = explanation or question.options[question.right]
    return chat_row(f"{body}{texts.plain}", texts.answer.format(letter=letter, text=text))


def choice_pairs(question: Question, most: int | None = None) -> list[Row]:
    """Preference rows: the question, its right option, and one wrong option in each row; ``most`` rows at most.

    The options are not listed in the prompt, so that an answer is judged by what it says. Wrong options follow each
    other from the one behind the right one on, so that with ``most`` no place among them is preferred.
    """
    count = len(question.options)
    wrong = (question.options[(question.right + step) % count] for step in range(1, count))
    right = question.options[question.right]
    rows = [{"prompt": question.text, "chosen": right, "rejected": option} for option in wrong if option != right]
    if not rows:
        raise BadRecord("options: all of them are the same text")
    return rows[:most]


PLACEHOLDER = re.compile(r"\{\{\s*(\w+)\s*\}\}")


def identity_row(chat: Conversation, values: Mapping[str, str]) -> tuple[Row, int]:
    """A row in which ``{{name}}`` and the like are replaced, and how many were. `BadRecord` for one without a value."""
    count = 0

    def put(match: re.Match[str]) -> str:
        nonlocal count
        if match[1] not in values:
            raise BadRecord(f"no value: there is none for {match[0]}")
        count += 1
        return values[match[1]]

    def filled(message: Message) -> Row:
        row: Row = {"role": message.role, "content": PLACEHOLDER.sub(put, message.content)}
        if message.trained is not None:
            row["train"] = message.trained
        return row if message.weight == 1 else {**row, "weight": message.weight}

    if chat.tools or any(message.tool_calls for message in chat.messages):
        raise BadRecord("tool call: rows about a name have no tools")
    return {"messages": [filled(message) for message in chat.messages]}, count


def chat_row(prompt: str, answer: str) -> Row:
    """A row of one prompt and one answer."""
    return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]}


def _options(value: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """The options of a question and their labels."""
    choices = value.get("choices")
    if isinstance(choices, Mapping):
        options = _texts(choices.get("text"), "options")
        labels = _texts(choices.get("label"), "labels of the options")
        if len(labels) != len(options):
            raise BadRecord(f"options: there are {len(options)}, and {len(labels)} labels")
        return options, labels
    if choices is None:
        for keys in (list(LETTERS), [f"option_{letter.lower()}" for letter in LETTERS]):
            there = [key for key in keys if value.get(key) not in (None, "")]
            if there != keys[: len(there)]:
                raise BadRecord(f"options: there is {there[-1]!r}, but not all before it")
            if there:
                choices = [value[key] for key in there]
                break
    return _texts(choices, "options"), list(LETTERS)


def _texts(values: Any, what: str) -> list[str]:
    """A list of texts that are not empty."""
    if not isinstance(values, list) or not all(isinstance(text, str) and text.strip() for text in values):
        raise BadRecord(f"options: the {what} must be a list of texts")
    return values


def _text(value: Mapping[str, Any], keys: Sequence[str], required: bool = True) -> str:
    """The text under the first of the keys that has one."""
    for key in keys:
        text = value.get(key)
        if text is None:
            continue
        if not isinstance(text, str):
            raise BadRecord(f"wrong type: {key!r} must be text, not {kind(text)}")
        if text.strip() or not required:
            return text
    if required:
        raise BadRecord(f"missing key: the row has no text under {' or '.join(map(repr, keys))}")
    return ""
