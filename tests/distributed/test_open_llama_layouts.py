"""Open-Llama on layouts: first values, the norm after the embedding in float64, and the training of one process."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pool import WorkerPool
from tiny_run import (
    LAYOUTS,
    OPTIONS,
    ROWS,
    Trace,
    largest_relative,
    options,
    start_world,
    whole_weights,
    work_train,
    write_data,
)

from megatron_steel.config.load import from_flat
from megatron_steel.model.build import build_model
from megatron_steel.model.initialize import model_wide_name

STEPS = 8
OPEN_LLAMA: dict[str, Any] = {
    "model_family": "open_llama",
    "add_qkv_bias": False,
    "stable_embedding": True,
    "embedding_init": "xavier",
    "init_method_std": 0.01,
    "norm_epsilon": 1e-5,
}
KINDS: dict[str, dict[str, Any]] = {
    "shared": {},
    "plain-untied": {"stable_embedding": False, "untie_embeddings_and_output_weights": True},
}
NORM = ("embedding.layer_norm.weight", "embedding.layer_norm.bias")


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def references(pool: WorkerPool, prefix: str) -> dict[str, Trace]:
    """Both kinds in one process."""
    runs = {name: options(prefix, OPEN_LLAMA, kind) for name, kind in KINDS.items()}
    return {name: pool.run(1, work_train, flat, STEPS, join=False)[0] for name, flat in runs.items()}


def work_embed(flat: dict[str, Any]) -> tuple[Trace, np.ndarray | None]:
    """Initial weights, a norm that is not the identity, and the input of the first layer for known ids."""
    import torch

    world = start_world(flat)
    trace, given = Trace(tensor_rank=world.tensor_rank), None
    for model in build_model(from_flat(flat), ROWS, world).language_models():
        for local_name, parameter in model.named_parameters():
            name = model_wide_name(model, local_name)
            trace.weights[name] = parameter.detach().float().numpy().copy()
            if world.tensor_size > 1 and getattr(parameter, "tensor_model_parallel", False):
                trace.splits[name] = parameter.partition_dim
        if model.pre_process and hasattr(model.embedding, "layer_norm"):
            channels = torch.arange(model.config.hidden_size, dtype=torch.float32)
            with torch.no_grad():
                model.embedding.layer_norm.weight.copy_(1 + 0.3 * channels.sin())
                model.embedding.layer_norm.bias.copy_(channels.cos())
                given = model.embedding(known_ids(), torch.arange(8).expand(2, 8)).float().numpy()
    return trace, given


def known_ids() -> Any:
    """Ids [2, 8] that hold the first and the last row."""
    import torch

    return torch.tensor([[0, 1, 2, 3, ROWS - 1, 500, 501, 7], [9, 8, 7, 6, 5, 4, 999, 998]])


@pytest.mark.parametrize("bf16", [False, True])
def test_first_values_and_the_norm_on_every_layout(pool: WorkerPool, bf16: bool) -> None:
    flat = {**OPTIONS, **OPEN_LLAMA, "bf16": bf16}
    reference = whole_weights([pool.run(1, work_embed, flat, join=False)[0][0]])
    table = reference["embedding.word_embeddings.weight"]
    # Of the rows there are, not of the padded ones: the standard error is std / sqrt(2 n).
    assert abs(table.std() / math.sqrt(2 / (ROWS + 32)) - 1) < 5 / math.sqrt(2 * table.size)
    assert (reference[NORM[0]] == 1).all() and not reference[NORM[1]].any()
    assert abs(reference["decoder.layers.0.self_attention.linear_qkv.weight"].std() / 0.01 - 1) < 0.1

    ids = known_ids().numpy()
    rows, channels = table.astype(np.float64)[ids], np.arange(32)
    scaled = (rows - rows.mean(-1, keepdims=True)) / np.sqrt(rows.var(-1, keepdims=True) + 1e-5)
    wanted = (scaled * (1 + 0.3 * np.sin(channels)) + np.cos(channels)).transpose(1, 0, 2)
    for name in ("1", "tp2", "tp2-sp", "pp2", "tp2-pp2"):
        layout = LAYOUTS[name]
        found = pool.run(layout.ranks, work_embed, {**flat, **layout.flags}, join=False)
        weights = whole_weights([trace for trace, _ in found])
        assert weights.keys() == reference.keys()
        assert all(np.array_equal(weights[key], reference[key]) for key in reference), name
        given = [part for _, part in found if part is not None]
        assert len(given) == layout.ranks // (2 if "pp2" in name else 1), "only the first stage has the norm"
        whole = np.concatenate(given) if name == "tp2-sp" else given[0]
        np.testing.assert_allclose(whole, wanted, rtol=0, atol=0.05 if bf16 else 1e-5)


@pytest.mark.parametrize("layout", ["tp2", "tp2-sp", "pp2", "pp2-interleaved", "tp2-pp2", "dp2-overlapped"])
@pytest.mark.parametrize("kind", KINDS)
def test_layouts_train_the_model_of_one_process(
    pool: WorkerPool, prefix: str, references: dict[str, Trace], kind: str, layout: str
) -> None:
    reference, spread = references[kind], LAYOUTS[layout]
    flat = options(prefix, OPEN_LLAMA, KINDS[kind], spread.flags)
    traces = pool.run(spread.ranks, work_train, flat, STEPS, join=False)
    assert largest_relative(traces[0].losses, reference.losses) < 1e-5
    assert largest_relative(traces[0].grad_norms, reference.grad_norms) < 1e-5
    mine, theirs = whole_weights(traces), whole_weights([reference])
    assert mine.keys() == theirs.keys()
    for name, weight in theirs.items():
        assert np.abs(mine[name] - weight).max() < 2e-5, name
    if kind == "shared":
        assert np.abs(theirs[NORM[0]] - 1).max() > 1e-3 < np.abs(theirs[NORM[1]]).max(), "the norm must be trained"


def test_a_run_that_stops_goes_on_to_the_bit(
    pool: WorkerPool, tmp_path: Path, prefix: str, references: dict[str, Trace]
) -> None:
    saved = options(prefix, OPEN_LLAMA, save=str(tmp_path))
    first = pool.run(1, work_train, saved, STEPS // 2, True, join=False)[0]
    again = {**saved, "load": str(tmp_path)}
    second = pool.run(1, work_train, again, STEPS // 2, join=False)[0]
    assert first.losses + second.losses == references["shared"].losses
    for name, weight in references["shared"].weights.items():
        assert np.array_equal(second.weights[name], weight), name
    split = pool.run(2, work_train, {**again, **LAYOUTS["tp2-sp"].flags}, STEPS // 2, join=False)
    assert largest_relative(split[0].losses, second.losses) < 1e-5
