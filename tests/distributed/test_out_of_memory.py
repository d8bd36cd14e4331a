"""A full device ends a run with one line: what was being done, how much was in use, and what to change."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from pool import WorkerPool
from tiny_chats import chat_options, write_chats, write_model
from tiny_run import options, write_data

from megatron_steel.config.load import from_flat
from megatron_steel.train import loop, preflight, run
from megatron_steel.train.prepare import prepare
from megatron_steel.train.prepare_chat import prepare_chat

# As PyTorch words it.
MESSAGE = (
    "CUDA out of memory. Tried to allocate 2.25 GiB. GPU 0 has a total capacity of 79.18 GiB of which 1.03 GiB is free."
)
PLACES = {
    "train_step": loop,
    "evaluate": loop,
    "build_session": run,
    "run_micro_batches": preflight,
}


def work_fill(flat: dict[str, Any], place: str, after: int) -> tuple[int, str]:
    """Run with a device that is full when ``place`` has been called ``after`` times; exit code, and what was said."""
    module, calls = PLACES[place], 0
    original = getattr(module, place)

    def full(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > after:
            raise torch.OutOfMemoryError(MESSAGE)
        return original(*args, **kwargs)

    config = from_flat(flat)
    prepared = prepare_chat(config) if config.chat.train_data else prepare(config)
    setattr(module, place, full)
    try:
        with tempfile.TemporaryFile("w+") as said, contextlib.redirect_stderr(said):
            code = run.run(prepared)
            said.seek(0)
            return code, said.read()
    finally:
        setattr(module, place, original)


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_data(tmp_path_factory.mktemp("data"))


def fill(pool: WorkerPool, flat: dict[str, Any], place: str, after: int = 0) -> str:
    code, said = pool.run(1, work_fill, flat, place, after, join=False)[0]
    assert code == 1 and said.count("\n") == 1 and said.startswith("error: rank 0: ")
    assert " GiB were in use at most and 2.25 GiB more were asked for; try " in said
    return str(said)


def test_a_step_names_itself_and_what_helps(pool: WorkerPool, prefix: str) -> None:
    said = fill(pool, options(prefix), "train_step", after=2)
    assert said.startswith("error: rank 0: iteration 3: the memory of ")
    assert said.rstrip().endswith(
        "try --micro-batch-size below 2 (the step stays the same), --cross-entropy-chunk-size 512, "
        "--recompute-granularity full, --optimizer-cpu-offload, a shorter --seq-length, "
        "more devices (--tensor-model-parallel-size)"
    )


def test_what_is_used_already_is_not_advised(pool: WorkerPool, prefix: str) -> None:
    flat = options(
        prefix,
        micro_batch_size=1,
        recompute_granularity="full",
        recompute_method="uniform",
        recompute_num_layers=1,
        cross_entropy_chunk_size=16,
        optimizer_cpu_offload=True,
    )
    said = fill(pool, flat, "build_session")
    assert "rank 0: building model and optimizer: the memory" in said
    assert said.rstrip().endswith("try a shorter --seq-length, more devices (--tensor-model-parallel-size)")


def test_evaluation_and_preflight(pool: WorkerPool, prefix: str, tmp_path: Path) -> None:
    flat = options(prefix, valid_data_path=[prefix], eval_interval=2, eval_iters=1)
    assert "rank 0: evaluation after iteration 2: the memory" in fill(pool, flat, "evaluate")
    model, data = write_model(tmp_path / "model"), write_chats(tmp_path / "rows.jsonl", 20)
    said = fill(pool, chat_options(model, data, preflight=True), "run_micro_batches")
    assert "rank 0: the widest micro-batch (2 x " in said
