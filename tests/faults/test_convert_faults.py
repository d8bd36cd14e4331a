"""Conversions that are stopped or run out of disk while tensors are written: nothing stays, one line says why."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from pool import WorkerPool

from megatron_steel.checkpoint.hf import import_hf

REPOSITORY = Path(__file__).parents[2]
sys.path.insert(0, str(REPOSITORY / "tests" / "parity"))

import hf_models  # noqa: E402

# One tensor takes a quarter of a second, all of them a minute on two threads.
SLOW = """
import sys, time
from megatron_steel.checkpoint import dcp_write, safetensors_file
def slow(real):
    def call(*args, **named):
        print("writing", flush=True)
        time.sleep(0.25)
        return real(*args, **named)
    return call
dcp_write.torch.save = slow(dcp_write.torch.save)
safetensors_file.NewFile.write = slow(safetensors_file.NewFile.write)
from tools.convert_hf import main
sys.exit(main(sys.argv[1:]))
"""
PATIENCE = 8.0


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``hf``, a model of many tensors, and ``ours``, imported from it."""
    root = tmp_path_factory.mktemp("convert")
    hf_models.make_model("qwen2-tied", num_hidden_layers=40, vocab_size=1000).save_pretrained(root / "hf")
    import_hf(root / "hf", root / "ours")
    return root


def arguments(made: Path, command: str, target: Path) -> list[str]:
    """The command line that writes to ``target``."""
    source = {"import": ["--hf", made / "hf", "--save"], "export": ["--load", made / "ours", "--hf"]}[command]
    return [command, *map(str, source), str(target)]


@pytest.mark.parametrize("command", ["import", "export"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["sigterm", "ctrl-c"])
def test_stopped_in_the_middle(made: Path, tmp_path: Path, command: str, number: signal.Signals) -> None:
    """It ends with the tensors that are being written, not with all, and takes away what it wrote."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    argv = [sys.executable, "-c", SLOW, *arguments(made, command, tmp_path / "deep" / "target")]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment) as process:
        assert process.stdout is not None and process.stdout.readline().startswith(b"writing")
        assert list(tmp_path.iterdir())
        began = time.monotonic()
        os.kill(process.pid, number)
        process.stdout.read()
        assert process.wait(60) != 0
    assert time.monotonic() - began < PATIENCE
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["import", "export"])
def test_full_disk(pool: WorkerPool, made: Path, make_disk: Callable[[int], Path], command: str) -> None:
    """One line, and the disk is as empty as before."""
    size = sum(path.stat().st_size for path in (made / "hf").glob("*.safetensors"))
    disk = make_disk(max(size // 2, 1 << 16))
    free = shutil.disk_usage(disk).free
    argv = arguments(made, command, disk / "deep" / "target")
    code, out, err = pool.run(1, hf_models.work_convert, argv, join=False)[0]
    assert (code, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1, err
    assert "No space left on device" in err, err
    assert list(disk.iterdir()) == [] and shutil.disk_usage(disk).free == free
