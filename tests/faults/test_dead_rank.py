"""A rank that is killed, or stops answering: the others end with one line and exit code 1 within a bounded time."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
TIMEOUT_SECONDS = 6

SCRIPT = f"""
def main():
    import os, signal, sys, torch
    from megatron_steel.runtime import contact, world
    here = world.start(timeout_minutes={TIMEOUT_SECONDS} / 60)
    with contact.watching(here):
        world.barrier(here)
        if here.rank == 1:
            os.kill(os.getpid(), int(sys.argv[1]))
        world.agree(here, False)
if __name__ == "__main__":
    main()
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize(
    ("number", "reason"),
    [(signal.SIGKILL, "connection closed"), (signal.SIGSTOP, "no answer within the timeout")],
    ids=["killed", "stopped"],
)
def test_survivor_ends(tmp_path: Path, number: signal.Signals, reason: str) -> None:
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, script, str(int(number))],
            env={**os.environ, **common, "PYTHONPATH": str(REPOSITORY), "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        start = time.monotonic()
        _, words = ranks[0].communicate(timeout=90)
        assert ranks[0].returncode == 1
        assert words == f"error: rank 0: lost contact with rank 1 ({reason})\n"
        # Start-up, the timeout of the group, the wait for the other's note, the exit.
        assert time.monotonic() - start < TIMEOUT_SECONDS + 60
    finally:
        for process in ranks:
            process.kill()
            process.communicate()
