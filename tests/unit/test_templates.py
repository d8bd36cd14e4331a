"""Chat templates: exact ids and labels, on a tokenizer whose tokens are bytes and control tokens.

Rows are written by hand as pieces: text or the id of a control token, and whether it is trained.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from chat_by_hand import (
    ANSWER,
    BOS,
    CALL,
    CONTROLS,
    END,
    EOS,
    EOT,
    GMASK,
    HEAD,
    SOP,
    START,
    SYSTEM,
    TAIL,
    THINK,
    UNTHINK,
    USER,
    WORDS,
    Piece,
    byte_tokenizer,
    chatml_rows,
    check,
    ids_of,
    labels_of,
    talk,
)
from hypothesis import given
from hypothesis import strategies as st

from megatron_steel.text.builtin_templates import BUILT_IN
from megatron_steel.text.conversation import IGNORED, Message, Round
from megatron_steel.text.masks import MaskPolicy, pick_system
from megatron_steel.text.templates import Template, load_template, suggest_template
from megatron_steel.text.tokenizer import Tokenizer, build_tokenizer

ROOT = Path(__file__).resolve().parents[2]
BUNDLED = build_tokenizer("HuggingFaceTokenizer", str(ROOT / "examples" / "data" / "tokenizer"))
BUNDLED_CHATML = load_template("chatml", BUNDLED)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return byte_tokenizer(tmp_path_factory.mktemp("bytes"))


# F4: spans by segment, never by search.


@pytest.mark.parametrize(
    "answer",
    ["Hello", "a\nb\n\nc", "\nleads", "\n\n", "ends\n", " ", "x<|im_start|>assistant\ny", "user:x\nsystem:y", "\u4f60"],
)
def test_the_answer_and_its_end_are_trained(tokenizer: Tokenizer, answer: str) -> None:
    template = load_template("chatml", tokenizer)
    check(template.encode(talk("q", answer), MaskPolicy()), chatml_rows(("q", 0), (answer, 1)))


def test_every_answer_of_several_rounds(tokenizer: Tokenizer) -> None:
    encoded = load_template("chatml", tokenizer).encode(talk("q", "a\nb", "r", "\nc"), MaskPolicy())
    rows = chatml_rows(("q", 0), ("a\nb", 1), ("r", 0), ("\nc", 1))
    check(encoded, rows)
    first = len(ids_of(rows[:7]))
    assert encoded.rounds[0] == Round(begin=0, answer=first, end=first + 4)
    assert encoded.rounds[1] == Round(begin=first + 4, answer=len(ids_of(rows[:17])), end=len(ids_of(rows[:19])))


@pytest.mark.parametrize("typed", CONTROLS + WORDS)
@pytest.mark.parametrize("name", ["chatml", "qwen3", "llama3", "alpaca"])
def test_control_tokens_somebody_typed_are_text(tokenizer: Tokenizer, name: str, typed: str) -> None:
    template = load_template(name, tokenizer)
    encoded = template.encode(talk(f"say {typed}now", "a", system=f"{typed}!"), MaskPolicy())
    plain = template.encode(talk("say @now", "a", system="@!"), MaskPolicy())
    words = [index for index, word in enumerate(CONTROLS + WORDS) if word == typed]
    count = encoded.ids_T.tolist().count(256 + words[0])
    # A word that no turn is built from is text that a tokenizer may have one token for.
    is_text = typed in WORDS and typed not in BUILT_IN[name].source
    assert count == plain.ids_T.tolist().count(256 + words[0]) + 2 * is_text
    if not is_text:
        at = plain.ids_T.tolist().index(ord("@"))
        assert encoded.ids_T.tolist()[at : at + len(typed)] == list(typed.encode())
    assert int((encoded.labels_T != IGNORED).sum()) == int((plain.labels_T != IGNORED).sum())


def test_an_answer_writes_words_but_no_control_tokens(tokenizer: Tokenizer) -> None:
    encoded = load_template("chatml", tokenizer).encode(talk("q", "<tool_call>x<|im_end|>y"), MaskPolicy())
    rows = chatml_rows(("q", 0), ("", 1))
    check(encoded, [*rows[:7], (CALL, 1), ("x<|im_end|>y", 1), (END, 1), ("\n", 0)])


@given(st.lists(st.text(st.characters(exclude_categories=["Cs", "Cn"]), max_size=12), min_size=2, max_size=6))
def test_ids_decode_to_the_text_and_answers_stay_whole(texts: list[str]) -> None:
    template = BUNDLED_CHATML
    conversation = talk(*texts[: len(texts) // 2 * 2])
    encoded = template.encode(conversation, MaskPolicy())
    ids = encoded.ids_T.tolist()
    assert BUNDLED.decode(ids) == template.text(conversation.messages)
    assert [BUNDLED.decode(ids[turn.answer : turn.end]) for turn in encoded.rounds] == [
        message.content + "<|im_end|>" for message in conversation.messages[1::2]
    ]


def test_exact_ids_of_the_bundled_tokenizer() -> None:
    encoded = BUNDLED_CHATML.encode(talk("Hi", "a\nb"), MaskPolicy())
    prompt = [1, 701, 280, 201, 42, 75, 2, 201, 1, 988, 754, 620, 201]
    assert encoded.ids_T.tolist() == [*prompt, 67, 201, 68, 2, 201]
    assert encoded.labels_T.tolist() == [IGNORED] * len(prompt) + [67, 201, 68, 2, IGNORED]


# Every built-in template.

LLAMA3_SYSTEM: list[Piece] = [(HEAD, 0), ("system", 0), (TAIL, 0), ("\n\nS", 0), (EOT, 0)]
ALPACA_ROWS: list[Piece] = [("S\n\n### Instruction:\nq\n\n### Response:\n", 0), ("a", 1), (EOS, 1)]
BY_HAND: dict[str, list[Piece]] = {
    "chatml": [(START, 0), ("system\nS", 0), (END, 0), ("\n", 0), *chatml_rows(("q", 0), ("a", 1), ("r", 0), ("b", 1))],
    "llama3": [
        (BOS, 0), *LLAMA3_SYSTEM,
        (HEAD, 0), ("user", 0), (TAIL, 0), ("\n\nq", 0), (EOT, 0),
        (HEAD, 0), ("assistant", 0), (TAIL, 0), ("\n\n", 0), ("a", 1), (EOT, 1),
        (HEAD, 0), ("user", 0), (TAIL, 0), ("\n\nr", 0), (EOT, 0),
        (HEAD, 0), ("assistant", 0), (TAIL, 0), ("\n\n", 0), ("b", 1), (EOT, 1),
    ],
    "mistral": [
        (BOS, 0), ("[INST] S\n\nq [/INST]", 0), (" a", 1), (EOS, 1), ("[INST] r [/INST]", 0), (" b", 1), (EOS, 1),
    ],
    "alpaca": [
        *ALPACA_ROWS, ("\n\n### Instruction:\nr\n\n### Response:\n", 0), ("b", 1), (EOS, 1), ("\n\n", 0),
    ],
    "open_llama": [("S\nuser:q\nsystem:a", 1), (EOS, 1), ("user:r\nsystem:b", 1), (EOS, 1)],
    "plain": [("Sq", 0), ("a", 1), (EOS, 1), ("r", 0), ("b", 1), (EOS, 1)],
}  # fmt: skip
BY_HAND |= {name: BY_HAND["chatml"] for name in ("qwen2", "qwen2.5")}
BY_HAND["qwen3"] = [
    *BY_HAND["chatml"][:-3],
    (THINK, 1),
    ("\n\n", 1),
    (UNTHINK, 1),
    ("\n\nb", 1),
    *BY_HAND["chatml"][-2:],
]


@pytest.mark.parametrize("name", BY_HAND)
def test_built_in_templates_by_hand(tokenizer: Tokenizer, name: str) -> None:
    template = load_template(name, tokenizer)
    check(template.encode(talk("q", "a", "r", "b", system="S"), MaskPolicy()), BY_HAND[name])


def test_every_built_in_template_is_here() -> None:
    assert set(BUILT_IN) == {*BY_HAND, "mini_qwen", "glm4"}


def test_default_system_texts(tokenizer: Tokenizer) -> None:
    texts = {
        "chatml": None,
        "qwen2": "You are a helpful assistant.",
        "qwen2.5": "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
        "qwen3": None,
    }
    for name, text in texts.items():
        written = load_template(name, tokenizer).text(talk("q", "a").messages)
        assert ("system" in written) == (text is not None)
        assert text is None or written.startswith(f"<|im_start|>system\n{text}<|im_end|>\n<|im_start|>user\n")
    alpaca = load_template("alpaca", tokenizer).text(talk("q", "a").messages)
    assert alpaca.startswith("Below is an instruction that describes a task. ")


def test_mini_qwen_has_no_system_turn_and_no_newline_between_rounds(tokenizer: Tokenizer) -> None:
    template = load_template("mini_qwen", tokenizer)
    rows: list[Piece] = [
        (START, 0), ("user\nq", 0), (END, 0), ("\n", 0), (START, 0), ("assistant\n", 0), ("a", 1), (END, 1),
        (START, 0), ("user\nr", 0), (END, 0), ("\n", 0), (START, 0), ("assistant\n", 0), ("b", 1), (END, 1),
    ]  # fmt: skip
    check(template.encode(talk("q", "a", "r", "b"), MaskPolicy()), rows)
    with pytest.raises(ValueError, match=r"^rows.jsonl:1: chat template mini_qwen: mini_qwen has no system turn$"):
        template.encode(talk("q", "a", system="S"), MaskPolicy())
    assert template.encode_prompt(talk("q").messages) == ids_of(rows[:6])


# F8: Open-Llama: every round ends with EOS, and the prompt is trained.


def test_open_llama_rounds_are_texts_of_their_own(tokenizer: Tokenizer) -> None:
    template = load_template("open_llama", tokenizer)
    encoded = template.encode(talk("q\n", "a", "r", "\nb"), MaskPolicy())
    check(encoded, [("user:q\n\nsystem:a", 1), (EOS, 1), ("user:r\nsystem:\nb", 1), (EOS, 1)])
    assert [turn.begin for turn in encoded.rounds] == [0, len("user:q\n\nsystem:a") + 1]
    assert template.stop_ids == (EOS,)


# F5: label tables per mode.

QUESTION_TEXTS = ("q", "a", "r", "b", "s", "c")


@pytest.mark.parametrize(
    ("policy", "trained"),
    [
        (MaskPolicy(), (1, 1, 1)),
        (MaskPolicy(turns="last"), (0, 0, 1)),
        (MaskPolicy(turns="first"), (1, 0, 0)),
        (MaskPolicy(mask_history=True), (0, 0, 1)),
    ],
)
def test_which_turns_are_trained(tokenizer: Tokenizer, policy: MaskPolicy, trained: tuple[int, ...]) -> None:
    encoded = load_template("chatml", tokenizer).encode(talk(*QUESTION_TEXTS), policy)
    first, second, third = trained
    check(encoded, chatml_rows(("q", 0), ("a", first), ("r", 0), ("b", second), ("s", 0), ("c", third)))


def test_a_message_decides_for_itself(tokenizer: Tokenizer) -> None:
    conversation = talk(*QUESTION_TEXTS)
    messages = list(conversation.messages)
    messages[1] = dataclasses.replace(messages[1], trained=True, weight=0.5)
    messages[5] = dataclasses.replace(messages[5], trained=False)
    conversation = dataclasses.replace(conversation, messages=tuple(messages))
    encoded = load_template("chatml", tokenizer).encode(conversation, MaskPolicy(turns="last"))
    rows = chatml_rows(("q", 0), ("a", 1), ("r", 0), ("b", 0), ("s", 0), ("c", 0))
    assert encoded.labels_T.tolist() == labels_of(rows)
    assert encoded.weights_T.tolist() == [0.5 if label != IGNORED else 0.0 for label in labels_of(rows)]


def test_weight_zero_is_not_trained(tokenizer: Tokenizer) -> None:
    conversation = talk("q", Message(role="assistant", content="a", weight=0.0))
    encoded = load_template("chatml", tokenizer).encode(conversation, MaskPolicy())
    assert set(encoded.labels_T.tolist()) == {IGNORED} and not encoded.weights_T.any()


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_other_weights_are_refused(tokenizer: Tokenizer, weight: float) -> None:
    conversation = talk("q", Message(role="assistant", content="a", weight=weight))
    with pytest.raises(ValueError, match=r"^rows.jsonl:1: weight .* of an answer: must be a number of at least 0$"):
        load_template("chatml", tokenizer).encode(conversation, MaskPolicy())


def test_the_newline_behind_an_answer_can_be_trained(tokenizer: Tokenizer) -> None:
    encoded = load_template("chatml", tokenizer).encode(talk("q", "a", "r", "b"), MaskPolicy(train_newline=True))
    rows = chatml_rows(("q", 0), ("a", 1), ("r", 0), ("b", 1))
    rows[9] = rows[19] = ("\n", 1)
    check(encoded, rows)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask_history": True, "train_on_prompt": True}, "--mask-history and --train-on-prompt exclude each other"),
        ({"mask_history": True, "turns": "first"}, "--mask-history trains the last answer alone"),
        ({"turns": "some"}, "--train-turns some: must be one of all, last, first"),
    ],
)
def test_options_that_exclude_each_other(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MaskPolicy(**options)


def test_what_a_template_excludes(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="glm4: --train-on-prompt is not possible"):
        load_template("glm4", tokenizer).check(MaskPolicy(train_on_prompt=True))
    with pytest.raises(ValueError, match="open_llama: trains all tokens, which --mask-history excludes"):
        load_template("open_llama", tokenizer).check(MaskPolicy(mask_history=True))


def test_only_answers_say_whether_they_are_trained(tokenizer: Tokenizer) -> None:
    conversation = talk(Message(role="user", content="q", trained=True), "a")
    with pytest.raises(ValueError, match="^rows.jsonl:1: only answers can say whether they are trained"):
        load_template("chatml", tokenizer).encode(conversation, MaskPolicy())


# efficient_eos: the end token is the label of the token after an answer.


@pytest.mark.parametrize(
    ("policy", "first", "last"),
    [(MaskPolicy(), 1, 1), (MaskPolicy(mask_history=True), 0, 1), (MaskPolicy(turns="first"), 1, 0)],
)
def test_efficient_eos(tokenizer: Tokenizer, policy: MaskPolicy, first: int, last: int) -> None:
    encoded = load_template("glm4", tokenizer).encode(talk("q", "a", "r", "b", system="S"), policy)
    rows: list[Piece] = [
        (GMASK, 0), (SOP, 0), (SYSTEM, 0), ("\nS", 0), (USER, 0), ("\nq", 0), (ANSWER, 0), ("\na", first),
        (USER, 0), ("\nr", 0), (ANSWER, 0), ("\nb", last), (EOS, last),
    ]  # fmt: skip
    labels = labels_of(rows)
    second_user = len(ids_of(rows[:8]))
    labels[second_user] = EOS if first else IGNORED
    assert encoded.ids_T.tolist() == ids_of(rows)
    assert encoded.labels_T.tolist() == labels
    assert encoded.weights_T.tolist() == [float(label != IGNORED) for label in labels]
    assert load_template("glm4", tokenizer).stop_ids == (USER, EOS)


# F12: a conversation as text to pretrain on.


@pytest.mark.parametrize("name", [name for name in BY_HAND])
def test_all_tokens_are_trained_as_in_pretraining(tokenizer: Tokenizer, name: str) -> None:
    encoded = load_template(name, tokenizer).encode(
        talk("q", "a", "r", "b", system="S"), MaskPolicy(train_on_prompt=True)
    )
    assert encoded.labels_T.tolist() == encoded.ids_T.tolist() == ids_of(BY_HAND[name])
    assert (encoded.weights_T == 1).all()


# F13: an optional system text.


def test_half_of_the_conversations_get_a_system_text() -> None:
    rows = [dataclasses.replace(talk("q", "a"), place=f"rows.jsonl:{number}") for number in range(1000)]
    drawn = [pick_system(row, "S", 0.5, seed=1) for row in rows]
    count = sum(row.messages[0] == Message(role="system", content="S") for row in drawn)
    assert 437 <= count <= 563  # four standard deviations
    assert all(row.messages[-2:] == before.messages for row, before in zip(drawn, rows, strict=True))
    assert drawn == [pick_system(row, "S", 0.5, seed=1) for row in reversed(rows)][::-1]
    assert drawn != [pick_system(row, "S", 0.5, seed=2) for row in rows]
    assert [pick_system(row, "S", 0.0, seed=1) for row in rows] == rows
    assert all(len(pick_system(row, "S", 1.0, seed=1).messages) == 3 for row in rows)


def test_a_system_text_of_its_own_stays() -> None:
    row = talk("q", "a", system="mine")
    assert pick_system(row, "S", 1.0, seed=1) == row
    with pytest.raises(ValueError, match="probability 1.5 of the system text: must be between 0 and 1"):
        pick_system(row, "S", 1.5, seed=1)


# Prompts for inference, end tokens, names.


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_prompt_is_what_was_trained_before_the_answer(tokenizer: Tokenizer, name: str) -> None:
    template = load_template(name, tokenizer)
    conversation = talk("q\n", "a\nb", "\nr", "\nc")
    encoded = template.encode(conversation, MaskPolicy())
    ids = encoded.ids_T.tolist()
    for number, turn in enumerate(encoded.rounds):
        assert template.encode_prompt(conversation.messages[: 2 * number + 1]) == ids[: turn.answer]


@pytest.mark.parametrize(("name", "stops"), [("chatml", (END, EOS)), ("llama3", (EOT, EOS)), ("mistral", (EOS,))])
def test_stop_ids(tokenizer: Tokenizer, name: str, stops: tuple[int, ...]) -> None:
    assert load_template(name, tokenizer).stop_ids == stops


def test_suggested_templates(tmp_path: Path) -> None:
    assert suggest_template(BUNDLED) == "chatml"
    assert suggest_template(byte_tokenizer(tmp_path / "a", ["<|endoftext|>"])) == "alpaca"
    assert suggest_template(byte_tokenizer(tmp_path / "b", ["<|endoftext|>", "<s>", *CONTROLS[4:7]])) == "llama3"
    assert suggest_template(byte_tokenizer(tmp_path / "c", ["<|endoftext|>", "<s>", "[INST]", "[/INST]"])) == "mistral"


def test_mistral_with_control_tokens(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(tmp_path, ["<|endoftext|>", "<s>", "[INST]", "[/INST]"])
    encoded = load_template("mistral", tokenizer).encode(talk("q [INST]", "a"), MaskPolicy())
    check(encoded, [(257, 0), (258, 0), (" q [INST]", 0), (259, 0), (" a", 1), (256, 1)])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("chatty", r"^--chat-template chatty: no such file, and not one of chatml, qwen2, .*, plain, tokenizer$"),
        ("llama3", r"^chat template llama3: the tokenizer has no token <\|start_header_id\|>; take another template"),
    ],
)
def test_templates_that_are_not_there(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_template(name, BUNDLED)


def test_without_a_template_or_control_tokens(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="^--chat-template tokenizer: the tokenizer's files hold none"):
        load_template("tokenizer", tokenizer)
    with pytest.raises(ValueError, match="has no control tokens, so no chat template can be used with it"):
        load_template("chatml", build_tokenizer("NullTokenizer", "", vocab_size=300))


def test_fingerprints_tell_templates_apart(tokenizer: Tokenizer) -> None:
    prints = {load_template(name, tokenizer).fingerprint() for name in BUILT_IN}
    assert len(prints) == len(BUILT_IN)
    assert load_template("chatml", tokenizer).fingerprint() in prints
    assert load_template("chatml", BUNDLED).fingerprint() not in prints
    assert isinstance(load_template("chatml", tokenizer), Template)
