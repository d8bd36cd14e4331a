"""Templates people write themselves, tools, and tokenizers of other kinds: exact ids and labels."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest
import sentencepiece
from chat_by_hand import CALL, END, EOS, START, UNCALL, Piece, byte_tokenizer, chatml_rows, check, ids_of, talk

from megatron_steel.text.conversation import IGNORED, Conversation, Message
from megatron_steel.text.masks import MaskPolicy
from megatron_steel.text.templates import Template, load_template, suggest_template
from megatron_steel.text.tokenizer import Tokenizer, build_tokenizer

ANSWERS = """\
{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' %}\
{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}{% else %}\
{{ m.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
WITHOUT_TAGS = ANSWERS.replace("{% generation %}", "").replace("{% endgeneration %}", "")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return byte_tokenizer(tmp_path_factory.mktemp("bytes"))


def from_source(folder: Path, tokenizer: Tokenizer, source: str) -> Template:
    """The template a .jinja file holds."""
    (folder / "own.jinja").write_text(source, encoding="utf-8")
    return load_template(str(folder / "own.jinja"), tokenizer)


# Tools.

WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"city": {"type": "string"}}}}
ASKED = Message(role="assistant", content="", tool_calls=({"name": "weather", "arguments": {"city": "B\u00f6rn"}},))
WITH_TOOLS = Conversation(
    messages=(
        Message(role="user", content="q"),
        ASKED,
        Message(role="tool", content='{"t": 3}'),
        Message(role="tool", content="<tool_call>"),
        Message(role="assistant", content="cold"),
    ),
    place="rows.jsonl:7",
    tools=(WEATHER,),
)
HEAD_OF_TOOLS = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
    '{"type": "function", "function": {"name": "weather", "parameters": {"city": {"type": "string"}}}}\n</tools>\n\n'
    "For each function call, return a json object with function name and arguments within "
)
CALLED: list[Piece] = [
    (CALL, 1), ('\n{"name": "weather", "arguments": {"city": "B\u00f6rn"}}\n', 1), (UNCALL, 1), (END, 1), ("\n", 0),
]  # fmt: skip


def test_tools_in_chatml(tokenizer: Tokenizer) -> None:
    encoded = load_template("chatml", tokenizer).encode(WITH_TOOLS, MaskPolicy())
    check(encoded, [
        (START, 0), ("system\n" + HEAD_OF_TOOLS, 0), (CALL, 0), (UNCALL, 0), (" XML tags:\n", 0), (CALL, 0),
        ('\n{"name": <function-name>, "arguments": <args-json-object>}\n', 0), (UNCALL, 0), (END, 0), ("\n", 0),
        (START, 0), ("user\nq", 0), (END, 0), ("\n", 0),
        (START, 0), ("assistant\n", 0), *CALLED,
        (START, 0), ('user\n<tool_response>\n{"t": 3}\n</tool_response>', 0),
        ("\n<tool_response>\n<tool_call>\n</tool_response>", 0), (END, 0), ("\n", 0),
        (START, 0), ("assistant\n", 0), ("cold", 1), (END, 1), ("\n", 0),
    ])  # fmt: skip


def test_text_and_several_calls_in_one_answer(tokenizer: Tokenizer) -> None:
    calls = ({"name": "a", "arguments": {}}, {"name": "b", "arguments": {"x": [1, None, "<|im_end|>"]}})
    answer = Message(role="assistant", content="wait", tool_calls=calls)
    encoded = load_template("chatml", tokenizer).encode(talk("q", answer), MaskPolicy())
    rows = chatml_rows(("q", 0), ("wait\n", 1))
    written = [(CALL, 1), ('\n{"name": "a", "arguments": {}}\n', 1), (UNCALL, 1), ("\n", 1)]
    second = '\n{"name": "b", "arguments": {"x": [1, null, "<|im_end|>"]}}\n'
    check(encoded, [*rows[:-2], *written, (CALL, 1), (second, 1), (UNCALL, 1), *rows[-2:]])


def test_tools_in_llama3(tokenizer: Tokenizer) -> None:
    template = load_template("llama3", tokenizer)
    text = template.text(WITH_TOOLS.messages, WITH_TOOLS.tools)
    header = "<|start_header_id|>{}<|end_header_id|>\n\n"
    assert text.startswith("<s>" + header.format("user") + "Given the following functions, please respond with a JSON")
    assert '\n        "name": "weather",\n' in text and text.count("Given the following functions") == 1
    call = '{"name": "weather", "parameters": {"city": "B\u00f6rn"}}<|eot_id|>'
    assert "q<|eot_id|>" + header.format("assistant") + call in text
    assert header.format("ipython") + '"{\\"t\\": 3}"<|eot_id|>' in text
    encoded = template.encode(WITH_TOOLS, MaskPolicy())
    first, second = encoded.rounds
    assert tokenizer.decode(encoded.ids_T[first.answer : first.end].tolist()) == call
    assert tokenizer.decode(encoded.ids_T[second.answer : second.end].tolist()) == "cold<|eot_id|>"


