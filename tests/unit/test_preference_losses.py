"""Losses of preferences against formulas in float64, and at the places where they are known."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_steel.config.preference_schema import PreferenceConfig
from megatron_steel.objective.preference import (
    Answers,
    judge_pairs,
    kto_drift,
    kto_loss,
    log_odds,
    reward_loss,
)

Array = np.ndarray


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def formula(options: PreferenceConfig, pc: Array, pr: Array, rc: Array, rr: Array, nc: Array, nr: Array) -> Array:
    """The papers' formulas, written without care for large numbers."""
    h = options.beta * ((pc - rc) - (pr - rr))
    eps = options.label_smoothing
    match options.loss_type:
        case "sigmoid":
            loss = -(1 - eps) * np.log(sigmoid(h)) - eps * np.log(sigmoid(-h))
        case "sigmoid_norm":
            loss = -np.log(sigmoid(options.beta * ((pc - rc) / nc - (pr - rr) / nr)))
        case "robust":
            loss = (-(1 - eps) * np.log(sigmoid(h)) + eps * np.log(sigmoid(-h))) / (1 - 2 * eps)
        case "hinge":
            loss = np.maximum(0, 1 - h)
        case "ipo":
            loss = ((pc - rc) / nc - (pr - rr) / nr - 1 / (2 * options.beta)) ** 2
        case "orpo":
            odds_c, odds_r = (np.exp(p / n) / (1 - np.exp(p / n)) for p, n in ((pc, nc), (pr, nr)))
            loss = -pc / nc - options.beta * np.log(sigmoid(np.log(odds_c / odds_r)))
        case "simpo":
            loss = -np.log(sigmoid(options.beta * (pc / nc - pr / nr) - options.simpo_gamma))
    return loss - options.rpo_alpha * pc / nc


CASES: list[dict[str, Any]] = [
    {"loss_type": "sigmoid"},
    {"loss_type": "sigmoid", "label_smoothing": 0.2, "beta": 0.5},
    {"loss_type": "sigmoid", "rpo_alpha": 0.7},
    {"loss_type": "sigmoid_norm", "beta": 5.0},
    {"loss_type": "robust", "label_smoothing": 0.1},
    {"loss_type": "hinge", "beta": 0.3},
    {"loss_type": "ipo", "beta": 0.2},
    {"loss_type": "orpo", "beta": 0.25},
    {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.2},
    {"loss_type": "simpo", "beta": 2.0, "rpo_alpha": 0.1},
]


