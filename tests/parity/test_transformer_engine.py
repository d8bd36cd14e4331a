"""Transformer Engine's own modules, where the package is installed: their checkpoints are those of the torch backend.

They refuse to be built without a GPU, though they only need one to compute: here they are told that there is one.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from pool import WorkerPool
from test_engine_layers import FAMILIES, saved
from tiny_run import ROWS, options, start_world

from megatron_steel.config.load import from_flat
from megatron_steel.model import build
from megatron_steel.model.backends import have_transformer_engine

pytestmark = pytest.mark.skipif(not have_transformer_engine(), reason="needs Transformer Engine")


class Told:
    """A module that says of one thing what it is told, and is itself otherwise."""

    def __init__(self, module: Any, **told: Any) -> None:
        self.module = module
        vars(self).update(told)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


@contextmanager
def told_of_a_gpu() -> Iterator[None]:
    """Transformer Engine's modules, and nothing else, believe that there is a GPU; models are built of them."""
    base: Any = sys.modules["transformer_engine.pytorch.module.base"]  # megatron-core has imported it
    before, choose = base.torch, build.choose_backend
    base.torch = Told(torch, cuda=Told(torch.cuda, is_available=lambda: True))
    build.choose_backend = lambda name, size: ("transformer_engine", "told")
    try:
        yield
    finally:
        base.torch, build.choose_backend = before, choose


def work_states(flat: dict[str, Any]) -> tuple[Any, Any]:
    """What checkpoints of the torch backend and of Transformer Engine hold."""
    world = start_world(flat)
    theirs = saved(build.build_model(from_flat({**flat, "moe_grouped_gemm": False}), ROWS, world))
    with told_of_a_gpu():
        ours = saved(build.build_model(from_flat(flat), ROWS, world))
    return theirs, ours


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("family", [*FAMILIES, "grouped"])
def test_checkpoints_are_the_same(pool: WorkerPool, family: str, ranks: int) -> None:
    name = "qwen3_moe" if family == "grouped" else family
    flat = {**options("none"), "model_family": name, **FAMILIES[name], "moe_grouped_gemm": family == "grouped"}
    flat |= {"tensor_model_parallel_size": ranks, "sequence_parallel": ranks > 1}
    del flat["train_data_path"]
    for theirs, ours in pool.run(ranks, work_states, flat, timeout=120, join=False):
        assert ours == theirs, "names, shapes and first values"
