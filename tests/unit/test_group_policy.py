"""GRPO's losses against formulas in float64, and at the places where they are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_steel.objective.group_policy import (
    answer_weights,
    clipped_losses,
    group_advantages,
    group_policy_losses,
    k3_divergence,
)

REWARDS = st.integers(2, 8).flatmap(
    lambda size: st.lists(
        st.lists(st.sampled_from([0.0, 0.1, 0.3, 1.0, -2.5]), min_size=size, max_size=size), min_size=1, max_size=5
    )
)


def draw(seed: int, tokens: int = 40) -> tuple[np.ndarray, ...]:
    """Log-probabilities of policy, sampler and reference, and advantages, of tokens some of which are clipped."""
    rng = np.random.default_rng(seed)
    policy = -rng.uniform(0.01, 4.0, tokens)
    return policy, policy + rng.normal(0, 0.3, tokens), policy + rng.normal(0, 0.5, tokens), rng.normal(0, 1, tokens)


def formula(policy: np.ndarray, old: np.ndarray, reference: np.ndarray, advantages: np.ndarray) -> np.ndarray:
    """DeepSeekMath, eq. 3 and 4, one token at a time, with bounds 0.8 and 1.3 and beta 0.05."""
    losses = []
    for p, o, r, a in zip(policy, old, reference, advantages, strict=True):
        ratio = math.exp(p) / math.exp(o)
        clipped = min(max(ratio, 0.8), 1.3)
        odds = math.exp(r) / math.exp(p)
        losses.append(-min(ratio * a, clipped * a) + 0.05 * (odds - math.log(odds) - 1))
    return np.array(losses)


OPTIONS = {"clip_low": 0.2, "clip_high": 0.3, "beta": 0.05}


@pytest.mark.parametrize("seed", range(3))
def test_losses_are_the_papers(seed: int) -> None:
    values = draw(seed)
    found = group_policy_losses(*map(torch.tensor, values), **OPTIONS)
    np.testing.assert_allclose(found.losses_N.numpy(), formula(*values), rtol=1e-11)
    single = group_policy_losses(*(torch.tensor(value, dtype=torch.float32) for value in values), **OPTIONS)
    np.testing.assert_allclose(single.losses_N.numpy(), formula(*values), rtol=1e-4, atol=1e-6)
    assert 0 < found.clipped_N.sum() < len(values[0])


def test_gradients_are_those_of_the_formula() -> None:
    values = draw(5)
    policy = torch.tensor(values[0], requires_grad=True)
    found = group_policy_losses(policy, *map(torch.tensor, values[1:]), **OPTIONS)
    found.losses_N.sum().backward()
    step = 1e-6
    slopes = (formula(values[0] + step, *values[1:]) - formula(values[0] - step, *values[1:])) / (2 * step)
    np.testing.assert_allclose(policy.grad, slopes, rtol=1e-5, atol=1e-8)
    # What was clipped only feels the reference.
    alone = torch.tensor(values[0], requires_grad=True)
    clipped_losses(alone, *map(torch.tensor, (values[1], values[3])), 0.2, 0.3)[0].sum().backward()
    assert alone.grad is not None and torch.equal(alone.grad == 0, found.clipped_N)


def test_on_policy_the_gradient_is_reinforce() -> None:
    policy = torch.tensor([-0.5, -2.0, -0.1], requires_grad=True)
    advantages = torch.tensor([1.0, -0.5, 0.0])
    found = group_policy_losses(policy, policy.detach(), None, advantages)
    found.losses_N.sum().backward()
    assert torch.equal(found.losses_N, -advantages) and torch.equal(policy.grad, -advantages)
    assert not found.divergences_N.any() and not found.clipped_N.any()


def test_a_reference_without_beta_is_only_reported() -> None:
    policy, old, reference, advantages = map(torch.tensor, draw(2))
    with_it = group_policy_losses(policy, old, reference, advantages)
    without = group_policy_losses(policy, old, None, advantages)
    assert torch.equal(with_it.losses_N, without.losses_N)
    assert (with_it.divergences_N > 0).all()


def test_divergence_is_an_estimate_of_the_kl() -> None:
    """The mean over all tokens of a vocabulary, each as often as the policy says, is the KL itself."""
    torch.manual_seed(0)
    policy, reference = (torch.log_softmax(torch.randn(50, dtype=torch.float64), 0) for _ in range(2))
    estimate = (policy.exp() * k3_divergence(policy, reference)).sum()
    assert math.isclose(estimate.item(), (policy.exp() * (policy - reference)).sum().item(), rel_tol=1e-12)
    assert (k3_divergence(policy, reference) >= 0).all() and not k3_divergence(policy, policy).any()


def test_close_models_have_an_exact_divergence() -> None:
    """x^2 / 2 near 0, where exp(x) - x - 1 in float32 is noise."""
    near = torch.tensor([1e-3, -1e-3, 1e-2])
    np.testing.assert_allclose(k3_divergence(torch.zeros(3), near), near.double() ** 2 / 2, rtol=5e-3)


@given(REWARDS, st.booleans())
def test_advantages(rewards: list[list[float]], scaled: bool) -> None:
    found = group_advantages(torch.tensor(rewards), scaled)
    assert found.mean(1).abs().max() < 1e-6
    for row, group in zip(found, rewards, strict=True):
        if len(set(group)) == 1:
            assert not row.abs().gt(1e-9).any()
            continue
        # The order of a group is that of its rewards.
        assert torch.equal(torch.argsort(row, stable=True), torch.argsort(torch.tensor(group), stable=True))
        wanted = np.array(group) - np.mean(group)
        wanted = wanted / (np.std(group, ddof=1) + 1e-4) if scaled else wanted
        np.testing.assert_allclose(row, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reward", [0.1, 0.3, 0.7, 1.1])
def test_equal_rewards_teach_nothing(reward: float) -> None:
    """Also where their mean in float32 is another number."""
    for answers in range(2, 17):
        assert group_advantages(torch.full((1, answers), reward)).abs().max() < 1e-9


def test_groups_that_compare_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="2 answers or more to compare, not 1"):
        group_advantages(torch.ones(3, 1))
    with pytest.raises(ValueError, match="not a finite number"):
        group_advantages(torch.tensor([[1.0, math.nan]]))


@pytest.mark.parametrize("distance", [30.0, 1e3, 1e6])
def test_far_models_stay_finite(distance: float) -> None:
    for sign in (1, -1):
        for advantage in (1.0, -1.0):
            policy = torch.tensor([-1.0], requires_grad=True)
            other = policy.detach() + sign * distance
            found = group_policy_losses(policy, other, other, torch.tensor([advantage]), beta=0.1)
            found.losses_N.sum().backward()
            assert found.losses_N.isfinite().all() and policy.grad is not None and policy.grad.isfinite().all()


COUNTS = np.array([3, 5, 0, 4])


def test_what_a_step_is_the_mean_over() -> None:
    losses = [np.array([1.0, 2, 3]), np.array([0.5, 1, 2, 2, 1]), np.array([]), np.array([4.0, 0, 1, 1])]
    sums = np.array([loss.sum() for loss in losses])
    wanted = {
        "answer": np.mean([loss.mean() for loss in losses if len(loss)]),
        "token": np.concatenate(losses).mean(),
        "length": sums.sum() / (3 * 8),
    }
    for average, value in wanted.items():
        tokens, answers = answer_weights(average, torch.tensor(COUNTS), 8)
        assert math.isclose(float((tokens * torch.tensor(sums)).sum() / answers.sum()), value, rel_tol=1e-6), average
        # Micro-batches of a step add up to it.
        halves = [answer_weights(average, torch.tensor(COUNTS[part]), 8) for part in (slice(0, 1), slice(1, 4))]
        for whole, parts in zip((tokens, answers), zip(*halves, strict=True), strict=True):
            assert torch.equal(whole, torch.cat(parts))
    with pytest.raises(ValueError, match="answer, token or length, not sum"):
        answer_weights("sum", torch.tensor(COUNTS), 8)
