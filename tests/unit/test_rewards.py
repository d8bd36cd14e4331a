"""Rewards by rule: what earns one, and that nothing but the response does."""

from __future__ import annotations

import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_steel.evaluate.rewards import choice_reward, chosen_letter, load_reward, math_reward, read_number


@pytest.mark.parametrize(
    ("response", "answer", "wanted"),
    [
        ("2 + 2 = 4\n#### 4", "4", 1),
        ("#### 4.", 4, 1),
        ("#### $1,234.50", "1234.5", 1),
        ("#### -$3", -3, 1),
        ("so **12%**\n#### **12%**", "12", 1),
        ("#### 3/4", 0.75, 1),
        ("#### 1e3", "#### 1,000", 1),
        ("#### 18 apples", "She sells 9 * 2 = 18.\n#### 18", 1),
        ("#### 007", 7, 1),
        ("#### 5\nno, wait\n#### 4", "4", 1),
        # What is not behind the last mark earns nothing.
        ("4", "4", 0),
        ("#### 4\n#### 5", "4", 0),
        ("the answer is 4 ####", "4", 0),
        ("#### 41", "4", 0),
        ("#### 4.2", "4", 0),
        ("#### about 4", "4", 0),
        ("#### 1,2", "12", 0),
        ("#### 5 or 4", "4", 0),
        ("### 4", "4", 0),
        ("", "4", 0),
        ("#### 3/0", "0", 0),
    ],
)
def test_math(response: str, answer: Any, wanted: float) -> None:
    assert math_reward(response, answer) == wanted


@given(st.fractions(max_denominator=10**6), st.text(max_size=20))
def test_math_compares_exactly(number: Fraction, before: str) -> None:
    text = f"{number.numerator}/{number.denominator}"
    assert read_number(text) == number
    assert math_reward(f"{before}\n#### {text}", text) == 1.0
    assert math_reward(f"{before}\n#### {number.numerator + number.denominator}/{number.denominator}", text) == 0.0


@given(st.integers(-(10**15), 10**15))
def test_math_reads_thousands(number: int) -> None:
    assert math_reward(f"#### {number:,}", number) == 1.0


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        ("B", "B"),
        (" (B)\n", "B"),
        ("B.", "B"),
        ("**B**", "B"),
        ("B. Paris", "B"),
        ("(C) because it is round", "C"),
        ("The answer is B", "B"),
        ("the answer is (B).", "B"),
        ("Not A. The answer is B, not C.", "B"),
        ("Answer: **D**", "D"),
        ("I first thought the answer is A. No, the answer is C.", "C"),
        (r"A is wrong, so \boxed{B}", "B"),
        (r"\boxed{\text{B}}", "B"),
        # Options that are only repeated settle on nothing.
        ("A. Rome\nB. Paris", None),
        ("A) Rome B) Paris C) Oslo", None),
        ("A dog", None),
        ("The answer is A dog", None),
        ("Because", None),
        ("b", None),
        ("", None),
    ],
)
def test_letters(response: str, letter: str | None) -> None:
    assert chosen_letter(response) == letter


@pytest.mark.parametrize("letter", ["A", "B", "C", "D"])
def test_letters_of_the_prompt_earn_nothing(letter: str) -> None:
    """The mistake this guards against: a rule that looks at prompt + response finds every letter there is."""
    prompt = "Which is a city?\nA. red\nB. Rome\nC. run\nD. rain\nAnswer with the letter. Answer: "
    assert choice_reward("", letter) == 0.0
    assert choice_reward("I do not know.", letter) == 0.0
    assert choice_reward(prompt, letter) == 0.0
    assert choice_reward(letter, letter) == 1.0
    assert choice_reward(letter, "BCDA"["ABCD".index(letter)]) == 0.0


@pytest.mark.parametrize(("rule", "answer"), [("math", "many"), ("math", True), ("math", None), ("choice", "Rome")])
def test_answers_that_cannot_be_compared(rule: str, answer: Any) -> None:
    with pytest.raises(ValueError, match=f"which --reward {rule} compares"):
        load_reward(rule)("#### 4", answer)


def test_own_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = "def length(response, answer):\n    return len(response) / answer\n\nnumber = 3\n"
    (tmp_path / "own_rewards.py").write_text(body + "\ndef bad(response, answer):\n    return float('nan')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert load_reward("own_rewards:length")("four", 8) == 0.5
    for name, message in [
        ("own_rewards:bad", "returned nan"),
        ("own_rewards:number", "own_rewards has no function number"),
        ("own_rewards:other", "own_rewards has no function other"),
        ("no_such_module:f", "cannot import no_such_module"),
        ("maths", "--reward maths: give one of math, choice, or a function as package.module:function"),
        (":f", "give one of math, choice"),
    ]:
        with pytest.raises(ValueError) as caught:
            load_reward(name)("x", 1)
        assert message in str(caught.value) and "\n" not in str(caught.value)
    sys.modules.pop("own_rewards")
