"""Pretraining started the way a user starts it: processes, flags, exit codes, files."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_steel.metrics.sinks import METRICS_FILE, read_metrics

ROOT = Path(__file__).resolve().parents[2]
POLL_SECONDS = 0.005


def as_flags(values: dict[str, Any]) -> list[str]:
    """``{"train_iters": 5, "bf16": True}`` as ``--train-iters 5 --bf16``."""
    flags: list[str] = []
    for name, value in values.items():
        dashed = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{dashed}" if value else f"--no-{dashed}")
        elif value is not None:
            flags += [f"--{dashed}", *([str(item) for item in value] if isinstance(value, list) else [str(value)])]
    return flags


def free_port() -> int:
    """A port nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(folder: Path, flags: Sequence[str], ranks: int = 1, program: Sequence[str] = ()) -> list[subprocess.Popen]:
    """Start the ranks of a run with the environment torchrun gives them; output goes to files in ``folder``."""
    command = [sys.executable, *(program or ("-m", "megatron_steel.pretrain")), *flags]
    common = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    if ranks > 1:
        common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
    processes = []
    folder.mkdir(parents=True, exist_ok=True)
    for rank in range(ranks):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(ranks)} if ranks > 1 else {}
        with open(folder / f"out{rank}", "w") as out, open(folder / f"err{rank}", "w") as err:
            processes.append(
                subprocess.Popen(
                    command, env={**os.environ, **common, **own}, stdout=out, stderr=err, cwd=folder, text=True
                )
            )
    return processes


def finish(processes: Sequence[subprocess.Popen], timeout: float = 120.0) -> list[int]:
    """Exit codes of all ranks; whatever still runs after ``timeout`` seconds is killed and fails the test."""
    deadline = time.monotonic() + timeout
    try:
        return [process.wait(max(0.1, deadline - time.monotonic())) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def run(folder: Path, flags: Sequence[str], ranks: int = 1, program: Sequence[str] = ()) -> list[int]:
    """Start, wait, return the exit codes."""
    return finish(start(folder, flags, ranks, program))


def wait_for_iteration(processes: Sequence[subprocess.Popen], save: Path, iteration: int, timeout: float = 90) -> None:
    """Return when metrics.jsonl holds a row of this iteration or a later one."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if (save / METRICS_FILE).is_file():
            rows = read_metrics(save / METRICS_FILE)
            if rows and rows[-1]["iteration"] >= iteration:
                return
        assert all(process.poll() is None for process in processes), "the run ended early"
        time.sleep(POLL_SECONDS)
    raise TimeoutError(f"iteration {iteration} was not reached")


def training_rows(save: Path) -> dict[int, dict[str, Any]]:
    """The training rows of metrics.jsonl by iteration."""
    rows = read_metrics(save / METRICS_FILE)
    return {row["iteration"]: row for row in rows if row.get("split") != "valid"}
