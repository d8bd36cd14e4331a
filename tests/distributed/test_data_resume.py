"""Three sources through real runs: every layout in turn reads the ledger's samples once; what a resume refuses."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import as_flags, run, training_rows
from pool import WorkerPool
from tiny_run import LAYOUTS, PP2, TP2, Trace, open_session, options, take_steps, write_data

from megatron_steel.config.load import from_flat
from megatron_steel.data.order import Ledger
from megatron_steel.metrics.sinks import METRICS_FILE, read_metrics
from megatron_steel.train.loop import save
from megatron_steel.train.prepare import prepare

GLOBAL_BATCH = 8
PHASE = "start_iteration=5 zh=1 en=1 code=2"


@pytest.fixture(scope="module")
def prefixes(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Three sources of different sizes."""
    folder = tmp_path_factory.mktemp("data")
    sizes = {"zh": 120, "en": 60, "code": 30}
    return [write_data(folder, count, seed, name) for seed, (name, count) in enumerate(sizes.items())]


def three(prefixes: list[str], *changes: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Options of a run with weights and, from its sixth step on, other weights."""
    weighted = ["0.6", prefixes[0], "0.3", prefixes[1], "0.1", prefixes[2]]
    return options("", *changes, train_data_path=weighted, data_phases=[PHASE], **more)


def work_read(flat: dict[str, Any], steps: int) -> tuple[int, list[bytes], Trace, dict[str, int]]:
    """Train and save; this rank's data-parallel number, its samples, the trace, tokens by source in the state."""
    trace, rows = Trace(), []
    with open_session(flat) as session:
        read = session.loader.step

        def step(first_sample: int) -> Any:
            batches = read(first_sample)
            for batch in batches:
                whole = np.concatenate([batch.tokens_BS.numpy()[:, :1], batch.labels_BS.numpy()], axis=1)
                rows.extend(sample.tobytes() for sample in whole)
            return batches

        session.loader.step = step  # type: ignore[method-assign]
        take_steps(session, steps, trace)
        save(session)
        trace.consumed_samples = session.state.consumed_samples
        return session.world.data_rank, rows, trace, session.state.consumed_tokens_by_source


def expected_samples(flat: dict[str, Any], start: int, stop: int) -> list[bytes]:
    """The samples that the ledger of a new run names, read here."""
    prepared = prepare(from_flat({**flat, "load": None, "save": None}))
    names = [source.fingerprint for source in prepared.ledger.sources]
    source, _, window = prepared.ledger.samples(start, stop)
    return [prepared.datasets[names[s]][int(w)].tobytes() for s, w in zip(source, window, strict=True)]


def test_no_sample_is_lost_or_repeated_over_five_layouts(pool: WorkerPool, prefixes: list[str], tmp_path: Path) -> None:
    """C5 and C9: data-, tensor- and pipeline-parallel ranks, micro-batches and world sizes change at every save."""
    chain = [
        (2, {**LAYOUTS["dp2"].flags, "micro_batch_size": 2}),
        (1, {"micro_batch_size": 8}),
        (2, {**TP2, "micro_batch_size": 1}),
        (4, {**TP2, **PP2, "micro_batch_size": 4}),
        (2, {**PP2, "micro_batch_size": 2}),
    ]
    done = 0
    for ranks, flags in chain:
        flat = three(prefixes, flags, load=str(tmp_path) if done else None, save=str(tmp_path))
        replies = pool.run(ranks, work_read, flat, 2, join=False)
        by_replica = {replica: rows for replica, rows, _, _ in replies}
        seen = Counter(row for rows in by_replica.values() for row in rows)
        assert seen == Counter(expected_samples(three(prefixes), done, done + 2 * GLOBAL_BATCH)), (
            f"after {done} samples"
        )
        done += 2 * GLOBAL_BATCH
        assert {trace.consumed_samples for _, _, trace, _ in replies} == {done}
    state = json.loads((tmp_path / "iter_0000010" / "state.json").read_text())
    ledger = Ledger.from_json(state["ledger"])
    assert [segment.start for segment in ledger.segments] == [0, 40]
    counted = np.bincount(ledger.samples(0, done)[0], minlength=3) * 32
    assert state["consumed_tokens_by_source"] == dict(zip(("zh", "en", "code"), counted.tolist(), strict=True))
    assert sum(state["consumed_tokens_by_source"].values()) == state["consumed_tokens"]


def test_three_sources_and_a_phase_resume_exactly(pool: WorkerPool, prefixes: list[str], tmp_path: Path) -> None:
    """C1 and C9: 4 + 4 steps are 8 steps: the same samples, losses to the last bit, tokens by source."""
    whole = pool.run(1, work_read, three(prefixes), 8, join=False)[0]
    first = pool.run(1, work_read, three(prefixes, save=str(tmp_path)), 4, join=False)[0]
    second = pool.run(1, work_read, three(prefixes, load=str(tmp_path)), 4, join=False)[0]
    assert first[1] + second[1] == whole[1]
    assert first[2].losses + second[2].losses == whole[2].losses


@pytest.fixture(scope="module")
def saved(pool: WorkerPool, prefixes: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint after 6 steps, one step into the phase."""
    folder = tmp_path_factory.mktemp("saved")
    pool.run(1, work_read, three(prefixes, save=str(folder)), 6, join=False)
    return folder


def resume(flat: dict[str, Any], folder: Path, **changes: Any) -> Any:
    """What a resume with these options is given before it starts."""
    return prepare(from_flat({**flat, "load": str(folder), "global_batch_size": GLOBAL_BATCH, **changes}))


def test_the_order_does_not_depend_on_the_run(prefixes: list[str]) -> None:
    """Length, micro-batch and where the run would be saved: the ledger is the same."""
    ledgers = [
        prepare(from_flat(three(prefixes, train_iters=train_iters, micro_batch_size=micro_batch, lr_warmup_iters=0)))
        for train_iters in (1, 20, 50)
        for micro_batch in (1, 4, 8)
    ]
    assert len({prepared.ledger.fingerprint() for prepared in ledgers}) == 1
    assert [line for line in ledgers[0].warnings if "begin after the run's last sample 7" in line]


def test_past_phases_are_fixed_and_future_ones_are_not(prefixes: list[str], saved: Path) -> None:
    flat = three(prefixes)
    before = resume(flat, saved).ledger
    for append in (False, True):
        with pytest.raises(ValueError, match="the phase from sample 40 on is not what the checkpoint was trained with"):
            resume(flat, saved, data_phases=["start_iteration=5 zh=1 en=1 code=3"], append_data=append)
    future = [PHASE, "start_tokens=2000 code=1"]
    with pytest.raises(ValueError, match=r"start at samples \[63\], the checkpoint's at \[\]: pass --append-data"):
        resume(flat, saved, data_phases=future)
    after = resume(flat, saved, data_phases=future, append_data=True)
    assert np.array_equal(after.ledger.samples(0, 63), before.samples(0, 63))
    assert set(after.ledger.samples(63, 100)[0].tolist()) == {2}
    assert any("planned anew" in line for line in after.warnings)


def test_new_moved_copied_changed_and_missing_files(prefixes: list[str], saved: Path, tmp_path: Path) -> None:
    """C2, C3 and C4 for three sources: the message names the file and the way out."""
    flat = three(prefixes)
    moved = [shutil.copy(prefix + suffix, tmp_path / f"x_{i}{suffix}") for i, prefix in enumerate(prefixes)
             for suffix in (".bin", ".idx")]  # fmt: skip
    assert len(moved) == 6
    renamed = ["0.6", str(tmp_path / "x_0"), "0.3", str(tmp_path / "x_1"), "0.1", str(tmp_path / "x_2")]
    phase = ["start_iteration=5 x_0=1 x_1=1 x_2=2"]
    same = resume(flat, saved, train_data_path=renamed, data_phases=phase).ledger
    assert same == resume(flat, saved).ledger
    copied = [*flat["train_data_path"], "0.5", str(tmp_path / "x_0")]
    copy_phase = ["start_iteration=6 zh=1 en=1 code=2 x_0=1"]
    with pytest.raises(ValueError, match="'zh' and 'x_0' have the same content"):
        resume(flat, saved, train_data_path=copied, data_phases=[PHASE, *copy_phase], append_data=True)
    with pytest.raises(ValueError, match="'code' .* is missing: give its file again, or pass --append-data"):
        resume(flat, saved, train_data_path=flat["train_data_path"][:4], data_phases=[])
    write_data(tmp_path, seed=9, name="x_2")
    with pytest.raises(ValueError, match="content of source 'code' changed|source 'x_2' is new"):
        resume(flat, saved, train_data_path=renamed, data_phases=["start_iteration=6 x_0=1 x_1=1 x_2=2"])
    (tmp_path / "x_1.bin").unlink()
    with pytest.raises(ValueError, match="x_1.bin does not exist"):
        resume(flat, saved, train_data_path=renamed, data_phases=phase)


def test_a_byte_in_the_middle_is_found_by_the_full_hash(pool: WorkerPool, prefixes: list[str], tmp_path: Path) -> None:
    """C4: the token file is far longer than the two ends that are always looked at."""
    big = write_data(tmp_path, documents=3000, name="big")
    flat = options("", train_data_path=[*prefixes[:2], big], data_fingerprint="full")
    pool.run(1, work_read, {**flat, "save": str(tmp_path / "run")}, 1, join=False)
    with open(f"{big}.bin", "r+b") as stream:
        stream.seek(200_000)
        byte = stream.read(1)[0]
        stream.seek(200_000)
        stream.write(bytes([byte ^ 1]))
    with pytest.raises(ValueError, match="the content of source 'big' changed"):
        resume(flat, tmp_path / "run")


def test_rows_and_state_say_what_was_read_from_each_source(prefixes: list[str], tmp_path: Path) -> None:
    """Training rows count tokens and epochs by source; each source's held-out part is scored under its name."""
    flat = options("", train_data_path=[], data_path=prefixes, split="70,30", target_epochs=[0.5, 1.0, 2.0])
    flat |= {"data_phases": ["start_iteration=3 code=1"]}
    flat |= {"train_iters": 4, "eval_interval": 2, "eval_iters": 2, "log_interval": 2, "save": str(tmp_path / "run")}
    assert run(tmp_path / "logs", as_flags(flat)) == [0]
    rows = training_rows(tmp_path / "run")
    for iteration, row in rows.items():
        by_source = row["consumed_tokens_by_source"]
        assert list(by_source) == ["zh", "en", "code"] == list(row["epochs_by_source"])
        assert sum(by_source.values()) == row["consumed_tokens"] == iteration * GLOBAL_BATCH * 32
    valid = [row for row in read_metrics(tmp_path / "run" / METRICS_FILE) if row.get("split") == "valid"]
    sets = ("zh", "en", "code", None)
    assert [(row["iteration"], row.get("name")) for row in valid] == [(i, n) for i in (2, 4) for n in sets]
    for each, together in ((valid[:3], valid[3]), (valid[4:7], valid[7])):
        tokens = [row["tokens"] for row in each]
        assert together["tokens"] == sum(tokens)
        assert together["loss"] == pytest.approx(np.average([row["loss"] for row in each], weights=tokens), rel=1e-12)
    assert all(np.isfinite(row["loss"]) and row["tokens"] > 0 for row in valid)
    out = (tmp_path / "logs" / "out0").read_text()
    shares = [float(share) for share in re.findall(r"^data: \w+: share ([\d.]+)", out, re.MULTILINE)]
    assert len(shares) == 3 and min(shares) > 0 and sum(shares) == pytest.approx(1, abs=2e-4)
    assert "data from sample 24 on: code 1.0000" in out
    assert all(f"validation-{name} loss at iteration 4" in out for name in ("zh", "en", "code"))
    assert out.count(" validation loss at iteration 4 ") == 1
    assert out.index("data: code: share") < out.index("iteration        2/")
    state = json.loads((tmp_path / "run" / "iter_0000004" / "state.json").read_text())
    assert state["consumed_tokens_by_source"] == rows[4]["consumed_tokens_by_source"]
    epochs = rows[2]["epochs_by_source"]
    assert epochs["code"] / epochs["zh"] == pytest.approx(4, rel=0.5)
