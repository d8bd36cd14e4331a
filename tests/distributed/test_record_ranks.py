"""One reduction over two processes."""

from __future__ import annotations

import math

import torch
from pool import WorkerPool

from megatron_steel.metrics.record import MetricRecorder


def work() -> tuple[dict[str, float], dict[str, float], int]:
    """Record on two ranks in different order and number; two rows and the number of collectives."""
    rank, calls = torch.distributed.get_rank(), 0
    reduce = torch.distributed.all_reduce

    def counted(*args: object, **options: object) -> object:
        nonlocal calls
        calls += 1
        return reduce(*args, **options)

    torch.distributed.all_reduce = counted
    recorder = MetricRecorder(torch.distributed.group.WORLD)
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
    first = recorder.flush(3)
    recorder.record("loss", float(rank))
    second = recorder.flush(4)
    torch.distributed.all_reduce = reduce
    return first, second, calls


def test_two_ranks(pool: WorkerPool) -> None:
    for rank, (first, second, calls) in enumerate(pool.run(2, work)):
        reduced = {"loss": 3.0, "tokens": 15.0, "memory": 7.0, "broken": math.inf}
        assert first == {"iteration": 3, "lr": 0.5 + rank, **reduced}
        assert second == {"iteration": 4, "loss": 0.5}
        assert calls == 3  # sums and maxima, then sums only
