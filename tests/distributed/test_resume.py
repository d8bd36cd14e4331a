"""Kill a run anywhere, go on: the same losses to the last bit, the same samples, the schedule's learning rate."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import as_flags, finish, run, start, training_rows, wait_for_iteration
from pool import WorkerPool
from tiny_run import OVERLAPPED, Trace, open_session, options, take_steps, work_train, write_data

from megatron_steel.config.load import from_flat
from megatron_steel.data.order import Ledger
from megatron_steel.optim.schedule import learning_rate

KILL_AFTER = 12


@pytest.fixture(scope="module")
def prefixes(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two sources."""
    folder = tmp_path_factory.mktemp("data")
    return [write_data(folder, seed=seed, name=name) for seed, name in ((0, "one"), (1, "two"))]


def state_of(save: Path, iteration: int) -> dict[str, Any]:
    return json.loads((save / f"iter_{iteration:07d}" / "state.json").read_text())


def command(prefixes: list[str], save: Path, **changes: Any) -> list[str]:
    flat = options(prefixes[0], train_data_path=["0.7", prefixes[0], "0.3", prefixes[1]], log_interval=1)
    return as_flags({**flat, "save": str(save), "save_interval": 10, "auto_resume": True, **changes})


def train_and_kill(folder: Path, flags: list[str], save: Path, ranks: int) -> None:
    """Start a run and kill all its ranks with SIGKILL after iteration 12."""
    processes = start(folder, flags, ranks)
    try:
        wait_for_iteration(processes, save, KILL_AFTER)
    finally:
        for process in processes:
            process.send_signal(signal.SIGKILL)
        codes = finish(processes)
    assert codes == [-signal.SIGKILL] * ranks
    assert 20 not in training_rows(save), "the run was over before it could be killed"
    assert (save / "latest_checkpointed_iteration.txt").read_text() == "10"


def assert_bitwise(ours: Path, theirs: Path) -> None:
    """All 20 training rows agree to the last bit, and the ledgers at the end are the same."""
    mine, reference = training_rows(ours), training_rows(theirs)
    assert list(mine) == list(reference) == list(range(1, 21))
    for iteration, row in reference.items():
        for name in ("loss", "loss_by_source", "grad_norm", "lr", "consumed_samples", "consumed_tokens"):
            assert mine[iteration][name] == row[name], f"{name} of iteration {iteration}"
    assert state_of(ours, 20)["ledger"] == state_of(theirs, 20)["ledger"]


def test_killed_and_resumed_is_bitwise_the_same(tmp_path: Path, prefixes: list[str]) -> None:
    """10 + kill -9 + 10 on one process; and, from the same checkpoint, on two replicas."""
    whole, cut, wider = tmp_path / "whole", tmp_path / "cut", tmp_path / "wider"
    assert run(tmp_path / "logs1", command(prefixes, whole)) == [0]
    train_and_kill(tmp_path / "logs2", command(prefixes, cut), cut, 1)
    shutil.copytree(cut, wider)
    assert run(tmp_path / "logs3", command(prefixes, cut)) == [0]
    assert "starting from" in (tmp_path / "logs3" / "out0").read_text()
    assert_bitwise(cut, whole)

    assert run(tmp_path / "logs4", command(prefixes, wider), ranks=2) == [0, 0]
    mine, reference = training_rows(wider), training_rows(whole)
    assert state_of(wider, 20)["ledger"] == state_of(whole, 20)["ledger"]
    for iteration in range(1, 21):
        assert mine[iteration]["consumed_samples"] == reference[iteration]["consumed_samples"] == 8 * iteration
        assert mine[iteration]["loss"] == pytest.approx(reference[iteration]["loss"], rel=1e-5)
        assert mine[iteration]["grad_norm"] == pytest.approx(reference[iteration]["grad_norm"], rel=1e-5)
    largest = max(abs(mine[i]["loss"] / reference[i]["loss"] - 1) for i in range(11, 21))
    print(f"resumed on two replicas: largest relative difference of a loss {largest:.1e}")


def test_killed_replicas_with_dropout_and_sharded_state(tmp_path: Path, prefixes: list[str]) -> None:
    """Random state of every rank comes back: dropout draws what it would have drawn."""
    changes = {**OVERLAPPED, "hidden_dropout": 0.1, "attention_dropout": 0.1}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert run(tmp_path / "logs1", command(prefixes, whole, **changes), ranks=2) == [0, 0]
    train_and_kill(tmp_path / "logs2", command(prefixes, cut, **changes), cut, 2)
    assert run(tmp_path / "logs3", command(prefixes, cut, **changes), ranks=2) == [0, 0]
    assert_bitwise(cut, whole)


def work_resume(flat: dict[str, Any], steps: int) -> tuple[Trace, dict[str, Any]]:
    """Resume, take steps; also the ledger's JSON."""
    trace = Trace()
    with open_session(flat) as session:
        take_steps(session, steps, trace)
        trace.consumed_samples = session.state.consumed_samples
        return trace, session.state.ledger


