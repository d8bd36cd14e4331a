"""Promise 2 on real files: over ranks, a restart on others and an append, each token is trained exactly once."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_steel.data.document_batches import BatchBuilder
from megatron_steel.data.indexed import IndexedWriter
from megatron_steel.data.loader import BatchLayout, TrainLoader
from megatron_steel.data.order import Ledger
from megatron_steel.data.sources import DataSources, open_sources

SEQ_LENGTH = 16
GLOBAL_BATCH = 8


def write(prefix: Path, lengths: np.ndarray, first_token: int) -> str:
    """Documents whose tokens count on from first_token: a token id occurs once in the whole corpus."""
    with IndexedWriter(str(prefix), np.dtype(np.int32)) as writer:
        for length in lengths:
            writer.add_document(np.arange(first_token, first_token + length))
            first_token += int(length)
        writer.commit()
    return str(prefix)


def open_data(prefixes: list[str], seed: int) -> DataSources:
    return open_sources(
        data_path=[],
        split="1",
        train_data_path=prefixes,
        valid_data_path=[],
        seq_length=SEQ_LENGTH,
        seed=seed,
        tokenizer=None,
    )


def labels_of(ledger: Ledger, data: DataSources, steps: range, size: int, micro_batch_size: int) -> list[np.ndarray]:
    """Labels that each step trains, over all ranks of a layout."""
    builder = BatchBuilder(
        seq_length=SEQ_LENGTH, tensor_group=None, reads_data=True, device=torch.device("cpu"), eod_id=None
    )
    loaders = [
        TrainLoader(
            ledger,
            data.datasets,
            BatchLayout(
                micro_batch_size=micro_batch_size,
                num_microbatches=GLOBAL_BATCH // size // micro_batch_size,
                data_parallel_rank=rank,
                data_parallel_size=size,
            ),
            builder,
        )
        for rank in range(size)
    ]
    result = []
    for step in steps:
        batches = [batch for loader in loaders for batch in loader.step(step * GLOBAL_BATCH)]
        result.append(np.sort(torch.cat([batch.labels_BS.ravel() for batch in batches]).numpy()))
    for loader in loaders:
        loader.close()
    return result


@pytest.mark.parametrize("append_at", [1, 5, 9])
def test_no_token_is_repeated_or_lost(tmp_path: Path, append_at: int) -> None:
    random = np.random.RandomState(append_at)
    old = [
        write(tmp_path / "zh", random.randint(1, 60, 40), 0),
        write(tmp_path / "en", random.randint(1, 60, 25), 5000),
    ]
    data = open_data(old, seed=3)
    ledger = Ledger.create(data.train, 3, SEQ_LENGTH)
    trained = labels_of(ledger, data, range(append_at), size=2, micro_batch_size=2)

    # Killed and started again on four ranks with a third file; the ledger comes out of the checkpoint.
    restored = Ledger.from_json(json.loads(json.dumps(ledger.to_json())))
    grown = open_data([*old, write(tmp_path / "code", random.randint(1, 60, 30), 9000)], seed=restored.seed)
    with pytest.raises(ValueError, match="'code' is new: pass --append-data"):
        restored.check(grown.train, SEQ_LENGTH)
    consumed = append_at * GLOBAL_BATCH
    # What is unused of each source is its weight, so that all of them end an epoch together.
    used = dict(zip((s.fingerprint for s in restored.sources), restored.consumed(consumed).tolist(), strict=True))
    left = [spec.windows - used.get(spec.fingerprint, 0) for spec in grown.train]
    specs = [replace(spec, weight=weight) for spec, weight in zip(grown.train, left, strict=True)]
    appended = restored.append(consumed, specs, seed=3)
    steps = range(append_at, -(-(consumed + sum(left)) // GLOBAL_BATCH))
    again = labels_of(appended, grown, steps, size=4, micro_batch_size=1)
    assert all(
        np.array_equal(one, other)
        for one, other in zip(again, labels_of(appended, grown, steps, size=1, micro_batch_size=8), strict=True)
    )

    source, epoch, _ = appended.samples(0, consumed + sum(left))
    assert (epoch == 0).all()
    assert np.bincount(source).tolist() == [spec.windows for spec in grown.train]
    expected = np.concatenate([grown.datasets[s.fingerprint][w][1:] for s in specs for w in range(s.windows)])
    assert len(np.unique(expected)) == len(expected)
    # The last step may reach into the next epoch.
    full_steps = (consumed + sum(left)) // GLOBAL_BATCH
    seen = np.concatenate([*trained, *again][:full_steps])
    assert len(np.unique(seen)) == len(seen)
    assert np.isin(seen, expected).all()
    assert set(expected) <= set(np.concatenate([*trained, *again]))
