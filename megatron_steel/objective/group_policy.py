"""Losses of reinforcement learning on groups of answers (GRPO) as functions of log-probabilities of tokens.

Shapes: N tokens of answers, whatever their rows; T answers; G groups of K answers to one prompt each.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Average = Literal["answer", "token", "length"]
"""What a step's loss is the mean over: answers of means over their tokens, all tokens, or places for tokens."""
# e^20 times more probable is beyond any step of use; further apart, float32 would overflow.
FURTHEST = 20.0
# Keeps the advantages of a group whose rewards hardly differ from being blown up.
SMALLEST_DEVIATION = 1e-4


class TokenLosses(NamedTuple):
    """Of each token [N]: its loss, its divergence from the reference, and whether its ratio was clipped (bool).

    Only the losses have a gradient.
    """

    losses_N: Tensor
    divergences_N: Tensor
    clipped_N: Tensor


def group_advantages(rewards_GK: Tensor, scaled: bool = True) -> Tensor:
    """How much better each answer is than the mean of its group, [G, K]; the mean of each group is 0.

    scaled: divided by the group's standard deviation (DeepSeekMath: Shao et al. 2024, arXiv:2402.03300, section 4.1.2),
    with K - 1 in the denominator and 1e-4 added to it, as in TRL. Not scaled, prompts that nearly all answers solve, or
    nearly none, do not count more than others (Dr. GRPO: Liu et al. 2025, arXiv:2503.20783). A group of equal rewards
    has advantages of 0. Raises ``ValueError`` for groups of one answer, which compare with nothing, and for rewards
    that are no numbers.
    """
    if rewards_GK.shape[1] < 2:
        raise ValueError(f"a group needs 2 answers or more to compare, not {rewards_GK.shape[1]}")
    if not rewards_GK.isfinite().all():
        raise ValueError("a reward is not a finite number: rewards of a group must be")
    # In float32 the mean of equal rewards is off by a rounding error, which the division would make visible.
    rewards_GK, kind = rewards_GK.double(), rewards_GK.dtype
    advantages_GK = rewards_GK - rewards_GK.mean(1, keepdim=True)
    if scaled:
        advantages_GK = advantages_GK / (rewards_GK.std(1, keepdim=True) + SMALLEST_DEVIATION)
    return advantages_GK.to(kind)


def k3_divergence(logps_N: Tensor, reference_N: Tensor) -> Tensor:
    """r - log r - 1 >= 0 with r = reference / policy at a sampled token.

    Its mean over the policy's samples is KL(policy || reference) (DeepSeekMath, eq. 4; Schulman 2020, "Approximating KL
    Divergence", k3). r stops at e^20.
    """
    difference_N = (reference_N - logps_N).clamp(max=FURTHEST)
    # exp(x) - 1 loses what is left after cancellation where the two models are close, which is nearly everywhere.
    return torch.expm1(difference_N) - difference_N


def clipped_losses(
    logps_N: Tensor, old_N: Tensor, advantages_N: Tensor, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor]:
    """-min(ratio A, clip(ratio, 1 - low, 1 + high) A) and whether the clip decided, [N] each.

    PPO: Schulman et al. 2017, arXiv:1707.06347, eq. 7; two bounds: DAPO, Yu et al. 2025, arXiv:2503.14476. ratio is
    policy over the policy that sampled (``old_N``, without gradient); if they are the same, the gradient is that of
    -A log policy. A clipped token has none. The ratio stays within e^-20 and e^20.
    """
    ratio_N = torch.exp((logps_N - old_N).clamp(-FURTHEST, FURTHEST))
    bounded_N = ratio_N.clamp(1 - clip_low, 1 + clip_high)
    losses_N = -torch.minimum(ratio_N * advantages_N, bounded_N * advantages_N)
    above_N = (ratio_N > 1 + clip_high) & (advantages_N > 0)
    below_N = (ratio_N < 1 - clip_low) & (advantages_N < 0)
    return losses_N, above_N | below_N


def group_policy_losses(
    logps_N: Tensor,
    old_N: Tensor,
    reference_N: Tensor | None,
    advantages_N: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    beta: float = 0.0,
) -> TokenLosses:
    """Clipped losses + ``beta`` times the divergence from the reference (DeepSeekMath, eq. 3, before its means).

    reference_N: None where there is none: then the divergence is 0 and ``beta`` must be. With ``beta`` 0 a reference is
    only reported.
    """
    assert reference_N is not None or beta == 0
    losses_N, clipped_N = clipped_losses(logps_N, old_N, advantages_N, clip_low, clip_high)
    if reference_N is None:
        return TokenLosses(losses_N, torch.zeros_like(logps_N), clipped_N)
    divergences_N = k3_divergence(logps_N, reference_N)
    if beta:
        losses_N = losses_N + beta * divergences_N
    return TokenLosses(losses_N, divergences_N.detach(), clipped_N)


def answer_weights(average: Average, counts_T: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """Weight of each token of an answer and of the answer in the step's denominator, float32 [T] each.

    A step's loss is sum(first x losses of tokens) / sum(second), over all its micro-batches and replicas. ``answer``:
    the mean over answers of the mean over their tokens (DeepSeekMath, eq. 3); ``token``: the mean over tokens (DAPO,
    eq. 8); ``length``: each answer over ``longest``, the most tokens one may have, so that long wrong answers are not
    spared (Dr. GRPO). Answers without tokens weigh nothing.
    """
    counts_T = counts_T.float()
    present_T = (counts_T > 0).float()
    match average:
        case "answer":
            return present_T / counts_T.clamp(min=1), present_T
        case "token":
            return present_T, counts_T
        case "length":
            return present_T / longest, present_T
        case other:
            raise ValueError(f"a step's loss is a mean over answer, token or length, not {other}")
