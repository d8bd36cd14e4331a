"""Prompts as samples that a ledger numbers; a model samples the answers.

Shapes: L tokens of a prompt, T tokens of a prompt with its answer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from megatron_steel.data.chat_dataset import PLANES
from megatron_steel.data.chat_encode import ChatEncoder
from megatron_steel.data.chat_store import ChatReport, encode_in_chunks, note_bad
from megatron_steel.text.conversation import Prompt
from megatron_steel.text.masks import pick_system

Encoded = tuple[list[int], Any]
"""Ids of a prompt up to the answer to come, and what answers are compared with."""


def encode_prompts(
    rows: Iterable[Any], encoder: ChatEncoder, room: int, workers: int
) -> tuple[list[Encoded], ChatReport]:
    """The prompts in their order, and what became of all rows.

    One of more than ``room`` tokens is a bad row: a prompt that is cut asks something else.
    """

    def encode(part: list[Any]) -> tuple[list[Encoded], ChatReport]:
        report, found = ChatReport(), []
        for row in part:
            try:
                ids = prompt_ids(row, encoder)
                if len(ids) > room:
                    raise ValueError(f"too long: {len(ids)} tokens, --seq-length - --max-new-tokens is {room}")
            except ValueError as error:
                note_bad(report, row.place, str(error).removeprefix(f"{row.place}: "))
                continue
            report.kept += 1
            report.tokens += len(ids)
            found.append((ids, row.answer))
        return found, report

    return encode_in_chunks(rows, encode, workers)


def prompt_ids(row: Prompt, encoder: ChatEncoder) -> list[int]:
    """The ids of a prompt with the header of its answer; ``ValueError`` when the template cannot write it."""
    talk = row.conversation
    if encoder.system_text is not None:
        talk = pick_system(talk, encoder.system_text, encoder.system_probability, encoder.seed)
    return encoder.template.encode_prompt(talk.messages, talk.tools)


def answer_planes(prompt: Sequence[int], answer: Sequence[int]) -> np.ndarray:
    """The :data:`~megatron_steel.data.chat_dataset.PLANES` of a prompt and its answer, of which the latter is trained.

    int32 (4, T).
    """
    ids = np.array([*prompt, *answer], dtype=np.int32)
    planes = np.empty((len(PLANES), len(ids)), dtype=np.int32)
    trained = np.zeros(len(ids), dtype=bool)
    trained[len(prompt) - 1 : -1] = True
    planes[0] = ids
    planes[1] = np.where(trained, np.roll(ids, -1), -1)
    planes[2] = trained.astype(np.float32).view(np.int32)
    planes[3] = np.arange(len(ids), dtype=np.int32)
    return planes


class PromptDataset:
    """Prompts of a source.

    content: names what prompts and answers are made from. longest_answer: tokens that an answer may have.
    group_size: answers to each.
    Raises ``ValueError`` for a source without prompts.
    """

    def __init__(
        self, name: str, prompts: list[Encoded], content: str, seq_length: int, longest_answer: int, group_size: int
    ) -> None:
        if not prompts:
            raise ValueError(f"{name}: holds no prompt to train on")
        self.name, self.prompts, self.seq_length = name, prompts, seq_length
        self.longest_answer, self.group_size = longest_answer, group_size
        self.fingerprint = hashlib.sha256(f"prompts 1|{content}|{seq_length}".encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def mean_tokens(self) -> float:
        """Tokens of the answers to a prompt with it, on average, if all are as long as they may be."""
        mean = sum(len(ids) for ids, _ in self.prompts) / len(self.prompts)
        return self.group_size * (mean + self.longest_answer)

    def longest(self, count: int) -> list[tuple[int, int]]:
        """Return (tokens with the answer, number) of the longest prompts, at most ``count``, the longest first."""
        lengths = np.array([len(ids) for ids, _ in self.prompts])
        numbers = np.argsort(-lengths, kind="stable")[:count]
        return [(int(lengths[number]) + self.longest_answer, int(number)) for number in numbers]

    def prepared(self) -> bool:
        """Whether ``read`` answers at once: always."""
        return True

    def prepare(self) -> None:
        """Nothing is left to be done."""

    def describe(self) -> str:
        """Return for the log what is made of a prompt."""
        return f"of one prompt each, {self.group_size} answers"

    def read(self, window: int, epoch: int) -> np.ndarray:
        """Return the planes of a prompt with the longest answer, int32 (4, L + longest_answer): what has to fit."""
        ids, _ = self.prompts[window]
        return answer_planes(ids, [ids[-1]] * self.longest_answer)
