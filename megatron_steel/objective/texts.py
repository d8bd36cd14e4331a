"""Losses of whole texts: the log-probability of each from those of its tokens.

Shapes: B rows, S tokens of a row (this context-parallel rank's), T texts of the micro-batch.
"""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_steel.data.batch import Batch
from megatron_steel.objective.language import LossOutput


def text_sums(values_BS: Tensor, batch: Batch, context_group: ProcessGroup) -> Tensor:
    """Sum [T] of a number of each token over the trained tokens of each text, float32.

    Each context-parallel rank has a part of a text's tokens and gets the sum of all; the gradient of that sum reaches
    each part once, because every rank computes the same loss from it.
    """
    assert batch.texts is not None
    values_BS = values_BS.reshape(batch.loss_mask_BS.shape).float() * batch.loss_mask_BS
    texts = len(batch.texts.roles_T)
    sums_T = values_BS.new_zeros(texts).index_add(0, batch.texts.of_token_BS.flatten(), values_BS.flatten())
    return reduce_from_tensor_model_parallel_region(sums_T, context_group) if context_group.size() > 1 else sums_T


def text_logps(losses_BS: Tensor, batch: Batch, context_group: ProcessGroup) -> Tensor:
    """Log-probability [T] of the trained tokens of each text, nats, float32, from the losses of tokens."""
    return text_sums(-losses_BS, batch, context_group)


def text_scores(scores_BS: Tensor, batch: Batch, context_group: ProcessGroup) -> Tensor:
    """Score [T] of each text, float32, that of its last token, from the scores of tokens; gathered like log-probs."""
    assert batch.texts is not None
    last_BS = scores_BS.reshape(batch.loss_mask_BS.shape).float() * batch.texts.is_last_BS
    texts = len(batch.texts.roles_T)
    scores_T = last_BS.new_zeros(texts).index_add(0, batch.texts.of_token_BS.flatten(), last_BS.flatten())
    return reduce_from_tensor_model_parallel_region(scores_T, context_group) if context_group.size() > 1 else scores_T


class TextLogps:
    """The objective of a model that is only asked: no loss, but the log-probability of each text."""

    metric_names: tuple[str, ...] = ()

    def __init__(self, context_group: ProcessGroup) -> None:
        self.context_group = context_group

    def share(self, losses_BS: Tensor, batch: Batch, step_weight: float) -> LossOutput:
        """Reports ``logps`` [T]; to be run forward only."""
        logps_T = text_logps(losses_BS, batch, self.context_group)
        return logps_T.sum(), torch.zeros((), dtype=torch.int), {"logps": logps_T}
