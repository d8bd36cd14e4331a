"""Which tokens of a conversation are trained, and which of optional system texts a conversation gets."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from dataclasses import dataclass
from typing import Literal

from megatron_steel.text.conversation import Conversation, Message

TURNS = ("all", "last", "first")


@dataclass(kw_only=True, frozen=True, slots=True)
class MaskPolicy:
    """What is trained where a message does not say it itself. ``ValueError`` for options that exclude each other."""

    turns: Literal["all", "last", "first"] = "all"
    """Which answers of a conversation."""
    train_on_prompt: bool = False
    """Also what stands before and between the answers, with weight 1."""
    mask_history: bool = False
    """Only the last answer, and it is the oldest turns that a conversation too long loses."""
    train_newline: bool = False
    """Also the white space between an answer's end token and the next control token, as LLaMA-Factory trains it."""

    def __post_init__(self) -> None:
        if self.turns not in TURNS:
            raise ValueError(f"--train-turns {self.turns}: must be one of {', '.join(TURNS)}")
        if self.mask_history and self.train_on_prompt:
            raise ValueError("--mask-history and --train-on-prompt exclude each other: is the history trained or not")
        if self.mask_history and self.turns == "first":
            raise ValueError("--mask-history trains the last answer alone, --train-turns first the first: give one")

    def weights(self, messages: tuple[Message, ...], place: str) -> list[float]:
        """Weight of each answer, 0 where it is not trained. What a message says about itself comes first."""
        answers = [message for message in messages if message.role == "assistant"]
        if any(message.trained is not None for message in messages if message.role != "assistant"):
            raise ValueError(f"{place}: only answers can say whether they are trained; see --train-on-prompt")
        for message in answers:
            if not 0 <= message.weight < math.inf:
                raise ValueError(f"{place}: weight {message.weight} of an answer: must be a number of at least 0")
        turns = "last" if self.mask_history else self.turns
        chosen = {"all": range(len(answers)), "first": range(1), "last": range(len(answers) - 1, len(answers))}[turns]
        trained = [
            index in chosen if message.trained is None else message.trained for index, message in enumerate(answers)
        ]
        return [message.weight if on else 0.0 for message, on in zip(answers, trained, strict=True)]


def pick_system(conversation: Conversation, system: str, probability: float, seed: int) -> Conversation:
    """The conversation with a system turn in front, if it has none and its draw is below ``probability``.

    The draw is a hash of seed and place: the same in every run and for any number of workers.
    """
    if not 0 <= probability <= 1:
        raise ValueError(f"probability {probability} of the system text: must be between 0 and 1")
    if conversation.messages and conversation.messages[0].role == "system":
        return conversation
    digest = hashlib.sha256(f"{seed}:{conversation.place}".encode()).digest()
    if int.from_bytes(digest[:8], "big") >= probability * 2**64:
        return conversation
    first = Message(role="system", content=system)
    return dataclasses.replace(conversation, messages=(first, *conversation.messages))
