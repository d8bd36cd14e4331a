"""Prompts as rows, answers as planes, and the loss of a micro-batch of sampled answers against numpy in float64."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_steel.config.preference_schema import PreferenceConfig
from megatron_steel.data.batch import Batch, Rollouts
from megatron_steel.data.chat_formats import BadRow, RowFormat
from megatron_steel.data.prompt_dataset import PromptDataset, answer_planes
from megatron_steel.data.prompt_rows import read_prompt
from megatron_steel.objective.grpo_objective import GroupPolicyObjective
from megatron_steel.text.conversation import Prompt

TURN = {"role": "user", "content": "2 + 2?"}


@pytest.mark.parametrize(
    ("row", "roles"),
    [
        ({"prompt": "2 + 2?", "answer": "4"}, ["user"]),
        ({"prompt": [{"role": "system", "content": "Be short."}, TURN], "answer": 4}, ["system", "user"]),
        ({"prompt": [TURN, {"role": "assistant", "content": "4"}, TURN], "answer": 0}, ["user", "assistant", "user"]),
        ({"messages": [TURN], "answer": {"value": 4}}, ["user"]),
        ({"instruction": "Add.", "input": "2 + 2", "answer": False}, ["user"]),
    ],
)
def test_prompts(row: dict[str, Any], roles: list[str]) -> None:
    found = read_prompt(row, "f:1", RowFormat(), 1000)
    assert isinstance(found, Prompt)
    assert [message.role for message in found.conversation.messages] == roles
    assert found.answer == row["answer"] and found.place == "f:1"
    # The answer to be found is never part of what the model is shown.
    assert all(message.content != str(row["answer"]) for message in found.conversation.messages[-1:])


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "2 + 2?"}, "missing key: the row has no 'answer'"),
        ({"prompt": "2 + 2?", "answer": None}, "missing key: the row has no 'answer'"),
        ({"answer": "4"}, "missing key: the row has no 'prompt'"),
        ({"prompt": "", "answer": "4"}, "empty prompt"),
        ({"prompt": [TURN, {"role": "assistant", "content": "4"}], "answer": "4"}, "answered prompt: the last turn"),
        ({"prompt": "x" * 2000, "answer": "4"}, "long turn"),
        (["2 + 2?", "4"], "wrong type: the row must be an object"),
    ],
)
def test_bad_prompts(row: Any, reason: str) -> None:
    found = read_prompt(row, "f:1", RowFormat(), 1000)
    assert isinstance(found, BadRow) and found.reason.startswith(reason)


def test_planes() -> None:
    """Only tokens of the answer are predicted: the first one at the last token of the prompt."""
    tokens, labels, weights, positions = answer_planes([5, 6, 7], [8, 9])
    assert tokens.tolist() == [5, 6, 7, 8, 9] and positions.tolist() == [0, 1, 2, 3, 4]
    assert labels.tolist() == [-1, -1, 8, 9, -1]
    assert weights.view(np.float32).tolist() == [0, 0, 1, 1, 0]


def test_dataset() -> None:
    data = PromptDataset("set", [([1, 2], "a"), ([1, 2, 3, 4], "b")], "content", 16, 6, 4)
    assert len(data) == 2 and data.mean_tokens == 4 * (3 + 6)
    assert data.longest(5) == [(10, 1), (8, 0)]
    assert data.read(1, 0).shape == (4, 10) and (data.read(1, 0)[1] >= 0).sum() == 6
    with pytest.raises(ValueError, match="set: holds no prompt"):
        PromptDataset("set", [], "content", 16, 6, 4)


COUNTS = np.array([3, 1, 0, 4])


def make_batch(rng: np.random.Generator, old: bool, references: bool) -> Batch:
    """Four rows, one of them without an answer."""
    rows, length = len(COUNTS), 6
    mask = np.zeros((rows, length), dtype=np.float32)
    for row, count in enumerate(COUNTS):
        mask[row, 1 : 1 + count] = 1

    def tensor(values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values.astype(np.float32))

    present = (COUNTS > 0).astype(float)
    return Batch(
        tokens_BS=torch.zeros(rows, length, dtype=torch.int64),
        labels_BS=torch.zeros(rows, length, dtype=torch.int64),
        loss_mask_BS=torch.from_numpy(mask),
        position_ids_BS=torch.zeros(rows, length, dtype=torch.int64),
        sources_B=np.zeros(rows, dtype=np.int64),
        valid_tokens=int(COUNTS.sum()),
        rollouts=Rollouts(
            advantages_B=tensor(rng.normal(size=rows) * present),
            rewards_B=tensor(rng.random(rows) * present),
            deviations_B=tensor(np.array([0.5, 0.5, 0.0, 0.0])),
            stopped_B=tensor(np.array([1.0, 0.0, 0.0, 1.0])),
            counts_B=tensor(COUNTS),
            old_BS=tensor(-rng.random((rows, length)) * 3) if old else None,
            references_BS=tensor(-rng.random((rows, length)) * 3) if references else None,
        ),
    )


@pytest.mark.parametrize("average", ["answer", "token", "length"])
@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_loss(average: Any, old: bool, beta: float) -> None:
    """Loss, gradient and what is reported of one micro-batch, token by token."""
    rng = np.random.default_rng(0)
    options = PreferenceConfig(
        loss_type="grpo", beta=beta, answer_average=average, max_new_tokens=5, grpo_clamp_eps_upper=0.4
    )
    world: Any = SimpleNamespace(device=torch.device("cpu"), data_size=1)
    objective, batch = GroupPolicyObjective(options, world, None), make_batch(rng, old, beta > 0)
    model: Any = SimpleNamespace(language_models=lambda: [])
    objective.begin_step(model, [batch], world)
    losses = torch.from_numpy(rng.random(batch.loss_mask_BS.shape).astype(np.float32) * 3).requires_grad_()
    total, _, report = objective.share(losses, batch, 3.0)
    total.backward()

    rollouts = batch.rollouts
    assert rollouts is not None and losses.grad is not None
    weights = {"answer": lambda n: 1 / n / 3, "token": lambda n: 1 / 8, "length": lambda n: 1 / 5 / 3}[average]
    wanted, kl, clipped, gradient = 0.0, 0.0, 0.0, np.zeros(losses.shape)
    for row, count in enumerate(COUNTS):
        advantage = float(rollouts.advantages_B[row])
        for at in range(1, 1 + count):
            logp = -float(losses[row, at].detach())
            ratio = np.exp(logp - float(rollouts.old_BS[row, at])) if rollouts.old_BS is not None else 1.0
            bounded = np.clip(ratio, 0.8, 1.4)
            loss = -min(ratio * advantage, bounded * advantage)
            cut = ratio * advantage > bounded * advantage
            slope = 0.0 if cut else ratio * advantage
            if rollouts.references_BS is not None:
                away = float(rollouts.references_BS[row, at]) - logp
                loss += beta * (np.exp(away) - 1 - away)
                slope -= beta * (1 - np.exp(away))
                kl += (np.exp(away) - 1 - away) / count
            wanted += weights(count) * loss
            gradient[row, at] = weights(count) * slope
            clipped += cut / count
    assert total.item() == pytest.approx(wanted, rel=1e-5, abs=1e-6)
    np.testing.assert_allclose(losses.grad.numpy(), gradient, rtol=1e-4, atol=1e-6)
    metrics = dict(zip(objective.metric_names, report["metrics"].tolist(), strict=True))
    assert metrics["reward"] == pytest.approx(float(rollouts.rewards_B.sum()))
    assert metrics["reward/group_std"] == 1.0 and metrics["reward/groups_of_equals"] == 1.0
    assert metrics["tokens/answer"] == 8.0 and metrics["answers/ended"] == 2.0
    assert metrics["kl"] == pytest.approx(kl, rel=1e-4) and metrics["clipped"] == pytest.approx(clipped)
    assert report["weight_by_sample"].tolist() == [1, 1, 0, 1]
    assert float(report["loss_by_sample"].sum()) == pytest.approx(3 * wanted, rel=1e-5, abs=1e-6)
