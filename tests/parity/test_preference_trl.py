"""Losses and rewards of preferences against those that TRL's trainers (1.16) compute from the same log-probabilities.

TRL's losses are written inside its trainers. They are run here as they are, with a model that answers with given
log-probabilities; what is compared are the loss of a batch, its gradient for each token and the rewards.
"""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from trl import DPOTrainer, GRPOTrainer, KTOTrainer, RewardTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

from megatron_steel.config.preference_schema import PreferenceConfig
from megatron_steel.objective.group_policy import answer_weights, group_policy_losses
from megatron_steel.objective.preference import Answers, Judgement, judge_pairs, kto_drift, kto_loss, reward_loss

PAIRS, LENGTH = 5, 12


class Told(torch.nn.Module):
    """A model that answers with the log-probabilities it was told."""

    is_gradient_checkpointing = False

    def __init__(self, *answers: Tensor) -> None:
        super().__init__()
        self.answers = list(answers)

    def forward(self, **inputs: Any) -> SimpleNamespace:
        logps = self.answers.pop(0)
        return SimpleNamespace(log_probs=logps, entropy=logps, mean_logits=logps, is_top1=logps > 0, logits=logps)


def trainer(model: Any, **attributes: Any) -> SimpleNamespace:
    """What a trainer's method needs of the trainer, on one process."""

    def same(tensor: Tensor, **_: Any) -> Tensor:
        return tensor

    one = SimpleNamespace(device=torch.device("cpu"), gather=same, gather_for_metrics=same, reduce=same)
    return SimpleNamespace(
        accelerator=one,
        model=model,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None, delta=None, center_rewards_coefficient=None),
        aux_loss_enabled=False,
        precompute_ref_logps=False,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
        **attributes,
    )


