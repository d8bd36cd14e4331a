"""What every test shares: megatron-core made to run on this machine, and ranks for distributed tests."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

from megatron_steel.runtime import cpu, device, quiet

# Before any test module is imported: many of them import megatron.core.
cpu.install()
# Tiny models gain nothing from more, and wait long for each other's threads where the cores are busy.
torch.set_num_threads(1)

# tests/ is no package; the directory is needed to import the pool from every kind of test.
sys.path.insert(0, str(Path(__file__).parent / "distributed"))

from pool import WorkerPool  # noqa: E402

# The same examples in every run, so that a change and nothing else turns a test red; --hypothesis-profile=default looks
# for new ones. A busy machine is no failure: pytest's own timeout catches what hangs.
hypothesis.settings.register_profile("steel", deadline=None, derandomize=True)
hypothesis.settings.load_profile("steel")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked ``gpu`` on a machine without one."""
    if not device.has_gpu():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


def pytest_configure(config: pytest.Config) -> None:
    """pytest resets the warning filters for each test; the messages a run drops say nothing in tests either."""
    for message in quiet.WARNINGS:
        start = re.escape(message.start).replace(":", r"\x3a")
        config.addinivalue_line("filterwarnings", f"ignore:{start}:{message.category.__name__}")


@pytest.fixture(scope="session")
def pool() -> Iterator[WorkerPool]:
    """Ranks for ``pool.run(world_size, function, *args)``; started at the first use, reused by all tests."""
    workers = WorkerPool()
    yield workers
    workers.close()
