"""A conversation as every chat format becomes one, and what a template makes of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Role = Literal["system", "user", "assistant", "tool"]

IGNORED = -100
"""The label of a token that is not trained; the one of PyTorch and Hugging Face."""


@dataclass(kw_only=True, frozen=True, slots=True)
class Message:
    """One turn."""

    role: Role
    content: str
    trained: bool | None = None
    """What the row itself says about training on this turn; None leaves it to the options of the run."""
    weight: float = 1.0
    """Of each of its tokens in the loss."""
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    """Calls of an assistant turn, each with ``name`` and ``arguments`` (a dictionary)."""


@dataclass(kw_only=True, frozen=True, slots=True)
class Conversation:
    """Turns in order: a system turn first if there is one, then user or tool turns and answers in alternation."""

    messages: tuple[Message, ...]
    place: str
    """Where it was read: file and line, for messages to the user."""
    tools: tuple[Mapping[str, Any], ...] = ()
    """Functions the assistant may call, as JSON schemas."""


@dataclass(kw_only=True, frozen=True, slots=True)
class Pair:
    """Two answers to one prompt, each the last turn of a conversation; the turns before are the same."""

    chosen: Conversation
    rejected: Conversation
    place: str


@dataclass(kw_only=True, frozen=True, slots=True)
class Judged:
    """An answer, the last turn of a conversation, that is good or bad."""

    conversation: Conversation
    desirable: bool
    place: str


@dataclass(kw_only=True, frozen=True, slots=True)
class Prompt:
    """Turns that wait for an answer, and what an answer is compared with."""

    conversation: Conversation
    answer: Any
    """A JSON value that is not null."""
    place: str


@dataclass(kw_only=True, frozen=True, slots=True)
class Round:
    """An answer and what stands before it since the answer before: positions in the ids of a conversation."""

    begin: int
    answer: int
    """First token of the answer; the header of the assistant turn ends here."""
    end: int
    """One after the last token of the answer, its end-of-turn token included."""


@dataclass(kw_only=True, frozen=True, slots=True)
class EncodedChat:
    """A conversation in tokens. Shapes: T tokens."""

    ids_T: np.ndarray
    """int32."""
    labels_T: np.ndarray
    """What is to be predicted in place of each token: its own id or `IGNORED`, as in Hugging Face (not shifted)."""
    weights_T: np.ndarray
    """Weight of each label in the loss, float32; 0 where the label is `IGNORED`."""
    rounds: tuple[Round, ...]
    """In order; they cover all tokens but those behind the last answer."""
