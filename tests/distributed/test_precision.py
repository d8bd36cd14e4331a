"""fp16 trains like fp32; its loss scale and what is skipped are the same on every rank and after a resume."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pool import WorkerPool
from tiny_run import LAYOUTS, largest_relative, open_session, options, whole_weights, work_train, write_data

from megatron_steel.train.loop import Session, mean_losses, save, skipped_steps, take_step

FP16 = {"fp16": True, "initial_loss_scale": 2.0**12}


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_data(tmp_path_factory.mktemp("data"))


@contextmanager
def poisoned(session: Session, rank: int, value: float) -> Iterator[None]:
    """One element of one gradient on one rank becomes ``value`` in the backward passes inside."""
    hooks = []
    if session.world.rank == rank:
        parameter = next(session.model.language_models()[0].parameters())

        def spoil(grad: Any) -> Any:
            grad = grad.clone()
            grad.view(-1)[3] = value
            return grad

        hooks.append(parameter.register_hook(spoil))
    yield
    for hook in hooks:
        hook.remove()


def weights_of(session: Session) -> dict[str, np.ndarray]:
    session.model.gather_parameters()
    models = session.model.language_models()
    return {
        f"{index} {name}": parameter.detach().float().numpy().copy()
        for index, model in enumerate(models)
        for name, parameter in model.named_parameters()
    }


def work_scale(
    flat: dict[str, Any], steps: int, bad: dict[int, float], save_after: tuple[int, ...] = ()
) -> list[dict[str, Any]]:
    """Take steps; in those of ``bad`` the last rank's gradient holds that value. One row for each step."""
    rows = []
    with open_session(flat) as session:
        for _ in range(steps):
            number, before = session.state.iteration + 1, weights_of(session)
            rank = session.world.size - 1 if number in bad else -1
            with poisoned(session, rank, bad.get(number, 0.0)):
                take_step(session)
            row = session.recorder.flush(number)
            after = weights_of(session)
            rows.append(
                {
                    "loss": mean_losses(session)["loss"],
                    "moved": any(not np.array_equal(before[name], after[name]) for name in before),
                    "skipped": skipped_steps(session),
                    "scale": row.get("loss_scale"),
                    "norm": row["grad_norm"],
                }
            )
            if number in save_after:
                save(session)
    return rows


@pytest.mark.parametrize("layout", ["1", "tp2-pp2", "dp2-overlapped"])
def test_fp16_is_close_to_fp32(pool: WorkerPool, prefix: str, layout: str) -> None:
    """Measured over 12 steps: losses 5e-6, gradient norms 5e-4, the largest weight 5e-4."""
    exact = pool.run(1, work_train, options(prefix), 12, join=False)
    spread = LAYOUTS[layout]
    half = pool.run(spread.ranks, work_train, options(prefix, spread.flags, FP16), 12, join=False)
    loss = largest_relative(half[0].losses, exact[0].losses)
    norm = largest_relative(half[0].grad_norms, exact[0].grad_norms)
    ours, theirs = whole_weights(half), whole_weights(exact)
    weights = max(float(np.abs(ours[name] - theirs[name]).max()) for name in theirs)
    print(f"{layout}: loss {loss:.1e}, gradient norm {norm:.1e}, weights {weights:.1e}")
    assert 0.0 < loss < 1e-4 and norm < 5e-3 and weights < 5e-3
    assert all(np.array_equal(ours[name].astype(np.float16).astype(np.float32), ours[name]) for name in ours)


def expected_scales(rows: list[dict[str, Any]], first: float, window: int) -> list[float]:
    """Megatron-LM's rules with a hysteresis of 2: which scale follows each step, from which steps were skipped."""
    scale, good, spare, scales = first, 0, 2, []
    for before, row in zip([{"skipped": 0}, *rows], rows, strict=False):
        if row["skipped"] > before["skipped"]:
            good, spare = 0, spare - 1
            scale = scale / 2 if spare <= 0 else scale
        else:
            good += 1
            if good == window:
                good, spare, scale = 0, 2, scale * 2
        scales.append(scale)
    return scales


@pytest.mark.parametrize("layout", ["1", "pp2", "dp2-sharded"])
def test_overflow_is_skipped_and_the_scale_comes_back(
    pool: WorkerPool, prefix: str, tmp_path: Path, layout: str
) -> None:
    """From a scale that overflows down to one that trains and up again; cut anywhere, it goes on bit for bit."""
    spread = LAYOUTS[layout]
    first, window = 2.0**23, 2
    changes = {"fp16": True, "initial_loss_scale": first, "loss_scale_window": window}
    flat = options(prefix, spread.flags, changes)
    # After 3 steps nothing has been learnt yet; after 5 the scale is on its way up again.
    ranks = pool.run(spread.ranks, work_scale, {**flat, "save": str(tmp_path)}, 9, {}, (3, 5), join=False)
    rows = ranks[0]
    assert all(repr(other) == repr(rows) for other in ranks)
    skipped = [row["skipped"] for row in rows]
    assert skipped[:3] == [1, 2, 3] and skipped[4] < 5 and skipped[-1] > skipped[4]
    assert [row["scale"] for row in rows] == expected_scales(rows, first, window)
    for before, row in zip([{"skipped": 0}, *rows], rows, strict=False):
        assert row["moved"] == (row["skipped"] == before["skipped"]) == math.isfinite(row["norm"])
    for start in (3, 5):
        again = {**flat, "load": str(tmp_path), "ckpt_step": start}
        resumed = pool.run(spread.ranks, work_scale, again, 9 - start, {}, join=False)
        assert all(repr(other) == repr(rows[start:]) for other in resumed)


