"""Rewards by rule: how good an answer is, from the answer alone and what the row holds to compare it with.

No rule is given the prompt, so what a prompt contains (the letters of its options, an example with its solution) earns
nothing.
"""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

Reward = Callable[[str, Any], float]
"""(response, the row's answer) -> reward, a finite number."""
ANSWER_MARK = "####"
# Thousands in commas or none, decimals, a fraction, a power of ten; signs of currency before, of percent behind.
NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?:[eE][-+]?\d{1,3})?")
BEFORE_NUMBER = " \t\r\n*$\u20ac\u00a3="
LETTER = r"\(?\**([A-Z])\b\**\)?"
NAMED_LETTER = re.compile(rf"\b[Aa]nswer(?:\s+is)?\s*(?:option\s*)?:?\s*\**{LETTER}(?!\s+[a-z])")
BOXED_LETTER = re.compile(r"\\boxed\{\s*(?:\\text\{)?\(?([A-Z])\)?\}")
WHOLE_LETTER = re.compile(rf"\s*{LETTER}[.):]?\s*")
MARKED_LETTER = re.compile(r"(?:^|\s)\(?([A-Z])[).:](?=\s|$)")


def read_number(text: str) -> Fraction | None:
    """The number that a text begins with, exactly: ``1,234.50``, ``$12``, ``-3/4``, ``5e3``, ``12%`` (as 12)."""
    rest = text.lstrip(BEFORE_NUMBER)
    found = re.match(r"([-+])\s*[$\u20ac\u00a3]\s*", rest)
    if found is not None:
        rest = found[1] + rest[found.end() :]
    first = NUMBER.match(rest)
    if first is None or not any(letter.isdigit() for letter in first[0]):
        return None
    value, behind = Fraction(first[0].replace(",", "")), rest[first.end() :]
    over = re.match(r"\s*/\s*(\d+)", behind)
    if over is not None and int(over[1]):
        return value / int(over[1])
    return value


def final_number(text: str) -> Fraction | None:
    """The number behind the last ``####`` of a text."""
    _, mark, rest = text.rpartition(ANSWER_MARK)
    return read_number(rest) if mark else None


def math_reward(response: str, answer: Any) -> float:
    """1 for a response with the answer's number behind its last ``####``, else 0.

    answer: a number, or a text that is one or ends in one behind ``####`` (GSM8K). Raises ``ValueError`` for another.
    """
    text = str(answer)
    wanted = final_number(text) if ANSWER_MARK in text else read_number(text)
    if wanted is None or isinstance(answer, bool):
        raise ValueError(f"the answer {text[:60]!r} is no number, which --reward math compares")
    return float(final_number(response) == wanted)


def chosen_letter(response: str) -> str | None:
    """The option that a response settles on, None where it names none, or several without an end.

    In this order: the last ``\\boxed{B}``, the last ``answer is B`` or ``Answer: (B)``, a response that is nothing
    but a letter, and the only letter that is marked as an option (``B.``, ``(B)``).
    """
    for pattern in (BOXED_LETTER, NAMED_LETTER):
        found = pattern.findall(response)
        if found:
            return str(found[-1])
    whole = WHOLE_LETTER.fullmatch(response)
    if whole is not None:
        return whole[1]
    marked = set(MARKED_LETTER.findall(response))
    return marked.pop() if len(marked) == 1 else None


def choice_reward(response: str, answer: Any) -> float:
    """1 for a response that settles on the answer's option, a letter like ``B``, else 0.

    Raises ``ValueError`` for an answer that is no letter.
    """
    found = WHOLE_LETTER.fullmatch(str(answer).upper())
    if found is None:
        raise ValueError(f"the answer {str(answer)[:60]!r} is no letter, which --reward choice compares")
    return float(chosen_letter(response) == found[1])


RULES: dict[str, Reward] = {"math": math_reward, "choice": choice_reward}


def load_reward(name: str) -> Reward:
    """A rule by name, or your own function as ``package.module:function``.

    Raises ``ValueError`` when there is none. The rule's values are checked: a ``ValueError`` for one that is no finite
    number.
    """
    if name in RULES:
        return RULES[name]
    module_name, colon, function_name = name.partition(":")
    if not (colon and module_name and function_name):
        raise ValueError(f"--reward {name}: give one of {', '.join(RULES)}, or a function as package.module:function")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(f"--reward {name}: cannot import {module_name} ({error}); see PYTHONPATH") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ValueError(f"--reward {name}: {module_name} has no function {function_name}")

    def checked(response: str, answer: Any) -> float:
        value = function(response, answer)
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"--reward {name}: returned {value!r} for the response {response[:60]!r}, not a number")
        return float(value)

    return checked
