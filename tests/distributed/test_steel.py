"""Steel's feed-forwards on layouts: the same training as in one process, also after a stop, and both backends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pool import WorkerPool
from tiny_run import LAYOUTS, Trace, largest_relative, options, whole_weights, work_train, write_data

STEPS = 12
STEEL: dict[str, Any] = {
    "model_family": "steel",
    "num_query_groups": None,
    "mlp_type": "senet",
    "mlp_div_ratio": 4,
    "soft_experts": 4,
    "untie_embeddings_and_output_weights": True,
}
FORMS: dict[str, dict[str, Any]] = {
    "causal": {"ffn_type": "softmoe_causal", "slots_per_expert": 2},
    "causal-swiglu": {"ffn_type": "softmoe_causal", "mlp_type": "swiglu"},
    "v1": {"ffn_type": "softmoe_v1"},
    "v2": {"ffn_type": "softmoe_v2", "slots_per_expert": 2, "allow_non_causal_softmoe": True, "init_method_std": 0.15},
    "v3": {"ffn_type": "softmoe_v3", "allow_non_causal_softmoe": True},
    "dense": {"mlp_div_ratio": 2},
}


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def references(pool: WorkerPool, prefix: str) -> dict[str, Trace]:
    """Every form in one process."""
    runs = (options(prefix, STEEL, form) for form in FORMS.values())
    return {name: pool.run(1, work_train, flat, STEPS, join=False)[0] for name, flat in zip(FORMS, runs, strict=True)}


def assert_same(ours: list[Trace], reference: Trace, chaotic: bool = False) -> None:
    """Losses, gradient norms and weights of a run on one process; the first steps only where rounding noise grows."""
    steps, norms = (2, 1) if chaotic else (STEPS, STEPS)
    assert largest_relative(ours[0].losses[:steps], reference.losses[:steps]) < 1e-5
    assert largest_relative(ours[0].grad_norms[:norms], reference.grad_norms[:norms]) < 1e-5
    if chaotic:
        return
    mine, theirs = whole_weights(ours), whole_weights([reference])
    assert mine.keys() == theirs.keys()
    for name, weight in theirs.items():
        assert np.abs(mine[name] - weight).max() < 2e-5, name


@pytest.mark.parametrize("layout", ["tp2", "tp2-sp", "pp2-interleaved", "dp2-overlapped"])
@pytest.mark.parametrize("form", FORMS)
def test_layouts_train_the_model_of_one_process(
    pool: WorkerPool, prefix: str, references: dict[str, Trace], form: str, layout: str
) -> None:
    reference, spread = references[form], LAYOUTS[layout]
    assert reference.losses[-1] < reference.losses[0] - 0.2
    flat = options(prefix, STEEL, FORMS[form], spread.flags)
    # v2 does not train well: its sums over tokens swing, and AdamW makes whole steps of rounding noise.
    assert_same(pool.run(spread.ranks, work_train, flat, STEPS, join=False), reference, chaotic=form == "v2")


@pytest.mark.parametrize("form", ["causal", "dense"])
def test_backends_agree(pool: WorkerPool, prefix: str, references: dict[str, Trace], form: str) -> None:
    flat = options(prefix, STEEL, FORMS[form], transformer_impl="local")
    assert_same(pool.run(1, work_train, flat, STEPS, join=False), references[form])


@pytest.mark.parametrize("form", ["causal", "dense"])
def test_a_run_that_stops_goes_on_to_the_bit(
    pool: WorkerPool, tmp_path: Path, prefix: str, references: dict[str, Trace], form: str
) -> None:
    saved = options(prefix, STEEL, FORMS[form], save=str(tmp_path))
    first = pool.run(1, work_train, saved, STEPS // 2, True, join=False)[0]
    second = pool.run(1, work_train, {**saved, "load": str(tmp_path)}, STEPS // 2, join=False)[0]
    assert first.losses + second.losses == references[form].losses
    for name, weight in references[form].weights.items():
        assert np.array_equal(second.weights[name], weight), name
    # The same checkpoint on two tensor-parallel ranks.
    spread = {**saved, "load": str(tmp_path), **LAYOUTS["tp2-sp"].flags}
    split = pool.run(2, work_train, spread, STEPS // 2, join=False)
    assert largest_relative(split[0].losses, second.losses) < 1e-5
