"""Chat templates against transformers: text, ids and masks, with templates of published models.

The templates are those TRL ships; they are only read, as files. Its ``*_training`` ones say by ``{% generation %}``
what of the published ones an assistant writes.

STEEL_REAL_TOKENIZER   a Hugging Face folder whose own chat template is compared as well (Qwen2.5)
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer

from megatron_steel.text.builtin_templates import BUILT_IN
from megatron_steel.text.conversation import IGNORED, Conversation, Message
from megatron_steel.text.masks import MaskPolicy
from megatron_steel.text.templates import load_template, suggest_template
from megatron_steel.text.tokenizer import Tokenizer, build_tokenizer

BUNDLED = Path(__file__).parents[2] / "examples" / "data" / "tokenizer"
CONTROL = re.compile(r"<\|\w+\|>|\[gMASK\]|<sop>")
OTHER_CONTROLS = (
    "<start_of_turn>", "<end_of_turn>", "<end_of_utterance>", "<|end|>", "<|observation|>",
    "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>",
)  # fmt: skip


class Tokenizers(NamedTuple):
    """The same folder, read by both."""

    hf: Any
    ours: Tokenizer


def published(name: str) -> str:
    """A template file of TRL."""
    spec = importlib.util.find_spec("trl")
    if spec is None or spec.origin is None:
        pytest.skip("needs the templates TRL ships")
    return (Path(spec.origin).parent / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Tokenizers:
    """The bundled tokenizer with the control tokens of many models."""
    folder = tmp_path_factory.mktemp("tokenizer")
    backend = Backend.from_file(str(BUNDLED / "tokenizer.json"))
    found = {control for built_in in BUILT_IN.values() for control in CONTROL.findall(built_in.source)}
    backend.add_special_tokens(["<bos>", *sorted(found), *OTHER_CONTROLS])
    backend.add_tokens(["<think>", "</think>", "<tool_call>", "</tool_call>"])
    backend.save(str(folder / "tokenizer.json"))
    config = json.loads((BUNDLED / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"bos_token": "<bos>"}))
    return Tokenizers(AutoTokenizer.from_pretrained(str(folder)), build_tokenizer("HuggingFaceTokenizer", str(folder)))


def talk(*turns: str, system: str | None = None) -> Conversation:
    messages = [] if system is None else [Message(role="system", content=system)]
    messages += [Message(role="assistant" if n % 2 else "user", content=turn) for n, turn in enumerate(turns)]
    return Conversation(messages=tuple(messages), place="rows.jsonl:1")


WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"city": {"type": "string"}}}}
CALLS = ({"name": "weather", "arguments": {"city": "B\u00f6rn", "days": [1, 2]}},)
TALKS = [
    talk("Hi there, what is 2+2?", "It is 4.\n\nYes."),
    talk("Hi\n", "\u4f60\u597d\uff0c\u4e16\u754c", "And  then?", " Nothing. ", "Why", "So\n", system="Be brief.\n"),
    talk("", "a", "user\n", "</s> <b> [INST]"),
]
WITH_TOOLS = Conversation(
    messages=(
        Message(role="system", content="Be brief."),
        Message(role="user", content="How cold is it?"),
        Message(role="assistant", content="", tool_calls=CALLS),
        Message(role="tool", content='{"t": 3}'),
        Message(role="assistant", content="Three degrees."),
        Message(role="user", content="Thanks"),
        Message(role="assistant", content="Bye"),
    ),
    place="rows.jsonl:2",
    tools=(WEATHER,),
)
TWO_CALLS = Conversation(
    messages=(
        Message(role="user", content="How cold is it?"),
        Message(role="assistant", content="Wait", tool_calls=CALLS * 2),
        Message(role="tool", content="3"),
        Message(role="tool", content="4"),
        Message(role="assistant", content="Cold"),
    ),
    place="rows.jsonl:3",
    tools=(WEATHER, WEATHER),
)


def for_hf(messages: tuple[Message, ...]) -> list[dict[str, Any]]:
    """Messages as apply_chat_template takes them."""
    rows: list[dict[str, Any]] = []
    for message in messages:
        rows.append({"role": message.role, "content": message.content})
        if message.tool_calls:
            rows[-1]["tool_calls"] = [{"type": "function", "function": call} for call in message.tool_calls]
    return rows


def rendered(both: Tokenizers, source: str, talk: Conversation, turns: int | None = None, header: bool = False) -> str:
    """Text of transformers, of all turns or the first ones."""
    return both.hf.apply_chat_template(
        for_hf(talk.messages[:turns]), tools=list(talk.tools) or None, chat_template=source, tokenize=False,
        add_generation_prompt=header,
    )  # fmt: skip


def same_text(both: Tokenizers, name: str, source: str, talk: Conversation) -> None:
    """Whole conversations, and every prompt."""
    template = load_template(name, both.ours)
    assert template.text(talk.messages, talk.tools) == rendered(both, source, talk)
    for turns, message in enumerate(talk.messages):
        if message.role == "assistant":
            prompt = template.text(talk.messages[:turns], talk.tools, header=True)
            assert prompt == rendered(both, source, talk, turns, header=True)


# Built-in templates write what the published ones write.

PUBLISHED = {"qwen2": "qwen2_5", "qwen2.5": "qwen2_5", "qwen3": "qwen3"}


def source_of(name: str) -> str:
    """The published template; those of Qwen2 and Qwen2.5 are told apart by their default system text."""
    source = published(PUBLISHED[name])
    return source.replace("You are Qwen, created by Alibaba Cloud. ", "") if name == "qwen2" else source


@pytest.mark.parametrize("talk", [*TALKS, WITH_TOOLS, TWO_CALLS], ids=["1", "3", "2", "tools", "calls"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_text_of_qwen(both: Tokenizers, name: str, talk: Conversation) -> None:
    same_text(both, name, source_of(name), talk)


@pytest.mark.parametrize("talk", TALKS)
def test_text_of_chatml(both: Tokenizers, talk: Conversation) -> None:
    source = json.loads((BUNDLED / "tokenizer_config.json").read_text())["chat_template"]
    same_text(both, "chatml", source, talk)


THOUGHTS = [
    talk("q", "<think>\nhm\n</think>\n\na", "r", "<think>\nso\n</think>\n\nb"),
    talk("q", "a", "r", "<think>no newlines</think>b"),
    talk("q", "\n\na"),
    talk("<tool_response>x</tool_response>", "a"),
    talk("q", "a", "<tool_response>x</tool_response>", "</think>b"),
]


@pytest.mark.parametrize("talk", THOUGHTS)
def test_thoughts_of_qwen3(both: Tokenizers, talk: Conversation) -> None:
    same_text(both, "qwen3", published("qwen3"), talk)


@pytest.mark.parametrize("talk", TALKS)
def test_text_of_llama3(both: Tokenizers, talk: Conversation) -> None:
    same_text(both, "llama3", published("llama3"), talk)


def test_tools_of_llama3(both: Tokenizers) -> None:
    """Those of Llama 3.1, but without the lines its template adds to every system turn."""
    added = "Environment: ipython\nCutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
    text = rendered(both, published("llama3_1"), WITH_TOOLS)
    assert added in text
    template = load_template("llama3", both.ours)
    assert template.text(WITH_TOOLS.messages, WITH_TOOLS.tools) == text.replace(added, "")


def test_text_of_mistral(both: Tokenizers) -> None:
    """As in Mistral's own description of its format; the end token of the bundled tokenizer has another name."""
    written = "<bos>[INST] q [/INST] a</s>[INST] r [/INST] b</s>".replace("</s>", "<|endoftext|>")
    assert load_template("mistral", both.ours).text(talk("q", "a", "r", "b").messages) == written


