"""Families with norms in other places, softcaps and scales train the same model on every layout."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from pool import WorkerPool
from tiny_run import LAYOUTS, Trace, largest_relative, options, whole_weights, work_train, write_data

STEPS = 10
FAMILIES: dict[str, dict[str, Any]] = {
    "olmo2": {"norm_placement": "post", "qk_layernorm_full": True},
    "gemma2": {
        "norm_placement": "sandwich",
        "apply_layernorm_1p": True,
        "activation": "gelu_tanh",
        "embedding_scale": True,
        "window_size": 8,
        "full_attention_layers": [1, 3],
        "softmax_scale": 0.5,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 4.0,
    },
    "gemma3": {
        "norm_placement": "sandwich",
        "apply_layernorm_1p": True,
        "activation": "gelu_tanh",
        "embedding_scale": True,
        "window_size": 8,
        "full_attention_layers": [1],
        "qk_layernorm": True,
        "rotary_base_local": 100.0,
    },
}
# Another backend that carries the family.
OTHER = {"olmo2": "local"}


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_data(tmp_path_factory.mktemp("data"))


def train(pool: WorkerPool, prefix: str, family: str, layout: str, **changes: Any) -> list[Trace]:
    fixed = {"model_family": family, "add_qkv_bias": False}
    flat = options(prefix, fixed, FAMILIES[family], LAYOUTS[layout].flags, changes)
    return pool.run(LAYOUTS[layout].ranks, work_train, flat, STEPS, join=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_layouts_train_the_model_of_one_process(pool: WorkerPool, prefix: str, family: str) -> None:
    reference = train(pool, prefix, family, "1")
    whole = whole_weights(reference)
    assert reference[0].losses[-1] < reference[0].losses[0] - 0.3
    runs = {layout: train(pool, prefix, family, layout) for layout in ("tp2", "tp2-sp", "pp2")}
    if family in OTHER:
        runs["other"] = train(pool, prefix, family, "1", transformer_impl=OTHER[family])
    for name, traces in runs.items():
        mine = whole_weights(traces)
        loss = largest_relative(traces[0].losses, reference[0].losses)
        norm = largest_relative(traces[0].grad_norms, reference[0].grad_norms)
        assert mine.keys() == whole.keys()
        weights = max(float(np.abs(mine[key] - whole[key]).max()) for key in mine)
        print(f"{family} on {name}: loss {loss:.1e}, gradient norm {norm:.1e}, weights {weights:.1e}")
        assert loss < 1e-5 and norm < 1e-5 and weights < 2e-5
