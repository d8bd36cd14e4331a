"""Weight decay goes by the kind of a parameter, and bf16 keeps fp32 main weights that a tiny step still moves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pool import WorkerPool
from tiny_run import Trace, open_session, options, take_steps, write_data

NORMS_AND_BIASES = ("layernorm.weight", "bias")
VOCABULARY = ("embedding.", "output_layer.")


def work_groups(flat: dict[str, Any]) -> dict[str, float]:
    """Each parameter's decay after one step, as the optimizer has it."""
    with open_session(flat) as session:
        take_steps(session, 1, Trace())
        names = {id(p): n for model in session.model.language_models() for n, p in model.named_parameters()}
        groups = session.optimizer.param_groups
        return {names[id(p)]: group["weight_decay"] for group in groups for p in group["params"]}


@pytest.mark.parametrize("decay_embeddings", [True, False])
def test_norms_and_biases_have_no_decay(pool: WorkerPool, tmp_path: Path, decay_embeddings: bool) -> None:
    flat = options(
        write_data(tmp_path),
        weight_decay=0.3,
        decay_embeddings=decay_embeddings,
        untie_embeddings_and_output_weights=True,
    )
    decay = pool.run(1, work_groups, flat, join=False)[0]
    # 4 layers of 4 matrices, 2 norms and a QKV bias; the final norm, the embedding and the head.
    assert len(decay) == 4 * 7 + 3
    for name, value in decay.items():
        if name.endswith(NORMS_AND_BIASES):
            assert value == 0.0, name
        elif name.startswith(VOCABULARY):
            assert value == (0.3 if decay_embeddings else 0.0), name
        else:
            assert value == 0.3, name


def work_tiny_step(flat: dict[str, Any]) -> tuple[int, int]:
    """(fp32 main weights, bf16 weights) that one step of a very small rate moved."""
    with open_session(flat) as session:
        inner = [p for part in session.optimizer.chained_optimizers for g in part.param_groups for p in g["params"]]
        weights = [p for model in session.model.language_models() for p in model.parameters()]
        before = [[p.detach().clone() for p in group] for group in (inner, weights)]
        take_steps(session, 1, Trace())
        moved = []
        for group, old in zip((inner, weights), before, strict=True):
            moved.append(sum(int((p.detach() != q).sum()) for p, q in zip(group, old, strict=True)))
        total = sum(p.numel() for p in weights)
    return int(np.round(100 * moved[0] / total)), int(np.round(100 * moved[1] / total))


def test_a_tiny_step_moves_main_weights_only(pool: WorkerPool, tmp_path: Path) -> None:
    """At rate 5e-7 a bf16 weight (8 bits of mantissa) rounds back; its fp32 main weight does not."""
    flat = options(write_data(tmp_path), bf16=True, lr=5e-7, min_lr=0.0, lr_warmup_iters=0, weight_decay=0.0)
    main, rounded = pool.run(1, work_tiny_step, flat, join=False)[0]
    assert main > 80
    assert rounded < 20
