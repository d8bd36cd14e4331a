"""Chat templates: conversations to ids and labels, and prompts to ids.

Every prompt and every answer is encoded on its own, so that the labels are known by place and never searched for. Ids
are those of ``apply_chat_template`` of transformers, except: where text would have merged across the end of an
answer's header (an answer that begins with a newline, after a header that ends with one), where a message holds a
control token (its ids here are those of its plain text), and where a tokenizer puts a space before a text that does
not begin with a control token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_steel.text.builtin_templates import BUILT_IN, MISTRAL_V3, BuiltIn
from megatron_steel.text.chat_tokens import BEGIN, END, ESCAPED_MARK, MARKS, ChatTokens
from megatron_steel.text.conversation import IGNORED, Conversation, EncodedChat, Message, Round
from megatron_steel.text.jinja_template import JinjaTemplate, split_blanks, to_json
from megatron_steel.text.masks import MaskPolicy
from megatron_steel.text.tokenizer import Tokenizer, digest

OF_TOKENIZER = "tokenizer"
PROBE = (
    Message(role="user", content="Hello"),
    Message(role="assistant", content="Hi there"),
    Message(role="user", content="And again"),
    Message(role="assistant", content="Hi again"),
)


class Template:
    """How turns are written and where an answer ends. ``stop_ids`` are the tokens that end one."""

    def __init__(self, name: str, built_in: BuiltIn, tokenizer: Tokenizer) -> None:
        self.name, self._tokenizer = name, tokenizer
        self.efficient_eos, self.trains_prompt = built_in.efficient_eos, built_in.trains_prompt
        self._template = JinjaTemplate(name, built_in.source)
        self._tokens = ChatTokens(tokenizer, built_in.source)
        for control in built_in.controls:
            if control not in self._tokens.ids:
                raise ValueError(
                    f"chat template {name}: the tokenizer has no token {control}; take another template, or add it"
                )
        self._special = self._named_tokens()
        self.stop_ids = self._find_stop_ids()

    @property
    def jinja(self) -> str:
        """The template for the ``chat_template.jinja`` of an exported folder."""
        return self._template.exported()

    def fingerprint(self) -> str:
        """sha256 hex of what decides ids and labels, but for the policy."""
        flags = f"{self.efficient_eos} {self.trains_prompt}".encode()
        return digest(self._template.source.encode(), flags, self._tokenizer.fingerprint().encode())

    def check(self, policy: MaskPolicy) -> None:
        """``ValueError`` when the template cannot be trained in this way."""
        if self.efficient_eos and policy.train_on_prompt:
            raise ValueError(
                f"chat template {self.name}: --train-on-prompt is not possible, "
                "as the token after an answer is where its end is trained"
            )
        if self.trains_prompt and policy.mask_history:
            raise ValueError(f"chat template {self.name}: trains all tokens, which --mask-history excludes")

    def encode(self, conversation: Conversation, policy: MaskPolicy) -> EncodedChat:
        """Ids and labels of a conversation. ``ValueError`` names its place when the template cannot write it."""
        self.check(policy)
        weights = policy.weights(conversation.messages, conversation.place)
        try:
            spans = self._spans(conversation.messages, conversation.tools)
            ids, rounds = self._encode_spans(spans)
        except ValueError as error:
            raise ValueError(f"{conversation.place}: {error}") from error
        ids_T = np.array(ids, dtype=np.int32)
        trains_prompt = policy.train_on_prompt or self.trains_prompt
        weights_T = np.full(len(ids), float(trains_prompt), dtype=np.float32)
        targets_T = ids_T.copy()
        for number, (turn, weight) in enumerate(zip(rounds, weights, strict=True)):
            weights_T[turn.answer : turn.end] = weight
            if self.efficient_eos and number + 1 < len(rounds):
                targets_T[turn.end], weights_T[turn.end] = self._tokenizer.eod_id, weight
            blanks = self._blanks(spans[2 * number + 2], ids[: turn.end]) if policy.train_newline else 0
            weights_T[turn.end : turn.end + blanks] = weight
        labels_T = np.where(weights_T > 0, targets_T, np.int32(IGNORED))
        return EncodedChat(ids_T=ids_T, labels_T=labels_T, weights_T=weights_T, rounds=tuple(rounds))

    def encode_prompt(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
        """Ids of turns with the header of the answer to come."""
        text = self._render(messages, tools, header=True)
        ids: list[int] = []
        # What was written as an answer is encoded as it was trained.
        for part in text.replace(END, BEGIN).split(BEGIN):
            ids += self._tokens.encode(part, ids)
        return ids

    def text(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = (), header: bool = False) -> str:
        """What the template writes; with ``header`` up to the answer to come."""
        return MARKS.sub("", self._render(messages, tools, header))

    def writes_like(self, other: JinjaTemplate, messages: Sequence[Message]) -> bool:
        """Whether another template writes the same text, for turns without control tokens and tools."""
        turns = [{"role": message.role, "content": message.content} for message in messages]
        return all(
            MARKS.sub("", other.render(turns[:count], (), self._special, header=header))
            == self.text(messages[:count], header=header)
            for count, header in ((len(turns), False), (len(turns) - 1, True))
        )

    def _spans(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> list[str]:
        turns, functions = self._prepared(messages, tools)
        spans = self._template.spans(turns, functions, self._special)
        self._check_escapes("".join(spans), turns, functions)
        return spans if self._template.marked else split_blanks(spans, self._tokens)

    def _render(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], header: bool) -> str:
        turns, functions = self._prepared(messages, tools)
        text = self._template.render(turns, functions, self._special, header)
        self._check_escapes(text, turns, functions)
        return text

    def _check_escapes(self, text: str, turns: Sequence[Any], functions: Sequence[Any]) -> None:
        """A mark that went through an ASCII ``tojson`` would stay in the text."""
        if ESCAPED_MARK in text and MARKS.search(to_json([turns, functions])):
            raise ValueError(f"chat template {self.name}: writes control tokens of a message as JSON escapes")

    def _prepared(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]
    ) -> tuple[list[dict[str, Any]], list[Any]]:
        """Turns and tools as templates take them, without control tokens."""
        source = self._template.source
        calls = any(message.tool_calls for message in messages)
        results = any(message.role == "tool" for message in messages)
        if (tools and "tools" not in source) or (calls and "tool_calls" not in source):
            raise ValueError(f"chat template {self.name}: cannot write tools; take chatml, qwen3 or llama3")
        if results and '"tool"' not in source and "'tool'" not in source:
            raise ValueError(f"chat template {self.name}: cannot write results of tools; take chatml, qwen3 or llama3")
        return [self._turn(message) for message in messages], [self._hidden(tool, False) for tool in tools]

    def _turn(self, message: Message) -> dict[str, Any]:
        answer = message.role == "assistant"
        turn: dict[str, Any] = {"role": message.role, "content": self._tokens.hide(message.content, answer)}
        if message.tool_calls:
            turn["tool_calls"] = [
                {"type": "function", "function": self._hidden(call, answer)} for call in message.tool_calls
            ]
        return turn

    def _hidden(self, value: Any, answer: bool) -> Any:
        if isinstance(value, str):
            return self._tokens.hide(value, answer)
        if isinstance(value, Mapping):
            return {self._tokens.hide(str(key), answer): self._hidden(item, answer) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._hidden(item, answer) for item in value]
        return value

    def _encode_spans(self, spans: Sequence[str]) -> tuple[list[int], list[Round]]:
        ids: list[int] = []
        rounds = []
        for index in range(0, len(spans) - 1, 2):
            begin = len(ids)
            ids += self._tokens.encode(spans[index], ids)
            answer = len(ids)
            ids += self._tokens.encode(spans[index + 1], ids)
            rounds.append((begin, answer, len(ids)))
        ids += self._tokens.encode(spans[-1], ids)
        if self.efficient_eos and rounds:
            begin, answer, _ = rounds[-1]
            ids.append(self._tokenizer.eod_id)
            rounds[-1] = (begin, answer, len(ids))
        return ids, [Round(begin=begin, answer=answer, end=end) for begin, answer, end in rounds]

    def _blanks(self, span: str, before: Sequence[int]) -> int:
        """How many tokens the white space is that follows an answer."""
        return len(self._tokens.encode(self._tokens.blank(span), before))

    def _named_tokens(self) -> dict[str, str]:
        names = {token.index: token.text for token in self._tokenizer.added_tokens()}
        tokenizer = self._tokenizer
        found = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id, "pad_token": tokenizer.pad_id}
        special = {name: names[index] for name, index in found.items() if index in names}
        if "eos_token" in self._template.variables and "eos_token" not in special:
            raise ValueError(f"chat template {self.name}: the tokenizer names no end token (eos_token)")
        return special

    def _find_stop_ids(self) -> tuple[int, ...]:
        """By writing two rounds; ``ValueError`` if the answers would not tell where they end."""
        spans = self._spans(PROBE, ())
        end = self._tokens.last_control(spans[1]) if not self.efficient_eos else self._tokens.first_control(spans[2])
        if end is None:
            raise ValueError(
                f"chat template {self.name}: an answer does not end with a control token, "
                "so a model would not learn to stop; write eos_token after it"
            )
        eos = self._tokenizer.eos_id
        return tuple(dict.fromkeys([end] if eos is None else [end, eos]))


def load_template(name_or_file: str, tokenizer: Tokenizer) -> Template:
    """A built-in template by name, the one in a ``.jinja`` file, or with ``tokenizer`` that of the tokenizer's folder.

    ``ValueError`` in one line when there is none, or when the tokenizer cannot write it.
    """
    if not tokenizer.added_tokens():
        raise ValueError(f"{tokenizer.name}: has no control tokens, so no chat template can be used with it")
    if name_or_file == OF_TOKENIZER:
        source = tokenizer.chat_template()
        if source is None:
            raise ValueError("--chat-template tokenizer: the tokenizer's files hold none; give a name or a .jinja file")
        return Template(name_or_file, BuiltIn(source=source), tokenizer)
    if name_or_file in BUILT_IN:
        built_in = BUILT_IN[name_or_file]
        if name_or_file == "mistral" and "[INST]" in {token.text for token in tokenizer.added_tokens()}:
            built_in = BuiltIn(source=MISTRAL_V3)
        return Template(name_or_file, built_in, tokenizer)
    path = Path(name_or_file)
    if not path.is_file():
        names = ", ".join((*BUILT_IN, OF_TOKENIZER))
        raise ValueError(f"--chat-template {name_or_file}: no such file, and not one of {names}")
    try:
        source = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"--chat-template {path}: not UTF-8 text") from error
    return Template(str(path), BuiltIn(source=source), tokenizer)


def suggest_template(tokenizer: Tokenizer) -> str:
    """The template that fits a tokenizer: the built-in one that writes what its own template writes, else its own.

    Without one of its own, by its control tokens: ChatML, Llama 3 or Mistral, else ``alpaca``.
    """
    names = {token.text for token in tokenizer.added_tokens()}
    fitting = [name for name, built_in in BUILT_IN.items() if built_in.controls and names.issuperset(built_in.controls)]
    if tokenizer.chat_template() is None:
        return fitting[0] if fitting else "mistral" if "[INST]" in names else "alpaca"
    own = JinjaTemplate(OF_TOKENIZER, tokenizer.chat_template() or "")
    for name in [*fitting, "mistral"]:
        template = load_template(name, tokenizer)
        try:
            if all(template.writes_like(own, turns) for turns in (PROBE, PROBE[:2])):
                return name
        except ValueError:
            continue
    return OF_TOKENIZER
