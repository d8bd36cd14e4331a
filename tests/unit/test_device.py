"""Facts about the device, seen from outside; signals that ask a run to stop."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from megatron_steel.runtime import device, signals, world
from megatron_steel.runtime.signals import StopRequest


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA H20", 148e12),
        ("NVIDIA GH200 480GB", 989.4e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
    ],
)
def test_peak_of_a_known_gpu_is_its_own(monkeypatch: pytest.MonkeyPatch, name: str, peak: float) -> None:
    """Names that contain each other (L4 in L40S, H20 in H200) must not be mixed up."""
    monkeypatch.setattr(device, "has_gpu", lambda: True)
    monkeypatch.setattr(device, "device_name", lambda: name)
    found, how = device.peak_flops(torch.bfloat16)
    assert found == peak and how.startswith("data sheet")


def test_unknown_gpu_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "has_gpu", lambda: True)
    monkeypatch.setattr(device, "device_name", lambda: "NVIDIA X9000")
    monkeypatch.setattr(device, "measured_flops", lambda dtype: 1e12)
    assert device.peak_flops(torch.bfloat16) == (1e12, "measured bfloat16 matmul")


@pytest.mark.skipif(torch.cuda.is_available(), reason="facts of a machine without CUDA")
def test_facts_on_a_cpu() -> None:
    assert device.device() == device.bind(3) == torch.device("cpu")
    assert (device.backend(), device.supports_bf16(), device.get_rng_state()) == ("gloo", True, None)
    state = torch.get_rng_state()
    start = time.perf_counter()
    rate, how = device.peak_flops(torch.float32)
    assert time.perf_counter() - start < 5 and how == "measured float32 matmul"
    start = time.perf_counter()
    assert device.peak_flops(torch.float32)[0] == rate and time.perf_counter() - start < 0.01
    assert torch.equal(torch.get_rng_state(), state)
    # Not more than a wide-vector core could do, not less than a slow one.
    assert 1e9 < rate < 1e12 * (os.cpu_count() or 1)


def test_uploads_wait_for_nothing() -> None:
    values = torch.arange(3)
    assert device.upload(values, torch.device("cpu")) is values

    class Pinned:
        """Writes down how a copy is made."""

        steps: list[object] = []

        def pin_memory(self) -> Pinned:
            self.steps.append("pinned")
            return self

        def to(self, where: torch.device, non_blocking: bool) -> Pinned:
            self.steps.append((where.type, non_blocking))
            return self

    device.upload(Pinned(), torch.device("meta"))  # type: ignore[arg-type]
    assert Pinned.steps == ["pinned", ("meta", True)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU counts its own memory")
def test_peak_memory_is_what_the_kernel_says() -> None:
    lines = Path("/proc/self/status").read_text().splitlines()
    (kernel,) = (1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    assert device.peak_memory_bytes() == pytest.approx(kernel, rel=0.02)


@pytest.mark.parametrize(
    ("environment", "local_size", "given"),
    [
        ({}, 1, None),
        ({}, 1000, 1),
        ({"OMP_NUM_THREADS": "1"}, 1, "kept"),
        ({"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "x"}, 1000, 1),
        ({"OMP_NUM_THREADS": "3", "TORCHELASTIC_RUN_ID": "x"}, 2, "kept"),
    ],
)
def test_threads(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], local_size: int, given: int | str | None
) -> None:
    before, calls = torch.get_num_threads(), []
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch, "set_num_threads", calls.append)
    assert world.set_threads(local_size) == before
    assert calls == ([] if given == "kept" else [given or len(os.sched_getaffinity(0))])


def test_first_signal_is_kept_and_a_repeat_is_not_a_second() -> None:
    handler = signal.getsignal(signal.SIGUSR1)
    with StopRequest() as stop:
        assert not stop
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop and stop.signal_name == "SIGUSR1"
    assert signal.getsignal(signal.SIGUSR1) is handler


def test_second_signal_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "REPEAT_SECONDS", 0.0)
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal_name == "SIGINT"
        with pytest.raises(SystemExit) as ended:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
    assert ended.value.code == 1


KEEP = """
import resource
import torch
from megatron_steel.runtime import device
told, faults = device.keep_freed_memory(), []
for _ in range(8):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step = [torch.ones(size * 2**20) for size in (4, 4, 4, 20)]
    del step
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(told, min(faults))
"""


def test_freed_memory_is_kept_for_the_next_step() -> None:
    """What a step freed comes back without new pages, the largest block too; in a process whose heap nobody cut up."""
    done = subprocess.run([sys.executable, "-c", KEEP], capture_output=True, text=True, check=True)
    told, faults = done.stdout.split()
    if told == "False":
        pytest.skip("the C library has no mallopt")
    assert int(faults) < 128 * 2**20 // resource.getpagesize() / 10
