"""Next-token prediction: what one micro-batch contributes to the loss of the whole step.

Shapes: B micro-batch, S sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_steel.data.loader import Batch
from megatron_steel.model.build import Model
from megatron_steel.runtime.world import World

LossOutput = tuple[Tensor, Tensor, dict[str, Tensor]]


def masked_sum(losses_BS: Tensor, loss_mask_BS: Tensor) -> Tensor:
    """Sum of the losses of the tokens that count, in fp32 (0-dim)."""
    return (losses_BS.float() * loss_mask_BS).sum()


def token_share(losses_BS: Tensor, loss_mask_BS: Tensor, step_tokens: int) -> LossOutput:
    """A micro-batch's part of the mean loss over all ``step_tokens`` tokens of the step.

    The gradients of all parts are summed over micro-batches and replicas, so 1 x 8 and 8 x 1 give the same step by
    construction. megatron-core divides nothing (``calculate_per_token_loss``); the second value is for its own count,
    which is not used.
    """
    total = masked_sum(losses_BS, loss_mask_BS)
    # Schedules may scale the first value in place: what is reported must be its own tensor.
    return total / step_tokens, torch.zeros((), dtype=torch.int), {"loss_sum": total.detach().clone()}


def forward_step(step_tokens: int) -> Callable[[Iterator[Batch], Any], tuple[Tensor, Callable[[Tensor], LossOutput]]]:
    """The function megatron-core's schedules call for each micro-batch of one optimizer step.

    ``step_tokens`` is the number of tokens that count in the whole step over all replicas.
    """

    def step(batches: Iterator[Batch], model: Any) -> tuple[Tensor, Callable[[Tensor], LossOutput]]:
        batch = next(batches)
        losses = model(batch.tokens_BS, batch.position_ids_BS, None, labels=batch.labels_BS)
        return losses, partial(token_share, loss_mask_BS=batch.loss_mask_BS, step_tokens=step_tokens)

    return step


def run_micro_batches(
    model: Model, batches: Sequence[Batch], step_tokens: int, seq_length: int, forward_only: bool
) -> list[dict[str, Tensor]]:
    """Run all micro-batches through the pipeline; on the last stage, one dictionary of sums for each."""
    iterators = [iter(batches) for _ in model.chunks]
    single = len(model.chunks) == 1
    return get_forward_backward_func()(
        forward_step_func=forward_step(step_tokens),
        data_iterator=iterators[0] if single else iterators,
        model=model.chunks[0] if single else model.chunks,
        num_microbatches=len(batches),
        seq_length=seq_length,
        micro_batch_size=batches[0].tokens_BS.shape[0],
        forward_only=forward_only,
    )


def sum_over_ranks(world: World, sums: Tensor) -> Tensor:
    """Sum a tensor over replicas and pipeline stages, in place; stages without a loss hold zeros."""
    for size, group in ((world.data_size, world.data_group), (world.pipeline_size, world.pipeline_group)):
        if size > 1:
            torch.distributed.all_reduce(sums, group=group)
    return sums
