"""Adapters and frozen weights: every layout trains what one process trains, and nothing else moves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pool import WorkerPool
from tiny_run import LAYOUTS, Trace, keep_weights, largest_relative, open_session, options, whole_weights, write_data

from megatron_steel.config.adapters import WHOLE
from megatron_steel.runtime import world as runtime
from megatron_steel.train.loop import save

STEPS = 4
# Measured: 4e-8 for losses, 3e-7 for gradient norms, 4e-6 for weights at this learning rate.
RELATIVE = 1e-6
WEIGHT_DIFFERENCE = 2e-5

WAYS: dict[str, dict[str, Any]] = {
    "lora": {
        "lora_rank": 4,
        "untie_embeddings_and_output_weights": True,
        "lora_modules_to_save": ["lm_head"],
        "recompute_granularity": "full",
    },
    "dora": {"lora_rank": 3, "use_dora": True, "use_rslora": True, "lora_target_modules": ["q_proj", "v_proj", "o_proj",
             "up_proj", "down_proj"]},
    "last": {"freeze_trainable_layers": 1},
    "first": {"freeze_trainable_layers": -1, "freeze_extra_modules": ["norm", "embed_tokens"]},
    "embeddings": {"train_embeddings_only": True},
}  # fmt: skip


SPREAD = {
    "lora": ("tp2", "tp2-sp", "pp2", "dp2-overlapped", "cp2"),
    "dora": ("tp2", "tp2-sp", "dp2-overlapped"),
    "last": ("pp2", "dp2-sharded"),  # on the first stage nothing is trained
    "first": ("pp2", "tp2"),
    "embeddings": ("pp2", "tp2-sp"),
}
"""Layouts in which a way of training does something of its own."""


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_data(tmp_path_factory.mktemp("data"))


def work_part(flat: dict[str, Any], steps: int, before: bool = False) -> tuple[Trace, dict[str, np.ndarray], list[str]]:
    """Train; also the weights of the start, and the names of what has gradients or optimizer state."""
    from tiny_run import take_steps

    trace, start = Trace(), Trace()
    with open_session(flat) as session:
        keep_weights(session, start)
        take_steps(session, steps, trace)
        keep_weights(session, trace)
        held = {id(p) for part in session.optimizer.chained_optimizers for p in part.get_parameters()}
        names = [
            name
            for module in session.model.language_models()
            for name, p in module.named_parameters()
            if p.requires_grad or p.grad is not None or hasattr(p, "main_grad") or id(p) in held
        ]
        if flat.get("save"):
            save(session)
    return trace, start.weights, names


def train(pool: WorkerPool, layout: str, flat: dict[str, Any], steps: int = STEPS) -> list[Any]:
    return pool.run(LAYOUTS[layout].ranks, work_part, flat, steps, join=False)


@pytest.mark.parametrize("way", WAYS)
def test_layouts_train_what_one_process_trains(pool: WorkerPool, prefix: str, way: str) -> None:
    flat = options(prefix, WAYS[way], lr=1e-2)
    reference = train(pool, "1", flat)
    traces = [reference[0][0]]
    wanted = whole_weights(traces)
    assert traces[0].losses[-1] < traces[0].losses[0]
    for layout in SPREAD[way]:
        results = train(pool, layout, options(prefix, LAYOUTS[layout].flags, WAYS[way], lr=1e-2))
        ours = [result[0] for result in results]
        found = whole_weights(ours)
        assert found.keys() == wanted.keys()
        assert largest_relative(ours[0].losses, traces[0].losses) < RELATIVE, layout
        assert largest_relative(ours[0].grad_norms, traces[0].grad_norms) < RELATIVE, layout
        off = {name: float(np.abs(found[name] - wanted[name]).max()) for name in wanted}
        assert max(off.values()) < WEIGHT_DIFFERENCE, (layout, off)


def expected(way: str, name: str) -> bool:
    """What is trained, written down once more."""
    embedding, head = WHOLE["embed_tokens"], WHOLE["lm_head"]
    return {
        "lora": ".adapters." in name or name == head,
        "dora": ".adapters." in name,
        "last": name.startswith("decoder.layers.3."),
        "first": name.startswith("decoder.layers.0.") or name in (embedding, "decoder.final_layernorm.weight"),
        "embeddings": name in (embedding, head),
    }[way]


@pytest.mark.parametrize("way", WAYS)
def test_frozen_weights_keep_their_bits_and_have_no_state(pool: WorkerPool, prefix: str, way: str) -> None:
    trace, start, held = train(pool, "1", options(prefix, WAYS[way], lr=1e-2))[0]
    trained = {name for name in start if expected(way, name)}
    assert trained and set(held) == trained
    moved = {name for name, value in trace.weights.items() if not np.array_equal(value, start[name])}
    assert moved == trained


@pytest.mark.parametrize(
    ("way", "sharded", "bf16"), [("dora", True, False), ("last", False, False), ("last", False, True)]
)
def test_a_run_goes_on_on_another_layout(
    pool: WorkerPool, prefix: str, way: str, sharded: bool, bf16: bool, tmp_path: Path
) -> None:
    flat = options(prefix, WAYS[way], {"use_distributed_optimizer": sharded, "bf16": bf16}, lr=1e-2)
    whole = train(pool, "1", flat)[0][0]
    root = str(tmp_path / "run")
    train(pool, "tp2-sp", {**flat, **LAYOUTS["tp2-sp"].flags, "save": root}, 2)
    again = [result[0] for result in train(pool, "pp2", {**flat, **LAYOUTS["pp2"].flags, "load": root}, 2)]
    # In bf16 tensor ranks round their partial activations to 8 bits; a step of AdamW may go either way then.
    losses, weights = (1e-4, 4e-2) if bf16 else (RELATIVE, WEIGHT_DIFFERENCE)
    assert largest_relative(again[0].losses, whole.losses[2:]) < losses
    found, wanted = whole_weights(again), whole_weights([whole])
    assert max(float(np.abs(found[name] - wanted[name]).max()) for name in wanted) < weights


def work_logits(flat: dict[str, Any], tokens: list[list[int]]) -> np.ndarray:
    """Logits of the run's model before its first step."""
    with open_session(flat) as session, torch.no_grad():
        ids = torch.tensor(tokens)
        positions = torch.arange(ids.shape[1]).expand_as(ids)
        model = session.model.language_models()[0].eval()
        return model(ids, positions, None).float().numpy()