def test_scale_that_never_changes(pool: WorkerPool, prefix: str) -> None:
    flat = options(prefix, fp16=True, loss_scale=2.0**12, lr_warmup_iters=0)
    (rows,) = pool.run(1, work_scale, flat, 3, {2: math.inf}, join=False)
    assert [(row["moved"], row["scale"]) for row in rows] == [(True, 4096.0), (False, 4096.0), (True, 4096.0)]


BAD = [("dp2", "fp32"), ("dp2-overlapped", "fp32"), ("tp2", "fp32"), ("pp2", "bf16"), ("dp2-overlapped", "bf16")]
BAD += [("dp2", "fp16"), ("dp2-overlapped", "fp16"), ("tp2", "fp16"), ("pp2", "fp16")]


@pytest.mark.parametrize(("layout", "precision"), BAD)
def test_one_bad_gradient_is_skipped_by_all_ranks(pool: WorkerPool, prefix: str, layout: str, precision: str) -> None:
    spread = LAYOUTS[layout]
    changes = {**FP16, "hysteresis": 1} if precision == "fp16" else {"bf16": precision == "bf16"}
    bad = {2: math.nan, 3: math.inf}
    flat = options(prefix, spread.flags, changes, lr_warmup_iters=0)
    for rows in pool.run(spread.ranks, work_scale, flat, 4, bad, join=False):
        assert [row["moved"] for row in rows] == [True, False, False, True]
        assert [row["skipped"] for row in rows] == [0, 1, 2, 2]
        assert [math.isfinite(row["norm"]) for row in rows] == [True, False, False, True]
        expected = [2.0**12, 2.0**11, 2.0**10, 2.0**10] if precision == "fp16" else [None] * 4
        assert [row["scale"] for row in rows] == expected
        assert all(math.isfinite(row["loss"]) for row in rows)


def work_bytes(flat: dict[str, Any]) -> dict[str, set[str]]:
    """Types of weights, gradients and moments after a step, and of what the optimizer updates."""
    with open_session(flat) as session:
        take_step(session)
        (inner,) = (part.optimizer for part in session.optimizer.chained_optimizers)
        found: dict[str, set[str]] = {"weights": set(), "gradients": set(), "moments": set(), "updated": set()}
        for parameter in session.model.language_models()[0].parameters():
            found["weights"].add(str(parameter.dtype))
            found["gradients"].add(str(parameter.main_grad.dtype))
        for updated, state in inner.state.items():
            found["updated"].add(str(updated.dtype))
            found["moments"] |= {str(state[name].dtype) for name in ("exp_avg", "exp_avg_sq")}
        return found


PURE = {"bf16": True, "pure_bf16": True}


@pytest.mark.parametrize("layout", ["tp2-pp2", "dp2"])
def test_pure_bf16(pool: WorkerPool, prefix: str, tmp_path: Path, layout: str) -> None:
    """Nothing in fp32, losses near those of fp32 (measured over 12 steps: 1e-3), and a resume bit for bit."""
    spread = LAYOUTS[layout]
    flat = options(prefix, spread.flags, PURE, save=str(tmp_path))
    for found in pool.run(spread.ranks, work_bytes, flat, join=False):
        assert found == {name: {"torch.bfloat16"} for name in found}
    exact = pool.run(1, work_train, options(prefix), 12, join=False)[0]
    traces = pool.run(spread.ranks, work_train, options(prefix, spread.flags, PURE), 12, join=False)
    loss = largest_relative(traces[0].losses, exact.losses)
    norm = largest_relative(traces[0].grad_norms, exact.grad_norms)
    print(f"{layout}: loss {loss:.1e}, gradient norm {norm:.1e}")
    assert 1e-5 < loss < 5e-3 and norm < 5e-2
    whole_weights(traces)
    pool.run(spread.ranks, work_train, flat, 4, True, join=False)
    resumed = pool.run(spread.ranks, work_train, {**flat, "save": None, "load": str(tmp_path)}, 8, join=False)
    for one, other in zip(resumed, traces, strict=True):
        assert one.losses == other.losses[4:] and one.grad_norms == other.grad_norms[4:]
        assert all(np.array_equal(one.weights[name], other.weights[name]) for name in one.weights)


def test_resuming_in_another_precision(pool: WorkerPool, prefix: str, tmp_path: Path) -> None:
    """Sharded state fits every precision; the others are told apart before anything is built."""
    pool.run(1, work_train, options(prefix, save=str(tmp_path / "plain")), 2, True, join=False)
    with pytest.raises(ValueError, match="holds moments of fp32 weights as optimizer state, this run has fp32 copies"):
        pool.run(1, work_train, options(prefix, FP16, load=str(tmp_path / "plain")), 1, join=False)
    sharded = options(prefix, LAYOUTS["dp2-sharded"].flags)
    exact = pool.run(2, work_train, {**sharded, "save": str(tmp_path / "sharded")}, 2, True, join=False)
    half = pool.run(2, work_train, {**sharded, **FP16, "load": str(tmp_path / "sharded")}, 2, join=False)
    assert half[0].losses[-1] < exact[0].losses[0] and half[0].consumed_samples == 32
