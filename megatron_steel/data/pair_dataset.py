"""Two answers to one prompt, or a judged answer, as samples that a ledger numbers.

Conversations lie in pairs in a store: 2i is the chosen one of pair i and 2i + 1 the rejected one. Of judged answers 2i
is the answer itself, and 2i + 1 its prompt with the answer of another row, from which KTO estimates how far the model
has moved. Both are always in one row, each a text of its own.

Where prompts are shared the second text of a pair lacks the prompt but for its last token, which predicts the answer's
first, and goes on from the beginning of the first text: its positions say so. Which pairs are in which row is the
same with and without, for that layouts that cannot share train on the same steps; the rows become shorter.
"""

from __future__ import annotations

import hashlib
from enum import IntEnum

import numpy as np

from megatron_steel.data.batch import Texts
from megatron_steel.data.chat_dataset import PLANES, text_planes
from megatron_steel.data.chat_store import ChatStore
from megatron_steel.data.packing import Rows, fill, one_each, pack
from megatron_steel.text.conversation import IGNORED

PAIR_PLANES = (*PLANES, "roles", "references")
"""Those of a conversation, and of the text that a token is in its role and the bits of its reference, a float32."""


class Role(IntEnum):
    """What a text is for."""

    PADDING = 0
    CHOSEN = 1
    REJECTED = 2
    """Follows the chosen one it belongs to."""
    DESIRABLE = 3
    UNDESIRABLE = 4
    MISMATCHED = 5
    """Follows the judged one whose prompt it has."""


UNITS = (Role.CHOSEN, Role.DESIRABLE, Role.UNDESIRABLE)
"""One of them is in each pair and in each judged answer."""


def judged(texts: Texts) -> int:
    """Pairs or judged answers of a micro-batch: what a step's loss is the mean over."""
    return int(np.isin(texts.roles_T, UNITS).sum())


def shared_tokens(store: ChatStore) -> np.ndarray:
    """Of each pair, how many tokens at the beginning of both conversations no answer is predicted at, int64."""
    trained = np.flatnonzero(store.labels_N != IGNORED)
    begins = np.asarray(store.begins_n)
    answers = trained[np.searchsorted(trained, begins[:-1])] - begins[:-1]
    shared = np.maximum(answers.reshape(-1, 2).min(1) - 1, 0)
    for pair, (first, second) in enumerate(begins[:-1].reshape(-1, 2).tolist()):
        count = int(shared[pair])
        same = store.ids_N[first : first + count] == store.ids_N[second : second + count]
        if not same.all():
            shared[pair] = int(same.argmin())
    return shared


class PairDataset:
    """Rows of pairs, packed or one each.

    desirable: of judged answers, whether each is a good one; None for pairs.
    share: whether a pair's prompt is there once.
    Raises ``ValueError`` for a source without pairs.
    """

    def __init__(
        self,
        name: str,
        store: ChatStore,
        content: str,
        seq_length: int,
        packing: bool,
        desirable: np.ndarray | None = None,
        share: bool = False,
    ) -> None:
        if not len(store):
            raise ValueError(f"{name}: holds nothing to train on ({store.report.rows} rows)")
        assert len(store) % 2 == 0
        self.name, self.store, self.content = name, store, content
        self.seq_length, self.packing, self.desirable = seq_length, packing, desirable
        self.share = share
        self.shared = shared_tokens(store) if share else np.zeros(len(store) // 2, dtype=np.int64)
        """Tokens of each pair that its second text has in common with the first and goes on from."""
        self.lengths = store.lengths_n.reshape(-1, 2).sum(1)
        """Tokens of each pair, its prompt counted twice."""
        self.rows: Rows = pack(self.lengths, seq_length) if packing else one_each(len(self.lengths))
        self.references = np.zeros(len(store), dtype=np.float32)
        """Log-probability of each conversation under the reference model."""
        kind = f"pairs 1|{content}|{seq_length}|{'packed' if packing else 'single'}"
        self.fingerprint = hashlib.sha256(kind.encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def mean_tokens(self) -> float:
        """Tokens of a row without padding, on average, those of a shared prompt counted twice."""
        return float(self.lengths.sum()) / len(self.rows)

    @property
    def mean_saved(self) -> float:
        """Of these tokens, those that are not there because prompts are shared."""
        return float(self.shared.sum()) / len(self.rows)

    def longest(self, count: int) -> list[tuple[int, int]]:
        """Return (tokens, row) of the longest rows, at most ``count``, the longest first."""
        tokens = np.add.reduceat((self.lengths - self.shared)[self.rows.samples], self.rows.begins[:-1])
        rows = np.argsort(-tokens, kind="stable")[:count]
        return [(int(tokens[row]), int(row)) for row in rows]

    def prepared(self) -> bool:
        """Whether ``read`` answers at once: always."""
        return True

    def prepare(self) -> None:
        """Nothing is left to be done."""

    def describe(self) -> str:
        """Return for the log what the rows are made of."""
        made_of = f"of {len(self.lengths):,} {'pairs' if self.desirable is None else 'judged answers'}"
        if self.packing:
            made_of += f", {fill(self.rows, self.lengths, self.seq_length):.1%} filled"
        if self.share:
            made_of += f", shared prompts save {self.shared.sum() / self.lengths.sum():.1%} of the tokens"
        return made_of

    def texts(self, window: int) -> np.ndarray:
        """Return the numbers of the conversations of a row, in their order."""
        return (2 * self.rows[window][:, None] + np.arange(2)).ravel()

    def roles(self, pair: int) -> tuple[Role, Role]:
        """Return what the two conversations of a pair are for."""
        if self.desirable is None:
            return Role.CHOSEN, Role.REJECTED
        return (Role.DESIRABLE if self.desirable[pair] else Role.UNDESIRABLE), Role.MISMATCHED

    def read(self, window: int, epoch: int) -> np.ndarray:
        """Return the :data:`PAIR_PLANES` of a row, int32 (6, L); the same in every epoch."""
        parts = []
        for number in self.texts(window).tolist():
            planes = text_planes(self.store, number, None)[:, self.shared[number // 2] * (number % 2) :]
            more = np.empty((2, planes.shape[1]), dtype=np.int32)
            more[0] = self.roles(number // 2)[number % 2]
            more[1] = self.references[number : number + 1].view(np.int32)
            parts.append(np.concatenate([planes, more]))
        return np.concatenate(parts, axis=1)
