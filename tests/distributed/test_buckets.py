"""Several gradient buckets per buffer: what is saved of a sharded optimizer is what a resumed run needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from pool import WorkerPool
from tiny_run import LAYOUTS, Trace, open_session, options, take_steps, work_train, write_data

from megatron_steel.model import build
from megatron_steel.train.loop import save


def work_buckets(flat: dict[str, Any], steps: int, save_at: int | None) -> tuple[Trace, int]:
    """Train with buckets of a few parameters; also the number of buckets."""
    trace = Trace()
    small = {"BUCKET_PARAMETERS": 5000, "BUCKET_PARAMETERS_PER_RANK": 1}
    with mock.patch.multiple(build, **small), open_session(flat) as session:
        count = sum(len(buffer.buckets) for chunk in session.model.chunks for buffer in chunk.buffers)
        for step in range(steps):
            take_steps(session, 1, trace)
            if step + 1 == save_at:
                save(session)
    return trace, count


@pytest.mark.parametrize("name", ["dp2-overlapped", "1"])
def test_a_run_with_several_buckets_resumes_bit_for_bit(pool: WorkerPool, tmp_path: Path, name: str) -> None:
    layout = LAYOUTS["dp2-overlapped"]
    prefix = write_data(tmp_path)
    folder = str(tmp_path / "save")
    flat = options(prefix, layout.flags, save=folder)
    whole, count = pool.run(2, work_buckets, flat, 6, 3, join=False)[0]
    assert count > 2
    ranks, flags = (2, layout.flags) if name == "dp2-overlapped" else (1, {"use_distributed_optimizer": True})
    resumed = options(prefix, flags, load=folder)
    rest = pool.run(ranks, work_train, resumed, 3, join=False)[0] if ranks == 1 else None
    if rest is None:
        rest = pool.run(2, work_buckets, resumed, 3, None, join=False)[0][0]
        assert rest.losses == whole.losses[3:]
        assert rest.grad_norms == whole.grad_norms[3:]
    assert rest.losses == pytest.approx(whole.losses[3:], rel=1e-5)
    assert rest.grad_norms == pytest.approx(whole.grad_norms[3:], rel=1e-5)
