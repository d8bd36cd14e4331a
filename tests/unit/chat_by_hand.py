"""A tokenizer whose tokens are bytes and control tokens, and rows of chats written by hand as pieces of text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from megatron_steel.text.conversation import IGNORED, Conversation, EncodedChat, Message
from megatron_steel.text.tokenizer import Tokenizer, build_tokenizer

PLAIN_BYTES = [*range(33, 127), *range(161, 173), *range(174, 256)]  # GPT-2's alphabet: these stand for themselves
CONTROLS = (
    "<|endoftext|>", "<s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>",
)  # fmt: skip
WORDS = ("<think>", "</think>", "<tool_call>", "</tool_call>")
EOS, BOS, START, END, HEAD, TAIL, EOT, GMASK, SOP, SYSTEM, USER, ANSWER, THINK, UNTHINK, CALL, UNCALL = range(256, 272)

Piece = tuple[str | int, int]


def byte_tokenizer(folder: Path, controls: Sequence[str] = CONTROLS, words: Sequence[str] = WORDS) -> Tokenizer:
    """A Hugging Face folder in which byte b is id b; control tokens and added words come after."""
    others = iter(byte for byte in range(256) if byte not in PLAIN_BYTES)
    letters = {chr(byte): byte for byte in PLAIN_BYTES} | {chr(256 + i): byte for i, byte in enumerate(others)}
    backend = Backend(models.BPE(vocab=letters, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(controls))
    backend.add_tokens([AddedToken(word, special=False, normalized=False) for word in words])
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    config = '{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "bos_token": "<s>"}'
    if "<s>" not in controls:
        config = '{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}'
    (folder / "tokenizer_config.json").write_text(config)
    return build_tokenizer("HuggingFaceTokenizer", str(folder))


def talk(*turns: str | Message, system: str | None = None, tools: Sequence[Mapping[str, Any]] = ()) -> Conversation:
    """Questions and answers in alternation."""
    messages = [] if system is None else [Message(role="system", content=system)]
    for number, turn in enumerate(turns):
        text = turn if isinstance(turn, str) else ""
        given = Message(role="assistant" if number % 2 else "user", content=text)
        messages.append(given if isinstance(turn, str) else turn)
    return Conversation(messages=tuple(messages), place="rows.jsonl:1", tools=tuple(tools))


def ids_of(pieces: Sequence[Piece]) -> list[int]:
    return [index for piece, _ in pieces for index in ([piece] if isinstance(piece, int) else piece.encode())]


def labels_of(pieces: Sequence[Piece]) -> list[int]:
    return [index if trained else IGNORED for piece, trained in pieces for index in ids_of([(piece, trained)])]


def check(encoded: EncodedChat, pieces: Sequence[Piece]) -> None:
    """Compare with a row by hand."""
    assert encoded.ids_T.tolist() == ids_of(pieces)
    assert encoded.labels_T.tolist() == labels_of(pieces)
    assert encoded.weights_T.tolist() == [float(label != IGNORED) for label in labels_of(pieces)]


def chatml_rows(*turns: tuple[str, int]) -> list[Piece]:
    """Pieces of questions and answers in ChatML, each with whether it is trained."""
    rows: list[Piece] = []
    for number, (text, trained) in enumerate(turns):
        role = "assistant" if number % 2 else "user"
        rows += [(START, 0), (role + "\n", 0), (text, trained), (END, trained), ("\n", 0)]
    return rows
