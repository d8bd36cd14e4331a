"""Two runs of one layout are equal to the bit; --deterministic-mode refuses what could change that."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pool import WorkerPool
from test_layouts import compare
from tiny_run import OVERLAPPED, Trace, options, work_train, write_data

from megatron_steel.runtime.deterministic import ENVIRONMENT, make_deterministic

STEPS = 4
MIXTURE = {"model_family": "mixtral", "add_qkv_bias": False, "num_experts": 4}


def work_repeat(flat: dict[str, Any]) -> tuple[Trace, bool]:
    """Train in deterministic mode; and whether it refused an operation without an order."""
    make_deterministic()
    try:
        trace = work_train(flat, STEPS)
        try:
            torch.zeros(4).put_(torch.tensor([1, 1]), torch.tensor([1.0, 2.0]))
        except RuntimeError:
            return trace, True
        return trace, False
    finally:
        torch.use_deterministic_algorithms(False)


def test_two_runs_are_equal_to_the_bit(pool: WorkerPool, tmp_path: Path) -> None:
    """In a layout where gradients are added up by several threads; and the mode changes no result by itself."""
    flat = options(write_data(tmp_path), OVERLAPPED, MIXTURE, train_iters=STEPS, hidden_dropout=0.1)
    first, second = (pool.run(2, work_repeat, {**flat, "deterministic_mode": True}, join=False) for _ in range(2))
    assert all(refused for _, refused in first + second)
    for (one, _), (two, _) in zip(first, second, strict=True):
        assert one.losses == two.losses and one.grad_norms == two.grad_norms
        assert all(np.array_equal(one.weights[name], two.weights[name]) for name in one.weights)
    compare([trace for trace, _ in first], pool.run(2, work_train, flat, STEPS, join=False))


def test_what_the_environment_gets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NCCL_ALGO", "Tree")
    monkeypatch.setenv("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "1")
    try:
        make_deterministic()
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["NCCL_ALGO"] == "Tree" and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        assert os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] == "0"
    finally:
        torch.use_deterministic_algorithms(False)
