"""Training on preferences: what the log-probabilities of whole answers make of a step.

Shapes: B rows and T texts of a micro-batch, P pairs or judged answers of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from megatron_steel.config.preference_schema import PreferenceConfig
from megatron_steel.data.batch import Batch, Texts
from megatron_steel.data.pair_dataset import Role
from megatron_steel.model.build import Model
from megatron_steel.model.lora import adapters_off
from megatron_steel.objective.language import BY_SAMPLE, LossOutput, run_micro_batches
from megatron_steel.objective.texts import TextLogps, text_logps
from megatron_steel.runtime.world import World


@contextmanager
def asking(model: Model, adapters: bool) -> Iterator[None]:
    """The model without dropout and gradients, and without its adapters unless ``adapters``."""
    modes = [chunk.training for chunk in model.chunks]
    for chunk in model.chunks:
        chunk.eval()
    try:
        with torch.no_grad():
            if adapters:
                yield
            else:
                with adapters_off(model.chunks):
                    yield
    finally:
        for chunk, mode in zip(model.chunks, modes, strict=True):
            chunk.train(mode)


def ask(model: Model, batches: Sequence[Batch], world: World, adapters: bool = True) -> list[Tensor]:
    """Log-probabilities [T] of all texts of each micro-batch; on the last pipeline stage, elsewhere nothing."""
    share = TextLogps(world.context_group).share
    with asking(model, adapters):
        return [output["logps"] for output in run_micro_batches(model, batches, 1.0, forward_only=True, share=share)]


def report(
    losses_P: Tensor, metrics_PK: Sequence[Tensor], texts: Texts, units: Tensor, world: World, rows: int
) -> dict[str, Tensor]:
    """What a micro-batch reports of its units (numbers of the texts [P] that stand for them), by row and in sum.

    Context-parallel ranks report the same units: each a share of them.
    """
    share = 1.0 / world.context_size
    row_P = torch.from_numpy(texts.rows_T).to(losses_P.device)[units]
    ones = torch.ones_like(losses_P)
    columns = (losses_P.detach(), ones, texts.counts_T[units])
    by_row = [losses_P.new_zeros(rows).index_add(0, row_P, column * share) for column in columns]
    metrics = [metric.detach().double().sum() * share for metric in metrics_PK]
    return dict(zip(BY_SAMPLE, by_row, strict=True)) | {"metrics": torch.stack(metrics)}


def numbers(texts: Texts, roles: Sequence[Role], where: torch.device) -> Tensor:
    """The texts with one of the roles, int64 [P]."""
    return torch.from_numpy(np.flatnonzero(np.isin(texts.roles_T, roles))).to(where)


class PreferenceObjective:
    """DPO and its family on pairs; a step's loss is the mean over its pairs.

    live: the model that references come from at each step (without its adapters if it is the trained one); None where
    they come with the data, or are 0.
    """

    metric_names = (
        "rewards/chosen",
        "rewards/rejected",
        "rewards/margins",
        "rewards/accuracies",
        "logps/chosen",
        "logps/rejected",
        "tokens/chosen",
        "tokens/rejected",
    )

    def __init__(self, options: PreferenceConfig, world: World, live: Model | None) -> None:
        self.options, self.world, self.live = options, world, live

    def begin_step(self, model: Model, batches: Sequence[Batch], world: World) -> None:
        """Ask the live model for references, if there is one."""
        if self.live is not None:
            answers = ask(self.live, batches, world, adapters=self.live is not model)
            for batch, logps_T in zip(batches, answers, strict=False):
                assert batch.texts is not None
                batch.texts.references_T = logps_T

    def share(self, losses_BS: Tensor, batch: Batch, step_weight: float) -> LossOutput:
        """See :class:`~megatron_steel.objective.language.Objective`."""
        from megatron_steel.objective.preference import preference_loss

        texts = batch.texts
        assert texts is not None
        logps_T = text_logps(losses_BS, batch, self.world.context_group)
        chosen = numbers(texts, [Role.CHOSEN], logps_T.device)
        policy = (logps_T[chosen], logps_T[chosen + 1])
        reference = (texts.references_T[chosen], texts.references_T[chosen + 1])
        counts = (texts.counts_T[chosen], texts.counts_T[chosen + 1])
        losses_P, good_P, bad_P = preference_loss(self.options, policy, reference, counts)
        margins = good_P - bad_P
        metrics = (good_P, bad_P, margins, (margins > 0).float(), *policy, *counts)
        rows = len(batch.sources_B)
        reported = report(losses_P, metrics, texts, chosen, self.world, rows)
        return losses_P.sum() / step_weight, torch.zeros((), dtype=torch.int), reported
