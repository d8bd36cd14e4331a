"""A finetune is the same on every layout, packed or not: losses, gradient norms and updated weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pool import WorkerPool
from tiny_chats import chat_options, write_chats, write_model
from tiny_run import LAYOUTS, Trace, largest_relative, open_session, whole_weights, work_train

STEPS = 4
ROWS = 4096  # of the bundled tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_chats(tmp_path_factory.mktemp("data") / "chats.jsonl", 60)


KINDS: dict[str, dict[str, Any]] = {
    "packed": {},
    "packed-sample": {"loss_weighting": "sample"},
    "single": {"packing": False},
}


@pytest.fixture(scope="module")
def alone(pool: WorkerPool, model: str, data: str) -> dict[str, Trace]:
    """One process."""
    return {
        kind: pool.run(1, work_train, chat_options(model, data, **flags), STEPS, join=False)[0]
        for kind, flags in KINDS.items()
    }


def difference(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> float:
    """Largest difference of a weight."""
    assert ours.keys() == theirs.keys()
    return max(float(np.abs(ours[name] - theirs[name]).max()) for name in ours)


@pytest.mark.parametrize(
    ("layout", "kind"),
    [
        ("tp2-sp", "packed"),
        ("pp2", "packed"),
        ("dp2-sharded", "packed"),
        ("cp2", "packed"),
        ("tp2-sp", "single"),
        ("pp2-interleaved", "single"),
        ("dp2-overlapped", "single"),
        ("cp2-tp2-sp", "single"),
        ("cp2-dp2-overlapped", "packed-sample"),
    ],
)
def test_layout_trains_like_one_process(
    pool: WorkerPool, model: str, data: str, alone: dict[str, Trace], layout: str, kind: str
) -> None:
    flat = chat_options(model, data, **KINDS[kind], **LAYOUTS[layout].flags)
    traces = pool.run(LAYOUTS[layout].ranks, work_train, flat, STEPS, join=False)
    wanted = alone[kind]
    assert largest_relative(traces[0].losses, wanted.losses) < 1e-6
    assert largest_relative(traces[0].grad_norms, wanted.grad_norms) < 1e-5
    assert difference(whole_weights(traces, ROWS), whole_weights([wanted], ROWS)) < 1e-5


def test_weighting_decides_what_is_trained(alone: dict[str, Trace]) -> None:
    assert abs(alone["packed"].losses[0] - alone["packed-sample"].losses[0]) > 1e-3


def test_packing_changes_nothing(pool: WorkerPool, model: str, tmp_path: Path) -> None:
    """Steps over all conversations at once: packed in a few rows, or each in a row of its own."""
    data = write_chats(tmp_path / "chats.jsonl", 24, seed=1, longest=3)
    packed_rows = pool.run(1, work_rows, chat_options(model, data), join=False)[0]
    assert 4 <= packed_rows <= 16
    traces = {}
    for weighting in ("token", "sample", "square"):
        for packing, batch in ((True, packed_rows), (False, 24)):
            flat = chat_options(
                model, data, packing=packing, global_batch_size=batch, micro_batch_size=1, loss_weighting=weighting
            )
            traces[weighting, packing] = pool.run(1, work_train, flat, 3, join=False)[0]
        packed, single = traces[weighting, True], traces[weighting, False]
        assert largest_relative(packed.losses, single.losses) < 1e-6
        assert largest_relative(packed.grad_norms, single.grad_norms) < 1e-5
        assert difference(whole_weights([packed], ROWS), whole_weights([single], ROWS)) < 1e-5
    first = {weighting: traces[weighting, True].losses[0] for weighting in ("token", "sample", "square")}
    assert len({round(loss, 5) for loss in first.values()}) == 3


def work_rows(flat: dict[str, Any]) -> int:
    """Rows that the data is packed into."""
    with open_session(flat) as session:
        return session.loader.ledger.sources[0].windows


def work_leak(flat: dict[str, Any]) -> tuple[float, float, float]:
    """Loss of a packed batch; of its conversations one by one; and with the bounds between them taken away."""
    from megatron_steel.objective.language import run_micro_batches

    with open_session(flat) as session:
        (batch,) = session.loader.step(0)

        def loss(changed: Any) -> float:
            (output,) = run_micro_batches(session.model, [changed], 1.0, forward_only=True)
            return float(output["loss_by_sample"].double().sum())

        bounds = batch.cu_seqlens.tolist()
        separate = 0.0
        names = ("tokens_BS", "labels_BS", "loss_mask_BS", "position_ids_BS")
        for begin, end in zip(bounds[:-1], bounds[1:], strict=True):
            part = {name: getattr(batch, name).reshape(1, -1)[:, begin:end] for name in names}
            separate += loss(dataclasses.replace(batch, **part, cu_seqlens=None))
        leaking = dataclasses.replace(batch, cu_seqlens=None)
        return loss(batch), separate, loss(leaking)


def test_packed_conversations_do_not_see_each_other(pool: WorkerPool, model: str, data: str) -> None:
    packed, separate, leaking = pool.run(1, work_leak, chat_options(model, data, global_batch_size=2), join=False)[0]
    assert abs(packed - separate) / separate < 1e-6
    assert abs(leaking - separate) / separate > 1e-4


def test_more_micro_batches_make_the_same_step(
    pool: WorkerPool, model: str, data: str, alone: dict[str, Trace]
) -> None:
    """Micro-batches hold different numbers of trained tokens."""
    for kind in KINDS:
        flat = chat_options(model, data, **KINDS[kind]) | {"micro_batch_size": 1}
        trace = pool.run(1, work_train, flat, STEPS, join=False)[0]
        assert largest_relative(trace.losses, alone[kind].losses) < 1e-6
        assert largest_relative(trace.grad_norms, alone[kind].grad_norms) < 1e-5


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_finetune_goes_on_bit_for_bit(pool: WorkerPool, model: str, data: str, tmp_path: Path, ranks: int) -> None:
    flat = chat_options(model, data)
    (whole, *_) = pool.run(ranks, work_train, flat, STEPS, join=False)
    pool.run(ranks, work_train, {**flat, "save": str(tmp_path / "run")}, 2, True, join=False)
    rest = {**flat, "load": str(tmp_path / "run"), "pretrained_checkpoint": None}
    (trace, *_) = pool.run(ranks, work_train, rest, 2, join=False)
    assert trace.consumed_samples == whole.consumed_samples == 4 * 8
    assert trace.losses == whole.losses[2:] and trace.grad_norms == whole.grad_norms[2:]
    assert all(np.array_equal(trace.weights[name], whole.weights[name]) for name in whole.weights)
