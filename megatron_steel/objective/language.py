"""Next-token prediction: what one micro-batch contributes to the loss of the whole step.

Shapes: B micro-batch, S sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_steel.data.batch import Batch, valid_tokens
from megatron_steel.model.build import Model
from megatron_steel.model.packed import PackedDocuments
from megatron_steel.runtime.world import World

LossOutput = tuple[Tensor, Tensor, dict[str, Tensor]]
Share = Callable[[Tensor, Batch, float], LossOutput]
"""From the losses of a micro-batch's tokens, itself and the step's weight to its part of the step's loss."""
BY_SAMPLE = ("loss_by_sample", "weight_by_sample", "trained_by_sample")
"""Weighted sum of the loss, sum of the weights and trained labels of each sample, [B]."""


def token_share(losses_BS: Tensor, batch: Batch, step_weight: float) -> LossOutput:
    """A micro-batch's part of the step's loss: the mean over its labels, each with its weight of ``step_weight``.

    The gradients of all parts are summed over micro-batches and replicas, so 1 x 8 and 8 x 1 give the same step by
    construction. megatron-core divides nothing (``calculate_per_token_loss``); the second value is for its own count,
    which is not used. What is reported are the sums over each sample, :data:`BY_SAMPLE`.
    """
    # Packed documents come as one row.
    losses_BS = losses_BS.reshape(batch.loss_mask_BS.shape)
    by_sample_B = (losses_BS.float() * batch.loss_mask_BS).sum(-1)
    # Schedules may scale the first value in place: what is reported must be its own tensor.
    counts = (batch.loss_mask_BS.sum(-1), (batch.loss_mask_BS != 0).sum(-1))
    report = dict(zip(BY_SAMPLE, (by_sample_B.detach().clone(), *counts), strict=True))
    return by_sample_B.sum() / step_weight, torch.zeros((), dtype=torch.int), report


def packed_documents(batch: Batch, context_size: int = 1) -> PackedDocuments | None:
    """How attention is to be cut in a micro-batch; None where each row is one text.

    The greatest length is that of a row, which no document exceeds: the same number in each step asks no device.
    """
    if batch.cu_seqlens is None:
        return None
    longest = batch.tokens_BS.shape[1] * context_size
    return PackedDocuments(
        bounds=batch.bounds,
        seen=batch.seen,
        qkv_format="thd",
        cu_seqlens_q=batch.cu_seqlens,
        cu_seqlens_kv=batch.cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )


def forward_step(
    step_weight: float, context_size: int, share: Share
) -> Callable[[Iterator[Batch], Any], tuple[Tensor, Callable[[Tensor], LossOutput]]]:
    """The function megatron-core's schedules call for each micro-batch of one optimizer step.

    ``step_weight`` is the sum of the weights of all labels in the step over all replicas (without weights of their own,
    their number), ``context_size`` the number of ranks that share a sample.
    """

    def step(batches: Iterator[Batch], model: Any) -> tuple[Tensor, Callable[[Tensor], LossOutput]]:
        batch = next(batches)
        inputs = (batch.tokens_BS, batch.position_ids_BS, batch.labels_BS)
        packed = packed_documents(batch, context_size)
        if packed is None:
            tokens, positions, labels = inputs
            losses = model(tokens, positions, None, labels=labels)
        else:
            tokens, positions, labels = (tensor.reshape(1, -1) for tensor in inputs)
            losses = model(tokens, positions, None, labels=labels, packed_seq_params=packed)
        return losses, partial(share, batch=batch, step_weight=step_weight)

    return step


def run_micro_batches(
    model: Model, batches: Sequence[Batch], step_weight: float, forward_only: bool, share: Share = token_share
) -> list[dict[str, Tensor]]:
    """Run all micro-batches through the pipeline; on the last stage, one dictionary of sums for each.

    Their whole rows are joined to one where documents are packed: all are, or none. The stages of a pipeline exchange
    tensors of one shape, so there all micro-batches have the same.
    """
    context_size = model.options.context_parallel_size
    (rows, length), joined = batches[0].tokens_BS.shape, batches[0].cu_seqlens is not None
    length *= context_size
    assert all((batch.cu_seqlens is not None) == joined for batch in batches)
    iterators = [iter(batches) for _ in model.chunks]
    single = len(model.chunks) == 1
    return get_forward_backward_func()(
        forward_step_func=forward_step(step_weight, context_size, share),
        data_iterator=iterators[0] if single else iterators,
        model=model.chunks[0] if single else model.chunks,
        num_microbatches=len(batches),
        seq_length=rows * length if joined else length,
        micro_batch_size=1 if joined else rows,
        forward_only=forward_only,
    )


def sum_over_ranks(world: World, sums: Tensor) -> Tensor:
    """Sum a tensor over tokens' ranks and pipeline stages, in place; stages without a loss hold zeros."""
    for group in (world.data_context_group, world.pipeline_group):
        if group.size() > 1:
            torch.distributed.all_reduce(sums, group=group)
    return sums


@dataclass(frozen=True, kw_only=True, slots=True)
class StepSize:
    """What is in a step over all replicas."""

    trained: int
    """Labels that count in the loss."""
    weight: float
    """Sum of their weights."""
    read_tokens: int | None = None
    """Tokens that are no padding; None where they are not counted."""


class Objective(Protocol):
    """What a run makes of the losses of tokens."""

    metric_names: tuple[str, ...]
    """What is reported of a step beside the loss: `StepResult.metric_sums` in this order."""
    watched: tuple[str, str] | None
    """Metrics of good and bad answers that should not fall together, if there are such."""
    counted: str
    """What a step's loss is the mean over, for reports on held-out data."""

    def begin_step(self, model: Model, batches: Sequence[Batch], world: World) -> None:
        """Find out what has to be known of a whole step before it is trained."""

    def share(self, losses_BS: Tensor, batch: Batch, step_weight: float) -> LossOutput:
        """A micro-batch's part of the step's loss."""


class NextToken:
    """Training on text: every label counts with its weight."""

    metric_names: tuple[str, ...] = ()
    watched: tuple[str, str] | None = None
    counted = "labels"

    def begin_step(self, model: Model, batches: Sequence[Batch], world: World) -> None:
        """Nothing has to be known."""

    def share(self, losses_BS: Tensor, batch: Batch, step_weight: float) -> LossOutput:
        """See :func:`token_share`."""
        return token_share(losses_BS, batch, step_weight)


def measure_step(world: World, batches: Sequence[Batch], equal_ranks: bool) -> StepSize:
    """How much the step over this and all other ranks' micro-batches trains.

    ``equal_ranks`` says that every rank that has other tokens has as many, which saves the question. Otherwise hosts
    ask each other, so that nobody waits for a device that is still busy with the step before.
    """
    mine, ranks = valid_tokens(batches), world.data_size * world.context_size
    if equal_ranks:
        return StepSize(trained=mine * ranks, weight=mine * ranks)
    weight = sum(batch.valid_tokens if batch.weight is None else batch.weight for batch in batches)
    read = [batch.read_tokens for batch in batches if batch.read_tokens is not None]
    sums = torch.tensor([mine, weight, sum(read)], dtype=torch.float64)
    if ranks > 1:
        # Ranks that share samples know the same: one of them counts.
        sums *= world.tensor_rank == world.pipeline_rank == 0
        torch.distributed.all_reduce(sums, group=world.host_group)
    trained, weight, tokens = sums.tolist()
    return StepSize(trained=int(trained), weight=weight, read_tokens=int(tokens) if read else None)
