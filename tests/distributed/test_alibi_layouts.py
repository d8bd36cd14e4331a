"""BLOOM (ALiBi, a norm after the embedding) on layouts: the training of one process, also of packed documents."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from pool import WorkerPool
from tiny_run import LAYOUTS, Trace, largest_relative, options, whole_weights, work_train, write_data

STEPS = 8
# Six heads, three on each of two ranks: slopes of both kinds.
BLOOM: dict[str, Any] = {
    "model_family": "bloom",
    "add_qkv_bias": False,
    "add_bias_linear": True,
    "hidden_size": 48,
    "ffn_hidden_size": 192,
    "num_attention_heads": 6,
    "num_query_groups": None,
    "position_embedding_type": "alibi",
    "normalization": "LayerNorm",
    "activation": "gelu_tanh",
    "gated_linear_unit": False,
    "init_method_std": 0.1,
    "stable_embedding": True,
}
KINDS: dict[str, dict[str, Any]] = {"whole": {}, "packed": {"reset_attention_mask": True}}


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def references(pool: WorkerPool, prefix: str) -> dict[str, Trace]:
    """Both kinds in one process."""
    runs = {name: options(prefix, BLOOM, kind) for name, kind in KINDS.items()}
    return {name: pool.run(1, work_train, flat, STEPS, join=False)[0] for name, flat in runs.items()}


@pytest.mark.parametrize("layout", ["tp2", "tp2-sp", "pp2-interleaved", "dp2-sharded"])
@pytest.mark.parametrize("kind", KINDS)
def test_layouts_train_the_model_of_one_process(
    pool: WorkerPool, prefix: str, references: dict[str, Trace], kind: str, layout: str
) -> None:
    reference, spread = references[kind], LAYOUTS[layout]
    traces = pool.run(spread.ranks, work_train, options(prefix, BLOOM, KINDS[kind], spread.flags), STEPS, join=False)
    assert reference.losses[-1] < reference.losses[0] - 0.1
    assert largest_relative(traces[0].losses, reference.losses) < 1e-5
    assert largest_relative(traces[0].grad_norms, reference.grad_norms) < 1e-5
    mine, theirs = whole_weights(traces), whole_weights([reference])
    assert mine.keys() == theirs.keys()
    for name, weight in theirs.items():
        difference = np.abs(mine[name] - weight)
        if name.endswith("linear_qkv.bias"):
            # Without rotation a bias of keys changes nothing: its gradient is rounding noise, and AdamW follows it.
            difference = difference.reshape(6, 3, 8)[:, ::2]
        assert difference.max() < 2e-5, name


def test_packing_matters(references: dict[str, Trace]) -> None:
    """What the tests above compare is not the same model twice."""
    assert largest_relative(references["packed"].losses, references["whole"].losses) > 1e-4
