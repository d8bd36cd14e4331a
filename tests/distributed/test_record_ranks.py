"""One reduction over two processes."""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.multiprocessing

from megatron_steel.metrics.record import MetricRecorder


def work(rank: int, folder: str) -> None:
    """Record on two ranks in different order and number; check the result on both."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    group = torch.distributed.group.WORLD
    calls: list[str] = []
    reduce = torch.distributed.all_reduce

    def counted(*args: object, **options: object) -> object:
        calls.append("all_reduce")
        return reduce(*args, **options)

    torch.distributed.all_reduce = counted
    recorder = MetricRecorder(group)
    if rank == 0:
        recorder.record("loss", torch.tensor(1.0))
        recorder.record("loss", 2.0)
        recorder.record("tokens", 10, "sum")
        recorder.record("memory", torch.tensor(5.0), "max")
        recorder.record("broken", 1.0, "max")
    else:
        recorder.record("broken", math.nan, "max")
        recorder.record("memory", 7.0, "max")
        recorder.record("tokens", torch.tensor(5), "sum")
        recorder.record("loss", 6.0)
    recorder.record("lr", 0.5 + rank, "last")
    row = recorder.flush(3)
    assert row == {
        "iteration": 3,
        "loss": 3.0,
        "tokens": 15.0,
        "memory": 7.0,
        "broken": math.inf,
        "lr": 0.5 + rank,
    }, row
    assert len(calls) == 2, calls
    recorder.record("loss", float(rank))
    assert recorder.flush(4) == {"iteration": 4, "loss": 0.5}
    assert len(calls) == 3, calls
    torch.distributed.destroy_process_group()


def test_two_ranks(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(work, (str(tmp_path),), nprocs=2)