@pytest.fixture(scope="module")
def saved(pool: WorkerPool, prefixes: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Trace]:
    """A checkpoint after 5 of 20 steps, and the trace of all 20."""
    folder = tmp_path_factory.mktemp("saved")
    pool.run(1, work_train, options(prefixes[0], save=str(folder)), 5, True, join=False)
    return folder, pool.run(1, work_train, options(prefixes[0]), 20, join=False)[0]


def test_learning_rate_is_the_schedules(pool: WorkerPool, prefixes: list[str], saved: tuple[Path, Trace]) -> None:
    folder, whole = saved
    ((trace, _),) = pool.run(1, work_resume, options(prefixes[0], load=str(folder)), 15, join=False)
    assert trace.rates == whole.rates[5:] and trace.losses == whole.losses[5:]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lr": 5e-3}, "lr 0.002 -> 0.005"),
        ({"lr_decay_style": "linear"}, "lr_decay_style cosine -> linear"),
        ({"train_iters": 30}, "lr_decay_iters 20 -> 30"),
        ({"weight_decay": 0.2}, "weight_decay 0.1 -> 0.2"),
    ],
)
def test_another_schedule_is_refused_or_used_at_once(
    pool: WorkerPool, prefixes: list[str], saved: tuple[Path, Trace], changes: dict[str, Any], words: str
) -> None:
    flat = options(prefixes[0], changes, load=str(saved[0]))
    with pytest.raises(ValueError, match=words) as refused:
        pool.run(1, work_resume, flat, 1, join=False)
    assert "--override-opt-param-scheduler" in str(refused.value)
    ((trace, _),) = pool.run(1, work_resume, {**flat, "override_opt_param_scheduler": True}, 2, join=False)
    wanted = from_flat(flat)
    rates = [learning_rate(step, wanted.optimizer, wanted.training.train_iters) for step in (5, 6)]
    assert trace.rates == rates
    if "weight_decay" not in changes:
        assert rates != saved[1].rates[5:7]
        assert trace.losses[0] == saved[1].losses[5] and trace.losses[1] != saved[1].losses[6]


def test_fixed_decay_lets_a_run_grow(pool: WorkerPool, prefixes: list[str], tmp_path: Path) -> None:
    """With --lr-decay-iters the curve does not depend on --train-iters, so a longer run is the same run."""
    flat = options(prefixes[0], lr_decay_iters=20, train_iters=5, save=str(tmp_path))
    pool.run(1, work_train, flat, 5, True, join=False)
    grown = {**flat, "train_iters": 8, "save": None}
    ((trace, _),) = pool.run(1, work_resume, {**grown, "load": str(tmp_path)}, 3, join=False)
    assert trace.losses == pool.run(1, work_train, grown, 8, join=False)[0].losses[5:]


def test_appended_data_keeps_what_was_consumed(
    pool: WorkerPool, prefixes: list[str], saved: tuple[Path, Trace]
) -> None:
    folder, _ = saved
    flat = options(prefixes[0], load=str(folder), train_data_path=prefixes)
    with pytest.raises(ValueError, match="source 'two' is new: pass --append-data"):
        pool.run(1, work_resume, flat, 1, join=False)
    ((trace, json_after),) = pool.run(1, work_resume, {**flat, "append_data": True}, 3, join=False)
    assert trace.consumed_samples == 64
    before, after = Ledger.from_json(state_of(folder, 5)["ledger"]), Ledger.from_json(json_after)
    consumed = state_of(folder, 5)["consumed_samples"]
    assert consumed == 40 and [segment.start for segment in after.segments] == [0, 40]
    for old, new in zip(before.samples(0, 40), after.samples(0, 40), strict=True):
        assert np.array_equal(old, new)
    source, epoch, window = after.samples(0, sum(spec.windows for spec in after.sources))
    assert set(source[40:].tolist()) == {0, 1}
    seen = list(zip(source.tolist(), epoch.tolist(), window.tolist(), strict=True))
    assert len(set(seen)) == len(seen), "a window was repeated"


@pytest.mark.parametrize("append", [False, True])
def test_changed_data_is_refused(pool: WorkerPool, tmp_path: Path, append: bool) -> None:
    prefix = write_data(tmp_path, seed=0, name="corpus")
    pool.run(1, work_train, options(prefix, save=str(tmp_path / "run")), 2, True, join=False)
    write_data(tmp_path, seed=5, name="corpus")
    flat = options(prefix, load=str(tmp_path / "run"), append_data=append)
    with pytest.raises(ValueError, match="the content of source 'corpus' changed"):
        pool.run(1, work_resume, flat, 1, join=False)


def test_data_may_move(pool: WorkerPool, tmp_path: Path, prefixes: list[str], saved: tuple[Path, Trace]) -> None:
    for suffix in (".bin", ".idx"):
        shutil.copy(prefixes[0] + suffix, tmp_path / f"renamed{suffix}")
    flat = options(str(tmp_path / "renamed"), load=str(saved[0]))
    ((trace, _),) = pool.run(1, work_resume, flat, 2, join=False)
    assert trace.losses == saved[1].losses[5:7]
