"""Metrics of an interval: values against numpy, no device wait before the flush."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_steel.metrics.record import MetricRecorder, nest

NUMBERS = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=20)


@settings(max_examples=50, deadline=None)
@given(NUMBERS, st.booleans())
def test_reductions_equal_numpy(numbers: list[float], as_tensors: bool) -> None:
    recorder = MetricRecorder()
    for number in numbers:
        value = torch.tensor([number], dtype=torch.float64) if as_tensors else number
        for reduction in ("mean", "sum", "max", "last"):
            recorder.record(reduction, value, reduction)
    row = recorder.flush(7)
    assert list(row) == ["iteration", "mean", "sum", "max", "last"] and row["iteration"] == 7
    assert row["mean"] == pytest.approx(np.mean(numbers), rel=1e-12, abs=1e-9)
    assert row["sum"] == pytest.approx(math.fsum(numbers), rel=1e-12, abs=1e-9)
    assert (row["max"], row["last"]) == (max(numbers), numbers[-1])
    assert all(type(value) in (float, int) for value in row.values())


def test_an_interval_starts_anew() -> None:
    recorder = MetricRecorder()
    recorder.record("loss", 4.0)
    recorder.flush(1)
    recorder.record("loss", 2.0)
    assert recorder.flush(2) == {"iteration": 2, "loss": 2.0}
    assert recorder.flush(3) == {"iteration": 3}


def test_a_tensor_counts_with_its_value_at_that_moment() -> None:
    """megatron-core divides the loss in place after it was recorded."""
    for dtype in (torch.float32, torch.float64):
        recorder, loss = MetricRecorder(), torch.tensor(6.0, dtype=dtype)
        for reduction in ("mean", "max", "last"):
            recorder.record(reduction, loss, reduction)
        loss /= 3
        assert recorder.flush(1) == {"iteration": 1, "mean": 6.0, "max": 6.0, "last": 6.0}


def test_many_small_numbers_do_not_vanish() -> None:
    recorder = MetricRecorder()
    recorder.record("tokens", torch.tensor(2.0**24), "sum")
    for _ in range(100):
        recorder.record("tokens", torch.tensor(1.0), "sum")  # fp32 would swallow each of them
    assert recorder.flush(1)["tokens"] == 2**24 + 100


def test_nan_is_not_hidden() -> None:
    for values in ([1.0, math.nan, 2.0], [torch.tensor(1.0), torch.tensor(math.nan), 2.0]):
        recorder = MetricRecorder()
        for value in values:
            for reduction in ("mean", "sum", "max"):
                recorder.record(reduction, value, reduction)
        row = recorder.flush(1)
        assert all(math.isnan(row[name]) for name in ("mean", "sum", "max"))


def test_no_host_transfer_before_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the recorder waited for the device")

    recorder, values = MetricRecorder(), [torch.tensor(float(n)) for n in range(4)]
    with monkeypatch.context() as patch:
        for name in ("item", "tolist", "__float__", "__bool__", "cpu", "numpy"):
            patch.setattr(torch.Tensor, name, refuse)
        for value in values:
            recorder.record("a", value)
            recorder.record("b", value, "max")
    assert recorder.flush(4) == {"iteration": 4, "a": 1.5, "b": 3.0}


def test_mixed_host_and_device_values() -> None:
    recorder = MetricRecorder()
    for value in (1.0, torch.tensor(5.0), 3):
        recorder.record("mean", value)
        recorder.record("max", value, "max")
    recorder.record("lr", 1e-4, "last")
    assert recorder.flush(1) == {"iteration": 1, "mean": 3.0, "max": 5.0, "lr": 1e-4}


def test_one_name_has_one_reduction() -> None:
    recorder = MetricRecorder()
    recorder.record("loss", 1.0)
    with pytest.raises(ValueError, match="loss is recorded as sum and as mean"):
        recorder.record("loss", 1.0, "sum")


def test_nest() -> None:
    flat = {"iteration": 1, "loss_by_source/zh": 2.0, "loss": 3.0, "loss_by_source/en/web": 4.0}
    assert nest(flat) == {"iteration": 1, "loss_by_source": {"zh": 2.0, "en/web": 4.0}, "loss": 3.0}
