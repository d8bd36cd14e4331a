"""Sentences: put together they are the text, and full stops that end none are told apart."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_steel.text.sentences import make_splitter

DATA = Path(__file__).resolve().parents[2] / "examples" / "data"
SHORT = 'Mr. Smith met Dr. Jones in May. He said "Hello!" Then he left.\n\nA new line here.'
CHINESE = (
    "\u4ed6\u8bf4\uff1a\u201c\u4f60\u597d\uff01\u201d\u7136\u540e\u8d70\u4e86\u3002\u771f\u7684\uff1f\uff01"
    "\u8fd8\u6709\u2026\u2026 \u7ed3\u675f\n\n\u6807\u9898\n\u6b63\u6587"
)


@pytest.fixture(scope="module")
def punkt(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder in the form of ``punkt_tab`` that knows two abbreviations."""
    folder = tmp_path_factory.mktemp("punkt")
    (folder / "abbrev_types.txt").write_text("mr\ndr\n")
    (folder / "collocations.tab").write_text("##number##\tst\n")
    (folder / "ortho_context.tab").write_text("he\t14\n")
    (folder / "sent_starters.txt").write_text("then\n")
    return str(folder)


def test_english_with_a_model(punkt: str) -> None:
    split = make_splitter("english", False, punkt, list)
    sentences = ["Mr. Smith met Dr. Jones in May.", 'He said "Hello!"', "Then he left.", "A new line here."]
    assert split(SHORT) == sentences
    assert split("") == [] and split(" \n ") == []
    kept = make_splitter("english", True, punkt, list)(SHORT)
    assert "".join(kept) == SHORT and [sentence.strip() for sentence in kept] == sentences


def test_english_learnt_from_the_text() -> None:
    from nltk.tokenize.punkt import PunktSentenceTokenizer

    lines = (DATA / "valid_en.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines[:20]]
    library = PunktSentenceTokenizer(texts[0])
    split = make_splitter("english", False, None, lambda: texts[:1])
    assert [split(text) for text in texts] == [library.tokenize(text) for text in texts]
    assert split("One came. Two left!") == ["One came.", "Two left!"]


def test_chinese_ends_at_marks_closing_quotes_and_lines() -> None:
    split = make_splitter("chinese", False, None, list)
    expected = [
        "\u4ed6\u8bf4\uff1a\u201c\u4f60\u597d\uff01\u201d", "\u7136\u540e\u8d70\u4e86\u3002",
        "\u771f\u7684\uff1f\uff01", "\u8fd8\u6709\u2026\u2026", "\u7ed3\u675f", "\u6807\u9898", "\u6b63\u6587",
    ]  # fmt: skip
    assert split(CHINESE) == expected
    assert split("3.14 \u548c v1.2") == ["3.14 \u548c v1.2"]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.text(alphabet="a\u4e2d\u3002\uff01?!\u2026\u201d\u300d \n\r\t.\u3000", max_size=40))
def test_nothing_is_lost(text: str) -> None:
    kept = make_splitter("zh", True, None, list)(text)
    assert "".join(kept) == text
    plain = make_splitter("zh", False, None, list)(text)
    assert "".join("".join(plain).split()) == "".join(text.split())
    assert all(sentence == sentence.strip() and sentence for sentence in plain)


def test_a_folder_that_is_no_model_is_told(tmp_path: Path, punkt: str) -> None:
    with pytest.raises(ValueError, match=r"holds no abbrev_types.txt; give a language's folder of punkt_tab"):
        make_splitter("english", False, str(tmp_path), list)
    for path in Path(punkt).iterdir():
        (tmp_path / path.name).write_text(path.read_text())
    (tmp_path / "ortho_context.tab").write_text("he 14\n")
    with pytest.raises(ValueError, match="not a punkt_tab folder"):
        make_splitter("english", False, str(tmp_path), list)
