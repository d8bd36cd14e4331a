"""Jinja chat templates as Hugging Face has them, rendered in a sandbox to prompts and answers in alternation.

The sandbox and its settings are those transformers documents for chat templates: immutable values, trimmed blocks,
loop controls, ``raise_exception`` and a ``tojson`` that leaves characters as they are. ``strftime_now`` is not there:
today's date would give the same row other ids tomorrow, and templates that ask for it carry a date of their own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError, meta, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment

from megatron_steel.text.chat_tokens import BEGIN, END, ChatTokens

GENERATION_TAG = re.compile(r"\{%([-+]?)\s*(?:end)?generation\s*([-+]?)%\}")
HAS_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


class Generation(Extension):
    """``{% generation %}``: marks what the assistant writes."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        """Wrap the body of the tag in a call of :meth:`mark`."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("mark"), [], [], body).set_lineno(line)

    def mark(self, caller: Macro) -> str:
        """The body between marks."""
        return BEGIN + caller() + END


class JinjaTemplate:
    """A template source. Rendering raises ``ValueError`` in one line, with what the template itself says."""

    def __init__(self, name: str, source: str) -> None:
        self.name, self.source = name, source
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
        )
        environment.filters["tojson"] = to_json
        environment.globals["raise_exception"] = raise_exception
        try:
            self._template = environment.from_string(source)
            self.variables = meta.find_undeclared_variables(environment.parse(source))
        except TemplateError as error:
            raise ValueError(f"chat template {name}: {one_line(error)}") from error
        self.marked = HAS_GENERATION.search(source) is not None

    def exported(self) -> str:
        """The source without generation tags, which not every reader of templates knows."""
        return GENERATION_TAG.sub(r"{#\1 \2#}", self.source)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]],
        special: Mapping[str, str],
        header: bool,
    ) -> str:
        """Text of messages, with marks around answers where the template names them. ``header`` opens an answer."""
        try:
            return self._template.render(
                messages=messages, tools=list(tools) or None, add_generation_prompt=header, documents=None, **special
            )
        except (TemplateError, SecurityError, TypeError, ValueError, KeyError, OverflowError) as error:
            raise ValueError(f"chat template {self.name}: {one_line(error)}") from error

    def spans(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]], special: Mapping[str, str]
    ) -> list[str]:
        """Prompt, answer, prompt, answer, ..., and the text behind the last answer; together the rendered text."""
        answers = sum(message["role"] == "assistant" for message in messages)
        text = self.render(messages, tools, special, header=False)
        spans = self._marked(text) if self.marked else self._by_prefixes(text, messages, tools, special)
        if len(spans) != 2 * answers + 1:
            raise ValueError(f"chat template {self.name}: marks {len(spans) // 2} answers of {answers}")
        return spans

    def _marked(self, text: str) -> list[str]:
        spans = re.split(f"([{BEGIN}{END}])", text)
        if spans[1::2] != [BEGIN, END] * (len(spans) // 4):
            raise ValueError(f"chat template {self.name}: generation blocks inside one another")
        merged = spans[:1:2]
        for prompt, answer in zip(spans[4::4], spans[2::4], strict=True):
            # Blocks with nothing between them are one answer: some templates write the end token apart.
            if len(merged) > 1 and not merged[-1]:
                merged[-2:] = [merged[-2] + answer, prompt]
            else:
                merged += [answer, prompt]
        return merged

    def _by_prefixes(
        self,
        text: str,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]],
        special: Mapping[str, str],
    ) -> list[str]:
        """An answer is what is rendered more with it than with its header; all of that must stay as turns follow."""
        spans, position = [], 0
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self.render(messages[:index], tools, special, header=True)
            after = self.render(messages[: index + 1], tools, special, header=False)
            if len(before) < position or not (after.startswith(before) and text.startswith(after)):
                raise ValueError(
                    f"chat template {self.name}: writes turn {index + 1} in another way when turns follow; "
                    "put {% generation %} around what the assistant writes, or take a built-in template"
                )
            spans += [text[position : len(before)], text[len(before) : len(after)]]
            position = len(after)
        return [*spans, text[position:]]


def split_blanks(spans: Sequence[str], tokens: ChatTokens) -> list[str]:
    """Spans in which white space after the last control token of an answer has gone to the prompt that follows."""
    moved = list(spans)
    for index in range(1, len(moved), 2):
        answer = tokens.without_blank_end(moved[index])
        moved[index + 1] = moved[index][len(answer) :] + moved[index + 1]
        moved[index] = answer
    return moved


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """The ``tojson`` of chat templates: no HTML escapes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def raise_exception(message: str) -> None:
    """What a template calls when it cannot write a conversation."""
    raise TemplateError(message)


def one_line(error: Exception) -> str:
    """What an error says."""
    return " ".join(str(error).split()) or type(error).__name__
