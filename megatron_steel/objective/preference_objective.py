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
from megatron_steel.model.mean_logits import MeanLogits
from megatron_steel.objective.language import BY_SAMPLE, LossOutput, run_micro_batches, sum_over_ranks
from megatron_steel.objective.preference import Answers, judge_pairs, kto_drift, kto_loss, reward_loss
from megatron_steel.objective.texts import TextLogps, text_logps, text_scores, text_sums
from megatron_steel.runtime.device import upload
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
    row_P = upload(torch.from_numpy(texts.rows_T), losses_P.device)[units]
    ones = torch.ones_like(losses_P)
    columns = (losses_P.detach(), ones, texts.counts_T[units])
    by_row = [losses_P.new_zeros(rows).index_add(0, row_P, column * share) for column in columns]
    metrics = [metric.detach().double().sum() * share for metric in metrics_PK]
    return dict(zip(BY_SAMPLE, by_row, strict=True)) | {"metrics": torch.stack(metrics)}


def numbers(texts: Texts, roles: Sequence[Role], where: torch.device) -> Tensor:
    """The texts with one of the roles, int64 [P]."""
    return upload(torch.from_numpy(np.flatnonzero(np.isin(texts.roles_T, roles))), where)


class PreferenceObjective:
    """DPO and its family on pairs; a step's loss is the mean over its pairs.

    live: the model that references come from at each step (without its adapters if it is the trained one); None where
    they come with the data, or are 0.
    """

    counted = "pairs"
    metric_names = (
        "rewards/chosen",
        "rewards/rejected",
        "rewards/margins",
        "rewards/accuracies",
        "logps/chosen",
        "logps/rejected",
        "logratios/chosen",
        "logratios/rejected",
        "logits/chosen",
        "logits/rejected",
        "tokens/chosen",
        "tokens/rejected",
    )
    watched: tuple[str, str] | None = ("rewards/chosen", "rewards/rejected")

    def __init__(self, options: PreferenceConfig, world: World, model: Model, live: Model | None) -> None:
        self.options, self.world, self.live = options, world, live
        self.logits = MeanLogits(model)

    def begin_step(self, model: Model, batches: Sequence[Batch], world: World) -> None:
        """Ask the live model for references, if there is one."""
        if self.live is not None:
            answers = ask(self.live, batches, world, adapters=self.live is not model)
            for batch, logps_T in zip(batches, answers, strict=False):
                assert batch.texts is not None
                batch.texts.references_T = logps_T

    def share(self, losses_BS: Tensor, batch: Batch, step_weight: float) -> LossOutput:
        """See :class:`~megatron_steel.objective.language.Objective`."""
        texts = batch.texts
        assert texts is not None
        logps_T = text_logps(losses_BS, batch, self.world.context_group)
        units = numbers(texts, [Role.CHOSEN], logps_T.device)
        chosen, rejected = answers(logps_T, texts, units), answers(logps_T, texts, units + 1)
        losses_P, good_P, bad_P = judge_pairs(self.options, chosen, rejected)
        margins_P = good_P - bad_P
        metrics = (
            *(good_P, bad_P, margins_P, (margins_P > 0).float()),
            *(chosen.policy_P, rejected.policy_P, chosen.ratios_P, rejected.ratios_P),
            *self.mean_logits(batch, units, units + 1),
            *(chosen.counts_P, rejected.counts_P),
        )
        reported = report(losses_P, metrics, texts, units, self.world, len(batch.sources_B))
        return losses_P.sum() / step_weight, torch.zeros((), dtype=torch.int), reported

    def mean_logits(self, batch: Batch, *units: Tensor) -> Iterator[Tensor]:
        """Of the texts with these numbers, the mean logit over their trained tokens and the vocabulary, [P] each."""
        texts, newest_BS = batch.texts, self.logits.newest_BS
        assert texts is not None and newest_BS is not None
        sums_T = text_sums(newest_BS, batch, self.world.context_group)
        return (sums_T[numbers_P] / texts.counts_T[numbers_P] for numbers_P in units)


