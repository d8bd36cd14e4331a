"""Replicas that went apart are found and named, and nothing is saved of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import as_flags, run
from hypothesis import given
from hypothesis import strategies as st
from pool import WorkerPool
from tiny_run import OVERLAPPED, SHARDED, TP2, Trace, open_session, options, take_steps, write_data

from megatron_steel.checkpoint.files import find_checkpoint
from megatron_steel.train import replicas
from megatron_steel.train.replicas import ReplicaError, check_replicas, describe, differing, tensor_hash

# A run whose rank 1 gets another weight after its third step: one bit of one element.
PROGRAM = """
import sys, torch
from megatron_steel import pretrain
from megatron_steel.runtime import cpu
cpu.install()
from megatron_steel.train import loop
whole_step = loop.take_step
def step(session):
    whole_step(session)
    if session.world.rank == 1 and session.state.iteration == 3:
        weight = next(session.model.language_models()[0].parameters())
        weight.detach().view(-1).view(torch.int32)[5] ^= 1
loop.take_step = step
if __name__ == "__main__":
    sys.exit(pretrain.main())
"""


@given(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), st.data())
def test_every_changed_element_changes_the_hash(dtype: torch.dtype, data: st.DataObject) -> None:
    size, seed = data.draw(st.integers(1, 200)), data.draw(st.integers(0, 2**31))
    values = torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(dtype)
    changed = values.clone()
    place = data.draw(st.integers(0, size - 1))
    bits = changed.view(torch.int16 if dtype.itemsize == 2 else torch.int32)
    bits[place] ^= 1 << data.draw(st.integers(0, 8 * dtype.itemsize - 2))
    assert tensor_hash(values) == tensor_hash(values.clone()) != tensor_hash(changed)


def test_hash_of_swapped_and_opposite_changes() -> None:
    values = torch.arange(1000, dtype=torch.float32)
    known = {tensor_hash(values)}
    for first in range(0, 990, 7):
        for second in (first + 1, first + 2, first + 9):
            swapped, opposite = values.clone(), values.clone()
            swapped[[first, second]] = swapped[[second, first]]
            opposite.view(torch.int32)[first] += 1
            opposite.view(torch.int32)[second] -= 1
            known |= {tensor_hash(swapped), tensor_hash(opposite)}
    assert len(known) == 1 + 2 * 3 * len(range(0, 990, 7))


def test_hash_does_not_depend_on_its_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(50, 40).t()
    whole = tensor_hash(values)
    monkeypatch.setattr(replicas, "CHUNK", 17)
    assert tensor_hash(values) == whole != tensor_hash(values.t())


def test_the_smaller_part_is_named() -> None:
    key = ("w", 0)
    assert not differing([{key: 1}, {key: 1}, {("w", 1): 2}])
    assert describe(differing([{key: 1}, {key: 2}, {key: 1}])).startswith("rank 1 held other weights than the 2")
    tie = describe(differing([{key: 1, ("v", 0): 0}, {key: 2, ("v", 0): 3}]))
    assert tie == "replicas differ in w and 1 more: rank 0 from rank 1, with no majority to tell which is wrong"


def work_compare(flat: dict[str, Any], stray: int) -> list[str]:
    """What the comparison says before and after one weight of rank ``stray`` is changed."""
    said = []
    with open_session(flat) as session:
        take_steps(session, 2, Trace())
        check_replicas(session.model, session.world, 2)
        if session.world.rank == stray:
            with torch.no_grad():
                dict(session.model.language_models()[0].named_parameters())["decoder.final_layernorm.weight"][3] += 1e-6
        try:
            check_replicas(session.model, session.world, 2)
        except ReplicaError as error:
            said.append(str(error))
    return said


@pytest.mark.parametrize(
    ("ranks", "flags", "named"),
    [
        (3, {"global_batch_size": 6}, "rank 2 held other weights than the 2 replicas that agree"),
        (4, {**TP2, **SHARDED}, "differ in decoder.final_layernorm.weight: rank 0 from rank 2, with no majority"),
    ],
    ids=["dp3", "tp2-dp2"],
)
def test_stray_rank_is_named(pool: WorkerPool, tmp_path: Path, ranks: int, flags: dict[str, Any], named: str) -> None:
    """By all ranks alike, also those whose own replicas agree."""
    flat = options(write_data(tmp_path), flags)
    said = pool.run(ranks, work_compare, flat, 2, join=False)
    assert all(len(lines) == 1 and named in lines[0] and lines == said[0] for lines in said), said


def test_run_ends_with_its_last_good_checkpoint(tmp_path: Path) -> None:
    """Asked for every 100 steps, and still before the save after step 4: the checkpoint of step 2 stays the newest."""
    (tmp_path / "stray.py").write_text(PROGRAM)
    save = tmp_path / "save"
    flat = options(
        write_data(tmp_path), save=str(save), save_interval=2, check_weight_hash_across_dp_replicas_interval=100
    )
    assert run(tmp_path, as_flags(flat), ranks=2, program=(str(tmp_path / "stray.py"),)) == [1, 1]
    line = (tmp_path / "err0").read_text().strip().splitlines()[-1]
    assert line.startswith("error: rank 0: after iteration 4 replicas differ in embedding.word_embeddings.weight")
    assert find_checkpoint(save, None)[0].name.endswith("2")
    assert sorted(path.name for path in save.glob("iter_*")) == [find_checkpoint(save, None)[0].name]


def test_overlapped_gather_does_not_look_like_a_stray_rank(pool: WorkerPool, tmp_path: Path) -> None:
    """Weights of other ranks arrive late there; and the comparison does not change the run."""
    flat = options(write_data(tmp_path), OVERLAPPED)
    assert pool.run(2, work_compare, flat, 5, join=False) == [[], []]
