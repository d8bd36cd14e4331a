"""The learning-rate curve against megatron-core's scheduler, closed forms and properties."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_steel.config.schema import OptimizerConfig
from megatron_steel.optim.schedule import check_same_schedule, learning_rate, schedule_identity

STYLES = ("constant", "linear", "cosine", "inverse-square-root", "WSD")
WSD_STYLES = ("exponential", "linear", "cosine", "minus_sqrt")
SHAPES = [(style, "exponential") for style in STYLES[:-1]] + [("WSD", style) for style in WSD_STYLES]


def core_curve(options: OptimizerConfig, train_iters: int, batch: int) -> list[float]:
    """Rates that megatron-core's scheduler, stepped in samples as Megatron-LM does, gives to iterations 1, 2, ..."""
    decay = options.lr_decay_iters or train_iters
    if options.lr_warmup_fraction is None:
        warmup = options.lr_warmup_iters * batch
    else:
        warmup = options.lr_warmup_fraction * decay * batch
    group = {"lr": None, "weight_decay": None}
    scheduler = OptimizerParamScheduler(
        SimpleNamespace(param_groups=[group]),
        init_lr=0.0,
        max_lr=options.lr,
        min_lr=options.min_lr,
        lr_warmup_steps=warmup,
        lr_decay_steps=decay * batch,
        lr_decay_style=options.lr_decay_style,
        start_wd=0.1,
        end_wd=0.1,
        wd_incr_steps=train_iters * batch,
        wd_incr_style="constant",
        wsd_decay_steps=(options.lr_wsd_decay_iters or 0) * batch,
        lr_wsd_decay_style=options.lr_wsd_decay_style,
    )
    rates = []
    for _ in range(train_iters):
        rates.append(group["lr"])
        scheduler.step(batch)
    return rates


@pytest.mark.parametrize(("style", "wsd"), SHAPES)
@pytest.mark.parametrize("warmup", [{}, {"lr_warmup_iters": 7}, {"lr_warmup_fraction": 0.13}])
@pytest.mark.parametrize("decay_iters", [None, 60])
def test_equals_megatron_core(style: str, wsd: str, warmup: dict, decay_iters: int | None) -> None:
    options = OptimizerConfig(
        lr=3e-4,
        min_lr=2e-5,
        lr_decay_style=style,
        lr_wsd_decay_style=wsd,
        lr_wsd_decay_iters=20 if style == "WSD" else None,
        lr_decay_iters=decay_iters,
        **warmup,
    )
    # Without warm-up the inverse square root of megatron-core depends on the batch size: compare in iterations.
    batch = 1 if style == "inverse-square-root" else 48
    expected = core_curve(options, 90, batch)
    ours = [learning_rate(step, options, 90) for step in range(90)]
    assert ours == pytest.approx(expected, rel=1e-12, abs=1e-18)


