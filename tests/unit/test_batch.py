"""Samples per step: the arithmetic of batches, and a ramp against megatron-core's own calculator."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.num_microbatches_calculator import RampupBatchsizeNumMicroBatchesCalculator

from megatron_steel.config.check import check
from megatron_steel.config.check_batch import check_batch
from megatron_steel.config.load import apply, parse
from megatron_steel.config.rampup import BatchSizes, batch_sizes
from megatron_steel.config.schema import Config


def build(**values: Any) -> Config:
    """Defaults with some flat options set."""
    config = Config()
    apply(config, values, "test")
    return config


@pytest.mark.parametrize(
    ("micro", "ranks", "wish", "result"),
    [(2, 4, None, 8), (2, 4, 8, 8), (2, 4, 24, 24), (1, 1, 512, 512)],
)
def test_batch_arithmetic(micro: int, ranks: int, wish: int | None, result: int) -> None:
    config = build(micro_batch_size=micro, global_batch_size=wish)
    check(config, ranks)
    assert config.training.global_batch_size == result


@pytest.mark.parametrize(
    ("wish", "way_out"), [(20, "use 16 or 24"), (9, "use 8 or 16"), (5, "a whole number; use 8"), (1, "number; use 8")]
)
def test_batch_error_names_the_neighbours(wish: int, way_out: str) -> None:
    with pytest.raises(ValueError) as caught:
        check_batch(build(micro_batch_size=2, global_batch_size=wish), 4)
    assert f"--global-batch-size {wish} is not --micro-batch-size 2 x 4 data-parallel ranks" in str(caught.value)
    assert str(caught.value).endswith(way_out)


@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 200))
def test_batch_way_out_is_accepted(micro: int, ranks: int, wish: int) -> None:
    config = build(micro_batch_size=micro, global_batch_size=wish)
    try:
        check_batch(config, ranks)
        assert wish % (micro * ranks) == 0
    except ValueError as error:
        for way_out in str(error).rsplit("use ", 1)[1].split(" or "):
            check_batch(build(micro_batch_size=micro, global_batch_size=int(way_out)), ranks)


RAMPS = st.tuples(st.integers(1, 9), st.integers(1, 5), st.integers(1, 9), st.integers(1, 400))


def ramp(unit: int, start: int, parts: int, samples: int) -> BatchSizes:
    """From ``start`` units by one unit at a time."""
    sizes = BatchSizes(
        final=unit * (start + parts), start=unit * start, increment=unit, parts=parts, samples=samples * parts
    )
    config = build(rampup_batch_size=[sizes.start, unit, sizes.samples], global_batch_size=sizes.final)
    check_batch(config, 1)
    assert batch_sizes(config.training) == sizes
    return sizes


@given(RAMPS)
def test_ramp_has_the_sizes_of_megatron_core(values: tuple[int, int, int, int]) -> None:
    """With a whole number of samples per part, where megatron-core's division does not round."""
    sizes = ramp(*values)
    theirs = RampupBatchsizeNumMicroBatchesCalculator(
        sizes.final, 1, 1, False, 1, sizes.start, sizes.increment, sizes.samples
    )
    consumed, reached = 0, False
    while not reached:
        reached = consumed > sizes.samples
        theirs.update(consumed, consistency_check=True)
        assert sizes.at(consumed) == theirs.current_global_batch_size
        consumed += sizes.at(consumed)
    assert sizes.at(consumed) == sizes.final


@given(RAMPS, st.integers(0, 300), st.integers(0, 2000), st.integers(0, 7))
def test_samples_after_some_steps(values: tuple[int, int, int, int], steps: int, consumed: int, odd: int) -> None:
    """The sum by parts is that of one step after the other, wherever it begins and however parts are divided."""
    even = ramp(*values)
    sizes = BatchSizes(
        final=even.final, start=even.start, increment=even.increment, parts=even.parts, samples=even.samples + odd
    )
    expected = consumed
    for _ in range(steps):
        expected += sizes.at(expected)
    assert sizes.consumed_after(steps, consumed) == expected


def test_without_a_ramp_all_steps_are_equal() -> None:
    sizes = batch_sizes(build(global_batch_size=12).training)
    assert [sizes.at(consumed) for consumed in (0, 12, 10**12)] == [12, 12, 12]
    assert sizes.consumed_after(5) == 60 and sizes.consumed_after(5, 7) == 67


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ("4 4", "must be three numbers above 0: START INCREMENT SAMPLES"),
        ("0 4 100", "must be three numbers above 0"),
        ("4 4 -1", "must be three numbers above 0"),
        ("16 4 100", "starts at 16, which is not below --global-batch-size 16"),
        ("3 4 100", "START and INCREMENT must be multiples of 4"),
        ("4 2 100", "START and INCREMENT must be multiples of 4"),
        ("4 8 100", "use --global-batch-size 12 or 20, or an increment that divides 12"),
    ],
)
def test_ramps_that_do_not_fit(values: str, message: str) -> None:
    flags = ["--global-batch-size", "16", "--micro-batch-size", "2", "--rampup-batch-size", *values.split()]
    with pytest.raises(ValueError, match="--rampup-batch-size") as caught:
        check_batch(parse(flags), 2)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    check_batch(parse([*flags[: -len(values.split())], "4", "4", "100"]), 2)


def test_each_size_of_a_ramp_fills_an_interleaved_pipeline() -> None:
    values = {"num_layers": 4, "pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 1}
    with pytest.raises(ValueError, match="multiples of 2"):
        check(build(**values, global_batch_size=8, rampup_batch_size=[2, 1, 10]), 2)
    check(build(**values, global_batch_size=8, rampup_batch_size=[2, 2, 10]), 2)
