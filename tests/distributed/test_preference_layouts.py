"""Training on preferences is the same on every layout, packed or not, and from whatever reference."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pool import WorkerPool
from tiny_chats import chat_options, write_model, write_pairs
from tiny_run import LAYOUTS, Trace, largest_relative, open_session, whole_weights, work_train

STEPS = 4
ROWS = 4096  # of the bundled tokenizer
KINDS: dict[str, dict[str, Any]] = {
    "sigmoid": {},
    "single": {"packing": False, "loss_type": "ipo"},
    "orpo": {"loss_type": "orpo"},
    "kto": {"loss_type": "kto"},
    "rm": {"loss_type": "rm"},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, str]:
    folder = tmp_path_factory.mktemp("data")
    return {judged: write_pairs(folder / f"{judged}.jsonl", 40, judged=judged) for judged in (False, True)}


def options(model: str, data: dict[bool, str], kind: str, **more: Any) -> dict[str, Any]:
    judged = KINDS[kind].get("loss_type") == "kto"
    return chat_options(model, data[judged], seq_length=128, preferences=True, **KINDS[kind], **more)


@pytest.fixture(scope="module")
def alone(pool: WorkerPool, model: str, data: dict[bool, str]) -> dict[str, Trace]:
    """One process."""
    return {kind: pool.run(1, work_train, options(model, data, kind), STEPS, join=False)[0] for kind in KINDS}


def check_same(traces: list[Trace], wanted: Trace) -> None:
    assert largest_relative(traces[0].losses, wanted.losses) < 3e-6
    assert largest_relative(traces[0].grad_norms, wanted.grad_norms) < 1e-5
    for row, other in zip(traces[0].rows, wanted.rows, strict=True):
        for name in (name for name in row if "/" in name or name == "kl"):
            assert math.isclose(row[name], other[name], rel_tol=1e-4, abs_tol=2e-6), name
    ours, theirs = whole_weights(traces, ROWS), whole_weights([wanted], ROWS)
    assert ours.keys() == theirs.keys()
    assert max(float(np.abs(ours[name] - theirs[name]).max()) for name in ours) < 1e-5


@pytest.mark.parametrize(
    ("layout", "kind"),
    [
        ("tp2-sp", "sigmoid"),
        ("pp2", "sigmoid"),
        ("cp2", "sigmoid"),
        ("pp2-interleaved", "single"),
        ("dp2-sharded", "orpo"),
        ("cp2-dp2-overlapped", "kto"),
        ("tp2-pp2", "kto"),
        ("tp2-sp", "rm"),
        ("cp2-pp2", "rm"),
    ],
)
def test_layout_trains_like_one_process(
    pool: WorkerPool, model: str, data: dict[bool, str], alone: dict[str, Trace], layout: str, kind: str
) -> None:
    flat = options(model, data, kind, **LAYOUTS[layout].flags)
    check_same(pool.run(LAYOUTS[layout].ranks, work_train, flat, STEPS, join=False), alone[kind])


def test_it_begins_at_the_reference(alone: dict[str, Trace]) -> None:
    assert math.isclose(alone["sigmoid"].losses[0], math.log(2), rel_tol=1e-6)
    first, last = alone["sigmoid"].rows[0], alone["sigmoid"].rows[-1]
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "logratios/chosen"):
        assert abs(first[name]) < 1e-5 < abs(last[name])
    assert last["tokens/chosen"] > 1 and last["logps/chosen"] < 0
    assert abs(alone["kto"].rows[0]["kl"]) < 1e-6


@pytest.mark.parametrize("kind", ["sigmoid", "kto"])
def test_references_agree(
    pool: WorkerPool, model: str, data: dict[bool, str], alone: dict[str, Trace], kind: str
) -> None:
    """Computed before, or by a second model at each step; with adapters also by the model without them."""
    flat = options(model, data, kind, reference="live")
    check_same(pool.run(1, work_train, flat, STEPS, join=False), alone[kind])
    lora = {"lora_rank": 4}
    wanted = pool.run(1, work_train, options(model, data, kind, **lora), STEPS, join=False)[0]
    assert largest_relative(wanted.losses, alone[kind].losses) > 1e-6
    for reference in ("live", "lora-base"):
        flat = options(model, data, kind, reference=reference, **lora)
        check_same(pool.run(1, work_train, flat, STEPS, join=False), wanted)


def test_packing_changes_nothing(pool: WorkerPool, model: str, tmp_path: Path) -> None:
    """Steps over all pairs at once."""
    for judged, loss_type in ((False, "sigmoid"), (False, "simpo"), (True, "kto")):
        data = {judged: write_pairs(tmp_path / f"{loss_type}.jsonl", 16, seed=1, judged=judged)}
        kind = "kto" if judged else "sigmoid"
        shared = {"micro_batch_size": 1, "loss_type": loss_type}
        (rows,) = pool.run(1, work_rows, options(model, data, kind) | shared, join=False)
        assert rows < 12
        packed = options(model, data, kind) | shared | {"global_batch_size": rows}
        single = options(model, data, kind) | shared | {"global_batch_size": 16, "packing": False}
        wanted = pool.run(1, work_train, single, 3, join=False)[0]
        check_same(pool.run(1, work_train, packed, 3, join=False), wanted)


def work_rows(flat: dict[str, Any]) -> int:
    """Rows that the data is packed into."""
    with open_session(flat) as session:
        return session.loader.ledger.sources[0].windows


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_goes_on_bit_for_bit(
    pool: WorkerPool, model: str, data: dict[bool, str], tmp_path: Path, ranks: int
) -> None:
    """The references are found again, and are those of the first start although the model has moved."""
    flat = options(model, data, "sigmoid")
    (whole, *_) = pool.run(ranks, work_train, flat, STEPS, join=False)
    pool.run(ranks, work_train, {**flat, "save": str(tmp_path / "run")}, 2, True, join=False)
    assert len(list((tmp_path / "run").rglob("references/*.npy"))) == 1
    for kept in (True, False):
        if not kept:
            next((tmp_path / "run").rglob("references/*.npy")).unlink()
        rest = {**flat, "load": str(tmp_path / "run"), "pretrained_checkpoint": None}
        rest |= {"data_cache_path": str(tmp_path / "run" / "encoded")}
        (trace, *_) = pool.run(ranks, work_train, rest, 2, join=False)
        assert trace.losses == whole.losses[2:] and trace.grad_norms == whole.grad_norms[2:]


def work_falling(flat: dict[str, Any]) -> tuple[str, int, int]:
    """Train as the command does on rewards that fall; why and after which step it stopped, and the last one saved."""
    from megatron_steel.metrics.collapse import RewardWatch
    from megatron_steel.train.loop import train

    class Falling(RewardWatch):
        def see(self, row: Any) -> str | None:
            assert {self.good, self.bad} <= row.keys()
            fall = -0.1 * row["iteration"]
            return super().see({self.good: fall, self.bad: 2 * fall})

    with open_session(flat) as session:
        assert session.watch is not None
        session.watch = Falling(session.watch.good, session.watch.bad, session.watch.patience)
        return train(session), session.state.iteration, session.last_saved


def test_collapsing_rewards_end_a_run(pool: WorkerPool, model: str, data: dict[bool, str], tmp_path: Path) -> None:
    for kind in ("sigmoid", "kto"):
        flat = options(model, data, kind, log_interval=1, reward_collapse_patience=3, train_iters=9)
        flat["save"] = str(tmp_path / kind)
        (stopped,) = pool.run(1, work_falling, flat, join=False)
        assert stopped == ("the rewards of good and bad answers fall together", 4, 4)


def test_a_reward_model_tells_answers_apart(pool: WorkerPool, model: str, tmp_path: Path) -> None:
    """Good answers begin with one word and bad ones with another: it learns which, and keeps it."""
    lines = []
    for number in range(32):
        turns = {"prompt": ("user", f"question {number}"), "chosen": ("assistant", f"light {number}")}
        turns["rejected"] = ("assistant", f"stone {number + 1}")
        lines.append(json.dumps({key: [{"role": role, "content": text}] for key, (role, text) in turns.items()}))
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(lines) + "\n")
    flat = chat_options(model, str(path), seq_length=128, preferences=True, loss_type="rm", train_iters=20, lr=5e-3)
    trace = pool.run(1, work_train, flat, 20, join=False)[0]
    assert trace.rows[-1]["rewards/accuracies"] == 1.0 and trace.losses[-1] < 0.3 < trace.losses[0]
