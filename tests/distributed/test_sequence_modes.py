"""Samples of uneven length through real runs: the same losses and counts on every layout, and an exact resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pool import WorkerPool
from tiny_run import LAYOUTS, PP2, TP2, Trace, open_session, options, take_steps, write_data

from megatron_steel.config.load import from_flat
from megatron_steel.train.loop import save
from megatron_steel.train.prepare import prepare

STEPS = 4


@pytest.fixture(scope="module")
def prefixes(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two sources of documents of 21 to 200 tokens, most of which end in a window that is not full."""
    folder = tmp_path_factory.mktemp("data")
    return [write_data(folder, count, seed, name) for seed, (name, count) in enumerate({"zh": 40, "en": 20}.items())]


def split(prefixes: list[str], *changes: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Options of a run over documents in samples of their own."""
    return options("", *changes, train_data_path=prefixes, sequence_mode="split", **more)


def work_steps(flat: dict[str, Any], steps: int) -> tuple[Trace, dict[str, int], int]:
    """Train and save; the trace, tokens by source, and all tokens."""
    trace = Trace()
    with open_session(flat) as session:
        take_steps(session, steps, trace)
        save(session)
        return trace, session.state.consumed_tokens_by_source, session.state.consumed_tokens


def true_tokens(flat: dict[str, Any], samples: int) -> dict[str, int]:
    """Labels by source of the first samples of the order, read from the files."""
    prepared = prepare(from_flat({**flat, "load": None, "save": None}))
    counts = dict.fromkeys((source.name for source in prepared.ledger.sources), 0)
    for s, epoch, window in zip(*prepared.ledger.samples(0, samples), strict=True):
        source = prepared.ledger.sources[s]
        counts[source.name] += len(prepared.datasets[source.fingerprint].read(int(window), int(epoch))) - 1
    return counts


def test_uneven_samples_train_the_same_on_every_layout(pool: WorkerPool, prefixes: list[str], tmp_path: Path) -> None:
    flat = split(prefixes, save=str(tmp_path / "one"))
    one, by_source, tokens = pool.run(1, work_steps, flat, STEPS, join=False)[0]
    counted = true_tokens(flat, STEPS * 8)
    assert by_source == counted
    assert tokens == sum(counted.values()) < STEPS * 8 * 32
    for name, ranks, flags in (("dp2", 2, LAYOUTS["dp2"].flags), ("tp2", 2, TP2), ("pp2", 2, PP2)):
        replies = pool.run(ranks, work_steps, split(prefixes, flags, save=str(tmp_path / name)), STEPS, join=False)
        for trace, *rest in replies:
            assert rest == [by_source, tokens], name
            np.testing.assert_allclose(trace.losses, one.losses, rtol=2e-5)


def test_uneven_samples_resume_exactly(pool: WorkerPool, prefixes: list[str], tmp_path: Path) -> None:
    """2 + 2 steps are 4 steps, tokens by source included; another mode is refused by name."""
    whole = pool.run(1, work_steps, split(prefixes, save=str(tmp_path / "whole")), 4, join=False)[0]
    first = pool.run(1, work_steps, split(prefixes, save=str(tmp_path / "half")), 2, join=False)[0]
    resumed = split(prefixes, load=str(tmp_path / "half"), save=str(tmp_path / "half"))
    second = pool.run(1, work_steps, resumed, 2, join=False)[0]
    assert first[0].losses + second[0].losses == whole[0].losses
    assert second[1:] == whole[1:]
    state = json.loads((tmp_path / "half" / "iter_0000004" / "state.json").read_text())
    assert state["consumed_tokens_by_source"] == whole[1]
    for mode in ("concat", "truncate", "sample"):
        with pytest.raises(ValueError, match="was trained with --sequence-mode split"):
            prepare(from_flat({**resumed, "sequence_mode": mode}))
