"""Training on preferences against TRL's trainers: the same pairs, and the same ten steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pool import WorkerPool
from tiny_chats import chat_options, write_model, write_pairs
from tiny_run import Trace, keep_weights, open_session, take_steps
from trl_preference_side import Pair, train_preferences

STEPS, BATCH = 10, 4
ADAMW = {"learning_rate": 2e-3, "adam_beta1": 0.9, "adam_beta2": 0.95, "adam_epsilon": 1e-5, "weight_decay": 0.1}
OURS = {"lr": 2e-3, "lr_decay_style": "constant", "adam_beta1": 0.9, "adam_beta2": 0.95, "weight_decay": 0.1}


def work_prefer(flat: dict[str, Any]) -> tuple[list[Pair], Trace]:
    """Ten steps, and the ids of their pairs."""
    trace, pairs = Trace(), []
    with open_session(flat) as session:
        dataset = session.loader._datasets[0]
        _, _, windows = session.loader.ledger.samples(0, STEPS * BATCH)
        store = dataset.store
        for window in windows:
            for number in dataset.texts(int(window)).tolist()[::2]:
                chosen, rejected = (
                    (store.ids_N[slice(*store.begins_n[n : n + 2])], store.labels_N[slice(*store.begins_n[n : n + 2])])
                    for n in (number, number + 1)
                )
                at = int((chosen[1] >= 0).argmax())
                good = dataset.desirable is None or bool(dataset.desirable[number // 2])
                ids = (chosen[0][:at].tolist(), chosen[0][at:].tolist(), rejected[0][at:].tolist())
                pairs.append(Pair(*ids, good))
        take_steps(session, STEPS, trace)
        keep_weights(session, trace)
    return pairs, trace


def work_read(flat: dict[str, Any]) -> Trace:
    """The weights of a folder under our names."""
    trace = Trace()
    with open_session(flat) as session:
        keep_weights(session, trace)
    return trace


REWARDS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")
OPTIONS: list[dict[str, Any]] = [
    {"loss_type": "sigmoid"},
    {"loss_type": "sigmoid_norm"},
    {"loss_type": "ipo"},
    {"loss_type": "hinge"},
    {"loss_type": "robust", "label_smoothing": 0.1},
]
# The loss, options of both sides, and what both report of each step.
OTHERS: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
    ("orpo", {"beta": 0.3}, REWARDS),
    ("simpo", {"beta": 2.0, "simpo_gamma": 0.7}, REWARDS),
    ("kto", {"beta": 0.3, "desirable_weight": 0.8, "undesirable_weight": 1.1}, ("kl",)),
]


def steps_agree(
    pool: WorkerPool, folder: Path, kind: str, micro_batch: int, options: dict[str, Any], theirs: dict[str, Any]
) -> tuple[list[dict[str, Any]], list[dict[str, float]]]:
    """Assert that losses and weights agree over ten steps; what each step reported, ours and TRL's."""
    model = write_model(folder / "model", initializer_range=0.1)
    data = write_pairs(folder / "pairs.jsonl", 44, judged=kind == "kto")
    # One pair to a row, so that a step has as many pairs as TRL's.
    flat = chat_options(model, data, packing=False, seq_length=128, global_batch_size=BATCH, train_iters=STEPS)
    flat |= {"preferences": True, **OURS, **options}
    pairs, trace = pool.run(1, work_prefer, flat, join=False)[0]
    sizes = {"batch": BATCH, "micro_batch": micro_batch, "max_grad_norm": 1.0}
    run = train_preferences(kind, model, folder / "trl", pairs, **sizes, **ADAMW, **theirs)
    np.testing.assert_allclose(trace.losses, run.losses, rtol=1e-5)
    read = pool.run(1, work_read, flat | {"pretrained_checkpoint": str(folder / "trl")}, join=False)[0]
    assert max(np.abs(trace.weights[name] - read.weights[name]).max() for name in read.weights) < 1e-5
    start = pool.run(1, work_read, flat, join=False)[0]
    assert max(np.abs(trace.weights[name] - start.weights[name]).max() for name in start.weights) > 1e-3
    return trace.rows, run.metrics


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: options["loss_type"])
def test_ten_steps_are_those_of_trl(pool: WorkerPool, tmp_path: Path, options: dict[str, Any]) -> None:
    options = {"beta": 0.1, **options}
    # TRL's mean logits are over the tokens of a micro-batch, ours over those of each answer.
    for mine, other in zip(*steps_agree(pool, tmp_path, "dpo", 1, options, options), strict=True):
        for name in (*REWARDS, "logps/chosen", "logits/chosen", "logits/rejected"):
            assert abs(mine[name] - other[name]) < 1e-5 * max(1.0, abs(other[name])), name


@pytest.mark.parametrize(("loss", "options", "names"), OTHERS, ids=[loss for loss, *_ in OTHERS])
def test_ten_steps_are_those_of_the_other_trainers(
    pool: WorkerPool, tmp_path: Path, loss: str, options: dict[str, Any], names: tuple[str, ...]
) -> None:
    mine, theirs = steps_agree(pool, tmp_path, loss, BATCH, {"loss_type": loss, **options}, options)
    for name in names:
        values = [row[name] for row in theirs]
        np.testing.assert_allclose([row[name] for row in mine], values, rtol=1e-5, atol=1e-5)
        assert np.ptp(values) > 0.1, name
