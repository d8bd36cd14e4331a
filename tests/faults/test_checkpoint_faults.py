"""Damaged checkpoints are refused by name; an interrupted or failed save leaves the one before it intact."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from command_line import as_flags, finish, run, start, training_rows, wait_for_iteration
from pool import WorkerPool
from tiny_run import SHARDED, Trace, open_session, options, take_steps, work_train, write_data

from megatron_steel.checkpoint.files import problem_with

ITERATION = "iter_0000002"


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def checkpoint(pool: WorkerPool, prefix: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The --save directory of a run of two steps on two replicas."""
    folder = tmp_path_factory.mktemp("checkpoint")
    pool.run(2, work_train, options(prefix, SHARDED, save=str(folder)), 2, True, join=False)
    return folder


def files_of(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def work_load(flat: dict[str, Any]) -> int:
    """Load and take a step; the iteration it started at."""
    with open_session(flat) as session:
        started = session.state.iteration
        take_steps(session, 1, Trace())
    return started


def damage(path: Path, how: str) -> None:
    if how == "delete":
        path.unlink()
        return
    with open(path, "r+b") as file:
        size = path.stat().st_size
        if how == "truncate":
            file.truncate(size // 2)
        else:
            file.seek(size // 2)
            byte = file.read(1)[0]
            file.seek(size // 2)
            file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("how", ["flip", "truncate", "delete"])
def test_every_file_is_guarded(pool: WorkerPool, prefix: str, checkpoint: Path, tmp_path: Path, how: str) -> None:
    """Each file in turn, the manifest included; the message names it, and nothing has been built or written."""
    names = files_of(checkpoint / ITERATION)
    kinds = ("state.json", ".distcp", "common.pt", ".metadata", "metadata.json", "rng_00001.safetensors", "manifest")
    assert all(any(kind in name for name in names) for kind in kinds), names
    flat = options(prefix, SHARDED, load=str(tmp_path / "copy"), save=str(tmp_path / "save"))
    for name in names:
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        shutil.copytree(checkpoint, tmp_path / "copy")
        damaged = tmp_path / "copy" / ITERATION / name
        damage(damaged, how)
        with pytest.raises(ValueError) as refused:
            pool.run(1, work_load, flat, join=False)
        message = str(refused.value)
        if name == "manifest.json" and how == "flip":
            assert ITERATION in message
        else:
            assert str(damaged) in message, message
        assert not (tmp_path / "save").exists()


def test_changed_byte_on_the_command_line(checkpoint: Path, prefix: str, tmp_path: Path) -> None:
    """One line and exit code 2 from the first rank, also when several ranks start; the others do not go on alone."""
    shutil.copytree(checkpoint, tmp_path / "copy")
    name = next(name for name in files_of(checkpoint / ITERATION) if name.endswith(".distcp"))
    damage(tmp_path / "copy" / ITERATION / name, "flip")
    flags = as_flags(options(prefix, SHARDED, load=str(tmp_path / "copy"), save=str(tmp_path / "save")))
    processes = start(tmp_path / "logs", flags, ranks=2)
    try:
        assert processes[0].wait(60) == 2
    finally:
        # What a launcher does when a rank has failed.
        processes[1].terminate()
        other = finish(processes)[1]
    error = (tmp_path / "logs" / "err0").read_text()
    assert error.startswith("error: ") and error.count("\n") == 1 and f"{name} has changed" in error, error
    assert other != 0 and not (tmp_path / "save").exists()


def test_auto_resume_passes_over_an_incomplete_checkpoint(
    pool: WorkerPool, prefix: str, checkpoint: Path, tmp_path: Path
) -> None:
    """The newest that is whole is taken; without one the run is refused, not started anew."""
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)
    flat = options(prefix, SHARDED, save=str(copy), auto_resume=True)
    shutil.copytree(copy / ITERATION, copy / "iter_0000004")
    (copy / "iter_0000004" / "state.json").unlink()
    (copy / "latest_checkpointed_iteration.txt").write_text("4")
    assert pool.run(1, work_load, flat, join=False) == [2]
    (copy / ITERATION / "state.json").unlink()
    with pytest.raises(ValueError, match="state.json is missing"):
        pool.run(1, work_load, flat, join=False)


@pytest.mark.parametrize("content", ["", "garbage", "7", "\u0662", "-1"])
def test_tracker_that_names_nothing(
    pool: WorkerPool, prefix: str, checkpoint: Path, tmp_path: Path, content: str
) -> None:
    shutil.copytree(checkpoint, tmp_path / "copy")
    (tmp_path / "copy" / "latest_checkpointed_iteration.txt").write_text(content, encoding="utf-8")
    assert pool.run(1, work_load, options(prefix, SHARDED, load=str(tmp_path / "copy")), join=False) == [2]


# Runs the program and kills it, while it saves iteration 4, at a function of checkpoint/store.py or files.py
# (``module.function`` or ``module.function:part of its first argument``), or as soon as a tensor file appears.
SCRIPT = """
import os, signal, sys, threading, time
from pathlib import Path
point, sys.argv = sys.argv[1], [sys.argv[0], *sys.argv[2:]]
save = Path(sys.argv[sys.argv.index("--save") + 1])

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def watch():
    while not list(save.glob("iter_0000004.tmp/*.distcp")):
        time.sleep(0.0005)
    die()

def wrap(module, name, argument):
    real = getattr(module, name)
    def deadly(*args, **kwargs):
        first = save / ("iter_0000004" if name in ("write_text", "remove_old") else "iter_0000002")
        if first.is_dir() and argument in str(args[0]):
            die()
        return real(*args, **kwargs)
    setattr(module, name, deadly)

def main():
    from megatron_steel.runtime import cpu
    cpu.install()
    from megatron_steel.checkpoint import files, store
    if point == "a tensor file":
        threading.Thread(target=watch, daemon=True).start()
    else:
        where, _, argument = point.partition(":")
        module, name = where.split(".")
        wrap({"store": store, "files": files}[module], name, argument)
    from megatron_steel.pretrain import main as pretrain
    sys.exit(pretrain())

if __name__ == "__main__":
    main()
"""

POINTS = [
    "a tensor file",
    "store.model_state",
    "store.save_file",
    "files.describe_files",
    "files.publish",
    "files.write_json:manifest",
    "files.write_text:latest",
    "files.remove_old",
]


def output_of(process: psutil.Process) -> str:
    """The file a process writes its output into; empty where we may not look."""
    try:
        return os.readlink(f"/proc/{process.pid}/fd/1")
    except OSError:
        return ""


def left_behind(folder: Path) -> list[psutil.Process]:
    """Processes that still write their output into a folder, once those that are ending have had time to."""
    deadline = time.monotonic() + 5.0
    while True:
        found = [process for process in psutil.process_iter() if output_of(process).startswith(str(folder))]
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.05)


@pytest.mark.parametrize("point", POINTS)
def test_killed_while_saving(pool: WorkerPool, prefix: str, tmp_path: Path, point: str) -> None:
    """Whatever the moment, a whole checkpoint is there, the run goes on from it, and its losses are the same."""
    (tmp_path / "script.py").write_text(SCRIPT)
    save = tmp_path / "save"
    flat = options(prefix, train_iters=6, save_interval=2, save=str(save), log_interval=1, auto_resume=True)
    codes = run(tmp_path / "logs", as_flags(flat), program=[str(tmp_path / "script.py"), point])
    assert codes == [-signal.SIGKILL], (tmp_path / "logs" / "err0").read_text()
    assert left_behind(tmp_path) == []
    # The tracker decides: a checkpoint it does not name yet is whole, but the run goes on from the one before.
    newest = 4 if point == "files.remove_old" else 2
    assert (save / "latest_checkpointed_iteration.txt").read_text() == str(newest)
    assert (save / "iter_0000004").is_dir() == (point in ("files.write_text:latest", "files.remove_old"))
    published = sorted(path.name for path in save.glob("iter_???????"))
    assert all(problem_with(save / name, hashes=True) is None for name in published), published
    alone = {**flat, "save": None, "auto_resume": False, "save_interval": None}
    assert pool.run(1, work_load, {**alone, "load": str(save)}, join=False) == [newest]
    reference = pool.run(1, work_train, alone, 6, join=False)[0]
    (trace,) = pool.run(1, work_train, flat, 6 - newest, True, join=False)
    assert trace.losses == reference.losses[newest:]
    assert not [path.name for path in save.iterdir() if path.suffix in (".tmp", ".old")]
    assert problem_with(save / "iter_0000006", hashes=True) is None


@pytest.fixture
def small_disk(checkpoint: Path, make_disk: Callable[[int], Path]) -> Path:
    """A file system with room for one checkpoint and a half."""
    used = sum(-(-path.stat().st_size // 4096) * 4096 for path in (checkpoint / ITERATION).rglob("*") if path.is_file())
    return make_disk(used * 3 // 2)


def test_full_disk(pool: WorkerPool, prefix: str, small_disk: Path, tmp_path: Path) -> None:
    """The second save does not fit: every rank ends with one line and exit code 1, the first checkpoint is whole."""
    save = small_disk / "run"
    flat = options(prefix, SHARDED, save=str(save), save_interval=2, train_iters=4, log_interval=1)
    codes = run(tmp_path / "logs", as_flags(flat), ranks=2)
    errors = [(tmp_path / "logs" / f"err{rank}").read_text() for rank in (0, 1)]
    assert codes == [1, 1], errors
    for rank, error in enumerate(errors):
        line = error.strip().splitlines()[-1]
        assert line.startswith(f"error: rank {rank}: saving {save}/iter_0000004: "), error
        assert "bytes are free on that disk" in line
        assert "Traceback" not in error
    assert [path.name for path in save.glob("iter_???????")] == [ITERATION]
    assert (save / "latest_checkpointed_iteration.txt").read_text() == "2"
    assert problem_with(save / ITERATION, hashes=True) is None
    print("\n".join(error.strip().splitlines()[-1] for error in errors))
    load = options(prefix, SHARDED, load=str(save), train_iters=4)
    assert pool.run(2, work_load, load, join=False) == [2, 2]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_signal_saves_and_ends(pool: WorkerPool, prefix: str, tmp_path: Path, number: signal.Signals) -> None:
    """One of two ranks gets the signal; both finish the step, save, and exit with 0. The run goes on bitwise."""
    save = tmp_path / "save"
    flat = options(prefix, SHARDED, save=str(save), train_iters=4000, max_epochs_per_source=1e6, log_interval=1)
    processes = start(tmp_path / "logs", as_flags(flat), ranks=2)
    try:
        wait_for_iteration(processes, save, 5)
        seen, sent = max(training_rows(save)), time.monotonic()
        processes[1].send_signal(number)
    finally:
        codes = finish(processes, 60)
    assert codes == [0, 0], (tmp_path / "logs" / "err0").read_text()
    took = time.monotonic() - sent
    last = max(training_rows(save))
    print(f"{number.name} at iteration {seen}: saved iteration {last} and left after {took:.1f} s")
    # A few steps may pass until the signal has arrived; a step here takes milliseconds.
    assert seen <= last <= seen + 20
    assert (save / "latest_checkpointed_iteration.txt").read_text() == str(last)
    assert "a signal asked for it" in (tmp_path / "logs" / "out0").read_text()
    alone = {**flat, "save": None}
    reference = pool.run(2, work_train, alone, last + 2, join=False)[0]
    trace = pool.run(2, work_train, {**alone, "load": str(save)}, 2, join=False)[0]
    assert trace.losses == reference.losses[last:]
