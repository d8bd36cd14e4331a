"""ZeRO-3 trains the model of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pool import WorkerPool
from tiny_run import Trace, largest_relative, open_session, options, take_steps, work_train, write_data
from torch import Tensor
from torch.distributed.tensor import DTensor

from megatron_steel.evaluate.heldout import evaluate
from megatron_steel.model.fully_sharded import is_sharded, local_shard
from megatron_steel.train.loop import save, skipped_steps

FSDP = {"use_torch_fsdp2": True, "transformer_impl": "torch"}


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_data(tmp_path_factory.mktemp("data"))


def work_sharded(flat: dict[str, Any], steps: int, save_it: bool = False) -> Trace:
    """Train; keep the whole weights, and check that no rank holds more than its part of them."""
    trace = Trace()
    with open_session(flat) as session:
        take_steps(session, steps, trace)
        if save_it:
            save(session)
        (model,) = session.model.language_models()
        for name, parameter in model.named_parameters():
            assert isinstance(parameter, DTensor)
            assert parameter._local_tensor.numel() * session.world.size == parameter.numel()
            trace.weights[name] = parameter.full_tensor().detach().float().numpy().copy()
    return trace


def close(ours: Trace, theirs: Trace, start: int = 0) -> None:
    """The steps of ``theirs`` from ``start`` on, and its weights."""
    loss = largest_relative(ours.losses, theirs.losses[start:])
    norm = largest_relative(ours.grad_norms, theirs.grad_norms[start:])
    weights = max(float(np.abs(ours.weights[name] - theirs.weights[name]).max()) for name in theirs.weights)
    print(f"loss {loss:.1e}, gradient norm {norm:.1e}, weights {weights:.1e}")
    assert loss < 1e-5 and norm < 1e-5 and weights < 2e-5


RECOMPUTE = (
    {},
    {"recompute_granularity": "full"},
    {"recompute_granularity": "selective", "recompute_modules": ["mlp"]},
)


@pytest.mark.parametrize("untied", [False, True])
def test_same_model(pool: WorkerPool, prefix: str, untied: bool) -> None:
    """Tied embeddings are used at both ends of the model; layers that are recomputed are gathered once more."""
    tied = {"untie_embeddings_and_output_weights": untied}
    (exact,) = pool.run(1, work_train, options(prefix, tied), 8, join=False)
    for recompute in RECOMPUTE if untied else RECOMPUTE[:1]:
        for trace in pool.run(2, work_sharded, options(prefix, FSDP, tied, recompute), 8, join=False):
            close(trace, exact)


def test_checkpoints_go_both_ways(pool: WorkerPool, prefix: str, tmp_path: Path) -> None:
    """Saved sharded, resumed sharded (the same bits), on 1 and 4 ranks and unsharded; and the other way round."""
    plain, sharded = options(prefix), options(prefix, FSDP)
    (exact,) = pool.run(1, work_train, {**plain, "save": str(tmp_path / "plain")}, 4, True, join=False)
    (longer,) = pool.run(1, work_train, plain, 8, join=False)
    whole = pool.run(2, work_sharded, sharded, 8, join=False)
    pool.run(2, work_sharded, {**sharded, "save": str(tmp_path / "sharded")}, 4, True, join=False)
    again = pool.run(2, work_sharded, {**sharded, "load": str(tmp_path / "sharded")}, 4, join=False)
    for one, other in zip(again, whole, strict=True):
        assert one.losses == other.losses[4:] and one.grad_norms == other.grad_norms[4:]
        assert all(np.array_equal(one.weights[name], other.weights[name]) for name in other.weights)
    close(pool.run(1, work_sharded, {**sharded, "load": str(tmp_path / "sharded")}, 4, join=False)[0], longer, 4)
    close(pool.run(4, work_sharded, {**sharded, "load": str(tmp_path / "sharded")}, 4, join=False)[3], longer, 4)
    close(pool.run(1, work_train, {**plain, "load": str(tmp_path / "sharded")}, 4, join=False)[0], longer, 4)
    close(pool.run(2, work_sharded, {**sharded, "load": str(tmp_path / "plain")}, 4, join=False)[1], longer, 4)


def work_evaluate(flat: dict[str, Any], sharded: bool) -> tuple[list[float], dict[str, Any]]:
    """Losses of two steps with an evaluation between them, and its scores."""
    trace = Trace()
    with open_session(flat) as session:
        take_steps(session, 1, trace)
        (loader,) = session.valid_loaders.values()
        scores = evaluate(session.model, loader, session.byte_lengths, session.world)
        take_steps(session, 1, trace)
        assert is_sharded(session.model.chunks) == sharded
    return trace.losses, scores.as_row()


def test_evaluation_and_bfloat16(pool: WorkerPool, prefix: str) -> None:
    """Held-out scores between two steps; in bf16, the numbers of replicas with fp32 weights beside bf16 ones."""
    changes = {"valid_data_path": [prefix], "eval_iters": 2, "bf16": True, "reset_attention_mask": True}
    changes["lr_warmup_iters"] = 0
    plain = pool.run(2, work_evaluate, options(prefix, changes), False, join=False)
    ours = pool.run(2, work_evaluate, options(prefix, changes, FSDP), True, join=False)
    print(plain, ours)
    for (losses, row), (their_losses, their_row) in zip(ours, plain, strict=True):
        assert row["tokens"] == their_row["tokens"]
        assert losses == pytest.approx(their_losses, rel=1e-4) and row["loss"] == pytest.approx(
            their_row["loss"], rel=1e-4
        )


def work_bad_gradient(flat: dict[str, Any]) -> list[tuple[bool, int]]:
    """Three steps, the second with NaN in a gradient of the last rank: whether weights moved, how many were skipped."""
    rows = []
    with open_session(flat) as session:
        (model,) = session.model.language_models()
        for number in range(3):
            before = [local_shard(parameter).clone() for parameter in model.parameters()]
            bad = number == 1 and session.world.rank == session.world.size - 1
            handle = model.decoder.register_forward_hook(spoil) if bad else None
            take_steps(session, 1, Trace())
            if handle is not None:
                handle.remove()
            after = [local_shard(parameter) for parameter in model.parameters()]
            same = all(torch.equal(old, new) for old, new in zip(before, after, strict=True))
            rows.append((not same, skipped_steps(session)))
    return rows


def spoil(module: torch.nn.Module, inputs: Any, output: Tensor) -> None:
    output.register_hook(lambda grad: torch.full_like(grad, torch.nan))


def test_bad_gradient_on_one_rank_is_skipped_by_all(pool: WorkerPool, prefix: str) -> None:
    for rows in pool.run(2, work_bad_gradient, options(prefix, FSDP, lr_warmup_iters=0), join=False):
        assert rows == [(True, 0), (False, 1), (True, 1)]
