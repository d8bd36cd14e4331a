"""Ranks, groups, seeds, random state and agreements of a world; and that every layout trains like one process."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from pool import WorkerPool
from safetensors.torch import load, save
from tiny_training import Layout, save_and_load, train

from megatron_steel.runtime import contact, quiet
from megatron_steel.runtime import world as runtime

REPOSITORY = Path(__file__).parents[2]


def describe(**sizes: int) -> dict[str, object]:
    world = runtime.start(**sizes, timeout_minutes=0.5)  # type: ignore[arg-type]
    groups = {
        "tensor": world.tensor_group,
        "pipeline": world.pipeline_group,
        "data": world.data_group,
        "context": world.context_group,
        "host": world.host_group,
    }
    ranks = {name: dist.get_process_group_ranks(group) for name, group in groups.items()}
    waits = {
        name: group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for name, group in groups.items()
    }
    return {
        "place": (world.tensor_rank, world.pipeline_rank, world.data_rank),
        "sizes": (world.tensor_size, world.pipeline_size, world.data_size, world.size),
        "ranks": ranks,
        "waits": waits,
        "line": world.one_line(),
    }


def test_places_and_groups_of_four_ranks(pool: WorkerPool) -> None:
    """megatron-core's order: tensor ranks are neighbours, then data, pipeline stages are farthest apart."""
    found = pool.run(4, _describe_2x1x2, join=False)
    assert [reply["place"] for reply in found] == [(0, 0, 0), (1, 0, 0), (0, 0, 1), (1, 0, 1)]
    assert found[3]["ranks"] == {
        "tensor": [2, 3], "pipeline": [3], "data": [1, 3], "context": [3], "host": [0, 1, 2, 3]
    }  # fmt: skip
    assert found[0]["line"] == "cpu, gloo, 4 ranks (tp 2, pp 1, dp 2), 1 thread each"
    found = pool.run(4, _describe_2x2, join=False)
    assert [reply["place"] for reply in found] == [(0, 0, 0), (1, 0, 0), (0, 1, 0), (1, 1, 0)]
    assert found[1]["ranks"]["pipeline"] == [1, 3]


def _describe_2x1x2() -> dict[str, object]:
    return describe(tensor_model_parallel_size=2)


def _describe_2x2() -> dict[str, object]:
    return describe(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)


def test_every_group_has_our_timeout(pool: WorkerPool) -> None:
    for reply in pool.run(2, _describe_2, join=False):
        assert set(reply["waits"].values()) == {30.0}, reply["waits"]


def _describe_2() -> dict[str, object]:
    return describe(pipeline_model_parallel_size=2)


def test_sizes_that_do_not_divide_are_refused(pool: WorkerPool) -> None:
    with pytest.raises(ValueError, match="2 ranks cannot hold replicas of 3 ranks"):
        pool.run(2, _describe_3, join=False)


def _describe_3() -> dict[str, object]:
    return describe(tensor_model_parallel_size=3)


