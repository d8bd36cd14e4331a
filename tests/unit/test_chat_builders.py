"""Chat rows made of questions, placeholders and samples: exact rows, and nothing lost without a word (F15, P9)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_steel.data.chat_builders import choice_pairs, choice_row, identity_row, parse_question
from megatron_steel.data.chat_formats import RowFormat, read_record
from megatron_steel.data.chat_messages import BadRecord
from megatron_steel.data.chat_samples import (
    SampleStats,
    keep_right,
    parse_sampled,
    read_letter,
    read_number,
    same_letter,
    same_number,
)
from megatron_steel.data.pair_formats import read_pair
from megatron_steel.text.conversation import Conversation, Message, Pair
from tools import build_chat_data

MMLU = {"question": "How many?", "choices": ["3 lines", "9 lines"], "label": 1}
WANJUAN = {
    "q_main": "计算机网络中防火墙的作用是什么？",
    "option_a": "防止未经授权的访问",
    "option_b": "提高速度",
    "std_ans": "A",
    "answer_detail": "防火墙按规则检查进出网络的数据，故选A。",
}
ENGLISH = "Here is a multiple-choice question:\nHow many?\nA. 3 lines\nB. 9 lines\n"
CHINESE = "以下是一道单选题:\n计算机网络中防火墙的作用是什么？\nA. 防止未经授权的访问\nB. 提高速度\n"


def exchange(prompt: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]}


@pytest.mark.parametrize(
    ("value", "thought", "expected"),
    [
        (MMLU, False, exchange(ENGLISH + "Give the answer.", "B. 9 lines")),
        (MMLU, True, exchange(ENGLISH + "Give the answer.", "B. 9 lines")),
        (
            {**MMLU, "explanation": "Three times three are nine."},
            True,
            exchange(ENGLISH + "Explain first, then give the answer.", "Three times three are nine.\nThe answer is B."),
        ),
        ({**MMLU, "explanation": "Nine."}, True, exchange(ENGLISH + "Give the answer.", "B. Nine.")),
        (WANJUAN, False, exchange(CHINESE + "请给出答案。", "A。防火墙按规则检查进出网络的数据，故选A。")),
        (
            WANJUAN,
            True,
            exchange(CHINESE + "请先给出解释再给出答案。", "防火墙按规则检查进出网络的数据答案为A"),
        ),
    ],
)
def test_choice_rows(value: dict[str, Any], thought: bool, expected: dict[str, Any]) -> None:
    assert choice_row(parse_question(value), thought) == expected


def test_the_language_around_a_question_can_be_chosen() -> None:
    assert choice_row(parse_question(MMLU), False, "zh")["messages"][1]["content"] == "B。9 lines"


@pytest.mark.parametrize(
    "value",
    [
        {"question": "How many?", "A": "3 lines", "B": "9 lines", "answer": "B"},
        {"question": "How many?", "choices": {"text": ["3 lines", "9 lines"], "label": ["1", "2"]}, "answerKey": "2"},
        {"question": "How many?", "choices": ["3 lines", "9 lines"], "answer": 1},
    ],
)
def test_questions_of_other_sets_are_the_same_question(value: dict[str, Any]) -> None:
    assert parse_question(value) == parse_question(MMLU)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ({**MMLU, "label": 2}, "no right option: 'label' is 2, and there are 2 options"),
        ({**MMLU, "label": -1}, "no right option: 'label' is -1"),
        ({**MMLU, "label": True}, "no right option: 'label' is True"),
        ({**MMLU, "label": "K"}, "no right option: 'label' is 'K'"),
        ({**MMLU, "label": None}, "missing key: the row has no 'label'"),
        ({**MMLU, "question": " "}, "missing key: the row has no text under 'question' or 'q_main'"),
        ({**MMLU, "choices": ["one"], "label": 0}, "options: there are 1, which must be 2 to 10"),
        ({**MMLU, "choices": ["one", ""]}, "options: the options must be a list of texts"),
        ({**MMLU, "choices": [1, 2]}, "options: the options must be a list of texts"),
        ({"question": "a", "A": "b", "C": "c", "answer": "A"}, "options: there is 'C', but not all before it"),
        ({"question": "a", "answer": "A"}, "options: the options must be a list of texts"),
        ({**MMLU, "choices": {"text": ["a", "b"], "label": ["1"]}}, "options: there are 2, and 1 labels"),
        ([], "wrong type: the row must be an object, not a list"),
        ({**WANJUAN, "answer_detail": "略"}, "left out: the explanation only says that it is omitted"),
    ],
)
def test_questions_that_cannot_be_asked(value: Any, reason: str) -> None:
    with pytest.raises(BadRecord) as caught:
        choice_row(parse_question(value), True)
    assert str(caught.value).startswith(reason)


def test_the_right_option_is_preferred_to_each_wrong_one() -> None:
    question = parse_question({"question": "How many?", "choices": ["1", "2", "3", "4"], "answer": "C"})
    rows = choice_pairs(question)
    assert rows == [{"prompt": "How many?", "chosen": "3", "rejected": wrong} for wrong in ("4", "1", "2")]
    assert choice_pairs(question, 1) == rows[:1]
    twice = parse_question({"question": "How many?", "choices": ["3", "2", "3"], "answer": "C"})
    assert [row["rejected"] for row in choice_pairs(twice, 2)] == ["2"]
    with pytest.raises(BadRecord, match="all of them are the same text"):
        choice_pairs(parse_question({"question": "How many?", "choices": ["3", "3"], "answer": "A"}))
    pair = read_pair(rows[0], "here", RowFormat(), 1000)
    assert isinstance(pair, Pair) and pair.rejected.messages[-1].content == "4"


def test_a_built_row_is_read_back() -> None:
    row = choice_row(parse_question(WANJUAN), True)
    chat = read_record(row, "here", RowFormat(), 1000)
    assert isinstance(chat, Conversation)
    assert [message.content for message in chat.messages] == [turn["content"] for turn in row["messages"]]


def test_identity_rows_replace_names_alone() -> None:
    chat = Conversation(
        messages=(
            Message(role="user", content="Are you {{ name }}?"),
            Message(role="assistant", content="Yes, {{name}} by {{author}}, {not} a {name}.", weight=2.0),
        ),
        place="here",
    )
    row, count = identity_row(chat, {"name": "Steel {{author}}", "author": "Us"})
    assert row == {
        "messages": [
            {"role": "user", "content": "Are you Steel {{author}}?"},
            {"role": "assistant", "content": "Yes, Steel {{author}} by Us, {not} a {name}.", "weight": 2.0},
        ]
    }
    assert count == 3
    with pytest.raises(BadRecord, match="there is none for {{author}}"):
        identity_row(chat, {"name": "Steel"})


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("3 + 4 = 7.", 7.0),
        ("so 5\n#### 1,234.50\nor 9", 1234.5),
        ("#### $-3", -3.0),
        (r"\boxed{12} of 30", 12.0),
        ("10-5", 5.0),
        ("1,2", 2.0),
        ("#### none", None),
        ("none", None),
    ],
)
def test_numbers_that_answers_end_with(text: str, number: float | None) -> None:
    assert read_number(text) == number


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("(C) because", "C"),
        ("B. 9 lines", "B"),
        ("The answer is A. No, the answer is **D**.", "D"),
        ("Answer: C", "C"),
        (r"so \boxed{A}", "A"),
        ("防火墙检查数据，答案为A", "A"),
        ("答案：B", "B"),
        ("不选A，故选C。", "C"),
        ("A good question", None),
        ("I think so", None),
        ("Because", None),
        ("The answer is not B", None),
        ("the options are A, B and C", None),
        ("", None),
    ],
)
def test_letters_are_read_and_never_guessed(text: str, letter: str | None) -> None:
    assert read_letter(text) == letter


def test_right_answers_must_be_readable() -> None:
    assert same_number("#### 7", "7.00001") and not same_number("#### 7", "7.001") and not same_number("x", "7")
    assert same_letter("The answer is B.", "B") and not same_letter("unsure", "B")
    with pytest.raises(BadRecord, match="no number"):
        same_number("7", "seven")
    with pytest.raises(BadRecord, match="no letter"):
        same_letter("B", "seven")


def test_right_samples_are_kept_once_each_and_counted() -> None:
    stats = SampleStats()
    value = {"question": "3 + 4?", "answer": 7, "samples": ["7", "It is 7", "8", "7", " ", "7.0"]}
    rows = keep_right(parse_sampled(value, 1000), same_number, 2, stats)
    assert rows == [exchange("3 + 4?", "7"), exchange("3 + 4?", "It is 7")]
    assert keep_right(parse_sampled({**value, "answer": "9"}, 1000), same_number, 2, stats) == []
    assert (stats.questions, stats.samples, stats.right, stats.repeated, stats.kept) == (2, 12, 4, 1, 2)
    assert stats.right_of_question == {4: 1, 0: 1}
    assert stats.lines()[1] == "12 samples, 4 right (33.33%), 1 of them repeated, 2 kept"


def test_samples_of_a_conversation_keep_its_turns() -> None:
    turns = [{"role": "system", "content": "Count."}, {"role": "user", "content": "3 + 4?"}]
    value = {"messages": turns, "answer": "7", "samples": ["7"]}
    (row,) = keep_right(parse_sampled(value, 1000), same_number, None, SampleStats())
    assert row == {"messages": [*turns, {"role": "assistant", "content": "7"}]}
    ends_wrong = {**value, "messages": [*turns, {"role": "assistant", "content": "7"}]}
    for bad in (ends_wrong, {**value, "samples": []}, {**value, "samples": [1]}, {**value, "answer": None}, {}, 3):
        with pytest.raises(BadRecord):
            parse_sampled(bad, 1000)


# The tool.


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def rows_of(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_question_of_a_file_is_looked_at(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    questions = [{"question": f"{i} + 1?", "answer": str(i + 1), "samples": [str(i + 1), "0"]} for i in range(7)]
    out = tmp_path / "out.jsonl"
    source = write(tmp_path / "in.jsonl", questions)
    build_chat_data.main(["samples", "--input", source, "--output", str(out), "--verifier", "number"])
    assert rows_of(out) == [exchange(f"{i} + 1?", str(i + 1)) for i in range(7)]
    printed = capsys.readouterr().out
    assert "7 questions, 7 with a right sample" in printed
    assert "7 rows read, 0 left out, 7 written" in printed


def test_bad_rows_are_named_and_nothing_is_written_without_leave(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "in.jsonl", [MMLU, {**MMLU, "label": 5}, WANJUAN])
    out = tmp_path / "out.jsonl"
    arguments = ["choices", "--input", source, "--output", str(out)]
    with pytest.raises(ValueError, match="1 of 3 rows cannot be used, nothing was written"):
        build_chat_data.main(arguments)
    assert f"{source}:2: no right option" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]
    build_chat_data.main([*arguments, "--max-bad-rows", "1", "--thought"])
    assert rows_of(out) == [choice_row(parse_question(value), True) for value in (MMLU, WANJUAN)]
    with pytest.raises(ValueError, match="is one of the input files"):
        build_chat_data.main(["choices", "--input", source, "--output", source])
    build_chat_data.main(["pairs", *arguments[1:], "--max-bad-rows", "1", "--most", "1"])
    assert rows_of(out) == [choice_pairs(parse_question(value), 1)[0] for value in (MMLU, WANJUAN)]
    with pytest.raises(ValueError, match="--most must be 1 or more, not 0"):
        build_chat_data.main(["pairs", *arguments[1:], "--most", "0"])


def test_identity_files(tmp_path: Path) -> None:
    rows = [{"instruction": "Who?", "output": "{{name}} by {{author}}"}, {"instruction": "Hi", "output": "Hi"}]
    source, out = write(tmp_path / "in.jsonl", rows), tmp_path / "new" / "out.jsonl"
    arguments = ["identity", "--input", source, "--output", str(out), "--name", "钢", "--author", "Us"]
    build_chat_data.main(arguments)
    assert rows_of(out) == [exchange("Who?", "钢 by Us"), exchange("Hi", "Hi")]
    write(tmp_path / "in.jsonl", rows[1:])
    out.unlink()
    with pytest.raises(ValueError, match="no row holds {{name}}"):
        build_chat_data.main(arguments)
    assert not list(out.parent.iterdir())
