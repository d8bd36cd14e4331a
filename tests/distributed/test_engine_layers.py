"""Layers of the ``transformer_engine`` backend around stand-ins for its classes: the weights and steps of torch's."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from engine_stand_in import stand_in
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from pool import WorkerPool
from tiny_run import GPT, MIXTURE, PLAIN, ROWS, largest_relative, options, start_world, work_train, write_data

from megatron_steel.checkpoint.store import model_state
from megatron_steel.config.load import from_flat
from megatron_steel.model.build import build_model

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": PLAIN,
    "qwen2": {},
    "qwen3": {**PLAIN, "qk_layernorm": True, "kv_channels": 16},
    "mistral": {**PLAIN, "untie_embeddings_and_output_weights": True},
    "gpt2": {**GPT, "activation": "gelu_tanh", "position_embedding_type": "learned_absolute"},
    "gpt_neox": {**GPT, "parallel_residual": True, "rotary_percent": 0.5, "untie_embeddings_and_output_weights": True},
    "olmo2": {**PLAIN, "norm_placement": "post", "qk_layernorm_full": True},
    "qwen3_moe": MIXTURE,
}
PACKED: dict[str, Any] = {"reset_attention_mask": True, "bf16": True}


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_data(tmp_path_factory.mktemp("data"))


def saved(model: Any) -> dict[str, list[tuple[Any, ...]]]:
    """What a checkpoint of a model holds: shape, place and sum of each part by name."""
    found: dict[str, list[tuple[Any, ...]]] = {}
    for stored in model_state(model)["model"].values():
        # The first matrix of a gated feed-forward is stored as two halves.
        for part in stored.build() if isinstance(stored, ShardedTensorFactory) else [stored]:
            where = (part.global_shape, part.global_offset)
            found.setdefault(part.key, []).append((*where, float(part.data.double().sum())))
    return {name: sorted(parts) for name, parts in found.items()}


def work_states(flat: dict[str, Any]) -> tuple[Any, Any, list[str], bool]:
    """What checkpoints of both backends hold, parameters of the engine's, and whether its layers bring more state."""
    world, config = start_world(flat), from_flat(flat)
    torch_model = build_model(config, ROWS, world)
    with stand_in():
        engine_model = build_model(config, ROWS, world)
        (module,) = engine_model.language_models()
        names = [name for name, _ in module.named_parameters()]
        extra = any("_extra_state" in key for key in module.sharded_state_dict())
        return saved(torch_model), saved(engine_model), names, extra


def work_engine(flat: dict[str, Any], engine: bool, steps: int, save_it: bool = False) -> Any:
    """Train with either backend."""
    with stand_in() if engine else nullcontext():
        return work_train(flat, steps, save_it)


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpoints_are_the_same(pool: WorkerPool, family: str) -> None:
    flat = {**options("none"), "model_family": family, **FAMILIES[family]}
    del flat["train_data_path"]
    theirs, ours, names, extra = pool.run(1, work_states, flat, join=False)[0]
    assert ours == theirs, "names, shapes and first values"
    fused = FAMILIES[family].get("norm_placement") != "post"
    assert any("linear_qkv.layer_norm_weight" in name for name in names) == fused
    assert extra, "which a checkpoint leaves out"


@pytest.mark.parametrize("family", FAMILIES)
def test_steps_are_the_same(pool: WorkerPool, prefix: str, family: str) -> None:
    flat = options(prefix, {"model_family": family}, FAMILIES[family], transformer_impl="torch")
    theirs, ours = (pool.run(1, work_engine, flat, engine, 3, join=False)[0] for engine in (False, True))
    apart = largest_relative(ours.losses, theirs.losses), largest_relative(ours.grad_norms, theirs.grad_norms)
    print(f"{family}: losses {apart[0]:.1e}, gradient norms {apart[1]:.1e}")
    assert max(apart) < 2e-5


@pytest.mark.parametrize("positions", [False, True])
def test_packed_documents_keep_their_positions(pool: WorkerPool, prefix: str, positions: bool) -> None:
    """Documents count their positions from the row's beginning, or from their own: the kernel would know the latter."""
    flat = options(prefix, PACKED, {"reset_position_ids": positions}, transformer_impl="torch")
    theirs, ours = (pool.run(1, work_engine, flat, engine, 3, join=False)[0] for engine in (False, True))
    apart = largest_relative(ours.losses, theirs.losses), largest_relative(ours.grad_norms, theirs.grad_norms)
    print(f"positions {positions}: losses {apart[0]:.1e}, gradient norms {apart[1]:.1e}")
    assert apart[0] < 2e-4 and apart[1] < 1e-2


def test_a_run_goes_on_with_the_other_backend(pool: WorkerPool, prefix: str, tmp_path: Path) -> None:
    whole = pool.run(1, work_engine, options(prefix), False, 6, join=False)[0]
    for engine in (False, True):
        folder = str(tmp_path / str(engine))
        first = options(prefix, save=folder, save_interval=100)
        pool.run(1, work_engine, first, engine, 3, True, join=False)
        rest = pool.run(1, work_engine, options(prefix, load=folder), not engine, 3, join=False)[0]
        assert largest_relative(rest.losses, whole.losses[3:]) < 1e-5, "optimizer state comes along"