# What we export is read by transformers as we write it.


@pytest.mark.parametrize("name", BUILT_IN)
def test_exported_templates(both: Tokenizers, name: str) -> None:
    template = load_template(name, both.ours)
    for conversation in TALKS:
        if name == "mini_qwen" and conversation.messages[0].role == "system":
            continue
        same_text(both, name, template.jinja, conversation)
        prompt = conversation.messages[:-1]
        if name != "plain":  # its answers go on in the middle of a text
            ids = both.hf.apply_chat_template(
                for_hf(prompt), chat_template=template.jinja, add_generation_prompt=True, return_dict=False
            )
            assert template.encode_prompt(prompt) == ids


# Ids and masks.

TAGGED = [
    "qwen2_5_training", "qwen3_training", "llama3_training", "phi3_training", "gemma3_training", "lfm2_training",
    "glm4moe_training", "cohere_training", "smolvlm_training",
]  # fmt: skip


def same_masks(both: Tokenizers, name: str, source: str, talk: Conversation) -> None:
    """Ids, and which of them are trained, of a template with generation tags."""
    truth = both.hf.apply_chat_template(
        for_hf(talk.messages), tools=list(talk.tools) or None, chat_template=source, return_dict=True,
        return_assistant_tokens_mask=True,
    )  # fmt: skip
    encoded = load_template(name, both.ours).encode(talk, MaskPolicy())
    assert encoded.ids_T.tolist() == truth["input_ids"]
    assert (encoded.labels_T != IGNORED).tolist() == [bool(trained) for trained in truth["assistant_masks"]]


@pytest.mark.parametrize("name", TAGGED)
def test_templates_with_generation_tags(tmp_path: Path, both: Tokenizers, name: str) -> None:
    (tmp_path / "own.jinja").write_text(published(name), encoding="utf-8")
    for conversation in TALKS[:2]:
        same_masks(both, str(tmp_path / "own.jinja"), published(name), conversation)