def test_llama3_writes_one_call_alone(tokenizer: Tokenizer) -> None:
    two = Message(role="assistant", content="", tool_calls=ASKED.tool_calls * 2)
    with pytest.raises(
        ValueError, match="^rows.jsonl:1: chat template llama3: a turn is either text or one tool call$"
    ):
        load_template("llama3", tokenizer).encode(talk("q", two), MaskPolicy())


@pytest.mark.parametrize("name", ["mistral", "alpaca", "open_llama", "mini_qwen", "glm4", "plain"])
def test_templates_without_tools_say_so(tokenizer: Tokenizer, name: str) -> None:
    template = load_template(name, tokenizer)
    for conversation, what in (
        (talk("q", "a", tools=[WEATHER]), "tools"),
        (talk("q", ASKED), "tools"),
        (talk(Message(role="tool", content="r"), "a"), "results of tools"),
    ):
        with pytest.raises(ValueError, match=f"^rows.jsonl:1: chat template {name}: cannot write {what}; take chatml"):
            template.encode(conversation, MaskPolicy())


# Thoughts.


def test_qwen3_shows_thoughts_after_the_last_question_only(tokenizer: Tokenizer) -> None:
    thought = "<think>\nhm\n</think>\n\n"
    template = load_template("qwen3", tokenizer)
    texts = template.text(talk("q", thought + "a", "r", thought + "b").messages).split("<|im_start|>")
    assert texts[2] == "assistant\na<|im_end|>\n"
    assert texts[4] == f"assistant\n{thought}b<|im_end|>\n"


# Jinja with {% generation %}, and by prefixes.

ROWS = chatml_rows(("q", 0), ("\na", 1), ("r", 0), ("b<|im_end|>", 1))


@pytest.mark.parametrize("source", [ANSWERS, WITHOUT_TAGS], ids=["generation", "prefixes"])
def test_own_templates(tmp_path: Path, tokenizer: Tokenizer, source: str) -> None:
    template = from_source(tmp_path, tokenizer, source)
    conversation = talk("q", "\na", "r", "b<|im_end|>")
    check(template.encode(conversation, MaskPolicy()), ROWS)
    assert template.encode_prompt(conversation.messages[:3]) == ids_of(ROWS[:17])
    assert template.stop_ids == (END, EOS)
    assert template.jinja.replace("{##}", "").replace("{# #}", "") == WITHOUT_TAGS


def test_blocks_next_to_each_other_are_one_answer(tmp_path: Path, tokenizer: Tokenizer) -> None:
    split = ANSWERS.replace("m.content + ", "m.content }}{% endgeneration %}{% generation %}{{ ", 1)
    check(from_source(tmp_path, tokenizer, split).encode(talk("q", "a"), MaskPolicy()), chatml_rows(("q", 0), ("a", 1)))


def test_the_templates_of_a_folder(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(ANSWERS)
    check(load_template("tokenizer", tokenizer).encode(talk("q", "a"), MaskPolicy()), chatml_rows(("q", 0), ("a", 1)))
    assert suggest_template(tokenizer) == "chatml"
    (tmp_path / "chat_template.jinja").write_text(ANSWERS.replace("\\n", " "))
    assert suggest_template(tokenizer) == "tokenizer"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% for m in messages %}", "Unexpected end of template"),
        ("{{ ''.__class__.__mro__ }}{{ eos_token }}", "access to attribute '__class__' of 'str' object is unsafe"),
        ("{{ messages.append(1) }}", "access to attribute 'append' of 'list' object is unsafe"),
        ("{{ raise_exception('only\n  questions') }}", "only questions"),
        ("{{ strftime_now('%Y') }}", "'strftime_now' is undefined"),
        (ANSWERS.replace(" + '<|im_end|>' }}{% end", " }}{% end"), "an answer does not end with a control token"),
        (ANSWERS.replace("m.role == 'assistant'", "loop.last and m.role == 'assistant'"), "marks 1 answers of 2"),
        (
            WITHOUT_TAGS.replace("m.role + '\\n'", "m.role + ('' if loop.last else ' ') + '\\n'"),
            r"writes turn 2 in another way when turns follow; put \{% generation %\} around",
        ),
        (ANSWERS.replace("{% generation %}", "{% generation %}" * 2).replace("{% endg", "{% endgeneration %}{% endg"),
         "generation blocks inside one another"),
    ],
)  # fmt: skip
def test_templates_that_are_refused(tmp_path: Path, tokenizer: Tokenizer, source: str, message: str) -> None:
    with pytest.raises(ValueError, match=rf"^chat template {tmp_path}/own.jinja: .*{message}") as caught:
        from_source(tmp_path, tokenizer, source)
    assert "\n" not in str(caught.value)


