"""One hand-written row per source format -> exactly the expected text."""

from __future__ import annotations

import json
from typing import Any

import pytest

from megatron_steel.data.records import COLUMNS, FORMATS

START = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"


def chat(*turns: str) -> str:
    """Turns of user and assistant after the default system message."""
    parts = [f"<|im_start|>{'user' if n % 2 == 0 else 'assistant'}\n{turn}<|im_end|>" for n, turn in enumerate(turns)]
    return START + "\n".join(parts)


def zhihu(upvotes: str) -> dict[str, Any]:
    return {"INSTRUCTION": "为什么？", "RESPONSE": "因为。", "METADATA": json.dumps({"upvotes": upvotes})}


CASES: list[tuple[str, dict[str, Any], str | None, str, str]] = [
    (
        "baike",
        {
            "title": "雪",
            "summary": "天上的水，冻了（固态）。",
            "sections": [{"title": "形成", "content": "冷。\n很冷。"}],
        },
        "雪：天上的水，冻了（固态）。\n形成：冷。\n很冷。",
        "baike",
        "zh",
    ),
    ("baike", {"title": "雪", "summary": None, "sections": []}, None, "", ""),
    (
        "baidu_qa",
        {"title": "问", "desc": "细节", "answer": "第一\r\n第二"},
        chat("问\n细节", "第一\n第二"),
        "baidu_qa",
        "zh",
    ),
    ("baidu_qa", {"title": "问", "desc": "问", "answer": "the end"}, chat("问", "the end"), "baidu_qa", "en"),
    ("belle", {"instruction": "加", "input": "1 1", "output": "Amen"}, chat("加\n1 1", "Amen"), "belle", "en"),
    ("belle", {"instruction": "加法", "input": "", "output": "n"}, chat("加法", "n"), "belle", "zh"),
    ("firefly", {"kind": "NLI", "input": "a", "target": "end\n"}, chat("a", "end\n"), "firefly", "en"),
    (
        "sharegpt",
        {"conversations": [{"from": "human", "value": "q1"}, {"from": "gpt", "value": "_|im_end|>"}] * 2},
        chat("q1", "_|im_end|>", "q1", "_|im_end|>"),
        "sharegpt",
        "en",
    ),
    (
        "sharegpt",
        {
            "system": "Be brief.",
            "conversations": [{"from": "human", "value": "q"}, {"from": "assistant", "value": "a"}],
        },
        chat("q", "a").replace("You are a helpful assistant.", "Be brief."),
        "sharegpt",
        "en",
    ),
    (
        "messages",
        {"messages": [{"role": role, "content": role[0]} for role in ("system", "user", "assistant")]},
        chat("u", "a").replace("You are a helpful assistant.", "s"),
        "messages",
        "en",
    ),
    ("moss", {"conversation": [{"human": "q", "assistant": "a"}] * 2}, chat("q", "a", "q", "a"), "moss", "en"),
    ("zhihu", zhihu("赞同 100"), chat("为什么？", "因为。"), "zhihu", "zh"),
    ("zhihu", zhihu("赞同 1.5 万"), chat("为什么？", "因为。"), "zhihu", "zh"),
    ("zhihu", zhihu("赞同 1,024"), chat("为什么？", "因为。"), "zhihu", "zh"),
    ("zhihu", zhihu("赞同 99"), None, "", ""),
    ("zhihu", zhihu("赞同"), None, "", ""),
    ("wiki", {"completion": "昭通机场，在云南。", "source": "wikipedia.zh2307"}, "昭通机场，在云南。", "wiki", "zh"),
    ("starcoder", {"content": "x = 1\n", "stars": 0}, "x = 1\n", "starcoder", "code"),
    ("wanjuan", {"id": "1", "content": "正文"}, "正文", "wanjuan", "zh"),
    (
        "wanjuan",
        {
            "q_main": "一加一？",
            "option_a": "一",
            "option_b": "二",
            "option_c": "",
            "std_ans": "B",
            "answer_detail": "数。",
        },
        "一加一？\nA. 一\nB. 二\n标准答案：B\n解析：数。",
        "wanjuan",
        "zh",
    ),
    ("wanjuan", {"q_main": "Q", "option_a": "a: one", "std_ans": "a"}, "Q\na: one\n标准答案：a", "wanjuan", "en"),
    ("wudao", {"id": 1, "dataType": "新闻", "title": "题", "content": "文"}, "题\n文", "wudao", "zh"),
    ("wudao", {"title": "", "content": "文"}, "文", "wudao", "zh"),
    ("pile", {"text": "Hello", "meta": {"pile_set_name": "Pile-CC"}}, "Hello", "pile/Pile-CC", "en"),
]


@pytest.mark.parametrize(("name", "row", "text", "source", "lang"), CASES)
def test_text(name: str, row: dict[str, Any], text: str | None, source: str, lang: str) -> None:
    expected = None if text is None else (text, source, lang)
    assert FORMATS[name](row) == expected
    assert FORMATS[name]({key: value for key, value in row.items() if key in COLUMNS[name]}) == expected


def test_every_format_has_a_case() -> None:
    assert {name for name, *_ in CASES} == set(FORMATS) == set(COLUMNS)


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("belle", {"prompt": "a", "output": "b"}, "no key 'instruction'; its keys are 'prompt', 'output'"),
        ("firefly", {"input": 3, "target": "b"}, "'input' must be text, not int"),
        ("sharegpt", {"conversations": [{"from": "robot", "value": "x"}]}, "has the role 'robot'"),
        ("sharegpt", {"conversations": [{"from": "gpt", "value": "x"}]}, "must go user, assistant"),
        ("sharegpt", {"conversations": []}, "must go user, assistant.*no turns"),
        ("sharegpt", {"conversations": "x"}, "must be a list of objects"),
        ("moss", {"conversation": []}, "has no turns"),
        ("zhihu", {"INSTRUCTION": "a", "RESPONSE": "b", "METADATA": "{"}, "'METADATA' is not JSON"),
        ("zhihu", {"INSTRUCTION": "a", "RESPONSE": "b"}, "no key 'METADATA'"),
        ("belle", {"instruction": "a", "input": "", "output": "\ud800"}, "'output' holds half of a surrogate pair"),
        ("pile", {"text": "a", "meta": {}}, "meta: no key 'pile_set_name'"),
        ("wanjuan", {"text": "a"}, "no key 'content' or 'q_main'; its keys are 'text'"),
        ("baike", {"title": "a", "summary": "b", "sections": [{"title": "c"}]}, "section 1: no key 'content'"),
    ],
)
def test_a_wrong_row_says_what_is_missing(name: str, row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FORMATS[name](row)
