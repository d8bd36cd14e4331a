"""Every layout trains the same model: loss, gradient norm and weights against one process, at every step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from pool import WorkerPool
from tiny_run import LAYOUTS, Trace, largest_relative, options, whole_weights, work_train, write_data

STEPS = 20
# The promise is 1e-5. Measured: 4e-8 for losses, 2e-7 for gradient norms.
RELATIVE = 1e-5
# AdamW turns rounding noise in a gradient near zero into a step of its own; 20 steps of 2e-3 are the scale.
WEIGHT_DIFFERENCE = 2e-5

Run = Callable[..., list[Trace]]


@pytest.fixture(scope="module")
def run(pool: WorkerPool, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Train on a layout; what was run before is remembered."""
    prefix = write_data(tmp_path_factory.mktemp("data"))
    known: dict[str, list[Trace]] = {}

    def train(layout: str, **changes: Any) -> list[Trace]:
        key = f"{layout} {sorted(changes.items())}"
        if key not in known:
            spread = LAYOUTS[layout]
            flat = options(prefix, spread.flags, changes)
            known[key] = pool.run(spread.ranks, work_train, flat, STEPS, join=False)
        return known[key]

    return train


def compare(ours: list[Trace], theirs: list[Trace], relative: float = RELATIVE) -> None:
    """Same numbers at each step and on each rank, same weights at the end."""
    for trace in ours:
        assert trace.losses == ours[0].losses and trace.grad_norms == ours[0].grad_norms
        assert trace.rates == theirs[0].rates and trace.consumed_samples == theirs[0].consumed_samples
    loss = largest_relative(ours[0].losses, theirs[0].losses)
    norm = largest_relative(ours[0].grad_norms, theirs[0].grad_norms)
    mine, reference = whole_weights(ours), whole_weights(theirs)
    assert mine.keys() == reference.keys()
    weights = max(float(np.abs(mine[name] - reference[name]).max()) for name in mine)
    print(f"largest difference: loss {loss:.1e}, gradient norm {norm:.1e}, weights {weights:.1e}")
    assert loss < relative and norm < relative
    assert weights < WEIGHT_DIFFERENCE


@pytest.mark.parametrize(
    ("layout", "untied"),
    [(name, False) for name in LAYOUTS if name != "1"]
    # More untied ones, on 4 steps, are in test_matrix.py.
    + [("tp2-pp2", True)],
)
def test_layout_trains_the_model_of_one_process(run: Run, layout: str, untied: bool) -> None:
    reference = run("1", untie_embeddings_and_output_weights=untied)
    assert reference[0].losses[-1] < reference[0].losses[0] - 0.5
    compare(run(layout, untie_embeddings_and_output_weights=untied), reference)


@pytest.mark.parametrize("layout", ["1", "tp2", "pp2"])
def test_backends_agree(run: Run, layout: str) -> None:
    compare(run(layout, transformer_impl="local"), run("1", untie_embeddings_and_output_weights=False))


@pytest.mark.parametrize("micro_batch_size", [1, 8])
def test_split_into_micro_batches_does_not_matter(run: Run, micro_batch_size: int) -> None:
    reference = run("1", untie_embeddings_and_output_weights=False)
    compare(run("1", micro_batch_size=micro_batch_size), reference)


@pytest.mark.parametrize("layout", ["dp2-overlapped", "pp2", "tp2"])
def test_replicas_with_different_token_counts(run: Run, layout: str) -> None:
    """Masking the end of documents gives every micro-batch another number of tokens; all count the same."""
    reference = run("1", eod_mask_loss=True)
    assert reference[0].losses != run("1", untie_embeddings_and_output_weights=False)[0].losses
    compare(run(layout, eod_mask_loss=True), reference)


PLAIN = {"add_qkv_bias": False, "num_query_groups": None}
GPT = {**PLAIN, "normalization": "LayerNorm", "activation": "gelu", "gated_linear_unit": False, "add_bias_linear": True}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": PLAIN,
    "qwen3": {**PLAIN, "qk_layernorm": True},
    "mistral": {**PLAIN, "window_size": 7},
    "smollm3": {**PLAIN, "window_size": 7, "full_attention_layers": [1], "no_rope_layers": [0, 2]},
    "gpt2": {**GPT, "activation": "gelu_tanh", "position_embedding_type": "learned_absolute"},
    "gpt_neox": {**GPT, "parallel_residual": True, "rotary_percent": 0.5, "untie_embeddings_and_output_weights": True},
}


@pytest.mark.parametrize("layout", ["tp2-sp", "pp2-interleaved"])
@pytest.mark.parametrize("family", FAMILIES)
def test_other_families(run: Run, family: str, layout: str) -> None:
    switches = {"model_family": family, **FAMILIES[family]}
    reference = run("1", **switches)
    assert reference[0].losses[-1] < reference[0].losses[0] - 0.5
    compare(run(layout, **switches), reference)


@pytest.mark.parametrize("family", ["smollm3", "gpt2", "gpt_neox"])
def test_backends_agree_on_other_families(run: Run, family: str) -> None:
    switches = {"model_family": family, **FAMILIES[family]}
    compare(run("1", transformer_impl="local", **switches), run("1", **switches))


def test_bfloat16_replicas(run: Run) -> None:
    """bf16 rounds to 8 bits: two replicas add up in another order, and the losses stay close to each other and fp32."""
    reference = run("1", bf16=True)[0]
    for layout in ("dp2", "dp2-overlapped"):
        trace = run(layout, bf16=True)[0]
        assert largest_relative(trace.losses, reference.losses) < 2e-3
        assert largest_relative(trace.grad_norms, reference.grad_norms) < 2e-2
    exact = run("1", untie_embeddings_and_output_weights=False)[0]
    assert largest_relative(reference.losses, exact.losses) < 5e-3
