"""Training on rewards of groups of sampled answers (GRPO): what a step makes of the log-probabilities of tokens.

Shapes: B rows (answers) and S tokens of a micro-batch, N tokens of its answers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_steel.config.preference_schema import PreferenceConfig
from megatron_steel.data.batch import Batch
from megatron_steel.model.build import Model
from megatron_steel.objective.group_policy import answer_weights, group_policy_losses
from megatron_steel.objective.language import BY_SAMPLE, LossOutput, run_micro_batches
from megatron_steel.objective.preference_objective import asking
from megatron_steel.runtime.world import World


def set_temperature(model: Model, temperature: float) -> None:
    """Make the model's losses those of logits that are divided by the temperature, as sampling divides them."""
    for language_model in model.language_models():
        if language_model.post_process:
            language_model.output_layer.temperature = temperature


def token_logps(losses_BS: Tensor, batch: Batch, step_weight: float) -> LossOutput:
    """No loss, but the log-probability ``logps`` [B, S] of each label; to be run forward only."""
    logps_BS = -losses_BS.reshape(batch.loss_mask_BS.shape).float()
    return logps_BS.sum(), torch.zeros((), dtype=torch.int), {"logps": logps_BS.detach().clone()}


def ask_tokens(model: Model, batches: Sequence[Batch], adapters: bool = True) -> list[Tensor]:
    """Log-probabilities [B, S] of all labels of each micro-batch; on the last pipeline stage, elsewhere nothing."""
    with asking(model, adapters):
        outputs = run_micro_batches(model, batches, 1.0, forward_only=True, share=token_logps)
    return [output["logps"] for output in outputs]


class GroupPolicyObjective:
    """GRPO; a step's weight is the number of its answers, whatever its loss is the mean over.

    live: the model that answers are compared with (without its adapters if it is the trained one); None: none.
    """

    counted = "answers"
    watched: tuple[str, str] | None = None
    metric_names = (
        "reward",
        "reward/group_std",
        "reward/groups_of_equals",
        "tokens/answer",
        "answers/ended",
        "entropy",
        "kl",
        "clipped",
    )

    def __init__(self, options: PreferenceConfig, world: World, live: Model | None) -> None:
        self.options, self.world, self.live = options, world, live
        self.scale = torch.ones((), device=world.device)
        if live is not None:
            set_temperature(live, options.rl_default_temperature)

    def begin_step(self, model: Model, batches: Sequence[Batch], world: World) -> None:
        """Ask the reference and the policy that sampled, the first time; and count what the mean is over."""
        set_temperature(model, self.options.rl_default_temperature)
        rollouts = [batch.rollouts for batch in batches if batch.rollouts is not None]
        if self.live is not None and not rollouts[0].asked:
            for each, logps_BS in zip(rollouts, ask_tokens(self.live, batches, self.live is not model), strict=False):
                each.references_BS = logps_BS
        if self.options.grpo_iterations > 1 and not rollouts[0].asked:
            for each, logps_BS in zip(rollouts, ask_tokens(model, batches), strict=False):
                each.old_BS = logps_BS
        for each in rollouts:
            each.asked = True
        sums = torch.zeros(2, dtype=torch.float64, device=world.device)
        for batch in batches:
            _, denominators_B, present_B = self.weights(batch)
            sums += torch.stack([present_B.double().sum(), denominators_B.double().sum()])
        if world.data_size > 1:
            torch.distributed.all_reduce(sums, group=world.data_group)
        self.scale = (sums[0] / sums[1]).float()

    def weights(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Of each answer the weight of a token and its part of the denominator, and whether it is there; [B] each."""
        assert batch.rollouts is not None
        counts_B = batch.rollouts.counts_B
        tokens_B, denominators_B = answer_weights(self.options.answer_average, counts_B, self.options.max_new_tokens)
        return tokens_B, denominators_B, (counts_B > 0).float()

    def share(self, losses_BS: Tensor, batch: Batch, step_weight: float) -> LossOutput:
        """See :class:`~megatron_steel.objective.language.Objective`."""
        options, rollouts = self.options, batch.rollouts
        assert rollouts is not None
        mask_BS = batch.loss_mask_BS > 0
        row_N = mask_BS.nonzero()[:, 0]
        logps_N = -losses_BS.reshape(mask_BS.shape).float()[mask_BS]
        old_N = logps_N.detach() if rollouts.old_BS is None else rollouts.old_BS[mask_BS]
        judged = group_policy_losses(
            logps_N,
            old_N,
            None if rollouts.references_BS is None else rollouts.references_BS[mask_BS],
            rollouts.advantages_B[row_N],
            clip_low=options.grpo_clamp_eps_lower,
            clip_high=options.grpo_clamp_eps_upper,
            beta=options.beta if rollouts.references_BS is not None else 0.0,
        )
        weights_B, _, present_B = self.weights(batch)
        losses_B = losses_BS.new_zeros(len(present_B), dtype=torch.float32).index_add(
            0, row_N, judged.losses_N * (weights_B * self.scale)[row_N]
        )

        def mean(values_N: Tensor) -> Tensor:
            """Mean over the tokens of each answer, [B]."""
            sums_B = torch.zeros_like(present_B).index_add(0, row_N, values_N.detach().float())
            return sums_B / rollouts.counts_B.clamp(min=1)

        equal_B = (rollouts.deviations_B == 0).float() * present_B
        metrics = [rollouts.rewards_B, rollouts.deviations_B, equal_B, rollouts.counts_B, rollouts.stopped_B]
        metrics += [mean(-logps_N), mean(judged.divergences_N), mean(judged.clipped_N)]
        columns = (losses_B.detach().clone(), present_B, rollouts.counts_B)
        reported = dict(zip(BY_SAMPLE, columns, strict=True))
        reported["metrics"] = torch.stack([metric.double().sum() for metric in metrics])
        return losses_B.sum() / step_weight, torch.zeros((), dtype=torch.int), reported
