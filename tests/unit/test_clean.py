"""Every filter of clean_data.py with a text it keeps and one it drops or changes; measures against plain Python."""

from __future__ import annotations

import collections
import json
import math
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_steel.data.clean_filters import Outcome
from megatron_steel.data.clean_settings import FILTERS, Settings, describe, parse_filter, parse_settings
from megatron_steel.data.clean_text import Text
from megatron_steel.data.contamination import build_index

ZH = "床前明月光，疑是地上霜。举头望明月，低头思故乡。"
EN = "The quick brown fox jumps over the lazy dog near the river bank."
MIXED = st.text(alphabet=st.sampled_from("ab C1é\u0301中文，。!? \n\u3000ИİΣ"), max_size=60)


def apply(item: Any, text: str) -> str | dict[str, Any]:
    """ "kept", the new text, or what a drop says, for one filter as YAML would give it."""
    result = parse_filter(item, "test")[1].apply(Text(text))
    if result is None:
        return "kept"
    return result if isinstance(result, str) else result.detail


def python_tokens(text: str) -> list[str]:
    """Tokens by their definition, character by character."""
    tokens: list[str] = []
    joined = False
    for character in text.lower():
        if "\u4e00" <= character <= "\u9fff":
            tokens.append(character)
            joined = False
        elif character.isalnum() or unicodedata.category(character).startswith("M"):
            if joined:
                tokens[-1] += character
            else:
                tokens.append(character)
            joined = True
        else:
            joined = False
    return tokens


@given(MIXED)
def test_tokens_are_chinese_characters_and_words(text: str) -> None:
    starts, ends, hashes = Text(text).tokens
    words = [text.lower()[start:end] for start, end in zip(starts, ends, strict=True)]
    assert words == python_tokens(text)
    assert len(set(hashes.tolist())) == len(set(words))
    assert len(set(zip(words, hashes.tolist(), strict=True))) == len(set(words))


@given(MIXED, st.integers(1, 5))
def test_equal_ngrams_have_equal_hashes_and_others_differ(text: str, n: int) -> None:
    words = python_tokens(text)
    expected = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    hashes = Text(text).token_ngrams(n).tolist()
    assert len(hashes) == len(expected)
    assert len(set(zip(expected, hashes, strict=True))) == len(set(expected)) == len(set(hashes))


def test_a_token_has_one_hash_wherever_it_stands() -> None:
    far = Text("x " * 5000 + "river 月").tokens[2]
    assert far[-2:].tolist() == Text("RIVER 月").tokens[2].tolist()


@given(st.text(alphabet="abc中", max_size=200), st.integers(1, 4))
def test_character_repetition_is_the_share_of_the_top_ngrams(text: str, n: int) -> None:
    counts = sorted(collections.Counter(text[i : i + n] for i in range(len(text) - n + 1)).values(), reverse=True)
    top = min(math.isqrt(len(counts)), sum(count > 1 for count in counts))
    expected = sum(counts[:top]) / max(sum(counts), 1)
    got = apply({"character_repetition": {"n": n, "min": 2}}, text)
    assert isinstance(got, dict) and got["value"] == pytest.approx(expected, abs=1e-6)


@given(MIXED, st.integers(1, 3))
def test_word_repetition_is_the_share_of_repeated_ngrams(text: str, n: int) -> None:
    words = python_tokens(text)
    counts = collections.Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1)).values()
    expected = sum(count for count in counts if count > 1) / max(sum(counts), 1)
    got = apply({"word_repetition": {"n": n, "min": 2}}, text)
    assert isinstance(got, dict) and got["value"] == pytest.approx(expected, abs=1e-6)


# Filter, a text it keeps, a text it drops, and the value it names.
MEASURES: list[tuple[dict[str, Any], str, str, float]] = [
    ({"length": {"min": 5, "max": 100}}, ZH, "短", 1),
    ({"length": {"max": 30}}, ZH, EN, 64),
    ({"words": {"min": 10}}, ZH, "one two", 2),
    ({"average_line_length": {"min": 10, "max": 150}}, EN, "a\n\nbcd\n", 2),
    ({"maximum_line_length": {"max": 70}}, EN, "short\n" + "x" * 71, 71),
    ({"alphanumeric_share": {"min": 0.5, "max": 0.9}}, ZH, "ab12" * 3, 1.0),
    ({"alphanumeric_share": {"min": 0.5}}, EN, "-- = -- a", 1 / 9),
    ({"special_character_share": {"max": 0.25}}, EN, "ab 12!", 4 / 6),
    ({"character_repetition": {"max": 0.4, "n": 4}}, EN, "哈" * 40, 1.0),
    ({"word_repetition": {"max": 0.5, "n": 2}}, ZH, "buy now buy now buy now", 1.0),
    ({"word_repetition": {"max": 0.5, "n": 4}}, ZH, "点击这里点击这里点击这里", 1.0),
    ({"language_share": {"min": 0.5}}, ZH + EN, "Широка страна моя", 0.0),
    ({"language_share": {"min": 0.5, "scripts": "zh"}}, ZH, EN, 0.0),
]


