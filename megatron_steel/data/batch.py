"""A micro-batch, and what the two kinds of data (documents and conversations) have in common for a loader."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

# Marks what is no token on the way from the reading rank to batches, where it becomes token 0 without loss.
PADDING = -1


@dataclass(kw_only=True, slots=True)
class Texts:
    """The T texts of a micro-batch of packed rows, in their order, for losses of whole texts."""

    of_token_BS: torch.Tensor
    """Number of the text that each token of this context-parallel rank is in, int64."""
    roles_T: np.ndarray
    """What a text is for (pair_dataset.py); 0 for padding."""
    rows_T: np.ndarray
    """The row it is in."""
    counts_T: torch.Tensor
    """Trained labels of the text over all context-parallel ranks, float32."""
    is_last_BS: torch.Tensor
    """1 at the last token of each text, else 0, float32; this context-parallel rank's."""
    references_T: torch.Tensor
    """Log-probability of the text under the reference model, nats, float32; 0 where there is none."""


@dataclass(kw_only=True, slots=True)
class Seen:
    """What the texts of joined rows see where some go on from the beginning of the text before them.

    Such a text holds only what comes after a prompt that both have: its tokens see the prompt in the other's place.
    """

    before: list[int]
    """Of each text, how many tokens at the beginning of the text before it are its own beginning too; mostly 0."""
    keys: torch.Tensor
    """The tokens that each text sees, text after text: numbers in the joined rows, int64."""
    cu_seqlens: torch.Tensor
    """Where those of each text begin in `keys`, and their number; int32 (texts + 1,)."""


@dataclass(kw_only=True, slots=True)
class Rollouts:
    """The answers that a model has sampled, one to a row of the micro-batch; K rows in a row answer one prompt.

    Shapes: B rows, S tokens. Rows without an answer (validation) have zeros.
    """

    advantages_B: torch.Tensor
    """float32, with a mean of 0 in each group."""
    rewards_B: torch.Tensor
    """float32."""
    deviations_B: torch.Tensor
    """Standard deviation of the rewards of the row's group, float32."""
    stopped_B: torch.Tensor
    """1 for an answer that ended by itself, float32."""
    counts_B: torch.Tensor
    """Tokens of the answer, its end included, float32."""
    old_BS: torch.Tensor | None = None
    """Log-probability of each label under the policy that sampled, nats, float32; None: the one that is trained."""
    references_BS: torch.Tensor | None = None
    """Under the reference; None: not compared."""
    asked: bool = False
    """Whether the two last were asked for, which only the last pipeline stage sees."""


@dataclass(kw_only=True, slots=True)
class Batch:
    """One micro-batch. Shapes: B samples of the micro-batch, S tokens of a sample (this context-parallel rank's).

    A rank that needs no tokens (the middle of a pipeline) has zeros that take no memory in place of the tensors;
    the two last fields are right on every rank.
    """

    tokens_BS: torch.Tensor
    """Inputs, int64."""
    labels_BS: torch.Tensor
    """The token after each input, int64."""
    loss_mask_BS: torch.Tensor
    """Weight of the label in the loss, 0 where it is not trained, float32; 1 for every label of a document."""
    position_ids_BS: torch.Tensor
    """Position of each input in its sample, or in its document when positions are reset, int64."""
    sources_B: np.ndarray
    """Source of each sample, int64: index into Ledger.sources, or -1 in validation."""
    valid_tokens: int
    """Trained labels in this micro-batch, known without a device."""
    cu_seqlens: torch.Tensor | None = None
    """Packed documents: where attention begins anew in the whole rows joined end to end, and their length; int32
    (documents + 1,), the same on all context-parallel ranks.
    None: each row is one text, attended to as a whole, and positions count from its start."""
    bounds: list[int] | None = None
    """`cu_seqlens`, known without a device; None: the device has to be asked."""
    seen: Seen | None = None
    """Where texts go on from others; None: each sees itself alone."""
    weight: float | None = None
    """The sum of loss_mask_BS, known without a device; None: `valid_tokens`."""
    read_tokens: int | None = None
    """Tokens that are no padding; None: not counted."""
    texts: Texts | None = None
    """What losses of whole texts need; None: the loss is one of tokens."""
    rollouts: Rollouts | None = None
    """What losses of rewards need."""


class Dataset(Protocol):
    """Samples of one source, which a ledger numbers."""

    fingerprint: str
    """Names what is in the samples, wherever it lies."""
    seq_length: int

    def __len__(self) -> int: ...

    def read(self, window: int, epoch: int) -> np.ndarray:
        """A sample, for the builder that goes with it."""

    def prepared(self) -> bool:
        """Whether `read` answers at once."""

    def prepare(self) -> None:
        """Make `read` answer at once."""

    def describe(self) -> str:
        """For the log, after the number of samples."""


class Builder(Protocol):
    """Reads the samples of a step, and turns them into batches on the device."""

    equal_counts: bool
    """Whether every sample has as many trained labels, so that no rank needs data to know them."""
    reads: bool
    """Whether this rank reads samples."""
    padded: bool
    """Whether samples may be shorter than seq_length."""

    def read(self, fetch: Callable[[int, int], np.ndarray | None], shape: tuple[int, int]) -> torch.Tensor | None:
        """What `build` needs, on the ranks that read."""

    def build(self, host: torch.Tensor | None, sources: np.ndarray, present: np.ndarray) -> list[Batch]:
        """The micro-batches of a step."""


def valid_tokens(batches: Sequence[Batch]) -> int:
    """Return the number of trained labels in this rank's micro-batches of a step."""
    return sum(batch.valid_tokens for batch in batches)
