"""Reward models train the same on every layout, from a checkpoint too, and with adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pool import WorkerPool
from tiny_run import LAYOUTS, OPTIONS, Trace, largest_relative, start_world, whole_weights
from torch import Tensor

from megatron_steel.config.load import from_flat
from megatron_steel.data.batch import Batch
from megatron_steel.data.context import cut
from megatron_steel.model.initialize import model_wide_name

STEPS, SAMPLES, LENGTH, ROWS = 3, 8, 32, 1000
TOLERANCE = 1e-5
CHOSEN = ("tp2", "tp2-sp", "pp2", "pp2-interleaved", "dp2-sharded", "cp2", "tp2-pp2")
LORA = {"lora_rank": 4, "use_distributed_optimizer": False}


def sample_batches(step: int, world: Any) -> list[Batch]:
    """This rank's micro-batches of a step: ids, and as the mask's weights what its scores are multiplied by."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(ROWS, (SAMPLES, LENGTH), generator=generator)
    weights = torch.randn(SAMPLES, LENGTH, generator=generator)
    positions = torch.arange(LENGTH).expand_as(ids)
    mine = slice(world.data_rank, None, world.data_size)
    parts = [cut(whole[mine], world.context_rank, world.context_size) for whole in (ids, weights, positions)]
    return [
        Batch(
            tokens_BS=tokens,
            labels_BS=tokens,
            loss_mask_BS=mask,
            position_ids_BS=position,
            sources_B=np.zeros(len(tokens), np.int64),
            valid_tokens=tokens.numel(),
        )
        for tokens, mask, position in zip(*(part.contiguous().split(2) for part in parts), strict=True)
    ]


def weighted_scores(scores_BS: Tensor, batch: Batch, step_weight: float) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """A loss of all scores that no layout can get right by accident."""
    assert scores_BS.dtype == torch.float32
    loss = (torch.tanh(scores_BS) * batch.loss_mask_BS).sum() / step_weight
    return loss, torch.zeros((), dtype=torch.int), {"loss": loss.detach().clone()}


def work_steps(flat: dict[str, Any], load: str | None, save: str | None, steps: int) -> Trace:
    """Train from drawn weights or a checkpoint; losses, gradient norms, and the weights at the end."""
    from megatron_steel.checkpoint import store
    from megatron_steel.checkpoint.state import TrainState, read_state
    from megatron_steel.config.load import to_flat
    from megatron_steel.model.build import build_model
    from megatron_steel.objective.language import run_micro_batches, sum_over_ranks
    from megatron_steel.optim.optimizer import build_optimizer, set_rates, update

    world, config = start_world(flat), from_flat(flat)
    model = build_model(config, ROWS, world)
    optimizer = build_optimizer(config, model)
    state = TrainState(config=to_flat(config), vocab_size=ROWS, has_optimizer=True, world_size=world.size)
    first = 0
    if load is not None:
        store.load_training(Path(load), model, optimizer, read_state(Path(load)), world)
        first = STEPS - 1
    trace = Trace()
    for step in range(first, steps):
        if save is not None and step == STEPS - 1:
            state.iteration = step
            store.save(Path(save), model, optimizer, state, world, lambda folder: None)
        for chunk in model.chunks:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        batches = sample_batches(step, world)
        outputs = run_micro_batches(model, batches, SAMPLES, forward_only=False, share=weighted_scores)
        set_rates(optimizer, 2e-3, 0.1)
        norm, _ = update(optimizer, 1.0)
        total = torch.zeros(1, dtype=torch.float64)
        for output in outputs:
            total += output["loss"].double()
        trace.losses.append(sum_over_ranks(world, total).item())
        trace.grad_norms.append(norm.item())
    model.gather_parameters()
    trace.tensor_rank, trace.expert_tensor_rank = world.tensor_rank, world.expert_tensor_rank
    for module in model.language_models():
        for local, parameter in module.named_parameters():
            name = model_wide_name(module, local)
            trace.weights[name] = parameter.detach().float().numpy().copy()
            if world.tensor_size > 1 and getattr(parameter, "tensor_model_parallel", False):
                trace.splits[name] = parameter.partition_dim
    return trace


def flat_options(layout: str, **more: Any) -> dict[str, Any]:
    return {**OPTIONS, "score_head": True, "transformer_impl": "torch", **LAYOUTS[layout].flags, **more}


def run(
    pool: WorkerPool, layout: str, load: str | None = None, save: str | None = None, steps: int = STEPS, **more: Any
) -> list[Trace]:
    flat = flat_options(layout, **more)
    return pool.run(LAYOUTS[layout].ranks, work_steps, flat, load, save, steps, join=False)


def compare(ours: list[Trace], theirs: list[Trace]) -> None:
    assert largest_relative(ours[0].losses, theirs[0].losses) < TOLERANCE
    assert largest_relative(ours[0].grad_norms, theirs[0].grad_norms) < TOLERANCE
    mine, reference = whole_weights(ours), whole_weights(theirs)
    assert mine.keys() == reference.keys() and not any(name.startswith("output_layer") for name in mine)
    assert max(float(np.abs(mine[name] - reference[name]).max()) for name in mine) < TOLERANCE


@pytest.fixture(scope="module")
def alone(pool: WorkerPool) -> list[Trace]:
    return run(pool, "1")


@pytest.mark.parametrize("layout", CHOSEN)
def test_layout_trains_the_model_of_one_process(pool: WorkerPool, alone: list[Trace], layout: str) -> None:
    compare(run(pool, layout), alone)


def test_resume_on_another_layout(pool: WorkerPool, alone: list[Trace], tmp_path: Path) -> None:
    run(pool, "1", save=str(tmp_path))
    checkpoint = str(tmp_path / f"iter_{STEPS - 1:07d}")
    same, other = run(pool, "1", load=checkpoint), run(pool, "tp2-sp", load=checkpoint)
    assert same[0].losses == alone[0].losses[-1:] and same[0].grad_norms == alone[0].grad_norms[-1:]
    mine, reference = whole_weights(same), whole_weights(alone)
    assert all(np.array_equal(mine[name], reference[name]) for name in reference)
    assert largest_relative(other[0].losses, alone[0].losses[-1:]) < TOLERANCE


def test_the_score_is_trained_with_adapters(pool: WorkerPool) -> None:
    """Every other weight keeps its bits, on one process and on two that share the sequence out."""
    before, first, spread = run(pool, "1", steps=0, **LORA), run(pool, "1", **LORA), run(pool, "tp2-sp", **LORA)
    compare(spread, first)
    drawn, trained = whole_weights(before), whole_weights(first)
    moved = {name for name in drawn if not np.array_equal(drawn[name], trained[name])}
    assert "score.weight" in moved
    assert all(".adapters." in name for name in moved - {"score.weight"})
