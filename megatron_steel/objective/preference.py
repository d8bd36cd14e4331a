"""Losses of preferences as functions of log-probabilities of whole answers.

Shapes: P pairs, or judged answers. Log-probabilities are sums over an answer's tokens, nats; counts are its tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_steel.config.preference_schema import PreferenceConfig


class Answers(NamedTuple):
    """Answers of one kind: log-probabilities of the policy and of the reference, and counts of tokens, [P] each."""

    policy_P: Tensor
    reference_P: Tensor
    counts_P: Tensor

    @property
    def ratios_P(self) -> Tensor:
        """log of policy over reference."""
        return self.policy_P - self.reference_P

    @property
    def mean_ratios_P(self) -> Tensor:
        """log of policy over reference per token."""
        return self.ratios_P / self.counts_P

    @property
    def means_P(self) -> Tensor:
        """Log-probability per token of the policy."""
        return self.policy_P / self.counts_P


class Judgement(NamedTuple):
    """What a loss makes of answers: losses and implicit rewards, [P] each; the rewards have no gradient."""

    losses_P: Tensor
    chosen_rewards_P: Tensor
    rejected_rewards_P: Tensor


def sigmoid_loss(margins_P: Tensor, label_smoothing: float) -> Tensor:
    """-log sigmoid of the margin of rewards (DPO: Rafailov et al. 2023, arXiv:2305.18290, eq. 7).

    With label smoothing, the expected loss when that share of pairs is the wrong way round (conservative DPO:
    Mitchell 2023, eq. 3).
    """
    right = -F.logsigmoid(margins_P)
    return right if not label_smoothing else torch.lerp(right, -F.logsigmoid(-margins_P), label_smoothing)


def normalized_loss(chosen: Answers, rejected: Answers, beta: float) -> Tensor:
    """-log sigmoid(beta x difference of mean log-ratios): long answers do not have the larger margins.

    Length-normalized DPO: Lambert et al. 2024 (Tulu 3), arXiv:2411.15124, section 5.
    """
    return -F.logsigmoid(beta * (chosen.mean_ratios_P - rejected.mean_ratios_P))


def robust_loss(margins_P: Tensor, label_smoothing: float) -> Tensor:
    """An unbiased estimate of the loss without flipped pairs.

    Robust DPO: Chowdhury et al. 2024, arXiv:2403.00409, eq. 12.
    """
    right, wrong = -F.logsigmoid(margins_P), -F.logsigmoid(-margins_P)
    return ((1 - label_smoothing) * right - label_smoothing * wrong) / (1 - 2 * label_smoothing)


def hinge_loss(margins_P: Tensor) -> Tensor:
    """max(0, 1 - margin): SLiC, Zhao et al. 2023, arXiv:2305.10425; as a DPO loss Liu et al. 2024, arXiv:2309.06657."""
    return F.relu(1 - margins_P)


def ipo_loss(chosen: Answers, rejected: Answers, beta: float) -> Tensor:
    """(difference of mean log-ratios - 1 / (2 beta))^2 (IPO: Azar et al. 2023, arXiv:2310.12036, eq. 17).

    Ratios are means over tokens, as in the authors' experiments and in TRL.
    """
    return (chosen.mean_ratios_P - rejected.mean_ratios_P - 1 / (2 * beta)).square()


def log_odds(means_P: Tensor) -> Tensor:
    """log(p / (1 - p)) of the mean probability p = exp(means) of a token, without leaving the logarithm."""
    # log(1 - exp(x)) has no gradient to speak of at x = 0, where p is 1.
    means_P = means_P.clamp(max=-1e-7)
    return means_P - torch.log(-torch.expm1(means_P))


def orpo_loss(chosen: Answers, rejected: Answers, beta: float) -> Tensor:
    """Mean negative log-likelihood of the chosen answer - beta log sigmoid(log odds ratio).

    ORPO: Hong et al. 2024, arXiv:2403.07691, eq. 4 to 7; beta is the paper's lambda.
    """
    ratio_P = log_odds(chosen.means_P) - log_odds(rejected.means_P)
    return -chosen.means_P - beta * F.logsigmoid(ratio_P)


def simpo_loss(chosen: Answers, rejected: Answers, beta: float, gamma: float) -> Tensor:
    """-log sigmoid(beta (difference of mean log-probabilities) - gamma).

    SimPO: Meng et al. 2024, arXiv:2405.14734, eq. 6.
    """
    return -F.logsigmoid(beta * (chosen.means_P - rejected.means_P) - gamma)


def kto_loss(answers: Answers, desirable_P: Tensor, drift: Tensor, options: PreferenceConfig) -> Tensor:
    """Weight x (1 - sigmoid(+-beta (log-ratio - drift))) (KTO: Ethayarajh et al. 2024, arXiv:2402.01306, eq. 8).

    desirable_P: bool. drift: the paper's z_0 >= 0, a number without gradient: see :func:`kto_drift`.
    """
    sign_P = torch.where(desirable_P, 1.0, -1.0)
    weight_P = torch.where(desirable_P, options.desirable_weight, options.undesirable_weight)
    return weight_P * torch.sigmoid(-sign_P * options.beta * (answers.ratios_P - drift))


def kto_drift(ratio_sum: Tensor, count: Tensor) -> Tensor:
    """max(0, mean log-ratio of answers beside prompts of other answers): how far the policy has moved."""
    return (ratio_sum / count.clamp(min=1)).clamp(min=0)


def reward_loss(chosen_P: Tensor, rejected_P: Tensor) -> Tensor:
    """-log sigmoid(difference of scores) (Bradley and Terry 1952; Ouyang et al. 2022, arXiv:2203.02155, eq. 1)."""
    return -F.logsigmoid(chosen_P - rejected_P)


def judge_pairs(options: PreferenceConfig, chosen: Answers, rejected: Answers) -> Judgement:
    """Loss and implicit rewards of pairs under the options' loss, with its term of likelihood.

    Rewards are beta times log-ratios of whole answers, or for losses without a reference mean log-probabilities. Raises
    ``ValueError`` for a loss that is not one of pairs.
    """
    beta = options.beta
    good_P, bad_P = beta * chosen.ratios_P, beta * rejected.ratios_P
    match options.loss_type:
        case "sigmoid":
            losses_P = sigmoid_loss(good_P - bad_P, options.label_smoothing)
        case "sigmoid_norm":
            losses_P = normalized_loss(chosen, rejected, beta)
        case "robust":
            losses_P = robust_loss(good_P - bad_P, options.label_smoothing)
        case "hinge":
            losses_P = hinge_loss(good_P - bad_P)
        case "ipo":
            losses_P = ipo_loss(chosen, rejected, beta)
        case "orpo":
            losses_P = orpo_loss(chosen, rejected, beta)
            good_P, bad_P = beta * chosen.means_P, beta * rejected.means_P
        case "simpo":
            losses_P = simpo_loss(chosen, rejected, beta, options.simpo_gamma)
            good_P, bad_P = beta * chosen.means_P, beta * rejected.means_P
        case other:
            raise ValueError(f"--loss-type {other} is not one of pairs with log-probabilities")
    if options.rpo_alpha:
        # RPO: Pang et al. 2024, arXiv:2404.19733, eq. 1: the mean over the tokens of the chosen answer.
        losses_P = losses_P - options.rpo_alpha * chosen.means_P
    return Judgement(losses_P, good_P.detach(), bad_P.detach())
