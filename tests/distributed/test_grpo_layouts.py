"""Training on rewards of sampled answers is the same on every layout, whatever the batch is cut into, and goes on."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pool import WorkerPool
from tiny_chats import chat_options, fickle_reward, write_model, write_prompts
from tiny_run import LAYOUTS, Trace, largest_relative, open_session, whole_weights, work_train

STEPS, ROWS, GROUP = 3, 4096, 4
SEEN = "reward/group_std"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_prompts(tmp_path_factory.mktemp("data") / "prompts.jsonl", 24)


def options(model: str, data: str, **changes: Any) -> dict[str, Any]:
    grpo = {
        "preferences": True, "loss_type": "grpo", "reward": "tiny_chats:fickle_reward", "grpo_group_size": GROUP,
        "max_new_tokens": 12, "micro_batch_size": 2, "global_batch_size": 4, "rl_default_temperature": 0.7,
        "grpo_iterations": 2, "beta": 0.05, "lr": 2e-4,
    }  # fmt: skip
    return chat_options(model, data, **{**grpo, **changes})


def check_same(traces: list[Trace], wanted: Trace) -> None:
    assert np.abs(np.array(traces[0].losses) - wanted.losses).max() < 2e-6
    assert largest_relative(traces[0].grad_norms, wanted.grad_norms) < 2e-5
    for row, other in zip(traces[0].rows, wanted.rows, strict=True):
        for name in ("reward", SEEN, "tokens/answer", "answers/ended", "entropy", "kl", "clipped"):
            assert math.isclose(row[name], other[name], rel_tol=1e-4, abs_tol=2e-6), name
    ours, theirs = whole_weights(traces, ROWS), whole_weights([wanted], ROWS)
    assert max(float(np.abs(ours[name] - theirs[name]).max()) for name in theirs) < 1e-5


@pytest.fixture(scope="module")
def alone(pool: WorkerPool, model: str, data: str) -> Trace:
    """One process."""
    return pool.run(1, work_train, options(model, data), STEPS, join=False)[0]


def test_what_is_reported(alone: Trace) -> None:
    first = alone.rows[0]
    assert 0.2 < first["reward"] < 0.8 and first[SEEN] > 0.1
    assert 1 <= first["tokens/answer"] <= 12 and 0 <= first["answers/ended"] <= 1
    # Of the two steps on a batch, the second one's policy has left the one that sampled, and the reference.
    assert first["kl"] > 0 and first["entropy"] > 0 and max(row["clipped"] for row in alone.rows) > 0


@pytest.mark.parametrize("layout", ["tp2-sp", "dp2", "tp2-pp2", "dp2-overlapped"])
def test_layout_trains_like_one_process(pool: WorkerPool, model: str, data: str, alone: Trace, layout: str) -> None:
    flat = options(model, data, **LAYOUTS[layout].flags)
    check_same(pool.run(LAYOUTS[layout].ranks, work_train, flat, STEPS, join=False), alone)


@pytest.mark.parametrize("average", ["answer", "token", "length"])
def test_micro_batches_change_nothing(pool: WorkerPool, model: str, data: str, average: str) -> None:
    """One prompt at a time or four, in one process or two, are the same mean."""
    flat = options(model, data, answer_average=average, grpo_iterations=1, beta=0.0)
    wanted = pool.run(1, work_train, {**flat, "micro_batch_size": 4}, STEPS, join=False)[0]
    assert all(row["kl"] == 0 and row["clipped"] == 0 for row in wanted.rows)
    for ranks in (1, 2):
        check_same(pool.run(ranks, work_train, {**flat, "micro_batch_size": 1}, STEPS, join=False), wanted)


def test_a_run_goes_on_bit_for_bit(pool: WorkerPool, model: str, data: str, tmp_path: Path) -> None:
    flat = options(model, data)
    (whole, *_) = pool.run(2, work_train, flat, STEPS, join=False)
    pool.run(2, work_train, {**flat, "save": str(tmp_path / "run")}, 1, True, join=False)
    rest = {**flat, "load": str(tmp_path / "run"), "pretrained_checkpoint": None}
    (trace, *_) = pool.run(2, work_train, rest, STEPS - 1, join=False)
    assert trace.losses == whole.losses[1:] and trace.grad_norms == whole.grad_norms[1:]


def test_references_agree(pool: WorkerPool, model: str, data: str) -> None:
    """The model without its adapters is the model that the run started from."""
    lora = options(model, data, lora_rank=4)
    wanted = pool.run(1, work_train, lora, STEPS, join=False)[0]
    assert wanted.rows[-1]["kl"] > 0
    check_same(pool.run(1, work_train, {**lora, "reference": "lora-base"}, STEPS, join=False), wanted)


def test_batches_hold_what_was_sampled(pool: WorkerPool, model: str, data: str) -> None:
    """Prompts stand whole before answers, only answers are trained, and rewards are those of answers alone."""
    from megatron_steel.text.templates import load_template
    from megatron_steel.text.tokenizer import build_tokenizer

    (found,) = pool.run(1, work_rows, options(model, data, grpo_iterations=1), join=False)
    tokenizer = build_tokenizer("HuggingFaceTokenizer", model, None)
    stops = load_template("chatml", tokenizer).stop_ids
    answers = {line["answer"] for line in map(json.loads, Path(data).read_text().splitlines())}
    groups: dict[bytes, int] = {}
    for tokens, labels, mask, reward in found:
        trained = np.flatnonzero(mask)
        assert (np.diff(trained) == 1).all() and 1 <= len(trained) <= 12
        assert (labels[trained[:-1]] == tokens[trained[1:]]).all()
        response = labels[trained].tolist()
        assert not set(response[:-1]) & set(stops)
        text = tokenizer.decode([token for token in response if token not in stops])
        assert any(math.isclose(reward, fickle_reward(text, answer), abs_tol=1e-6) for answer in answers)
        prompt = tokens[: trained[0] + 1].tobytes()
        assert tokenizer.decode(tokens[: trained[0] + 1].tolist()).endswith("<|im_start|>assistant\n")
        groups[prompt] = groups.get(prompt, 0) + 1
    assert set(groups.values()) == {GROUP} and len(groups) == 4


def work_rows(flat: dict[str, Any]) -> list[tuple[np.ndarray, np.ndarray, np.ndarray, float]]:
    """Tokens, labels, mask and reward of each row of the first step; asks twice."""
    with open_session(flat) as session:
        batches, again = session.loader.step(0), session.loader.step(0)
        assert all(torch.equal(a.tokens_BS, b.tokens_BS) for a, b in zip(batches, again, strict=True))
        return [
            (tokens, labels, mask, reward)
            for batch in batches
            if batch.rollouts is not None
            for tokens, labels, mask, reward in zip(
                batch.tokens_BS.numpy(),
                batch.labels_BS.numpy(),
                batch.loss_mask_BS.numpy(),
                batch.rollouts.rewards_B.tolist(),
                strict=True,
            )
        ]
