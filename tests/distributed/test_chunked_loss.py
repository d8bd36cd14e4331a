"""A run with the logits of a few tokens at a time is the run with all of them, on any layout."""

from __future__ import annotations

from typing import Any

import pytest
from pool import WorkerPool
from test_layouts import compare
from test_recompute import DOCUMENTS, FULL, GEMMA, LLAMA
from tiny_run import LAYOUTS, largest_relative, options, work_train, write_data

STEPS = 4
UNTIED = {**LLAMA, "untie_embeddings_and_output_weights": True}


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_data(tmp_path_factory.mktemp("data"))


# A micro-batch has 64 tokens.
@pytest.mark.parametrize(
    ("model", "layout", "chunk", "more"),
    [
        ({**UNTIED, **DOCUMENTS}, "tp2-sp", 24, FULL),
        (UNTIED, "dp2-overlapped", 24, {}),
        (LLAMA, "pp2-interleaved", 7, {}),
        (GEMMA, "tp2", 24, {}),
    ],
    ids=["documents-tp2-sp-recomputed", "dp2-overlapped", "tied-pp2-interleaved", "softcap-tp2"],
)
def test_same_run(
    pool: WorkerPool, prefix: str, model: dict[str, Any], layout: str, chunk: int, more: dict[str, Any]
) -> None:
    reference = pool.run(1, work_train, options(prefix, model), STEPS, join=False)
    spread = LAYOUTS[layout]
    flat = options(prefix, model, spread.flags, more, cross_entropy_chunk_size=chunk)
    compare(pool.run(spread.ranks, work_train, flat, STEPS, join=False), reference)


def test_bfloat16(pool: WorkerPool, prefix: str) -> None:
    plain, chunked = (
        pool.run(1, work_train, options(prefix, UNTIED, bf16=True, **more), STEPS, join=False)[0]
        for more in ({}, {"cross_entropy_chunk_size": 24})
    )
    assert largest_relative(chunked.losses, plain.losses) < 1e-4
    assert largest_relative(chunked.grad_norms, plain.grad_norms) < 2e-3