def test_steel_recipe_closed_form() -> None:
    options = OptimizerConfig(lr=3e-4, min_lr=0.0, lr_decay_style="cosine", lr_warmup_iters=1000)
    total = 1_080_000
    for step, share in ((0, 0.0), (1, 0.001), (500, 0.5), (1000, 1.0), (540_500, 0.5), (1_080_000, 0.0)):
        assert learning_rate(step, options, total) == pytest.approx(3e-4 * share, rel=1e-12, abs=1e-20)
    # A quarter of the cosine: (1 + sqrt(1/2)) / 2.
    quarter = 3e-4 * (1 + math.sqrt(0.5)) / 2
    assert learning_rate(1000 + (total - 1000) // 4, options, total) == pytest.approx(quarter, rel=1e-12, abs=0)
    assert learning_rate(total - 1, options, total) == pytest.approx(
        3e-4 * math.sin(math.pi / 2 / (total - 1000)) ** 2, rel=1e-3, abs=0
    )


@st.composite
def schedules(draw: st.DrawFn) -> tuple[OptimizerConfig, int]:
    train_iters = draw(st.integers(2, 3000))
    decay = draw(st.none() | st.integers(2, 3000))
    end = decay or train_iters
    style, wsd = draw(st.sampled_from(SHAPES))
    warmup = draw(st.integers(0, end - 1))
    lr = draw(st.floats(1e-6, 1.0))
    options = OptimizerConfig(
        lr=lr,
        min_lr=lr * draw(st.floats(0.0, 1.0)),
        lr_decay_style=style,
        lr_decay_iters=decay,
        lr_warmup_iters=warmup,
        lr_wsd_decay_style=wsd,
        lr_wsd_decay_iters=draw(st.integers(1, end - warmup)) if style == "WSD" else None,
    )
    return options, train_iters


@settings(max_examples=60, deadline=None)
@given(schedules())
def test_properties(case: tuple[OptimizerConfig, int]) -> None:
    options, train_iters = case
    end, warmup = options.lr_decay_iters or train_iters, options.lr_warmup_iters
    curve = [learning_rate(step, options, train_iters) for step in range(end + 3)]
    assert all(0.0 <= rate <= options.lr for rate in curve)
    assert curve[warmup] == options.lr
    assert all(a <= b for a, b in zip(curve[: warmup + 1], curve[1 : warmup + 1], strict=False))
    assert all(a >= b * (1 - 1e-15) for a, b in zip(curve[warmup:], curve[warmup + 1 :], strict=False))
    if options.lr_decay_style == "constant":
        assert curve[-1] == options.lr
    else:
        assert curve[end + 1] == options.min_lr
        if options.lr_decay_style != "inverse-square-root":
            assert curve[end] == pytest.approx(options.min_lr, rel=1e-12, abs=1e-16 * options.lr)


@settings(max_examples=60, deadline=None)
@given(schedules())
def test_continuous(case: tuple[OptimizerConfig, int]) -> None:
    """On a curve stretched 1000 times, no step is larger than its slope allows (1000 x less than the whole way)."""
    options, train_iters = case
    scale = 1000
    end, warmup = (options.lr_decay_iters or train_iters) * scale, options.lr_warmup_iters * scale
    last = options.lr_wsd_decay_iters and options.lr_wsd_decay_iters * scale
    wide = OptimizerConfig(
        **{**vars(options), "lr_decay_iters": end, "lr_warmup_iters": warmup, "lr_wsd_decay_iters": last}
    )
    # The steepest place of any shape: the start of minus_sqrt, sqrt(1 / 1000) of the way in one step.
    limit = options.lr * math.sqrt(1 / scale)
    corners = {0, warmup, end - (last or 0), end}
    if options.lr_decay_style == "inverse-square-root":
        corners = {0, warmup} if warmup else set()  # it falls to min_lr after the end, as in megatron-core
    for corner in corners:
        for step in range(max(0, corner - 2), corner + 2):
            jump = learning_rate(step + 1, wide, end) - learning_rate(step, wide, end)
            assert abs(jump) <= limit * (1 + 1e-9), (corner, step)


def test_identity_reports_only_real_changes() -> None:
    cosine, constant = OptimizerConfig(lr_warmup_iters=10), OptimizerConfig(lr_decay_style="constant")
    saved = json.loads(json.dumps(schedule_identity(cosine, 100)))
    check_same_schedule(saved, schedule_identity(cosine, 100))
    # The same curve written another way.
    check_same_schedule(saved, schedule_identity(OptimizerConfig(lr_warmup_fraction=0.1, lr_decay_iters=100), 300))
    check_same_schedule(schedule_identity(constant, 100), schedule_identity(constant, 200))
    unused = OptimizerConfig(lr_decay_style="constant", min_lr=1e-5, lr_wsd_decay_iters=5)
    check_same_schedule(schedule_identity(constant, 100), schedule_identity(unused, 100))
    with pytest.raises(ValueError, match=r"lr_decay_iters 100 -> 200;.*--override-opt-param-scheduler") as error:
        check_same_schedule(saved, schedule_identity(cosine, 200))
    assert "\n" not in str(error.value) and "min_lr" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lr": 1e-4}, "lr 0.0003 -> 0.0001"),
        ({"weight_decay": 0.0}, "weight_decay 0.1 -> 0.0"),
        ({"lr_warmup_iters": 5}, "lr_warmup_iters 0 -> 5"),
        ({"lr_decay_style": "WSD", "lr_wsd_decay_iters": 9}, "lr_wsd_decay_iters unset -> 9"),
        ({"lr_decay_style": "constant"}, "lr_decay_iters 100 -> unset"),
    ],
)
def test_identity_names_the_change(change: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_same_schedule(
            schedule_identity(OptimizerConfig(), 100), schedule_identity(OptimizerConfig(**change), 100)
        )


@settings(max_examples=60, deadline=None)
@given(schedules(), schedules())
def test_equal_identity_means_equal_curve(one: tuple[OptimizerConfig, int], two: tuple[OptimizerConfig, int]) -> None:
    """Whatever is not in the identity must not move the curve."""
    options, train_iters = one
    identity = schedule_identity(options, train_iters)
    other = OptimizerConfig(**{**vars(two[0]), **identity})
    same = schedule_identity(other, two[1])
    if same == identity:
        for step in range(0, train_iters + 2, max(1, train_iters // 50)):
            assert learning_rate(step, options, train_iters) == learning_rate(step, other, two[1])
