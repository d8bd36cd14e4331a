"""Loss, perplexity and bits per byte on named held-out sets.

Bits per byte compare models with different tokenizers: the loss of all scored tokens in bits, over the UTF-8 bytes
those tokens stand for.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_steel.checkpoint.state import load_tokenizer, read_state
from megatron_steel.checkpoint.verify import load_for_inference
from megatron_steel.data.batch import Batch, valid_tokens
from megatron_steel.data.document_batches import BatchBuilder
from megatron_steel.data.loader import BatchLayout, ValidLoader
from megatron_steel.data.sources import TokenizerFacts, open_indexed, parse_valid_data_path
from megatron_steel.data.windows import WindowedDataset
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

    def as_row(self) -> dict[str, Any]:
        """The scores under the names of metrics.jsonl."""
        return {
            "loss": self.loss,
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
            "tokens": self.tokens,
            "bytes": self.bytes,
        }


def combine(results: Sequence[HeldOutResult]) -> HeldOutResult:
    """The scores of all sets as one: every scored token counts the same, whichever set it is from."""
    tokens = sum(result.tokens for result in results)
    loss = math.fsum(result.loss * result.tokens for result in results) / max(tokens, 1)
    return HeldOutResult(loss=loss, tokens=tokens, bytes=sum(result.bytes for result in results))


def byte_count(batches: Iterable[Batch], byte_lengths: Tensor) -> int:
    """UTF-8 bytes of the labels that count."""
    return sum(int((byte_lengths[b.labels_BS] * b.loss_mask_BS).sum().item()) for b in batches)


def evaluate(model: Model, steps: Iterable[list[Batch]], byte_lengths: np.ndarray, world: World) -> HeldOutResult:
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
            outputs = run_micro_batches(model, batches, 1, forward_only=True)
            if last:
                sums[0] += sum(output["loss_by_sample"].double().sum() for output in outputs)
                sums[1] += valid_tokens(batches)
                sums[2] += byte_count(batches, lengths)
    for chunk in model.chunks:
        chunk.train()
    total, tokens, read = sum_over_ranks(world, sums).tolist()
    return HeldOutResult(loss=total / max(tokens, 1), tokens=int(tokens), bytes=int(read))


def score_checkpoint(
    checkpoint: Path,
    valid_data_path: Sequence[str],
    world: World,
    *,
    seq_length: int | None,
    micro_batch_size: int,
    max_samples: int | None,
) -> dict[str, HeldOutResult]:
    """Score a checkpoint on named sets (NAME=PREFIX or PREFIX) on the layout of ``world``.

    Raises ``ValueError`` for data that is missing or was encoded with another tokenizer.
    """
    state = read_state(checkpoint)
    length = seq_length or int(state.config["seq_length"])
    tokenizer = load_tokenizer(checkpoint)
    facts = TokenizerFacts(tokenizer.fingerprint(), tokenizer.vocab_size)
    sets = {
        name: WindowedDataset(prefix, length, shuffle_documents=False, reader=open_indexed(prefix, facts))
        for name, prefix in parse_valid_data_path(valid_data_path)
    }
    model, _ = load_for_inference(checkpoint, world)
    layout = BatchLayout(
        micro_batch_size=micro_batch_size,
        num_microbatches=1,
        data_parallel_rank=world.data_rank,
        data_parallel_size=world.data_size,
    )
    builder = BatchBuilder(
        seq_length=length,
        tensor_group=world.tensor_group,
        reads_data=world.pipeline_rank in (0, world.pipeline_size - 1),
        device=world.device,
        eod_id=tokenizer.eos_id,
        # As in training: a model that never saw another document before its own is scored the same way.
        reset_attention_mask=bool(state.config.get("reset_attention_mask")),
        reset_position_ids=bool(state.config.get("reset_position_ids")),
    )
    results = {}
    for name, dataset in sets.items():
        loader = ValidLoader(dataset, layout, builder, max_samples)
        results[name] = evaluate(model, loader, tokenizer.byte_lengths(), world)
    return results
