"""How a batch is cut does not matter, and a growing one is the same on every layout and over a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pool import WorkerPool
from test_layouts import compare
from tiny_run import LAYOUTS, OVERLAPPED, Trace, options, work_train, write_data

STEPS = 8
# 4, 4, 4, 8, 12, 16, 16, 16 samples: a size begins at the first step 10, 20 or 30 samples in.
RAMP = {"rampup_batch_size": [4, 4, 30], "global_batch_size": 16, "micro_batch_size": 2, "train_iters": STEPS}


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def growing(pool: WorkerPool, prefix: str) -> list[Trace]:
    """One process without interruption."""
    return pool.run(1, work_train, options(prefix, RAMP), STEPS, join=False)


@pytest.mark.parametrize(
    ("ranks", "flags"),
    [(2, OVERLAPPED), (4, {**OVERLAPPED, **LAYOUTS["pp2-interleaved"].flags, "micro_batch_size": 1})],
    ids=["dp2", "pp2-interleaved-dp2"],
)
def test_ramp_on_other_layouts(
    pool: WorkerPool, prefix: str, growing: list[Trace], ranks: int, flags: dict[str, Any]
) -> None:
    """Gradients are reduced during the backward pass of the last micro-batch, whichever that is."""
    compare(pool.run(ranks, work_train, options(prefix, RAMP, flags), STEPS, join=False), growing)


def test_ramp_goes_on_after_a_resume(pool: WorkerPool, prefix: str, growing: list[Trace], tmp_path: Path) -> None:
    """Stopped in the second size on one rank, gone on with on one rank to the bit, and on two."""
    flat = options(prefix, RAMP, save=str(tmp_path))
    begun = pool.run(1, work_train, flat, 3, True, join=False)[0]
    rest = {"load": str(tmp_path), "save": None}
    one = pool.run(1, work_train, options(prefix, RAMP, rest), STEPS - 3, join=False)[0]
    assert begun.losses + one.losses == growing[0].losses
    assert begun.grad_norms + one.grad_norms == growing[0].grad_norms
    assert all(np.array_equal(one.weights[name], growing[0].weights[name]) for name in one.weights)
    two = pool.run(2, work_train, options(prefix, RAMP, rest), STEPS - 3, join=False)
    for trace in two:
        trace.losses, trace.grad_norms = begun.losses + trace.losses, begun.grad_norms + trace.grad_norms
        trace.rates = begun.rates + trace.rates
    compare(two, growing)


@pytest.mark.parametrize(("ranks", "micro_batch_size"), [(1, 8), (2, 1), (2, 4), (4, 2)])
def test_a_batch_is_the_same_however_it_is_cut(
    pool: WorkerPool, prefix: str, ranks: int, micro_batch_size: int
) -> None:
    """8 samples as 8 passes of 1, against 1 of 8, 4 of 1 on two replicas, 1 of 4 on two, 1 of 2 on four.

    With the ends of documents masked, so that every part has another number of tokens.
    """
    masked = {"eod_mask_loss": True, "train_iters": STEPS}
    reference = pool.run(1, work_train, options(prefix, masked, micro_batch_size=1), STEPS, join=False)
    cut = options(prefix, masked, micro_batch_size=micro_batch_size)
    compare(pool.run(ranks, work_train, cut, STEPS, join=False), reference)
