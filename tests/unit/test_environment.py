"""Environment variables by layout, and the garbage collector at chosen moments."""

from __future__ import annotations

import gc
import os
import weakref

import pytest
import torch

from megatron_steel.runtime import environment
from megatron_steel.runtime.garbage import Collector

NAMES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "NCCL_GRAPH_REGISTER", "CUDA_DEVICE_MAX_CONNECTIONS")


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in NAMES:
        # Set first, so that what the test sets is undone afterwards.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return monkeypatch


def test_one_queue_only_where_communication_overlaps_computation(clean: pytest.MonkeyPatch) -> None:
    environment.prepare(single_queue=False)
    assert "CUDA_DEVICE_MAX_CONNECTIONS" not in os.environ
    assert environment.one_line(False) == (
        "environment: PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True, NCCL_GRAPH_REGISTER=0"
    )
    environment.prepare(single_queue=True)
    assert os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"
    assert environment.one_line(True).endswith(", CUDA_DEVICE_MAX_CONNECTIONS=1")


def test_what_the_user_has_set_stays(clean: pytest.MonkeyPatch) -> None:
    clean.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    clean.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:512")
    environment.prepare(single_queue=True)
    assert os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == "32"
    assert "PYTORCH_CUDA_ALLOC_CONF" not in os.environ, "it would win over the other name"
    assert environment.one_line(False) == (
        "environment: NCCL_GRAPH_REGISTER=0, PYTORCH_ALLOC_CONF=max_split_size_mb:512, CUDA_DEVICE_MAX_CONNECTIONS=32"
    )


def test_fp32_products_stay_fp32(clean: pytest.MonkeyPatch) -> None:
    torch.set_float32_matmul_precision("high")
    environment.prepare(single_queue=False)
    assert torch.get_float32_matmul_precision() == "highest"


class Cycle:
    """Freed by the collector alone."""

    def __init__(self) -> None:
        self.itself = self


def test_cycles_wait_for_their_moment() -> None:
    assert gc.isenabled()
    with Collector(manual=True, interval=3) as collector:
        watched = weakref.ref(Cycle())
        collector.after_step(1)
        assert watched() is None and gc.get_freeze_count() > 0, "the first step's cycles are not frozen"
        watched = weakref.ref(Cycle())
        keep = [[number] for number in range(200_000)]
        collector.after_step(2)
        assert watched() is not None, "allocating a lot does not start a collection"
        collector.after_step(3)
        assert watched() is None
        watched = weakref.ref(Cycle())
        collector.collect()
        assert watched() is None
        del keep
    assert gc.isenabled() and gc.get_freeze_count() == 0


def test_python_s_collector_is_left_alone() -> None:
    with Collector() as collector:
        collector.after_step(1)
        collector.collect()
        assert gc.isenabled() and gc.get_freeze_count() == 0
