"""Weight gradients that are added where they are computed train as those that are added afterwards, on any layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.tensor_parallel import layers
from pool import WorkerPool
from tiny_chats import chat_options, write_chats, write_model
from tiny_run import LAYOUTS, MIXTURE, Trace, keep_weights, open_session, options, take_steps, write_data

STEPS = 4
TIED = {"untie_embeddings_and_output_weights": False}
# Whether the loss is computed in parts depends on the number of tokens: 64 of them here, 2 x 32.
CHUNKED = {"cross_entropy_chunk_size": 32}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "alone": ("1", {}),
    "tied": ("1", TIED),
    "tied, chunked loss, bf16": ("1", {**TIED, **CHUNKED, "bf16": True}),
    "untied, chunked loss": ("1", {"untie_embeddings_and_output_weights": True, **CHUNKED}),
    "bf16": ("1", {"bf16": True}),
    "recomputed": ("1", FULL),
    "sequence parallel": ("tp2-sp", {}),
    "tensor parallel, tied": ("tp2", TIED),
    "interleaved": ("pp2-interleaved", {}),
    "sharded": ("dp2-sharded", {}),
    "overlapped, tied": ("dp2-overlapped", TIED),
    "overlapped experts": ("dp2-overlapped", MIXTURE),
    "experts, tensor parallel": ("tp2-sp", MIXTURE),
    "context": ("cp2", {}),
}


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_data(tmp_path_factory.mktemp("data"))


def work_count(flat: dict[str, Any], steps: int) -> tuple[Trace, int]:
    """Train; and how many products were added to a main gradient."""
    trace, calls = Trace(), 0
    with open_session(flat) as session:
        stand_in = getattr(layers, "fused_weight_gradient_mlp_cuda", None)
        original = None if stand_in is None else stand_in.add_weight_gradient

        def count(*args: torch.Tensor) -> None:
            nonlocal calls
            calls += 1
            assert original is not None
            original(*args)

        if stand_in is not None:
            stand_in.wgrad_gemm_accum_fp32 = stand_in.wgrad_gemm_accum_fp16 = count
        take_steps(session, steps, trace)
        if not flat.get("use_torch_fsdp2"):
            keep_weights(session, trace)
        if stand_in is not None:
            stand_in.wgrad_gemm_accum_fp32 = stand_in.wgrad_gemm_accum_fp16 = original
    return trace, calls


def compare(pool: WorkerPool, ranks: int, flat: dict[str, Any], fused_calls: bool = True) -> None:
    plain = pool.run(ranks, work_count, {**flat, "gradient_accumulation_fusion": False}, STEPS, join=False)
    fused = pool.run(ranks, work_count, flat, STEPS, join=False)
    for (ours, calls), (theirs, none) in zip(fused, plain, strict=True):
        assert (calls > 0) == fused_calls and none == 0
        assert ours.losses == pytest.approx(theirs.losses, rel=2e-6)
        assert ours.grad_norms == pytest.approx(theirs.grad_norms, rel=1e-5)
        apart = [float(np.abs(ours.weights[name] - theirs.weights[name]).max()) for name in theirs.weights]
        assert max(apart, default=0.0) < 2e-5


@pytest.mark.parametrize("case", CASES)
def test_trains_the_same(pool: WorkerPool, prefix: str, case: str) -> None:
    layout, flags = CASES[case]
    spread = LAYOUTS[layout]
    compare(pool, spread.ranks, options(prefix, spread.flags, flags))


def test_frozen_weights_get_none(pool: WorkerPool, tmp_path: Path) -> None:
    """Adapters are no linear layers of megatron-core, and what they stand beside is not trained."""
    model, data = write_model(tmp_path / "model"), write_chats(tmp_path / "rows.jsonl", 40)
    compare(pool, 1, chat_options(model, data, lora_rank=4), fused_calls=False)
    # Lengths differ from micro-batch to micro-batch: some losses are computed in parts, others at once.
    compare(pool, 1, chat_options(model, data, packing=False, cross_entropy_chunk_size=64))


def test_fully_sharded_models_have_no_main_gradient(pool: WorkerPool, prefix: str) -> None:
    flat = options(prefix, use_torch_fsdp2=True, transformer_impl="torch")
    compare(pool, 2, flat, fused_calls=False)