@pytest.mark.parametrize(("item", "kept", "dropped", "value"), MEASURES)
def test_measures_keep_and_drop(item: dict[str, Any], kept: str, dropped: str, value: float) -> None:
    assert apply(item, kept) == "kept"
    got = apply(item, dropped)
    assert isinstance(got, dict) and got["value"] == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize(
    ("row", "value"),
    [
        ({"lang": "zh-cn", "meta": {"level": 3}}, None),
        ({"lang": "zh", "meta": {"level": 3}}, None),
        ({"lang": "ko", "meta": {"level": 3}}, "ko"),
        ({"lang": "zh-cn", "meta": {"level": 4}}, "4"),
        ({"lang": "zh-cn", "meta": "level 3"}, "absent"),
        ({"text": ZH}, "absent"),
        (ZH, "absent"),
    ],
)
def test_fields_of_the_record_decide(row: Any, value: str | None) -> None:
    filters = [
        parse_filter({"field": options}, "test")[1]
        for options in (
            {"key": "lang", "values": ["zh", "zh-cn"]},
            {"key": "meta.level", "values": "3"},
        )
    ]
    results = [one.apply(Text(ZH, row)) for one in filters]
    dropped = [result.detail["value"] for result in results if isinstance(result, Outcome)]
    assert dropped[:1] == ([] if value is None else [None if value == "absent" else value])


# Filter, a text it leaves alone, a text it changes, and into what.
NORMALISERS: list[tuple[Any, str, str, str]] = [
    ("nfkc", EN, "你好，世界！①ﬁ", "你好,世界!1fi"),
    ("whitespace", "def f():\n    return 1", "\ufeffa\u3000b\u00a0c  \r\n\r\n\r\n\r\n    d\u200b\n", "a b c\n\n    d"),
    ("control_characters", "a\tb\nc", "a\x00b\x1bc\x7f", "abc"),
    ({"remove_characters": {"characters": "◆■]^"}}, ZH, "◆一■二]^", "一二"),
    ("links", "http is a protocol. 和 https 一样", "看https://a.cn/b?c=1。好 (www.x.org/y), end", "看。好 (), end"),
    ({"links": {"replacement": "URL"}}, EN, '<a href="http://a.b/c">t</a>', '<a href="URL">t</a>'),
    ("emails", "a @ b, @user", "写信到foo.bar+x@mail.example.com吧", "写信到吧"),
    ("ips", "1.2.3, 300.1.1.1, 10:20:30, std::x, 1.2.3.4.5", "到192.168.0.1和2001:db8::1。", "到和。"),
    (
        "repeated_lines",
        "short\nshort\n" + ZH,
        f"{ZH}\n{EN}\n  {ZH}\nend",
        f"{ZH}\n{EN}\nend",
    ),
    (
        "repeated_sentences",
        "Yes. Yes. Pi is 3.14 or 3.14.",
        "我们今天去公园里散步吧。好。我们今天去公园里散步吧。This is one sentence. So on. This is one sentence.",
        "我们今天去公园里散步吧。好。This is one sentence. So on. ",
    ),
]


@pytest.mark.parametrize(("item", "kept", "before", "after"), NORMALISERS)
def test_normalisers_keep_and_change(item: Any, kept: str, before: str, after: str) -> None:
    assert apply(item, kept) == "kept"
    assert apply(item, before) == after
    assert apply(item, after) == "kept"  # once is enough


def test_every_filter_has_its_case() -> None:
    names = {next(iter(item)) if isinstance(item, dict) else item for item, *_ in [*MEASURES, *NORMALISERS]}
    assert names | {"contamination", "field"} == set(FILTERS)


@pytest.mark.parametrize("text", ["." * 200_000, "!?" * 100_000, "a@" * 100_000, "1." * 100_000, ":" * 200_000])
def test_no_text_is_slow(text: str) -> None:
    """Patterns with quadratic cost would need minutes."""
    for name in ("links", "emails", "ips", "repeated_sentences", "repeated_lines", "whitespace"):
        apply(name, text)


@given(st.text(max_size=200))
def test_sentences_lose_nothing_unless_one_repeats(text: str) -> None:
    assert apply({"repeated_sentences": {"min_length": 1000}}, text) == "kept"
    assert apply({"repeated_lines": {"min_length": 1000}}, text) == "kept"


