"""Speed numbers from a synthetic clock."""

from __future__ import annotations

import pytest

from megatron_steel.metrics.throughput import Throughput


class Clock:
    """Time that passes only when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def watch(clock: Clock, **changes: float) -> Throughput:
    settings = {
        "flops_per_token": 6e9,
        "tokens_per_sample": 1000,
        "devices": 8,
        "peak_flops": 1e15,
        "total_samples": 100_000,
    }
    return Throughput(**{**settings, **changes}, clock=clock)


def test_speed_of_a_lap() -> None:
    clock = Clock()
    speed = watch(clock)
    clock.now += 5.0
    row = speed.lap(2, 2000)  # 2.5 s a step: 400,000 tokens/s over 8 devices
    assert row == pytest.approx(
        {
            "step_time_s": 2.5,
            "tokens_per_second_per_device": 50_000.0,
            "tflops_per_device": 300.0,
            "mfu": 0.3,
            "eta_s": 98 * 2.5,
        }
    )


def test_pauses_are_not_training() -> None:
    clock = Clock()
    speed = watch(clock)
    clock.now += 10.0
    speed.lap(10, 10_000)
    clock.now += 6.0
    with speed.pause():
        clock.now += 30.0
    with pytest.raises(KeyError), speed.pause():
        clock.now += 3.0
        raise KeyError("an evaluation that failed")
    clock.now += 4.0
    row = speed.lap(20, 20_000)
    assert row["step_time_s"] == pytest.approx(1.0)
    # The remaining 80 steps are expected to be interrupted as often: 43 s for 10 steps.
    assert row["eta_s"] == pytest.approx(80 * 4.3)
    clock.now += 10.0
    row = speed.lap(30, 30_000)
    assert row["step_time_s"] == pytest.approx(1.0)
    assert row["eta_s"] == pytest.approx(70 * 53 / 20)


def test_the_first_lap_does_not_spoil_the_time_left() -> None:
    clock = Clock()
    speed = watch(clock)
    clock.now += 600.0  # compilation
    assert speed.lap(1, 1000)["eta_s"] == pytest.approx(99 * 600)
    for iteration in range(2, 101):
        clock.now += 1.0
        assert speed.lap(iteration, iteration * 1000)["eta_s"] == pytest.approx(100 - iteration)


def test_a_resumed_run_counts_its_own_steps() -> None:
    clock = Clock()
    speed = watch(clock, iteration=90, samples=90_000)
    clock.now += 10.0
    row = speed.lap(95, 95_000)
    assert row["step_time_s"] == pytest.approx(2.0) and row["eta_s"] == pytest.approx(10.0)


def test_growing_steps_are_counted_by_their_samples() -> None:
    clock = Clock()
    speed = watch(clock, total_samples=40)
    clock.now += 6.0
    row = speed.lap(2, 6)  # steps of 2 and of 4 samples, a second each sample
    assert row["step_time_s"] == pytest.approx(3.0) and row["eta_s"] == pytest.approx(34.0)
    assert row["tokens_per_second_per_device"] == pytest.approx(1000 / 8)
    clock.now += 10.0
    row = speed.lap(3, 16)
    assert row["step_time_s"] == pytest.approx(10.0) and row["eta_s"] == pytest.approx(24.0)


def test_a_clock_that_stands_still() -> None:
    assert watch(Clock()).lap(1, 1000)["step_time_s"] > 0
