"""The training step on a GPU: it never waits, skips without a trace, adds weight gradients in fp32, resumes exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import as_flags, run
from pool import WorkerPool
from test_bad_steps import work_bad_step
from tiny_chats import chat_options, write_chats, write_model
from tiny_run import OPTIONS, Trace, open_session, options, take_steps, write_data

from megatron_steel.metrics.sinks import METRICS_FILE, read_metrics
from megatron_steel.model.weight_gradients import add_weight_gradient, widens
from megatron_steel.optim.optimizer import square_sums
from megatron_steel.train.loop import reason_to_stop, take_step

pytestmark = pytest.mark.gpu

BF16 = {"bf16": True}
# Heads of a width that every attention kernel takes.
WIDE = {"hidden_size": 256, "ffn_hidden_size": 512, "seq_length": 128, "max_position_embeddings": 128}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
CASES: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": BF16,
    "pure bf16": {**BF16, "pure_bf16": True},
    "sharded": {**BF16, "use_distributed_optimizer": True},
    "recomputed": {**BF16, **FULL},
    "chunked loss": {**BF16, "cross_entropy_chunk_size": 64},
    "packed documents": {**BF16, "reset_attention_mask": True, "reset_position_ids": True},
    "loss masked at ends": {**BF16, "eod_mask_loss": True},
}


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_data(tmp_path_factory.mktemp("data"))


def work_steadily(flat: dict[str, Any]) -> list[float]:
    """Steps in which PyTorch raises where it would wait for the device, after some that may; the losses."""
    trace = Trace()
    with open_session(flat) as session:
        take_steps(session, 3, trace)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(3):
                take_step(session)
                assert reason_to_stop(session) is None
        finally:
            torch.cuda.set_sync_debug_mode("default")
        take_steps(session, 1, trace)
    return trace.losses


@pytest.mark.parametrize("case", CASES)
def test_steady_step_waits_for_nothing(pool: WorkerPool, prefix: str, case: str) -> None:
    flat = options(prefix, WIDE, CASES[case], transformer_impl="torch")
    (losses,) = pool.run(1, work_steadily, flat, timeout=300, join=False)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("packing", [True, False])
def test_steady_finetuning_waits_for_nothing(pool: WorkerPool, tmp_path: Path, packing: bool) -> None:
    model, data = write_model(tmp_path / "model"), write_chats(tmp_path / "rows.jsonl", 40)
    flat = chat_options(model, data, packing=packing, bf16=True, transformer_impl="torch", train_iters=8)
    pool.run(1, work_steadily, flat, timeout=300, join=False)


@pytest.mark.parametrize(
    "flags", [{}, BF16, {**BF16, "use_distributed_optimizer": True}, {"optimizer_cpu_offload": True}]
)
def test_bad_gradient_leaves_every_byte(pool: WorkerPool, prefix: str, flags: dict[str, Any]) -> None:
    flat = options(prefix, flags, lr_warmup_iters=0, transformer_impl="torch")
    (found,) = pool.run(1, work_bad_step, flat, float("nan"), timeout=300, join=False)
    assert found["kept"] and found["moved"] > 0.8
    assert found["names"] == ["exp_avg", "exp_avg_sq", "main", "model", "step"]
    assert found["nan_iterations"] == 2 and found["skipped"] == [2, 2, 2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weight_gradients_are_not_rounded_before_they_are_added(dtype: torch.dtype) -> None:
    assert widens("cuda"), "PyTorch 2.10 or newer adds a narrow product to a wide sum"
    generator = torch.Generator("cuda").manual_seed(0)
    flat = torch.randn(512 * 384 + 8, device="cuda", generator=generator)
    main = flat[8:].view(512, 384)
    before = main.double()
    inputs, grads = (torch.randn(2048, width, device="cuda", generator=generator).to(dtype) for width in (384, 512))
    exact = grads.double().t() @ inputs.double()
    torch.cuda.set_sync_debug_mode("error")
    try:
        add_weight_gradient(inputs, grads, main)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    apart = (main.double() - before - exact).abs().max() / exact.abs().max()
    rounded = ((grads.t() @ inputs).double() - exact).abs().max() / exact.abs().max()
    print(f"{dtype}: added {apart:.1e}, rounded first {rounded:.1e}")
    assert apart < 2e-6
    assert dtype == torch.float32 or rounded > 20 * apart


def test_sum_of_squares() -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = [(4096, 1024), (1,), (0,), (33, 7), (1 << 24,)]
    for dtype in (torch.float32, torch.bfloat16):
        grads = [(torch.randn(shape, device="cuda", generator=generator) * 1e-3).to(dtype) for shape in shapes]
        exact = sum(grad.double().square().sum() for grad in grads)
        assert abs(square_sums(grads) / exact - 1) < 1e-6
    for bad in (float("inf"), float("nan")):
        grads[3].view(-1)[5] = bad
        assert not square_sums(grads).isfinite()


def work_fill(flat: dict[str, Any], allowed: int) -> tuple[int, str]:
    """Run with ``allowed`` bytes of device memory; exit code, and what was said."""
    import contextlib
    import tempfile

    from megatron_steel.config.load import from_flat
    from megatron_steel.train.prepare import prepare
    from megatron_steel.train.run import run as train

    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(allowed / torch.cuda.get_device_properties(0).total_memory)
    try:
        with tempfile.TemporaryFile("w+") as said, contextlib.redirect_stderr(said):
            code = train(prepare(from_flat(flat)))
            said.seek(0)
            return code, said.read()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_a_full_device_is_explained(pool: WorkerPool, prefix: str) -> None:
    """The logits of 2048 x 32 tokens over 1008 rows alone are 250 MiB."""
    flat = options(prefix, micro_batch_size=2048, global_batch_size=2048, transformer_impl="torch")
    flat["max_epochs_per_source"] = 1e6
    ((code, said),) = pool.run(1, work_fill, flat, 200 * 2**20, timeout=300, join=False)
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert code == 1 and "rank 0: iteration 1: the memory of NVIDIA" in line
    assert "--micro-batch-size below 2048" in line and "more were asked for" in line


def work_allocator(flat: dict[str, Any]) -> dict[str, Any]:
    with open_session(flat) as session:
        take_step(session)
        settings: dict[str, Any] = torch.cuda.memory._snapshot()["allocator_settings"]
        return settings


def test_segments_grow(pool: WorkerPool, prefix: str) -> None:
    (settings,) = pool.run(1, work_allocator, options(prefix, transformer_impl="torch"), timeout=300, join=False)
    assert settings["expandable_segments"]


@pytest.mark.parametrize("flags", [{}, BF16])
def test_resume_is_exact_in_deterministic_mode(prefix: str, tmp_path: Path, flags: dict[str, Any]) -> None:
    """Two runs from the command line: eight steps at once, and four and four."""
    flat = {**OPTIONS, **WIDE, **flags, "train_data_path": [prefix], "transformer_impl": "torch"}
    flat |= {"deterministic_mode": True, "log_interval": 1, "train_iters": 8}

    def rows(folder: Path, **more: Any) -> list[dict[str, Any]]:
        assert run(folder, as_flags({**flat, "save": str(folder), **more})) == [0], (folder / "err0").read_text()
        return read_metrics(folder / METRICS_FILE)

    whole = rows(tmp_path / "whole")
    first = rows(tmp_path / "parts", exit_interval=4)
    assert len(first) == 4
    both = rows(tmp_path / "parts", load=str(tmp_path / "parts"))
    assert len(whole) == len(both) == 8
    for one, other in zip(whole, both, strict=True):
        assert {name: one[name] for name in ("iteration", "loss", "grad_norm")} == {
            name: other[name] for name in ("iteration", "loss", "grad_norm")
        }