def draw(rows: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of policy and reference [rows, LENGTH - 1] and the mask of answers [rows, LENGTH]."""
    generator = torch.Generator().manual_seed(seed)
    begins = torch.randint(1, 5, (rows, 1), generator=generator)
    ends = torch.randint(6, LENGTH + 1, (rows, 1), generator=generator)
    place = torch.arange(LENGTH)
    mask = ((place >= begins) & (place < ends)).long()
    policy = -3 * torch.rand((rows, LENGTH - 1), generator=generator) * mask[:, 1:]
    reference = (policy + torch.randn(policy.shape, generator=generator)) * mask[:, 1:]
    return policy.requires_grad_(), reference, mask


def inputs(mask: Tensor, **others: Any) -> dict[str, Any]:
    return {"input_ids": torch.ones_like(mask), "attention_mask": mask, "completion_mask": mask} | others


def whole(policy: Tensor, reference: Tensor, mask: Tensor) -> Answers:
    return Answers(policy.sum(1), reference.sum(1), mask.sum(1))


def ours(options: PreferenceConfig, policy: Tensor, reference: Tensor, mask: Tensor) -> Judgement:
    chosen, rejected = (whole(*rows) for rows in zip(*(t.chunk(2) for t in (policy, reference, mask)), strict=True))
    return judge_pairs(options, chosen, rejected)


def same_loss(mine: Tensor, theirs: Tensor, leaf: Tensor) -> None:
    torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)
    gradients = [torch.autograd.grad(loss, leaf)[0] for loss in (mine, theirs)]
    assert gradients[1].abs().max() > 1e-4
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": "sigmoid", "beta": 0.2},
        {"loss_type": "sigmoid_norm", "beta": 3.0},
        {"loss_type": "robust", "beta": 0.3, "label_smoothing": 0.1},
        {"loss_type": "hinge", "beta": 0.5},
        {"loss_type": "ipo", "beta": 0.4},
    ],
    ids=lambda options: options["loss_type"],
)
def test_dpo(options: dict[str, Any], seed: int) -> None:
    policy, reference, mask = draw(2 * PAIRS, seed)
    model = Told(policy)
    theirs = trainer(
        model,
        ref_model=Told(reference),
        loss_types=[options["loss_type"]],
        loss_weights=[1.0],
        ld_alpha=None,
        f_divergence_type="reverse_kl",
        use_weighting=False,
        beta=options["beta"],
        label_smoothing=options.get("label_smoothing", 0.0),
    )
    loss = DPOTrainer._compute_loss(theirs, model, inputs(mask), False)
    mine = ours(PreferenceConfig(**options), policy, reference, mask)
    same_loss(mine.losses_P.mean(), loss, policy)
    metrics = theirs._metrics["train"]
    for name, rewards in (("chosen", mine.chosen_rewards_P), ("rejected", mine.rejected_rewards_P)):
        assert abs(rewards.mean().item() - metrics[f"rewards/{name}"][0]) < 1e-6
    right = mine.chosen_rewards_P > mine.rejected_rewards_P
    assert right.float().mean().item() == metrics["rewards/accuracies"][0]


def test_conservative_dpo_and_simpo() -> None:
    """CPO's losses take differences of log-probabilities: of ratios they are DPO's, of means SimPO's."""
    policy, reference, mask = draw(2 * PAIRS, 3)
    theirs = trainer(None, alpha=0.0, loss_type="sigmoid", beta=0.3, label_smoothing=0.2)
    losses, *rewards = CPOTrainer.cpo_loss(theirs, *(policy - reference).sum(1).chunk(2))
    mine = ours(PreferenceConfig(beta=0.3, label_smoothing=0.2), policy, reference, mask)
    torch.testing.assert_close(list(mine[1:]), rewards)
    same_loss(mine.losses_P.mean(), losses.mean(), policy)
    theirs = trainer(None, alpha=0.0, loss_type="simpo", beta=2.0, simpo_gamma=1.4, label_smoothing=0.0)
    losses, *rewards = CPOTrainer.cpo_loss(theirs, *(policy.sum(1) / mask.sum(1)).chunk(2))
    mine = ours(PreferenceConfig(loss_type="simpo", beta=2.0, simpo_gamma=1.4), policy, reference, mask)
    torch.testing.assert_close(list(mine[1:]), rewards)
    same_loss(mine.losses_P.mean(), losses.mean(), policy)


def test_orpo() -> None:
    policy, reference, mask = draw(2 * PAIRS, 4)
    means = (policy.sum(1) / mask.sum(1)).chunk(2)
    # Its part of likelihood is in the trainer's next function: over the prompt too there, over the answer in the paper.
    ratios, *rewards = ORPOTrainer.odds_ratio_loss(trainer(None, beta=0.25), *means)[:3]
    mine = ours(PreferenceConfig(loss_type="orpo", beta=0.25), policy, reference, mask)
    torch.testing.assert_close(list(mine[1:]), rewards)
    same_loss(mine.losses_P.mean(), (-means[0] - ratios).mean(), policy)


@pytest.mark.parametrize("labels", [[True, False, True, True, False], [True] * 5, [False] * 5], ids=str)
@pytest.mark.parametrize("drift", [0.5, -0.5])
def test_kto(labels: list[bool], drift: float) -> None:
    policy, reference, mask = draw(PAIRS, 5)
    others, others_reference, others_mask = draw(PAIRS, 6)
    others = (others_reference + drift).detach() * others_mask[:, 1:]
    model = Told(others, policy)
    theirs = trainer(
        model,
        ref_model=Told(others_reference, reference),
        calculate_KL=True,
        loss_type="kto",
        beta=0.3,
        desirable_weight=1.5,
        undesirable_weight=0.7,
    )
    theirs._compute_kl_logps = lambda *given: KTOTrainer._compute_kl_logps(theirs, *given)
    extra = {f"KL_{name}": value for name, value in inputs(others_mask).items()}
    good = torch.tensor(labels)
    loss = KTOTrainer._compute_loss(theirs, model, inputs(mask, label=good, **extra), False)
    moved = kto_drift((others - others_reference).sum(), torch.tensor(PAIRS))
    assert abs(moved.item() - theirs._metrics["train"]["kl"][0]) < 1e-6 and (moved > 0) == (drift > 0)
    options = PreferenceConfig(loss_type="kto", beta=0.3, desirable_weight=1.5, undesirable_weight=0.7)
    same_loss(kto_loss(whole(policy, reference, mask), good, moved, options).mean(), loss, policy)


def test_reward_model() -> None:
    scores = torch.randn(2 * PAIRS, 1, generator=torch.Generator().manual_seed(0)).requires_grad_()
    model = Told(scores)
    loss = RewardTrainer.compute_loss(trainer(model), model, {"attention_mask": torch.ones(2 * PAIRS, 3)})
    same_loss(reward_loss(*scores[:, 0].chunk(2)).mean(), loss, scores)


@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize(("average", "kind"), [("answer", "grpo"), ("token", "bnpo"), ("length", "dr_grpo")])
def test_grpo(average: Any, kind: str, beta: float) -> None:
    policy, reference, mask = draw(6, 8)
    mask = mask[:, 1:]
    noise = torch.randn(policy.shape, generator=torch.Generator().manual_seed(1))
    old = (policy + 0.4 * noise).detach()
    advantages = torch.tensor([1.0, -1.0, 0.5, -0.2, 0.0, 2.0])
    theirs = trainer(
        Told(),
        loss_type=kind,
        beta=beta,
        epsilon_low=0.2,
        epsilon_high=0.28,
        importance_sampling_level="token",
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=False,
        max_completion_length=LENGTH - 1,
        current_gradient_accumulation_steps=1,
        _entropy_bonus_enabled=False,
        _get_per_token_logps_and_entropies=lambda *_, **__: (policy, policy.detach(), None),
    )
    theirs.args.use_bias_correction_kl = False
    batch = {"prompt_ids": mask[:, :2], "prompt_mask": mask[:, :2], "completion_ids": mask, "completion_mask": mask}
    batch |= {"advantages": advantages, "old_per_token_logps": old, "ref_per_token_logps": reference}
    loss = GRPOTrainer._compute_loss(theirs, theirs.model, batch)
    each = group_policy_losses(
        policy, old, reference, advantages[:, None].expand_as(policy), clip_low=0.2, clip_high=0.28, beta=beta
    )
    weights, weighs = answer_weights(average, mask.sum(1), LENGTH - 1)
    same_loss((each.losses_N * mask * weights[:, None]).sum() / weighs.sum(), loss, policy)
    metrics = theirs._metrics["train"]
    clipped = (each.clipped_N * mask).sum() / mask.sum()
    assert 0 < clipped and abs(clipped.item() - metrics["clip_ratio/region_mean"][0]) < 1e-6
    if beta:
        np.testing.assert_allclose((each.divergences_N * mask).sum() / mask.sum(), metrics["kl"][0], rtol=1e-5)
