"""Sources of chat data: values of --train-data, and entries of a dataset_info.json as LLaMA-Factory writes them."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_steel.data.chat_formats import BadRow
from megatron_steel.data.chat_sources import ChatSource, draw_rows, open_chat
from megatron_steel.text.conversation import Conversation

LIMIT = 1_000_000
# Entries as in LLaMA-Factory's own data/dataset_info.json, and one with names of its own for everything.
REGISTRY: dict[str, Any] = {
    "identity": {"file_name": "identity.json"},
    "glaive": {
        "file_name": "glaive.json",
        "formatting": "sharegpt",
        "columns": {"messages": "conversations", "tools": "tools"},
    },
    "openai_style": {
        "file_name": "openai.jsonl",
        "formatting": "sharegpt",
        "columns": {"messages": "messages"},
        "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
    },
    "orca": {
        "file_name": "orca.jsonl",
        "columns": {"prompt": "question", "response": "answer", "system": "system_prompt"},
    },
    "full_alpaca": {
        "file_name": "alpaca.jsonl",
        "columns": {
            "prompt": "instruction",
            "query": "input",
            "response": "output",
            "system": "system",
            "history": "history",
        },
    },
    "named": {
        "file_name": "named.jsonl",
        "formatting": "sharegpt",
        "columns": {"messages": "talk", "system": "sys"},
        "tags": {
            "role_tag": "who",
            "content_tag": "says",
            "user_tag": "customer",
            "assistant_tag": "clerk",
            "observation_tag": "screen",
            "function_tag": "button",
            "system_tag": "boss",
        },
    },
    "many": {"file_name": "many", "split": "train"},
    "sub": {"file_name": "many", "folder": "deep", "subset": "zh"},
    "five": {"file_name": "alpaca.jsonl", "num_samples": 5},
    "hub": {"hf_hub_url": "somebody/somewhere"},
    "both": {"hf_hub_url": "somebody/somewhere", "file_name": "identity.json"},
    "pairs": {"file_name": "identity.json", "ranking": True, "columns": {"chosen": "chosen"}},
    "pictures": {"file_name": "identity.json", "formatting": "sharegpt", "columns": {"messages": "m", "images": "i"}},
    "pretraining": {"file_name": "identity.json", "columns": {"prompt": "text"}},
    "typo": {"file_name": "identity.json", "columnz": {}},
    "typo_column": {"file_name": "identity.json", "columns": {"prompd": "a"}},
    "other": {"file_name": "identity.json", "formatting": "vicuna"},
    "gone": {"file_name": "gone.json"},
    "no_split": {"file_name": "many", "split": "validation"},
    "split_of_file": {"file_name": "identity.json", "split": "test"},
    "minus": {"file_name": "identity.json", "num_samples": 0},
    "tagged_alpaca": {"file_name": "identity.json", "tags": {"role_tag": "role"}},
    "no_messages": {"file_name": "identity.json", "formatting": "sharegpt", "columns": {"tools": "tools"}},
    "no_file": {"formatting": "alpaca"},
}


def alpaca(*names: str) -> list[dict[str, Any]]:
    return [{"instruction": f"ask {name}", "input": "", "output": f"say {name}"} for name in names]


def write(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(rows) if path.suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def registry(tmp_path: Path) -> Path:
    """The registry with its files."""
    call = '{"name": "f", "arguments": {}}'
    talk = [("human", "a"), ("function_call", call), ("observation", "1"), ("gpt", "b")]
    write(tmp_path / "identity.json", alpaca("me"))
    glaive = {"conversations": [{"from": role, "value": text} for role, text in talk], "tools": '[{"name": "f"}]'}
    write(tmp_path / "glaive.json", [glaive, {**glaive, "tools": "[]"}])
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    write(tmp_path / "openai.jsonl", [{"messages": turns}])
    orca = {"question": "a", "answer": "b", "system_prompt": "s", "input": "not read", "output": "not read"}
    write(tmp_path / "orca.jsonl", [orca])
    rows = [{**row, "system": "s", "history": [["q", "r"]]} for row in alpaca("1", "2", "3")]
    write(tmp_path / "alpaca.jsonl", rows)
    named = [("boss", "c"), ("customer", "a"), ("button", call), ("screen", "1"), ("clerk", "b")]
    write(tmp_path / "named.jsonl", [{"talk": [{"who": who, "says": says} for who, says in named], "sys": "x"}])
    write(tmp_path / "many" / "train-00000-of-00002.jsonl", alpaca("t0"))
    write(tmp_path / "many" / "train-00001-of-00002.jsonl", alpaca("t1"))
    write(tmp_path / "many" / "test-00000-of-00001.jsonl", alpaca("x"))
    write(tmp_path / "many" / "deep" / "zh" / "a.jsonl", alpaca("zh"))
    path = tmp_path / "dataset_info.json"
    path.write_text(json.dumps(REGISTRY), encoding="utf-8")
    return path


def texts(source: ChatSource) -> list[list[tuple[str, str]]]:
    """Roles and texts of the conversations."""
    rows = list(source.rows())
    assert all(isinstance(row, Conversation) for row in rows), rows
    return [[(m.role, m.content) for m in row.messages] for row in rows if isinstance(row, Conversation)]


# F3.


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("identity", [("user", "ask me"), ("assistant", "say me")]),
        ("both", [("user", "ask me"), ("assistant", "say me")]),
        ("glaive", [("user", "a"), ("assistant", ""), ("tool", "1"), ("assistant", "b")]),
        ("openai_style", [("user", "a"), ("assistant", "b")]),
        ("orca", [("system", "s"), ("user", "a"), ("assistant", "b")]),
        (
            "full_alpaca",
            [("system", "s"), ("user", "q"), ("assistant", "r"), ("user", "ask 1"), ("assistant", "say 1")],
        ),
        ("named", [("system", "c"), ("user", "a"), ("assistant", ""), ("tool", "1"), ("assistant", "b")]),
        ("many", [("user", "ask t0"), ("assistant", "say t0")]),
        ("sub", [("user", "ask zh"), ("assistant", "say zh")]),
    ],
)
def test_entries_are_read_as_they_say(registry: Path, name: str, expected: list[tuple[str, str]]) -> None:
    (source,) = open_chat([name], registry, LIMIT)
    assert source.name == name and source.weight is None
    assert texts(source)[0] == expected


def test_tools_and_calls_of_an_entry(registry: Path) -> None:
    first, second = open_chat(["glaive"], registry, LIMIT)[0].rows()
    assert isinstance(first, Conversation) and isinstance(second, Conversation)
    assert first.tools == ({"type": "function", "function": {"name": "f"}},) and second.tools == ()
    assert first.messages[1].tool_calls == ({"name": "f", "arguments": {}},)


def test_a_split_and_a_folder_choose_files(registry: Path) -> None:
    many, sub = open_chat(["many", "sub"], registry, LIMIT)
    assert [file.name for file in many.files] == ["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl"]
    assert [file.name for file in sub.files] == ["a.jsonl"]


def test_num_samples_beyond_the_rows_takes_all_and_some_again(registry: Path) -> None:
    (source,) = open_chat(["five"], registry, LIMIT)
    asked = [chat[-2][1] for chat in texts(source)]
    assert len(asked) == 5 and set(asked) == {"ask 1", "ask 2", "ask 3"}
    assert texts(source) == texts(source)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hub", "is at hf_hub_url somebody/somewhere; download it, and give the place as its file_name"),
        ("pairs", "has ranking: pairs of answers are for"),
        ("pictures", "has a column of images: only text is read"),
        ("pretraining", "columns names no response; it is text for pretraining"),
        ("typo", "has the unknown key 'columnz'; did you mean 'columns'?"),
        ("typo_column", "columns has the unknown key 'prompd'; did you mean 'prompt'?"),
        ("other", "formatting 'vicuna' is not one of alpaca, sharegpt, openai"),
        ("gone", "gone.json does not exist"),
        ("no_split", "holds no file of the split 'validation'"),
        ("split_of_file", "identity.json is one file; folder, subset and split choose"),
        ("minus", "num_samples must be a whole number above 0, not 0"),
        ("tagged_alpaca", "has tags, which alpaca has not"),
        ("no_messages", "columns names no messages"),
        ("no_file", "has no file_name"),
        ("identiti", "did you mean 'identity' of"),
    ],
)
def test_entries_that_cannot_be_trained_are_refused_in_one_line(registry: Path, name: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        open_chat([name], registry, LIMIT)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("text", "message"), [("[]", "must be an object of names"), ("{", "not JSON")])
def test_a_registry_that_is_none(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "info.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        open_chat(["a"], tmp_path / "info.json", LIMIT)
    with pytest.raises(ValueError, match="cannot be read"):
        open_chat(["a"], tmp_path / "none.json", LIMIT)


# Values.


def test_files_folders_patterns_and_names_with_weights(registry: Path) -> None:
    home = registry.parent
    values = ["2", f"{home}/many", "0.5", f"{home}/*entity.json", "0", f"{home}/orca.jsonl", "1", f"{home}/glaive"]
    many, pattern, glaive = open_chat(values, None, LIMIT)
    assert [file.name for file in many.files] == [
        "test-00000-of-00001.jsonl",
        "train-00000-of-00002.jsonl",
        "train-00001-of-00002.jsonl",
    ]
    assert pattern.files == (home / "identity.json",)
    assert glaive.files == (home / "glaive.json",)
    assert [source.name for source in (many, pattern, glaive)] == ["many", "*entity.json", "glaive"]
    assert [source.weight for source in (many, pattern, glaive)] == [2.0, 0.5, 1.0]


def test_a_folder_is_its_data_without_the_registry(registry: Path) -> None:
    (source,) = open_chat([str(registry.parent)], None, LIMIT)
    assert [file.name for file in source.files] == [
        "alpaca.jsonl",
        "glaive.json",
        "identity.json",
        "named.jsonl",
        "openai.jsonl",
        "orca.jsonl",
    ]


def test_names_are_told_apart(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a/chat.jsonl", "b/chat.jsonl", "b/other.jsonl")]
    for path in paths:
        write(path, alpaca(str(path)))
    found = open_chat([str(path) for path in paths], None, LIMIT)
    assert [source.name for source in found] == ["a/chat", "b/chat", "other"]
    write(tmp_path / "b/chat.json", alpaca("c"))
    found = open_chat([str(tmp_path / "b/chat.json"), str(paths[1])], None, LIMIT)
    assert [source.name for source in found] == ["chat.json", "chat.jsonl"]


def test_a_fingerprint_is_of_the_content_and_of_how_it_is_read(registry: Path, tmp_path: Path) -> None:
    def name_of(value: str, limit: int = LIMIT) -> str:
        return open_chat([value], registry, limit)[0].fingerprint

    home = registry.parent
    first = name_of(f"{home}/alpaca.jsonl")
    write(tmp_path / "elsewhere" / "moved.jsonl", [])
    moved = tmp_path / "elsewhere" / "moved.jsonl"
    moved.write_bytes((home / "alpaca.jsonl").read_bytes())
    assert name_of(str(moved)) == first
    others = [name_of("full_alpaca"), name_of("five"), name_of(f"{moved}:max_samples=2"), name_of(str(moved), 99)]
    moved.write_bytes(moved.read_bytes() + b"\n")
    assert len({first, name_of(str(moved)), *others}) == 6


def test_max_samples_takes_rows_by_lot(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", alpaca(*map(str, range(100))))
    (source,) = open_chat([f"{path}:max_samples=10"], None, LIMIT)
    assert source.name == "a"
    asked = [int(chat[0][1].split()[1]) for chat in texts(source)]
    assert len(set(asked)) == 10 and asked == sorted(asked) and max(asked) > 20
    (whole,) = open_chat([f"{path}:max_samples=1000"], None, LIMIT)
    assert len(texts(whole)) == 100


def test_a_source_survives_pickling(registry: Path) -> None:
    (source,) = open_chat(["named"], registry, LIMIT)
    copy = pickle.loads(pickle.dumps(source))
    assert copy == source and list(copy.rows()) == list(source.rows())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["{home}/none.jsonl"], "no such file, folder or name"),
        (["{home}/*.parquet"], "matches no file"),
        (["{home}/empty"], "holds no file that ends in"),
        (["{home}/notes.txt"], "plain text holds no conversations"),
        (["{home}/named2"], "did you mean 'named'?"),
        (["{home}/named.jsonl", "2", "{home}/named"], "give data only, or a weight before each of them"),
        (["-1", "{home}/named"], "the weight -1 of"),
        (["{home}/named.jsonl", "{home}/named"], "is given 2 times"),
        (["{home}/named.jsonl:max_samples=0"], "max_samples is a whole number above 0"),
        (["{home}/named.jsonl:fraction=0.5"], "take a part of the rows with :max_samples=N"),
    ],
)
def test_values_that_name_nothing_are_refused(registry: Path, values: list[str], message: str) -> None:
    home = registry.parent
    (home / "empty").mkdir()
    (home / "notes.txt").write_text("a")
    with pytest.raises(ValueError) as caught:
        open_chat([value.format(home=home) for value in values], None, LIMIT)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_name_that_is_a_path_too_is_refused(registry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(registry.parent)
    with pytest.raises(ValueError, match=r"write \./many for one"):
        open_chat(["many"], registry, LIMIT)
    assert open_chat(["./many"], registry, LIMIT)[0].name == "many"


@given(rows=st.integers(0, 50), samples=st.none() | st.integers(1, 120), most=st.none() | st.integers(1, 120))
def test_draws_are_as_many_as_asked(rows: int, samples: int | None, most: int | None) -> None:
    copies = draw_rows(rows, samples, most)
    total = 0 if not rows else samples if samples is not None else rows
    assert len(copies) == rows and copies.sum() == min(total, most or total)
    if samples is not None and most is None and samples >= rows:
        assert (copies >= 1).all()
    if samples is None or samples <= rows:
        assert (copies <= 1).all()
    assert np.array_equal(copies, draw_rows(rows, samples, most))


ROW = st.sampled_from(
    [*alpaca("a"), {"instruction": "a"}, {"conversations": [{"from": "human", "value": "a"}]}, [], "text", None, 3]
)


@settings(max_examples=30, deadline=None)
@given(rows=st.lists(ROW, max_size=12), samples=st.none() | st.integers(1, 20))
def test_in_is_out_and_rejected(tmp_path_factory: pytest.TempPathFactory, rows: list[Any], samples: int | None) -> None:
    home = tmp_path_factory.mktemp("rows")
    write(home / "a.jsonl", rows)
    entry = {"file_name": "a.jsonl"} if samples is None else {"file_name": "a.jsonl", "num_samples": samples}
    (home / "dataset_info.json").write_text(json.dumps({"name": entry}))
    found = list(open_chat(["name"], home / "dataset_info.json", LIMIT)[0].rows())
    out = sum(isinstance(row, Conversation) for row in found)
    rejected = sum(isinstance(row, BadRow) for row in found)
    assert out + rejected == len(found) == (len(rows) if samples is None or not rows else samples)
    if samples is None:
        assert out == sum(row == alpaca("a")[0] for row in rows)