def write_jsonl(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_contamination_names_the_evaluation_record(tmp_path: Path) -> None:
    question = "Which of the following planets has the largest number of confirmed moons in the solar system?"
    file = write_jsonl(tmp_path / "eval.jsonl", {"q": "short"}, {"q": EN}, {"q": {"text": [question]}, "a": ZH})
    item = {"contamination": {"files": [file], "n": 8}}
    assert apply(item, "Nothing of that is in this document, which talks about something else entirely.") == "kept"
    found = parse_filter(item, "test")[1].apply(Text("Intro.\n" + question.upper()))
    assert isinstance(found, Outcome) and not found.dropped
    assert found.detail == {
        "evaluation": f"{file}:3",
        "matches": 9,
        "ngram": "which of the following planets has the largest",
    }
    chinese = parse_filter({"contamination": {"files": [file], "n": 8, "action": "drop"}}, "test")[1]
    found = chinese.apply(Text("古诗：床前明月光 疑是地上霜"))
    assert isinstance(found, Outcome) and found.dropped and found.detail["evaluation"] == f"{file}:3"
    only = {"contamination": {"files": [file], "n": 8, "keys": ["q"]}}
    assert apply(only, ZH) == "kept"
    assert apply({"contamination": {"files": [file], "n": 8, "min_matches": 10}}, question) == "kept"
    assert build_index((file,), (), 8).too_short == 1


@pytest.mark.parametrize(
    ("line", "part"),
    [("{", "eval.jsonl:1: malformed JSON"), ("[1]", "must be a JSON object"), ('{"b": 1}', "no key 'q'")],
)
def test_a_bad_evaluation_file_is_named(line: str, part: str, tmp_path: Path) -> None:
    (tmp_path / "eval.jsonl").write_text(line, encoding="utf-8")
    with pytest.raises(ValueError, match=part.replace("[", r"\[")):
        build_index((str(tmp_path / "eval.jsonl"),), ("q",), 5)


# YAML tree, what the message says.
BAD_SETTINGS: list[tuple[Any, list[str]]] = [
    ([], ["expected keys with values, not list"]),
    ({"filter": []}, ["unknown key 'filter'", "did you mean 'filters'?"]),
    ({"filters": {"length": {}}}, ["must be a list"]),
    ({"filters": ["lenkth"]}, ["filters[0]: unknown filter 'lenkth'", "did you mean 'length'?"]),
    ({"filters": ["links", {"length": {"mim": 1}}]}, ["filters[1]: length: unknown option 'mim'", "'min'?"]),
    ({"filters": [{"length": {"min": "x"}}]}, ["length: min must be a number, not 'x'"]),
    ({"filters": [{"length": {"min": True}}]}, ["min must be a number"]),
    ({"filters": [{"length": {"min": 5, "max": 1}}]}, ["min 5 is above max 1"]),
    ({"filters": [{"length": 5}]}, ["expected options as 'name: value', not 5"]),
    ({"filters": [{"length": {}, "words": {}}]}, ["expected a filter name"]),
    ({"filters": ["remove_characters"]}, ["characters is missing"]),
    ({"filters": [{"remove_characters": {"characters": ""}}]}, ["name at least one"]),
    ({"filters": [{"character_repetition": {"n": 0}}]}, ["n must be at least 1"]),
    ({"filters": [{"language_share": {"scripts": ["fr"]}}]}, ["'fr' is not one of zh, en, other"]),
    ({"filters": [{"contamination": {"files": []}}]}, ["files must be a list of texts"]),
    ({"filters": [{"contamination": {"files": "x", "action": "kill"}}]}, ["'kill' is not one of report, drop"]),
    ({"minhash_dedup": {"bucket": 3}}, ["minhash_dedup: unknown option 'bucket'", "'buckets'?"]),
    ({"minhash_dedup": {"buckets": 0}}, ["buckets must be at least 1"]),
    ({"exact_dedup": {"ignore_case_and_punctuation": 1}}, ["must be true or false"]),
    ({"text_key": 3}, ["text_key must be text"]),
]


@pytest.mark.parametrize(("tree", "parts"), BAD_SETTINGS)
def test_bad_settings_are_one_line(tree: Any, parts: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        parse_settings(tree, "c.yaml")
    message = str(caught.value)
    assert message.startswith("c.yaml: ") and "\n" not in message
    for part in parts:
        assert part in message


def test_settings_say_what_they_hold() -> None:
    settings = parse_settings({"filters": ["links"], "exact_dedup": None, "minhash_dedup": False}, "c.yaml")
    assert [name for name, _ in settings.filters] == ["links"]
    assert settings.exact_dedup is not None and settings.minhash_dedup is None
    assert parse_settings({}, "c.yaml") == Settings()
    described = describe(parse_settings({"filters": ["words", {"length": {"min": 2}}]}, "c.yaml"))
    assert described["filters"] == [["words", {}], ["length", {"min": 2}]]  # and no Infinity, which is no JSON
