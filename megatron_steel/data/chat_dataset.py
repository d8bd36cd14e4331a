"""Conversations of a source as samples that a ledger numbers: several in one (packed), or one each.

Shapes: L tokens of a sample.
"""

from __future__ import annotations

import hashlib

import numpy as np

from megatron_steel.config.chat_schema import LossWeighting
from megatron_steel.data.chat_store import ChatStore
from megatron_steel.data.packing import Rows, fill, one_each, pack
from megatron_steel.text.conversation import IGNORED

PLANES = ("tokens", "labels", "weights", "positions")
"""What is read of each token: input, next token to predict or -1, weight of that label, position in its conversation.

int32; the weights are the bits of a float32.
"""


class ChatDataset:
    """Rows of conversations; each starts at position 0 and predicts nothing after its last token.

    weighting: how labels count. None: each trained label counts 1, whatever the data says of its weight (validation).
    Raises ``ValueError`` for a source without conversations.
    """

    def __init__(
        self, name: str, store: ChatStore, content: str, seq_length: int, packing: bool, weighting: LossWeighting | None
    ) -> None:
        if not len(store):
            raise ValueError(f"{name}: holds no conversation to train on ({store.report.rows} rows)")
        self.name, self.store, self.seq_length, self.weighting = name, store, seq_length, weighting
        self.packing = packing
        self.rows: Rows = pack(store.lengths_n, seq_length) if packing else one_each(len(store))
        kind = f"chat 1|{content}|{seq_length}|{'packed' if packing else 'single'}"
        self.fingerprint = hashlib.sha256(kind.encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def mean_tokens(self) -> float:
        """Tokens of a row without padding, on average."""
        return float(self.store.lengths_n.sum()) / len(self.rows)

    def longest(self, count: int) -> list[tuple[int, int]]:
        """Return (tokens, row) of the longest rows, at most ``count``, the longest first."""
        tokens = np.add.reduceat(self.store.lengths_n[self.rows.samples], self.rows.begins[:-1])
        rows = np.argsort(-tokens, kind="stable")[:count]
        return [(int(tokens[row]), int(row)) for row in rows]

    def prepared(self) -> bool:
        """Whether ``read`` answers at once: always."""
        return True

    def prepare(self) -> None:
        """Nothing is left to be done."""

    def describe(self) -> str:
        """Return for the log what the rows are made of."""
        made_of = f"of {len(self.store):,} conversations"
        if not self.packing:
            return made_of
        return f"{made_of}, {fill(self.rows, self.store.lengths_n, self.seq_length):.1%} filled"

    def read(self, window: int, epoch: int) -> np.ndarray:
        """Return the planes of a row, int32 (4, L); the same in every epoch."""
        return np.concatenate([self.sample(int(number)) for number in self.rows[window]], axis=1)

    def sample(self, number: int) -> np.ndarray:
        """Return the planes of one conversation, int32 (4, L)."""
        return text_planes(self.store, number, self.weighting)


def text_planes(store: ChatStore, number: int, weighting: LossWeighting | None) -> np.ndarray:
    """Return the :data:`PLANES` of one conversation, int32 (4, L)."""
    span = slice(store.begins_n[number], store.begins_n[number + 1])
    ids, labels = store.ids_N[span], store.labels_N[span]
    planes = np.empty((len(PLANES), len(ids)), dtype=np.int32)
    planes[0] = ids
    # What is to be predicted at a token is the label of the next one.
    planes[1, :-1], planes[1, -1] = np.where(labels[1:] == IGNORED, -1, labels[1:]), -1
    weights = np.zeros(len(ids), dtype=np.float32)
    weights[:-1] = store.weights(number)[1:]
    planes[2] = weigh(weights, weighting).view(np.int32)
    planes[3] = np.arange(len(ids), dtype=np.int32)
    return planes


def weigh(weights_L: np.ndarray, weighting: LossWeighting | None) -> np.ndarray:
    """How each label of a conversation counts in the loss, float32; the step's loss is divided by the sum of all.

    token: with its own weight. sample: all labels of a conversation together count 1. square: together they count the
    root of what they would (InternLM's square averaging), which lies between the two. None: 1 each.
    """
    if weighting is None:
        return (weights_L > 0).astype(np.float32)
    total = float(weights_L.sum(dtype=np.float64))
    if weighting == "token" or not total:
        return weights_L
    return (weights_L / (total if weighting == "sample" else total**0.5)).astype(np.float32)