@pytest.mark.parametrize("way", ["lora", "dora"])
def test_new_adapters_change_nothing(pool: WorkerPool, prefix: str, way: str, tmp_path: Path) -> None:
    """To the bit, on the weights of a checkpoint without any, which is where finetuning begins."""
    base = options(prefix, untie_embeddings_and_output_weights=way == "lora")
    root = str(tmp_path / "base")
    pool.run(1, work_part, {**base, "save": root}, 2, join=False)
    tokens = np.random.default_rng(0).integers(0, 900, (2, 32)).tolist()
    start = {"load": root, "finetune": True}
    plain = pool.run(1, work_logits, {**base, **start}, tokens, join=False)[0]
    adapted = pool.run(1, work_logits, {**base, **WAYS[way], **start}, tokens, join=False)[0]
    assert np.array_equal(plain, adapted)


def test_adapters_are_never_dropped_in_silence(pool: WorkerPool, prefix: str, tmp_path: Path) -> None:
    flat = options(prefix, {"lora_rank": 2}, save=str(tmp_path / "run"))
    train(pool, "1", flat, 1)
    without = options(prefix, load=str(tmp_path / "run"), finetune=True)
    with pytest.raises(ValueError, match="was saved with --lora-rank 2, this run has None; use the same, or merge"):
        train(pool, "1", without, 1)
    with pytest.raises(ValueError, match="--lora-rank 2, this run has 4"):
        train(pool, "1", {**without, "lora_rank": 4, "finetune": False}, 1)
    with pytest.raises(ValueError, match="holds adapters; merge them first"):
        pool.run(1, work_load_plain, options(prefix), str(tmp_path / "run"), join=False)


def work_load_plain(flat: dict[str, Any], root: str) -> None:
    """Load a checkpoint with adapters into a model without any, past the checks of a run."""
    from tiny_run import start_world

    from megatron_steel.checkpoint.files import find_checkpoint
    from megatron_steel.checkpoint.store import load_weights
    from megatron_steel.config.load import from_flat
    from megatron_steel.model.build import build_model

    world: runtime.World = start_world(flat)
    model = build_model(from_flat(flat), 1000, world, training=False)
    load_weights(find_checkpoint(Path(root), None)[0], model)
