"""Training on preferences against TRL's ``DPOTrainer``: the same pairs, and the same ten steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pool import WorkerPool
from tiny_chats import chat_options, write_model, write_pairs
from tiny_run import Trace, keep_weights, open_session, take_steps
from trl_dpo_side import WATCHED, Pair, train_dpo

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
                pairs.append((chosen[0][:at].tolist(), chosen[0][at:].tolist(), rejected[0][at:].tolist()))
        take_steps(session, STEPS, trace)
        keep_weights(session, trace)
    return pairs, trace


def work_read(flat: dict[str, Any]) -> Trace:
    """The weights of a folder under our names."""
    trace = Trace()
    with open_session(flat) as session:
        keep_weights(session, trace)
    return trace


OPTIONS: list[dict[str, Any]] = [
    {"loss_type": "sigmoid"},
    {"loss_type": "sigmoid_norm"},
    {"loss_type": "ipo"},
    {"loss_type": "hinge"},
    {"loss_type": "robust", "label_smoothing": 0.1},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: options["loss_type"])
def test_ten_steps_are_those_of_trl(pool: WorkerPool, tmp_path: Path, options: dict[str, Any]) -> None:
    model = write_model(tmp_path / "model", initializer_range=0.1)
    data = write_pairs(tmp_path / "pairs.jsonl", 44)
    # One pair to a row, so that a step has as many pairs as TRL's.
    flat = chat_options(model, data, packing=False, seq_length=128, global_batch_size=BATCH, train_iters=STEPS)
    flat |= {"preferences": True, **OURS, **options}
    pairs, trace = pool.run(1, work_prefer, flat, join=False)[0]
    theirs = train_dpo(
        model, tmp_path / "trl", pairs, batch=BATCH, micro_batch=2, max_grad_norm=1.0, beta=0.1, **ADAMW, **options
    )
    np.testing.assert_allclose(trace.losses, theirs.losses, rtol=1e-5)
    for mine, other in zip(trace.rows, theirs.metrics, strict=True):
        for name in WATCHED:
            assert abs(mine[name] - other[name]) < 1e-5 * max(1.0, abs(other[name])), name
    read = pool.run(1, work_read, flat | {"pretrained_checkpoint": str(tmp_path / "trl")}, join=False)[0]
    assert max(np.abs(trace.weights[name] - read.weights[name]).max() for name in read.weights) < 1e-5
