"""The Triton kernels in Triton's interpreter, in a process of their own: it is told before Triton is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest

from megatron_steel.model.kernels import choice

HERE = Path(__file__).parent


def interprets() -> bool:
    """Triton 3.6's interpreter makes numbers of arrays of one element, which numpy 2.4 no longer does."""
    return version("triton") >= "3.7" or np.lib.NumpyVersion(np.__version__) < "2.4.0"


@pytest.mark.skipif(not choice.has_triton(), reason="Triton has no wheels for this system")
def test_kernels_in_the_interpreter() -> None:
    if not interprets():
        pytest.skip("Triton before 3.7 interprets with numpy before 2.4 only")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "interpreted_kernels.py")]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, cwd=HERE.parents[1], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert " passed" in result.stdout and "skipped" not in result.stdout


@pytest.mark.skipif(not choice.has_triton(), reason="Triton has no wheels for this system")
def test_kernels_compile_for_hopper(tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, str(HERE / "compiled_kernels.py")]
    result = subprocess.run(command, cwd=HERE.parents[1], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    assert len(result.stdout.splitlines()) == 9


def test_layers_need_no_triton() -> None:
    """Nothing imports it before a tensor on a GPU comes: a CPU-only installation has none."""
    code = """
import sys
sys.modules["triton"] = None
from megatron_steel.model import attention, cross_entropy, mlp, norms, output
from megatron_steel.model.kernels import choice
import torch
x = torch.randn(2, 8)
norms.rms_norm(x, x[0], 1e-6), mlp.swiglu(x), cross_entropy.cross_entropy(x, torch.tensor([1, 2]), 8, None)
assert not [name for name in sys.modules if name.startswith("megatron_steel.model.kernels.") and "choice" not in name]
"""
    subprocess.run([sys.executable, "-c", code], cwd=HERE.parents[1], check=True, timeout=120)
