"""Rejection sampling: of several answers to each question those that a verifier finds right become chat rows.

Where no number or letter can be read from a sample it is wrong; nothing is guessed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_steel.data.chat_formats import RowFormat, parse_record
from megatron_steel.data.chat_messages import BadRecord, check_turns, kind
from megatron_steel.text.conversation import Message

Verify = Callable[[str, str], bool]
NUMBER = re.compile(r"(?:(?<![\w)])-)?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)")
MARKED = re.compile(r"####\s*([^\n]*)")
BOXED = re.compile(r"\\boxed\{([^{}]*)\}")
# A and I before a word are words themselves.
LETTER = r"[(*\s]*([A-J])(?![A-Za-z'])(?!(?<=[AI])\s+[a-z])"
SAID = re.compile(
    r"(?:\b(?i:answer(?:\s+is\s*:?|\s*:))|\\boxed\{"
    "|\u7b54\u6848(?:\u5e94?\u8be5?[\u4e3a\u662f\u9009])?\\s*[:\uff1a]?|(?<!\u4e0d)\u9009\u62e9?\\s*[:\uff1a]?)"
    + LETTER
)
FIRST = re.compile(LETTER)
# As in the evaluation of GSM8K by Qwen and Steel-LLM.
TOLERANCE = 1e-4


def read_number(text: str) -> float | None:
    """The number an answer ends with: the one after ``####``, else in ``\\boxed``, else the last one."""
    marked = MARKED.findall(text) or BOXED.findall(text)
    numbers = NUMBER.findall(marked[-1] if marked else text)
    return float(numbers[-1].replace(",", "")) if numbers else None


def same_number(answer: str, right: str) -> bool:
    """Whether an answer ends with the number that the right one ends with. `BadRecord` if that has none."""
    wanted, found = read_number(right), read_number(answer)
    if wanted is None:
        raise BadRecord(f"no number: the right answer {right[:40]!r} has none")
    return found is not None and abs(found - wanted) < TOLERANCE


def read_letter(text: str) -> str | None:
    """The option an answer names: the last that it calls its answer, else the letter it begins with."""
    said = SAID.findall(text)
    if said:
        return str(said[-1])
    first = FIRST.match(text)
    return first[1] if first else None


def same_letter(answer: str, right: str) -> bool:
    """Whether an answer names the option that the right one names. `BadRecord` if that names none."""
    wanted = read_letter(right)
    if wanted is None:
        raise BadRecord(f"no letter: the right answer {right[:40]!r} names no option")
    return read_letter(answer) == wanted


def same_text(answer: str, right: str) -> bool:
    """Whether two texts are the same but for white space around them."""
    return answer.strip() == right.strip()


VERIFIERS: Mapping[str, Verify] = {"number": same_number, "letter": same_letter, "text": same_text}


@dataclass
class SampleStats:
    """What became of the samples."""

    questions: int = 0
    samples: int = 0
    right: int = 0
    repeated: int = 0
    """Right ones that say what an earlier one of the question says."""
    kept: int = 0
    right_of_question: dict[int, int] = field(default_factory=dict)
    """Questions by how many of their samples are right."""

    def lines(self) -> list[str]:
        """For people to read."""
        share = self.right / max(self.samples, 1)
        answered = self.questions - self.right_of_question.get(0, 0)
        spread = ", ".join(f"{right}: {count:,}" for right, count in sorted(self.right_of_question.items()))
        return [
            f"{self.questions:,} questions, {answered:,} with a right sample",
            f"{self.samples:,} samples, {self.right:,} right ({share:.2%}), {self.repeated:,} of them repeated, "
            f"{self.kept:,} kept",
            f"questions by right samples: {spread or 'none'}",
        ]


@dataclass(kw_only=True, frozen=True)
class Sampled:
    """A prompt, its right answer and samples of answers."""

    prompt: tuple[Message, ...]
    right: str
    samples: tuple[str, ...]


def parse_sampled(value: Any, max_turn_bytes: int) -> Sampled:
    """A record with ``question``, ``prompt`` or ``messages`` (up to a user turn), ``answer`` and ``samples``.

    Raises `BadRecord`.
    """
    if not isinstance(value, Mapping):
        raise BadRecord(f"wrong type: the row must be an object, not {kind(value)}")
    samples, right = value.get("samples"), value.get("answer")
    if not isinstance(samples, list) or not samples or not all(isinstance(text, str) for text in samples):
        raise BadRecord("samples: 'samples' must be a list of texts")
    if not isinstance(right, str | int | float) or isinstance(right, bool):
        raise BadRecord(f"wrong type: 'answer' must be text or a number, not {kind(right)}")
    text = next((value[key] for key in ("question", "prompt") if isinstance(value.get(key), str)), None)
    if text is not None:
        prompt = [Message(role="user", content=text)]
    else:
        turns = value.get("messages", value.get("prompt"))
        prompt, _ = parse_record({"messages": turns, "system": value.get("system")}, RowFormat(kind="messages"))
    check_turns(prompt, max_turn_bytes)
    if prompt[-1].role != "user" or any(message.tool_calls or message.role == "tool" for message in prompt):
        raise BadRecord("role order: the prompt must end with a user turn, and have no tools")
    return Sampled(prompt=tuple(prompt), right=str(right), samples=tuple(samples))


def keep_right(sampled: Sampled, verify: Verify, most: int | None, stats: SampleStats) -> list[dict[str, Any]]:
    """A row for each different sample that is right, up to ``most`` of a question, in their order.

    Nothing is counted where `BadRecord` is raised.
    """
    right = [sample for sample in sampled.samples if sample.strip() and verify(sample, sampled.right)]
    different = list(dict.fromkeys(right))
    kept = different[:most]
    stats.questions += 1
    stats.samples += len(sampled.samples)
    stats.right += len(right)
    stats.repeated += len(right) - len(different)
    stats.kept += len(kept)
    stats.right_of_question[len(right)] = stats.right_of_question.get(len(right), 0) + 1
    prompt = [{"role": message.role, "content": message.content} for message in sampled.prompt]
    return [{"messages": [*prompt, {"role": "assistant", "content": sample}]} for sample in kept]