def test_files_that_are_no_text(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "own.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="own.jinja: not UTF-8 text$"):
        load_template(str(tmp_path / "own.jinja"), tokenizer)


def test_marks_of_the_program_are_refused_in_rows(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"^rows.jsonl:1: the text holds code points U\+FDD0 to U\+FDD3"):
        load_template("chatml", tokenizer).encode(talk("q\ufdd0", "a"), MaskPolicy())


def test_control_tokens_as_json_escapes_are_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    template = from_source(tmp_path, tokenizer, ANSWERS.replace("m.content +", "m.content | tojson(true) +"))
    template.encode(talk("q \\ufdd0", "\u00e9"), MaskPolicy())
    for template_call in (lambda row: template.encode(row, MaskPolicy()), lambda row: template.text(row.messages)):
        with pytest.raises(ValueError, match="writes control tokens of a message as JSON escapes"):
            template_call(talk("<|im_end|>", "a"))


def test_a_tokenizer_without_an_end_token(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    tokenizer = build_tokenizer("HuggingFaceTokenizer", str(tmp_path))
    with pytest.raises(ValueError, match=r"^chat template plain: the tokenizer names no end token \(eos_token\)$"):
        load_template("plain", tokenizer)
    assert load_template("chatml", tokenizer).stop_ids == (END,)


# Other tokenizers.


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A SentencePiece model with a space before every text, control tokens and a word of its own."""
    folder = tmp_path_factory.mktemp("sentencepiece")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the quick brown fox says hello to a lazy dog", "user assistant system"] * 20),
        model_prefix=str(folder / "tiny"), vocab_size=340, byte_fallback=True, model_type="bpe", minloglevel=2,
        control_symbols=["<|im_start|>", "<|im_end|>"], user_defined_symbols=["<tool_call>"], num_threads=1,
        hard_vocab_limit=False, normalization_rule_name="identity", remove_extra_whitespaces=False,
    )  # fmt: skip
    return build_tokenizer("SentencePieceTokenizer", str(folder / "tiny.model"))


def test_sentencepiece(pieces: Tokenizer) -> None:
    names = {token.text: token for token in pieces.added_tokens()}
    assert {"<|im_start|>", "<|im_end|>", "<s>", "</s>", "<tool_call>"} <= set(names)
    assert not names["<tool_call>"].control and names["</s>"].control
    start, end = names["<|im_start|>"].index, names["<|im_end|>"].index
    encoded = load_template("chatml", pieces).encode(talk("say <|im_end|>", "hello dog"), MaskPolicy())
    ids = encoded.ids_T.tolist()
    assert [ids.count(start), ids.count(end)] == [2, 2]
    newline = pieces.encode("a\n")[-1:]
    # A text after a control token has its space, the answer goes on in the middle of a text and has none.
    assert ids[: len(ids) - 1 - ids[::-1].index(start)] == [
        start, *pieces.encode("user\nsay <|im_end|>"), end, *pieces.encode("\n"),
    ]  # fmt: skip
    turn = encoded.rounds[0]
    assert ids[turn.answer : turn.end] == [*pieces.encode("\nhello dog")[len(pieces.encode("\n")) :], end]
    assert ids[turn.answer - 1] == newline[0]
    assert encoded.labels_T.tolist() == [
        index if turn.answer <= at < turn.end else IGNORED for at, index in enumerate(ids)
    ]


def test_mistral_on_sentencepiece(pieces: Tokenizer) -> None:
    encoded = load_template("mistral", pieces).encode(talk("hello", "the fox", "dog", "says"), MaskPolicy())
    bos, eos = pieces.bos_id, pieces.eos_id
    rows = [[bos, *pieces.encode("[INST] hello [/INST]")], [*pieces.encode("the fox"), eos]]
    rows += [pieces.encode("[INST] dog [/INST]"), [*pieces.encode("says"), eos]]
    assert encoded.ids_T.tolist() == [index for row in rows for index in row]


def test_tiktoken(tmp_path: Path) -> None:
    lines = [base64.b64encode(bytes([byte])) + f" {byte}\n".encode() for byte in range(256)]
    (tmp_path / "tiny.tiktoken").write_bytes(b"".join(lines))
    tokenizer = build_tokenizer("TikTokenizer", str(tmp_path / "tiny.tiktoken"))
    names = {token.text: token.index for token in tokenizer.added_tokens()}
    start, end = names["<|im_start|>"], names["<|im_end|>"]
    encoded = load_template("chatml", tokenizer).encode(talk("<|im_start|>", "a"), MaskPolicy())
    rows: list[Piece] = chatml_rows(("<|im_start|>", 0), ("a", 1))
    check(encoded, [({START: start, END: end}.get(piece, piece), on) for piece, on in rows])  # type: ignore[call-overload]
