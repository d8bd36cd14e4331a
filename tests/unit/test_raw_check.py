"""Raw rows: every seeded bad row is reported with file:line, good rows are not, and statistics count what is there."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_steel.data import raw_check
from megatron_steel.data.raw_check import CheckOptions, check_rows, message_problems
from megatron_steel.data.raw_rows import line_rows, raw_rows
from megatron_steel.data.statistics import raw_stats
from tools import inspect_data


def jsonl(path: Path, rows: list[Any]) -> str:
    """Write rows as JSON lines; bytes are written as they are."""
    lines = [row if isinstance(row, bytes) else json.dumps(row, ensure_ascii=False).encode() for row in rows]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return str(path)


def findings(rows: list[Any], options: CheckOptions | None = None) -> list[str]:
    """What check says about rows of a file "f"."""
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    return list(check_rows(line_rows("f", 1, b"\n".join(lines)), options or CheckOptions()))


def chat(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


GOOD = [
    chat(("user", "q"), ("assistant", "a")),
    chat(("system", "s"), ("user", "q"), ("assistant", "a"), ("user", "q"), ("assistant", "a")),
    [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
    chat(("user", "q"), ("function_call", "{}"), ("observation", "4"), ("assistant", "a")),
    [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": None, "tool_calls": [{}, {}]},
        *chat(("tool", "1"), ("tool", "2"), ("assistant", "a")),
    ],
]


@pytest.mark.parametrize("messages", GOOD)
def test_sound_chats_pass(messages: list[dict[str, str]]) -> None:
    assert list(message_problems(messages)) == []


@pytest.mark.parametrize(
    ("messages", "problems"),
    [
        ([], ["a chat without messages"]),
        (chat(("user", "q")), ["role order: the last message is no answer"]),
        (chat(("system", "s")), ["role order: the last message is no answer"]),
        (chat(("assistant", "a")), ["role order: message 0 (assistant) follows nothing"]),
        (chat(("user", "q"), ("assistant", " ")), ["empty answer: message 1 (assistant)"]),
        (chat(("user", ""), ("assistant", "a")), ["empty message: message 0 (user)"]),
        (
            chat(("user", "q"), ("user", "q"), ("assistant", "a")),
            ["role order: message 1 (user) follows user"],
        ),
        (
            chat(("user", "q"), ("assistant", "a"), ("assistant", "a")),
            ["role order: message 2 (assistant) follows assistant"],
        ),
        (
            chat(("user", "q"), ("assistant", "a"), ("system", "s")),
            ["role order: message 2 is system, which may only come first"],
        ),
        (
            chat(("tool", "1"), ("assistant", "a")),
            ["role order: message 0 (tool) follows nothing"],
        ),
        (
            chat(("user", "q"), ("narrator", "n"), ("assistant", "a")),
            ["message 1 has the unknown role 'narrator'"],
        ),
        (
            [{"content": "q"}, "text", *chat(("user", "q"), ("assistant", "a"))],
            ["message 0 has no role", "message 1 has no role"],
        ),
    ],
)
def test_faults_of_chats_are_named(messages: list[Any], problems: list[str]) -> None:
    assert list(message_problems(messages)) == problems


def test_every_seeded_bad_row_is_reported_with_its_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    question = "Which river flows through the old town of Heidelberg before it reaches the Rhine at Mannheim"
    evaluation = jsonl(tmp_path / "eval.jsonl", [{"question": question, "answer": "A"}, {"question": "Short one?"}])
    good = [{"id": i, "text": f"A plain row, number {i}, about nothing much."} for i in range(20)]
    bad: dict[int, Any] = {
        3: {"id": 3, "text": "   "},
        5: {"id": "5", "text": "an id of another type"},
        7: {"id": 7, "content": "another key"},
        8: b"{broken",
        9: b"",
        10: b"[1, 2]",
        11: b'{"id": 11, "text": "\xff"}',
        12: b'{"id": 12, "text": "\\ud800"}',
        13: {"id": 13, "text": "I am a model Created  by OpenAI in 2023."},
        14: {"id": 14, "text": f"Preface. {question.upper()}! End."},
        15: {"id": 15, "text": "short   ONE?"},
        16: {"id": 16, "text": "\u6211\u662fChatGPT\uff0c\u4f60\u597d"},
        17: {"id": 17, "text": None},
    }
    rows = [bad.get(number, row) for number, row in enumerate(good, start=1)]
    files = [jsonl(tmp_path / "good.jsonl", good), jsonl(tmp_path / "bad.jsonl", rows)]
    assert inspect_data.main(["check", files[0], "--eval", evaluation]) == 0
    assert capsys.readouterr().out == "0 findings in 1 files\n"
    assert inspect_data.main(["check", *files, "--eval", evaluation]) == 2
    lines = capsys.readouterr().out.splitlines()[:-1]
    said = {number: [line for line in lines if line.startswith(f"{files[1]}:{number}: ")] for number in bad}
    assert sum(map(len, said.values())) == len(lines)
    fragments = {
        3: ["empty text: 'text'"],
        5: ["'id' is text, not integer, unlike 32 rows (as " + files[0] + ":1)"],
        7: ["no key 'text'; extra key 'content' (text)"],
        8: ["malformed JSON: Expecting property name"],
        9: ["blank line"],
        10: ["the row is list of integer, not an object"],
        11: ["not UTF-8 (byte 21 of the line)"],
        12: ["half of a surrogate pair"],
        13: ["says 'created by openai'"],
        14: [f"shares 4 13-grams with {evaluation}:1: 'which river"],
        15: [f"the same text as {evaluation}:2"],
        16: ["says '\u6211\u662fchatgpt'"],
        17: ["empty text: 'text'", "'text' is null, not text"],
    }
    for number, parts in fragments.items():
        assert len(said[number]) == len(parts), said[number]
        for part in parts:
            assert any(part in line for line in said[number]), (part, said[number])


def test_answers_and_required_keys() -> None:
    rows = [{"instruction": "q", "input": "", "output": "a"}, {"instruction": "q", "input": "", "output": ""}]
    assert findings(rows) == ["f:2: empty answer: 'output'"]
    assert findings([{"body": "b"}], CheckOptions(text_keys=("body",))) == []
    assert findings([{"body": [" ", ""]}], CheckOptions(text_keys=("body",))) == ["f:1: empty text: 'body'"]
    assert findings([{"title": "b"}], CheckOptions(text_keys=("body",))) == ["f:1: no text: no key 'body'"]


def test_identity_strings_can_be_chosen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "strings.txt").write_text("made by Acme\n\n")
    file = jsonl(tmp_path / "a.jsonl", [{"text": "Created by OpenAI"}, {"text": "MADE by  acme."}])
    assert inspect_data.main(["check", file, "--identity-strings", str(tmp_path / "strings.txt")]) == 2
    assert capsys.readouterr().out.splitlines() == [
        f"{file}:2: says 'made by Acme', which a model would repeat about itself",
        "1 findings in 1 files",
    ]
    with pytest.raises(SystemExit) as error:
        inspect_data.main(["check", file, "--identity-strings", "none"])
    assert error.value.code == 2


def test_many_rows_of_another_schema_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(raw_check, "PLACES_PER_SCHEMA", 2)
    lines = findings([{"text": "a"}] * 6 + [{"content": "b"}] * 5)
    assert [line.split(":")[1] for line in lines] == ["7", "8", "8"]
    assert "... and 3 more rows after it" in lines[2]


def test_rows_of_every_form_have_their_lines(tmp_path: Path) -> None:
    rows = [{"text": "one"}, {"text": "two"}]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "b.txt").write_text("one\n\ntwo\n")
    with gzip.open(tmp_path / "c.jsonl.gz", "wt") as stream:
        stream.write("".join(json.dumps(row) + "\n" for row in rows))
    found = [(row.place, row.error) for row in raw_rows(sorted(tmp_path.iterdir()))]
    assert found == [
        (f"{tmp_path}/a.json:1", None),
        (f"{tmp_path}/a.json:2", None),
        (f"{tmp_path}/b.txt:1", None),
        (f"{tmp_path}/b.txt:2", "blank line"),
        (f"{tmp_path}/b.txt:3", None),
        (f"{tmp_path}/c.jsonl.gz:1", None),
        (f"{tmp_path}/c.jsonl.gz:2", None),
    ]


def test_raw_statistics(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"text": "ab\ncd\n\nab"},
        {"text": "\u4f60\u597d"},
        {"text": "\u4f60\u597d"},
        {"text": ""},
        {"other": 1},
        {"text": ["cd ", "e1"]},
    ]
    file = jsonl(tmp_path / "a.jsonl", rows)
    assert inspect_data.main(["stats", file, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["documents"], found["unusable_rows"], found["empty_documents"]) == (5, 1, 1)
    assert found["characters"] == 9 + 2 + 2 + 0 + 6 == found["lengths"]["sum"]
    assert (found["duplicate_documents"], found["lines"], found["duplicate_lines"]) == (1, 7, 3)
    assert found["language_shares"] == {"zh": 4 / 13, "en": 9 / 13, "other": 0.0}
    assert inspect_data.main(["stats", file]) == 0
    assert "duplicate lines          3\n" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no row has text under the key 'body'"):
        raw_stats(raw_rows([Path(file)]), "body")