def draw(seed: int, pairs: int = 6) -> list[Array]:
    """Log-probabilities and counts as of real answers."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, 30, (2, pairs)).astype(float)
    policy = -rng.uniform(0.05, 3.0, (2, pairs)) * counts
    reference = policy + rng.normal(0, 2, (2, pairs))
    return [*policy, *reference, *counts]


def judge(options: PreferenceConfig, values: list[Array], kind: torch.dtype = torch.float64) -> Any:
    pc, pr, rc, rr, nc, nr = (torch.tensor(value, dtype=kind) for value in values)
    return judge_pairs(options, Answers(pc, rc, nc), Answers(pr, rr, nr))


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_losses_are_the_papers(case: dict[str, Any], seed: int) -> None:
    options, values = PreferenceConfig(**case), draw(seed)
    wanted = formula(options, *values)
    np.testing.assert_allclose(judge(options, values).losses_P.numpy(), wanted, rtol=1e-10)
    np.testing.assert_allclose(judge(options, values, torch.float32).losses_P.numpy(), wanted, rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_are_those_of_the_formula(case: dict[str, Any]) -> None:
    options, values = PreferenceConfig(**case), draw(7)
    policy = [torch.tensor(value, requires_grad=True) for value in values[:2]]
    rest = [torch.tensor(value) for value in values[2:]]
    judged = judge_pairs(options, Answers(policy[0], rest[0], rest[2]), Answers(policy[1], rest[1], rest[3]))
    judged.losses_P.sum().backward()
    for index, tensor in enumerate(policy):
        for pair in range(len(values[0])):
            step = 1e-6
            moved = [[value.copy() for value in values] for _ in range(2)]
            moved[0][index][pair] += step
            moved[1][index][pair] -= step
            up, down = (formula(options, *value)[pair] for value in moved)
            assert tensor.grad is not None
            assert math.isclose(tensor.grad[pair].item(), (up - down) / (2 * step), rel_tol=1e-5, abs_tol=1e-8)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_at_the_reference(smoothing: float) -> None:
    """Before the first step: sigmoid loss is ln 2 and rewards are 0; the gradient is beta / 2 (1 - 2 smoothing)."""
    values = draw(1)
    values[2:4] = values[:2]
    judged = judge(PreferenceConfig(label_smoothing=smoothing), values)
    np.testing.assert_allclose(judged.losses_P.numpy(), math.log(2), rtol=1e-12)
    assert not judged.chosen_rewards_P.any() and not judged.rejected_rewards_P.any()


def test_rewards_are_what_is_compared() -> None:
    values = draw(2)
    judged = judge(PreferenceConfig(beta=0.5), values)
    np.testing.assert_allclose(judged.chosen_rewards_P, 0.5 * (values[0] - values[2]))
    judged = judge(PreferenceConfig(loss_type="simpo", beta=2.0), values)
    np.testing.assert_allclose(judged.rejected_rewards_P, 2.0 * values[1] / values[5])
    assert not judged.rejected_rewards_P.requires_grad


@given(scale=st.sampled_from([1.0, 1e2, 1e4]), seed=st.integers(0, 50))
def test_extreme_answers_stay_finite(scale: float, seed: int) -> None:
    values = draw(seed)
    values[:4] = [value * scale for value in values[:4]]
    for case in CASES:
        policy = [torch.tensor(value, dtype=torch.float32, requires_grad=True) for value in values[:2]]
        rest = [torch.tensor(value, dtype=torch.float32) for value in values[2:]]
        judged = judge_pairs(
            PreferenceConfig(**case), Answers(policy[0], rest[0], rest[2]), Answers(policy[1], rest[1], rest[3])
        )
        judged.losses_P.sum().backward()
        assert judged.losses_P.isfinite().all()
        assert all(tensor.grad is not None and tensor.grad.isfinite().all() for tensor in policy)


def test_certain_answers_have_finite_odds() -> None:
    certain = torch.zeros(1, requires_grad=True)
    log_odds(certain).sum().backward()
    assert log_odds(certain).isfinite().all() and certain.grad is not None and certain.grad.isfinite().all()


@pytest.mark.parametrize("good", [[True] * 6, [False] * 6, [True, False, True, False, True, True]])
def test_kto(good: list[bool]) -> None:
    """Also when all answers are good: the drift comes from mismatched ones."""
    policy, _, reference, _, counts, _ = draw(3)
    options = PreferenceConfig(loss_type="kto", beta=0.3, desirable_weight=1.5, undesirable_weight=0.5)
    drift = kto_drift(torch.tensor(4.2), torch.tensor(6.0))
    assert math.isclose(drift.item(), 0.7, rel_tol=1e-6)
    own = Answers(*(torch.tensor(value) for value in (policy, reference, counts)))
    found = kto_loss(own, torch.tensor(good), drift, options)
    ratio = policy - reference
    right, wrong = 1.5 * (1 - sigmoid(0.3 * (ratio - 0.7))), 0.5 * (1 - sigmoid(0.3 * (0.7 - ratio)))
    np.testing.assert_allclose(found.numpy(), np.where(good, right, wrong), rtol=1e-6)


def test_drift_is_never_negative() -> None:
    assert kto_drift(torch.tensor(-3.0), torch.tensor(2.0)) == 0 == kto_drift(torch.tensor(0.0), torch.tensor(0.0))


def test_reward_model() -> None:
    chosen, rejected = torch.tensor([2.0, -1.0]), torch.tensor([0.5, 3.0])
    wanted = [-math.log(1 / (1 + math.exp(-difference))) for difference in (1.5, -4.0)]
    np.testing.assert_allclose(reward_loss(chosen, rejected).numpy(), wanted, rtol=1e-6)


def test_other_kinds_are_refused() -> None:
    with pytest.raises(ValueError, match="--loss-type kto is not one of pairs"):
        judge(PreferenceConfig(loss_type="kto"), draw(0))