def draw(tensor: int, pipeline: int) -> tuple[tuple[int, int, int], list[float], list[float]]:
    """Place; numbers drawn alike by tensor ranks; numbers of their own."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    world = runtime.start(tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline, seed=5)
    alike = [random.random(), float(np.random.rand()), torch.rand(1).item()]
    with get_cuda_rng_tracker().fork():
        own = torch.rand(2).tolist()
    return (world.tensor_rank, world.pipeline_rank, world.data_rank), alike, own


def test_seeds(pool: WorkerPool) -> None:
    """Replicas draw alike everywhere; tensor ranks only outside the tracker; stages differ (Megatron-LM's rule)."""
    replicas = pool.run(2, draw, 1, 1, join=False)
    assert replicas[0][1:] == replicas[1][1:]
    shards = pool.run(2, draw, 2, 1, join=False)
    assert shards[0][1] == shards[1][1] == replicas[0][1] and shards[0][2] != shards[1][2]
    assert shards[0][2] == replicas[0][2]
    stages = pool.run(2, draw, 1, 2, join=False)
    assert all(a != b for a, b in zip(stages[0][1], stages[1][1], strict=True)) and stages[0][2] != stages[1][2]
    # The seeds themselves: seed + 100 * stage outside, + 2718 + tensor rank inside.
    for stage in (0, 1):
        torch.manual_seed(5 + 100 * stage)
        assert torch.rand(1).item() == stages[stage][1][2]
        torch.manual_seed(5 + 100 * stage + 2718)
        assert torch.rand(2).tolist() == stages[stage][2]


def restore_random_state() -> bool:
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    runtime.start(seed=11)

    def draw_all() -> list[float]:
        with get_cuda_rng_tracker().fork():
            own = torch.rand(2).tolist()
        gauss = [random.gauss(0, 1), float(np.random.randn())]
        return [random.random(), float(np.random.rand()), *torch.rand(2).tolist(), *own, *gauss]

    draw_all()  # an odd number of gaussians: both libraries now hold a second one back
    stored = save(runtime.rng_state())
    wanted = [draw_all(), draw_all()]
    runtime.set_rng_state(load(stored))
    return [draw_all(), draw_all()] == wanted


def test_random_state_survives_a_file(pool: WorkerPool) -> None:
    assert pool.run(1, restore_random_state, join=False) == [True]


def agreements() -> tuple[object, ...]:
    world = runtime.start()
    last = world.size - 1
    return (
        runtime.agree(world, world.rank == last),
        runtime.agree(world, False),
        runtime.broadcast_object(world, {"rank": world.rank}, source=last),
        runtime.gather_objects(world, world.rank * 2),
    )


def test_agreements(pool: WorkerPool) -> None:
    assert pool.run(2, agreements, join=False) == [(True, False, {"rank": 1}, [0, 2])] * 2
    assert pool.run(1, agreements, join=False) == [(True, False, {"rank": 0}, [0])]


def twice() -> int:
    """A world can be stopped and another started in the same process group environment."""
    world = runtime.start()
    runtime.stop(world, failed=False)
    return int(dist.is_initialized())


def test_stop_leaves_nothing(pool: WorkerPool) -> None:
    assert pool.run(2, twice, join=False) == [0, 0]


# Layouts against one process of the same precision. What is summed in another order agrees to rounding: 24 bits in
# fp32; in bf16 replicas sum fp32 gradients, but tensor ranks round their partial activations to 8 bits.
EXACT, ROUGH = 3e-6, 2e-2
LAYOUTS = {
    "tp2": (2, Layout(tensor=2), EXACT),
    "tp2 sp": (2, Layout(tensor=2, sequence_parallel=True), EXACT),
    "pp2": (2, Layout(pipeline=2), EXACT),
    "pp2 vpp2": (2, Layout(pipeline=2, virtual=2), EXACT),
    "dp2": (2, Layout(), EXACT),
    "dp2 overlap": (2, Layout(overlap=True), EXACT),
    "tp2 pp2": (4, Layout(tensor=2, pipeline=2), EXACT),
    "dp2 overlap bf16": (2, Layout(overlap=True, bf16=True), EXACT),
    "tp2 sp bf16": (2, Layout(tensor=2, sequence_parallel=True, bf16=True), ROUGH),
}


@pytest.fixture(scope="module")
def alone(pool: WorkerPool) -> dict[bool, list[tuple[float, float]]]:
    """Losses and gradient norms of one process, in fp32 and (True) in bf16."""
    return {bf16: pool.run(1, train, Layout(bf16=bf16), join=False)[0] for bf16 in (False, True)}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_trains_like_one_process(
    pool: WorkerPool, alone: dict[bool, list[tuple[float, float]]], name: str
) -> None:
    ranks, layout, tolerance = LAYOUTS[name]
    for reply in pool.run(ranks, train, layout, join=False):
        np.testing.assert_allclose(reply, alone[layout.bf16], rtol=tolerance)


def test_bf16_stays_near_fp32(alone: dict[bool, list[tuple[float, float]]]) -> None:
    losses = {bf16: [loss for loss, _ in steps] for bf16, steps in alone.items()}
    np.testing.assert_allclose(losses[True], losses[False], rtol=1e-3)
    assert losses[True] != losses[False]


def test_experts_train_like_one_process(pool: WorkerPool) -> None:
    wanted = pool.run(1, train, Layout(experts=4), join=False)[0]
    for layout in (Layout(experts=4, expert=2), Layout(experts=4, tensor=2, sequence_parallel=True)):
        np.testing.assert_allclose(pool.run(2, train, layout, join=False)[0], wanted, rtol=EXACT)


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (1, Layout(overlap=True)),
        (2, Layout(bf16=True, overlap=True)),
        (2, Layout(pipeline=2, virtual=2)),
        (2, Layout(tensor=2)),
    ],
    ids=["one", "dp2 overlap bf16", "pp2 vpp2", "tp2"],
)
def test_saved_run_goes_on_bit_for_bit(pool: WorkerPool, tmp_path: Path, ranks: int, layout: Layout) -> None:
    assert pool.run(ranks, save_and_load, layout, str(tmp_path), join=False) == [True] * ranks


QUIET_START = """
def main():
    from megatron_steel.runtime import world
    here = world.start()
    import megatron.core.dist_checkpointing, megatron.core.distributed, megatron.core.models.gpt.gpt_layer_specs
    import megatron.core.optimizer
    from megatron.core.transformer.transformer_config import TransformerConfig
    TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1)
    print(here.one_line())
    world.stop(here, failed=False)
if __name__ == "__main__":
    main()
"""


def test_one_process_starts_quietly_without_any_environment(tmp_path: Path) -> None:
    script = tmp_path / "start.py"
    script.write_text(QUIET_START)
    environment = {"PYTHONPATH": str(REPOSITORY), "PATH": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "cpu, gloo, 1 rank (tp 1, pp 1, dp 1), 1 thread\n"


def test_quiet_has_a_reason_for_every_message() -> None:
    assert all(message.why and message.start for message in (*quiet.WARNINGS, *quiet.RECORDS))


def fail_on_rank_one(file: str) -> None:
    """Rank 1 raises; rank 0 waits for it in a collective and writes its last words to ``file``."""
    world = runtime.start(timeout_minutes=0.5)
    with open(file, "w") if world.rank == 0 else open("/dev/null", "w") as sys.stderr, contact.watching(world):
        if world.rank == 1:
            raise ValueError("a bad\nsample")
        runtime.barrier(world)


def test_survivor_names_the_rank_that_failed_and_why(pool: WorkerPool, tmp_path: Path) -> None:
    words = tmp_path / "words"
    with pytest.raises(ValueError, match="a bad"):
        pool.run(2, fail_on_rank_one, str(words), join=False)
    assert words.read_text() == (
        "error: rank 0: lost contact with rank 1, which failed: ValueError: a bad sample (connection closed)\n"
    )
