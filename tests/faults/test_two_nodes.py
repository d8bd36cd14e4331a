"""Two machines, as two network namespaces with a cable between them: they train together, and end when it is cut.

Needs root and the right to make network namespaces; skipped elsewhere.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from megatron_steel.metrics.sinks import METRICS_FILE, read_metrics

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("steel-a", "steel-b")
ADDRESSES = ("10.213.7.1", "10.213.7.2")
TIMEOUT_SECONDS = 12


def ip(*words: str) -> None:
    """One command of iproute2; ``CalledProcessError`` when it fails."""
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def nodes() -> Iterator[tuple[str, str]]:
    """Two namespaces, each with one end of a cable called eth0."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("needs root and iproute2")
    try:
        for name in NAMES:
            ip("netns", "add", name)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error.stderr.decode().strip()}")
    try:
        ip("link", "add", "eth0", "netns", NAMES[0], "type", "veth", "peer", "name", "eth0", "netns", NAMES[1])
        for name, address in zip(NAMES, ADDRESSES, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                ip("-n", name, "link", "set", device, "up")
        yield NAMES
    finally:
        for name in NAMES:
            ip("netns", "del", name)


def start(node: int, folder: Path) -> subprocess.Popen[str]:
    """The example on one node, one CPU rank on each."""
    settings = {
        "NNODES": "2", "NODE_RANK": str(node), "MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": "29517",
        "RANKS_PER_NODE": "1", "GPUS_PER_NODE": "0", "STEEL_PYTHON": sys.executable, "OUTPUT_DIR": str(folder),
        "TRAIN_ITERS": "100000", "SEQ_LENGTH": "64", "LOG_INTERVAL": "1", "GLOO_SOCKET_IFNAME": "eth0",
        "OMP_NUM_THREADS": "1", "STEPS": "data train",
    }  # fmt: skip
    timeout = ["--distributed-timeout-minutes", str(TIMEOUT_SECONDS / 60)]
    command = ["ip", "netns", "exec", NAMES[node], "bash", str(ROOT / "examples/pretrain_1b.sh"), *timeout]
    return subprocess.Popen(
        [*command, "--max-epochs-per-source", "1000"],
        env={**os.environ, **settings}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip


def stop(process: subprocess.Popen[str]) -> None:
    """End a node: its shell, its torchrun and its rank."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def test_a_cut_cable_ends_both_nodes_with_the_cause(nodes: tuple[str, str], tmp_path: Path) -> None:
    metrics = tmp_path / "checkpoints" / METRICS_FILE
    processes = [start(node, tmp_path) for node in (0, 1)]
    try:
        deadline = time.monotonic() + 120
        while not (metrics.is_file() and read_metrics(metrics)[-1:]):
            assert time.monotonic() < deadline and all(process.poll() is None for process in processes)
            time.sleep(0.1)
        ip("-n", nodes[0], "link", "set", "eth0", "down")
        cut = time.monotonic()
        errors = [process.communicate(timeout=120)[1] for process in processes]
        # The timeout of the group, the wait for a note of the other rank, the end of torchrun.
        assert time.monotonic() - cut < TIMEOUT_SECONDS + 60
        assert all(process.returncode == 1 for process in processes)
        # The store of notes is on the first node: the second can ask nobody who is gone.
        for node, lost in enumerate(("rank 1", "the node of rank 0")):
            expected = f"error: rank {node}: lost contact with {lost} (no answer within the timeout)"
            assert expected in errors[node].splitlines(), errors[node]
    finally:
        for process in processes:
            stop(process)