@pytest.mark.parametrize(
    ("name", "truth", "talks"),
    [
        ("qwen2.5", "qwen2_5_training", TALKS[:2]),
        ("qwen3", "qwen3_training", TALKS[:1]),  # TRL's shows thoughts in every round
        ("llama3", "llama3_training", TALKS[:2]),
    ],
)
def test_masks_of_built_in_templates(both: Tokenizers, name: str, truth: str, talks: list[Conversation]) -> None:
    """But for newlines next to an answer: TRL trains the one behind it, and for Qwen2.5 the one before it."""
    for conversation in talks:
        result = both.hf.apply_chat_template(
            for_hf(conversation.messages), chat_template=published(truth), return_dict=True,
            return_assistant_tokens_mask=True,
        )  # fmt: skip
        encoded = load_template(name, both.ours).encode(conversation, MaskPolicy())
        assert encoded.ids_T.tolist() == result["input_ids"]
        beside = {at for turn in encoded.rounds for at in (turn.answer - 1, turn.end)} if name != "llama3" else set()
        newline = both.ours.encode_typed("\n")[0]
        masks = enumerate(zip(encoded.labels_T != IGNORED, result["assistant_masks"], strict=True))
        assert all(one == other or (at in beside and encoded.ids_T[at] == newline) for at, (one, other) in masks)


# Not open_llama, which trains prompts; nor glm4, where the label of another token is the end; nor plain, whose answers
# go on in the middle of a text.
@pytest.mark.parametrize("name", ["chatml", "qwen2", "qwen2.5", "qwen3", "llama3", "mistral", "alpaca", "mini_qwen"])
def test_masks_of_our_tags(both: Tokenizers, name: str) -> None:
    for conversation in TALKS[:1] if name == "mini_qwen" else TALKS[:2]:
        same_masks(both, name, BUILT_IN[name].source, conversation)


@pytest.mark.parametrize("name", ["qwen2_5", "llama3", "gemma3", "lfm2", "smolvlm", "cohere"])
def test_templates_without_tags_by_prefixes(tmp_path: Path, both: Tokenizers, name: str) -> None:
    """The same rows as with the tags of TRL."""
    folders = [tmp_path / "plain.jinja", tmp_path / "tagged.jinja"]
    for path, source in zip(folders, (published(name), published(f"{name}_training")), strict=True):
        path.write_text(source, encoding="utf-8")
    untagged, tagged = (load_template(str(path), both.ours) for path in folders)
    assert untagged.stop_ids == tagged.stop_ids
    for conversation in TALKS[:2]:
        one, other = (template.encode(conversation, MaskPolicy()) for template in (untagged, tagged))
        assert one.ids_T.tolist() == other.ids_T.tolist()
        blank = {both.ours.encode_typed("\n")[0]}
        extra = {int(index) for index, a, b in zip(one.ids_T, one.labels_T, other.labels_T, strict=True) if a != b}
        assert extra <= blank  # the newline behind an answer, which some of TRL's tags hold


def test_where_ids_differ(both: Tokenizers) -> None:
    """Documented: transformers merges the newline of the header with the one an answer begins with."""
    conversation = talk("q", "\na")
    source = source_of("qwen2.5")
    ids = both.hf.apply_chat_template(for_hf(conversation.messages), chat_template=source, return_dict=False)
    ours = load_template("qwen2.5", both.ours).encode(conversation, MaskPolicy())
    assert both.ours.encode_typed("\n\n") != both.ours.encode_typed("\n") * 2
    assert ours.ids_T.tolist() != ids and both.ours.decode(ours.ids_T.tolist()) == both.ours.decode(ids)


@pytest.mark.parametrize(
    ("name", "message"),
    [("phi3", "writes turn 2 in another way when turns follow"), ("gptoss", "'strftime_now' is undefined")],
)
def test_published_templates_that_are_refused(tmp_path: Path, both: Tokenizers, name: str, message: str) -> None:
    (tmp_path / "own.jinja").write_text(published(name), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        load_template(str(tmp_path / "own.jinja"), both.ours)


def test_a_real_tokenizer(tmp_path: Path) -> None:
    if "STEEL_REAL_TOKENIZER" not in os.environ:
        pytest.skip("STEEL_REAL_TOKENIZER names no folder")
    folder = os.environ["STEEL_REAL_TOKENIZER"]
    real = Tokenizers(AutoTokenizer.from_pretrained(folder), build_tokenizer("HuggingFaceTokenizer", folder))
    name = suggest_template(real.ours)
    assert name != "tokenizer" and name in BUILT_IN
    for conversation in [*TALKS, WITH_TOOLS, TWO_CALLS]:
        same_text(real, name, real.hf.chat_template, conversation)
        ids = real.hf.apply_chat_template(
            for_hf(conversation.messages), tools=list(conversation.tools) or None, return_dict=False
        )
        own, built_in = (
            load_template(choice, real.ours).encode(conversation, MaskPolicy()) for choice in ("tokenizer", name)
        )
        assert own.ids_T.tolist() == built_in.ids_T.tolist() == ids
        if not conversation.tools:  # where a call without text begins is another place in the one that has no tags
            assert own.labels_T.tolist() == built_in.labels_T.tolist()
