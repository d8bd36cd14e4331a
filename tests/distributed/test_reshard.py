"""A checkpoint of one layout loads on every other: the same bits in weights and optimizer, the same next loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core import dist_checkpointing
from pool import WorkerPool
from tiny_run import (
    LAYOUTS,
    MIXTURE,
    OVERLAPPED,
    PP2,
    ROWS,
    SHARDED,
    TP2,
    Layout,
    Trace,
    keep_weights,
    open_session,
    options,
    take_steps,
    whole_weights,
    work_train,
    write_data,
)

from megatron_steel.train.loop import save

STEPS = 3
PLAIN = {name: LAYOUTS[name] for name in ("1", "tp2", "pp2", "pp2-interleaved", "dp2", "tp2-pp2")}
DISTRIBUTED = {
    "1-sharded": Layout(flags=SHARDED),
    "tp2-sharded": Layout(ranks=2, flags={**TP2, **SHARDED}),
    "dp2-overlapped": LAYOUTS["dp2-overlapped"],
    "tp2-dp2-sharded": LAYOUTS["tp2-dp2-sharded"],
}
# Ranks that share an expert, and ranks that have other experts.
SPREAD = {
    "experts-1": Layout(flags={**MIXTURE, **SHARDED}),
    "ep2": Layout(ranks=2, flags={**MIXTURE, **OVERLAPPED, "expert_model_parallel_size": 2}),
    "tp2-sp-ep2-etp1": Layout(
        ranks=2,
        flags={
            **MIXTURE,
            **TP2,
            **SHARDED,
            "sequence_parallel": True,
            "expert_model_parallel_size": 2,
            "expert_tensor_parallel_size": 1,
        },
    ),
    "ep2-pp2": Layout(ranks=4, flags={**MIXTURE, **PP2, **SHARDED, "expert_model_parallel_size": 2}),
}
PLAIN["pp2-uneven"] = Layout(ranks=2, flags={**PP2, "decoder_first_pipeline_num_layers": 3})
ALL = {**PLAIN, **DISTRIBUTED, **SPREAD}
# Every layout writes what another kind of layout reads; a checkpoint that comes back unchanged was read right by all.
CHAINS = {"whole": tuple(PLAIN), "sharded": tuple(DISTRIBUTED), "experts": tuple(SPREAD)}
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(kw_only=True)
class Saved:
    """A checkpoint, the weights in it and what the next step gave."""

    folder: Path
    weights: dict[str, np.ndarray]
    next_loss: float
    next_norm: float


def work_load(flat: dict[str, Any], again: bool = False) -> tuple[Trace, int]:
    """Load, keep the weights, save what was loaded when ``again``, take a step. Also the iteration it started at."""
    trace = Trace()
    with open_session(flat) as session:
        keep_weights(session, trace)
        start = session.state.iteration
        if again:
            session.last_saved = -1
            save(session)
        take_steps(session, 1, trace)
    return trace, start


def work_read(folder: str) -> dict[str, np.ndarray]:
    """Every tensor of a checkpoint by its stored name."""
    stored = dist_checkpointing.load_tensors_metadata(folder)
    loaded = dist_checkpointing.load(stored, folder, validate_access_integrity=False)
    return {name: tensor.float().numpy() for name, tensor in loaded.items() if isinstance(tensor, torch.Tensor)}


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def saved(pool: WorkerPool, prefix: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Saved]:
    """Train a few steps on a layout and save; once for each layout."""
    known: dict[str, Saved] = {}

    def train(name: str) -> Saved:
        if name not in known:
            folder = tmp_path_factory.mktemp(name)
            flat = options(prefix, ALL[name].flags, save=str(folder))
            traces = pool.run(ALL[name].ranks, work_train, flat, STEPS, True, join=False)
            longer = pool.run(ALL[name].ranks, work_train, {**flat, "save": None}, STEPS + 1, join=False)[0]
            assert longer.losses[:STEPS] == traces[0].losses
            known[name] = Saved(
                folder=folder,
                weights=whole_weights(traces),
                next_loss=longer.losses[-1],
                next_norm=longer.grad_norms[-1],
            )
        return known[name]

    return train


def assert_same_tensors(one: dict[str, np.ndarray], two: dict[str, np.ndarray]) -> None:
    """Bit-equal tensors under equal names; the vocabulary may be padded differently, with zeros."""
    assert one.keys() == two.keys()
    for name, value in one.items():
        other = two[name]
        if value.shape != other.shape:
            assert "word_embeddings" in name or "output_layer" in name, name
            assert not value[ROWS:].any() and not other[ROWS:].any(), f"the padding of {name} is not zero"
            value, other = value[:ROWS], other[:ROWS]
        assert np.array_equal(value, other), f"{name} differs"


@pytest.mark.parametrize("kind", CHAINS)
def test_a_checkpoint_goes_round_through_all_layouts(
    pool: WorkerPool, saved: Callable[[str], Saved], prefix: str, tmp_path: Path, kind: str
) -> None:
    """Each layout loads what the one before it saved, compares it with the first bit by bit, and saves it again."""
    start, *others = CHAINS[kind]
    before = saved(start)
    (first,) = pool.run(1, work_read, str(before.folder / "iter_0000003"))
    assert any(moment in name for name in first for moment in MOMENTS)
    folder = before.folder
    for number, target in enumerate([*others, start]):
        layout, root = ALL[target], tmp_path / str(number)
        flat = options(prefix, layout.flags, load=str(folder), save=str(root))
        replies = pool.run(layout.ranks, work_load, flat, True, join=False)
        assert [iteration for _, iteration in replies] == [STEPS] * layout.ranks
        traces = [trace for trace, _ in replies]
        weights = whole_weights(traces)
        assert weights.keys() == before.weights.keys()
        for name, value in weights.items():
            assert np.array_equal(value, before.weights[name]), f"{name} changed on the way to {target}"
        assert abs(traces[0].losses[0] / before.next_loss - 1) < 1e-6, target
        assert abs(traces[0].grad_norms[0] / before.next_norm - 1) < 1e-5, target
        (again,) = pool.run(1, work_read, str(root / "iter_0000003"))
        assert_same_tensors(first, again)
        folder = root


@pytest.mark.parametrize(("source", "target"), [("dp2-overlapped", "1"), ("1", "tp2-dp2-sharded"), ("tp2-pp2", "dp2")])
def test_weights_alone_load_whatever_the_optimizer(
    pool: WorkerPool, saved: Callable[[str], Saved], prefix: str, source: str, target: str
) -> None:
    before, layout = saved(source), ALL[target]
    flat = options(prefix, layout.flags, load=str(before.folder), finetune=True)
    replies = pool.run(layout.ranks, work_load, flat, join=False)
    assert all(start == 0 for _, start in replies)
    weights = whole_weights([trace for trace, _ in replies])
    for name, value in weights.items():
        assert np.array_equal(value, before.weights[name]), name


def test_other_kind_of_optimizer_state_is_refused(pool: WorkerPool, saved: Callable[[str], Saved], prefix: str) -> None:
    flat = options(prefix, LAYOUTS["dp2"].flags, load=str(saved("dp2-overlapped").folder))
    with pytest.raises(ValueError, match="saved with --use-distributed-optimizer; resume with it"):
        pool.run(2, work_load, flat, join=False)


def test_precision_can_change_on_the_way(pool: WorkerPool, saved: Callable[[str], Saved], prefix: str) -> None:
    """Weights of an fp32 run start a bf16 run."""
    flat = options(prefix, load=str(saved("1").folder), finetune=True, bf16=True)
    ((trace, _),) = pool.run(1, work_load, flat, join=False)
    for name, value in saved("1").weights.items():
        assert np.array_equal(whole_weights([trace])[name], torch.from_numpy(value).bfloat16().float().numpy())