class JudgedObjective(PreferenceObjective):
    """KTO on judged answers.

    How far the policy has moved is estimated over all answers of the step before any is trained: the same number
    whatever the micro-batches and replicas.
    """

    metric_names = (
        "rewards/desirable",
        "rewards/undesirable",
        "rewards/margins",
        "rewards/accuracies",
        "logps/policy",
        "logps/ratio",
        "logits/policy",
        "kl",
        "tokens/answer",
    )
    watched = ("rewards/desirable", "rewards/undesirable")

    def __init__(self, options: PreferenceConfig, world: World, model: Model, live: Model | None) -> None:
        super().__init__(options, world, model, live)
        self.drift = torch.zeros((), device=world.device)

    def begin_step(self, model: Model, batches: Sequence[Batch], world: World) -> None:
        """References from the live model, if there is one; then the drift."""
        super().begin_step(model, batches, world)
        sums = torch.zeros(2, dtype=torch.float64, device=world.device)
        for batch, logps_T in zip(batches, ask(model, batches, world), strict=False):
            assert batch.texts is not None
            others = numbers(batch.texts, [Role.MISMATCHED], logps_T.device)
            ratios_P = (logps_T - batch.texts.references_T)[others].double()
            sums += torch.stack([ratios_P.sum(), ratios_P.new_full((), len(others))]) / world.context_size
        ratio, count = sum_over_ranks(world, sums)
        self.drift = kto_drift(ratio, count).float()

    def share(self, losses_BS: Tensor, batch: Batch, step_weight: float) -> LossOutput:
        """See :class:`~megatron_steel.objective.language.Objective`."""
        texts = batch.texts
        assert texts is not None
        logps_T = text_logps(losses_BS, batch, self.world.context_group)
        units = numbers(texts, [Role.DESIRABLE, Role.UNDESIRABLE], logps_T.device)
        own = answers(logps_T, texts, units)
        good_P = upload(torch.from_numpy(texts.roles_T == Role.DESIRABLE), units.device)[units]
        losses_P = kto_loss(own, good_P, self.drift, self.options)
        rewards_P = self.options.beta * own.ratios_P.detach()
        signed_P = torch.where(good_P, rewards_P, -rewards_P)
        desirable_P, undesirable_P = rewards_P * good_P, rewards_P * ~good_P
        right_P = (signed_P > self.options.beta * torch.where(good_P, self.drift, -self.drift)).float()
        metrics = (
            *(desirable_P, undesirable_P, signed_P, right_P),
            *(own.policy_P, own.ratios_P, *self.mean_logits(batch, units)),
            *(self.drift.expand_as(rewards_P), own.counts_P),
        )
        reported = report(losses_P, metrics, texts, units, self.world, len(batch.sources_B))
        return losses_P.sum() / step_weight, torch.zeros((), dtype=torch.int), reported


class ScoreObjective(PreferenceObjective):
    """A reward model: the chosen answer of a pair is to have the higher score (Bradley-Terry)."""

    metric_names = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")
    watched = None

    def share(self, losses_BS: Tensor, batch: Batch, step_weight: float) -> LossOutput:
        """See :class:`~megatron_steel.objective.language.Objective`; the model's output are scores of tokens."""
        texts = batch.texts
        assert texts is not None
        scores_T = text_scores(losses_BS, batch, self.world.context_group)
        units = numbers(texts, [Role.CHOSEN], scores_T.device)
        good_P, bad_P = scores_T[units], scores_T[units + 1]
        losses_P = reward_loss(good_P, bad_P)
        metrics = (good_P, bad_P, good_P - bad_P, (good_P > bad_P).float())
        reported = report(losses_P, metrics, texts, units, self.world, len(batch.sources_B))
        return losses_P.sum() / step_weight, torch.zeros((), dtype=torch.int), reported


def answers(logps_T: Tensor, texts: Texts, numbers_P: Tensor) -> Answers:
    """The texts of these numbers with what losses need of them."""
    return Answers(logps_T[numbers_P], texts.references_T[numbers_P], texts.counts_T[numbers_P])
