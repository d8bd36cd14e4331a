"""Loss, perplexity and bits per byte on named held-out sets.

Bits per byte compare models with different tokenizers: the loss of all scored tokens in bits, over the UTF-8 bytes
those tokens stand for.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_steel.data.loader import Batch, valid_tokens
from megatron_steel.model.build import Model
from megatron_steel.objective.language import run_micro_batches, sum_over_ranks
from megatron_steel.runtime.world import World


@dataclass(frozen=True, kw_only=True)
class HeldOutResult:
    """Scores of one validation set."""

    loss: float
    """Mean loss per token, nats."""
    tokens: int
    """Tokens scored."""
    bytes: int
    """UTF-8 bytes of the scored tokens; special tokens stand for none."""

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(min(self.loss, 700.0))

    @property
    def bits_per_byte(self) -> float:
        """Total loss in bits over the bytes scored."""
        return self.loss * self.tokens / math.log(2) / self.bytes if self.bytes else math.nan


def byte_count(batches: Iterable[Batch], byte_lengths: Tensor) -> int:
    """UTF-8 bytes of the labels that count."""
    return sum(int((byte_lengths[b.labels_BS] * b.loss_mask_BS).sum().item()) for b in batches)


def evaluate(
    model: Model, steps: Iterable[list[Batch]], byte_lengths: np.ndarray, seq_length: int, world: World
) -> HeldOutResult:
    """Score every step of a validation loader; the same result on every rank.

    ``byte_lengths`` [vocabulary] holds the bytes each id stands for.
    """
    for chunk in model.chunks:
        chunk.eval()
    lengths = torch.from_numpy(byte_lengths.astype(np.float32)).to(world.device)
    sums = torch.zeros(3, dtype=torch.float64, device=world.device)
    last = world.pipeline_rank == world.pipeline_size - 1
    with torch.no_grad():
        for batches in steps:
            outputs = run_micro_batches(model, batches, 1, seq_length, forward_only=True)
            if last:
                sums[0] += sum(output["loss_by_sample"].double().sum() for output in outputs)
                sums[1] += valid_tokens(batches)
                sums[2] += byte_count(batches, lengths)
    for chunk in model.chunks:
        chunk.train()
    total, tokens, read = sum_over_ranks(world, sums).tolist()
    return HeldOutResult(loss=total / max(tokens, 1), tokens=int(tokens), bytes=int(read))
