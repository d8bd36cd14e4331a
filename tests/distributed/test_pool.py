"""The worker pool itself: results, failures, hanging and dead ranks, and that it goes on after each."""

from __future__ import annotations

import os
import threading
import time

import pytest
import torch
import torch.distributed as dist
from pool import MOST_THREADS, RemoteTraceback, WorkerPool


def total(number: int) -> tuple[int, float, int]:
    value = torch.tensor([float(number + dist.get_rank())])
    dist.all_reduce(value)
    return dist.get_rank(), value.item(), os.getpid()


def fail_on_last() -> None:
    if dist.get_rank() == dist.get_world_size() - 1:
        raise ValueError("bad rank")
    dist.barrier()


def hang_on_last() -> None:
    if dist.get_rank() == dist.get_world_size() - 1:
        time.sleep(100)


def die_on_last() -> None:
    if dist.get_rank() == dist.get_world_size() - 1:
        os._exit(7)
    dist.barrier()


def has_group() -> bool:
    return dist.is_initialized()


def test_results_come_in_rank_order_from_reused_processes(pool: WorkerPool) -> None:
    first, second = pool.run(2, total, 10), pool.run(2, total, 20)
    assert [reply[:2] for reply in first] == [(0, 21.0), (1, 21.0)]
    assert [reply[:2] for reply in second] == [(0, 41.0), (1, 41.0)]
    assert [reply[2] for reply in first] == [reply[2] for reply in second]
    assert pool.run(1, total, 3)[0][:2] == (0, 3.0)


def test_process_group_can_be_left_to_the_function(pool: WorkerPool) -> None:
    assert pool.run(2, has_group) == [True, True]
    assert pool.run(2, has_group, join=False) == [False, False]


def test_failure_of_a_rank_is_raised_with_its_traceback(pool: WorkerPool) -> None:
    with pytest.raises(ValueError, match="bad rank") as caught:
        pool.run(2, fail_on_last)
    assert isinstance(caught.value.__cause__, RemoteTraceback)
    assert "rank 1" in str(caught.value.__cause__) and "fail_on_last" in str(caught.value.__cause__)
    assert pool.run(2, total, 0)[0][1] == 1.0


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [(hang_on_last, TimeoutError, r"ranks \[1\]"), (die_on_last, RuntimeError, "exit code 7")],
)
def test_pool_recovers(function: object, error: type[Exception], message: str) -> None:
    pool = WorkerPool()
    try:
        with pytest.raises(error, match=message):
            pool.run(2, function, timeout=3)  # type: ignore[arg-type]
        assert [reply[1] for reply in pool.run(2, total, 1)] == [3.0, 3.0]
    finally:
        pool.close()


def leave_threads(count: int) -> int:
    """Start threads that never end; the process."""
    for _ in range(count):
        threading.Thread(target=time.sleep, args=(3600,), daemon=True).start()
    return os.getpid()


def test_workers_that_leak_threads_are_replaced() -> None:
    workers = WorkerPool()
    try:
        (first,) = workers.run(1, leave_threads, 5, join=False)
        assert workers.run(1, leave_threads, MOST_THREADS, join=False) == [first]
        assert workers.run(1, leave_threads, 0, join=False) != [first]
    finally:
        workers.close()
