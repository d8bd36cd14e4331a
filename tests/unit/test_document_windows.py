"""Windows that stay inside documents: what each mode takes of every document, and what the loader makes of it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_steel.config.schema import SequenceMode
from megatron_steel.data.batch import valid_tokens
from megatron_steel.data.document_batches import BatchBuilder
from megatron_steel.data.document_windows import open_windows
from megatron_steel.data.indexed import IndexedReader, IndexedWriter
from megatron_steel.data.loader import BatchLayout, TrainLoader, ValidLoader
from megatron_steel.data.order import Ledger, SourceSpec
from megatron_steel.data.windows import Limit, WindowedDataset

MODES: tuple[SequenceMode, ...] = ("split", "truncate", "sample")


def write(prefix: Path, lengths: list[int], dtype: type = np.int32) -> str:
    """Documents of these lengths whose tokens count on from 1, so that every token tells where it is from."""
    ends = np.cumsum(lengths).tolist()
    with IndexedWriter(str(prefix), np.dtype(dtype)) as writer:
        for end, length in zip(ends, lengths, strict=True):
            writer.add_document(list(range(end - length + 1, end + 1)))
        writer.commit()
    return str(prefix)


def windows_of(
    prefix: str, mode: SequenceMode, seq_length: int, seed: int = 0, limit: Limit | None = None
) -> WindowedDataset:
    reader = IndexedReader(prefix)
    return open_windows(mode, reader, seq_length, (0, reader.num_documents), seed, limit)


def test_a_book_is_five_samples_and_a_short_document_is_kept(tmp_path: Path) -> None:
    """Row D10: 10,000 ids at S = 2048; the short document comes whole, nothing crosses."""
    book = windows_of(write(tmp_path / "book", [10_000]), "split", 2048)
    pieces = [book[i] for i in range(len(book))]
    assert [len(piece) - 1 for piece in pieces] == [2048] * 4 + [1807]
    assert np.concatenate([pieces[0], *(piece[1:] for piece in pieces[1:])]).tolist() == list(range(1, 10_001))
    both = windows_of(write(tmp_path / "both", [10_000, 3, 1]), "split", 2048)
    assert len(both) == 6 and both.dropped_tokens == 1
    assert sum(both[i].tolist() == [10_001, 10_002, 10_003] for i in range(6)) == 1
    assert both.describe() == f"(split, {1 - 10_001 / (6 * 2048):.1%} padding, 1 tokens left out)"


@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=25).filter(lambda lengths: max(lengths) > 1),
    seq_length=st.integers(1, 12),
    seed=st.integers(0, 3),
)
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_split_trains_every_token_once_and_never_across_documents(
    tmp_path: Path, lengths: list[int], seq_length: int, seed: int
) -> None:
    dataset = windows_of(write(tmp_path / "d", lengths), "split", seq_length, seed)
    starts = np.concatenate([[0], np.cumsum(lengths)]) + 1
    wanted = Counter(
        (token, token + 1)
        for start, length in zip(starts, lengths, strict=False)
        for token in range(start, start + length - 1)
    )
    pieces = [dataset[i] for i in range(len(dataset))]
    assert all(2 <= len(piece) <= seq_length + 1 for piece in pieces)
    pairs = Counter(pair for piece in pieces for pair in zip(piece[:-1].tolist(), piece[1:].tolist(), strict=True))
    assert pairs == wanted  # (input, label) of the documents, each once; no pair holds tokens of two documents
    assert dataset.dropped_tokens == sum(length for length in lengths if length < 2)


@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=25).filter(lambda lengths: max(lengths) > 1),
    seq_length=st.integers(1, 12),
    epoch=st.integers(0, 3),
)
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_truncate_and_sample_take_one_window_of_each_document(
    tmp_path: Path, lengths: list[int], seq_length: int, epoch: int
) -> None:
    prefix = write(tmp_path / "d", lengths)
    starts = (np.concatenate([[0], np.cumsum(lengths)]) + 1).tolist()
    documents = [range(start, start + n) for start, n in zip(starts, lengths, strict=False) if n > 1]
    truncated, sampled = windows_of(prefix, "truncate", seq_length), windows_of(prefix, "sample", seq_length)
    assert len(truncated) == len(sampled) == len(documents)
    first = sorted(list(document[: seq_length + 1]) for document in documents)
    assert sorted(truncated.read(i, epoch).tolist() for i in range(len(truncated))) == first
    drawn = sorted(sampled.read(i, epoch).tolist() for i in range(len(sampled)))
    for window, document in zip(drawn, documents, strict=True):
        assert len(window) == min(len(document), seq_length + 1)
        assert window == list(range(window[0], window[0] + len(window)))
        assert window[0] >= document[0] and window[-1] <= document[-1]
    left_out = sum(lengths) - sum(map(len, first))
    assert truncated.dropped_tokens == sampled.dropped_tokens == left_out


def test_sample_begins_at_the_start_a_quarter_of_the_time_else_anywhere(tmp_path: Path) -> None:
    """4,000 draws of documents with 5 places: 0 with 1/4 + 3/4 * 1/5 = 0.4, each other one with 0.15."""
    prefix = write(tmp_path / "d", [12] * 400)
    dataset = windows_of(prefix, "sample", 7)
    drawn = [dataset.read(window, epoch)[0] % 12 - 1 for epoch in range(10) for window in range(400)]
    shares = np.bincount(drawn, minlength=5) / len(drawn)
    assert len(shares) == 5
    assert np.abs(shares - [0.4, 0.15, 0.15, 0.15, 0.15]).max() < 0.025
    # Another epoch or seed draws other places; the same ones draw the same, wherever the file lies.
    again = windows_of(write(tmp_path / "moved", [12] * 400), "sample", 7)
    assert all(np.array_equal(dataset.read(i, 3), again.read(i, 3)) for i in range(400))
    assert any(not np.array_equal(dataset.read(i, 3), dataset.read(i, 4)) for i in range(400))


def test_the_mode_and_the_part_are_in_the_fingerprint(tmp_path: Path) -> None:
    prefix = write(tmp_path / "d", [30, 20, 25])
    concat = WindowedDataset(prefix, 8)
    assert windows_of(prefix, "concat", 8).fingerprint == concat.fingerprint
    names = {concat.fingerprint} | {windows_of(prefix, mode, 8).fingerprint for mode in MODES}
    limits = [Limit("max_samples", 2), Limit("max_samples", 3), Limit("max_samples", 10**6)]
    names |= {windows_of(prefix, mode, 8, limit=limit).fingerprint for mode in ("concat", "split") for limit in limits}
    assert len(names) == 4 + 2 * 2


def test_documents_without_a_label_are_refused(tmp_path: Path) -> None:
    for mode in MODES:
        with pytest.raises(ValueError, match=r"no document of \[0, 2\) has two tokens"):
            windows_of(write(tmp_path / "d", [1, 1]), mode, 8)


def loaders(dataset: WindowedDataset, **options: Any) -> TrainLoader:
    ledger = Ledger.create([SourceSpec("a", dataset.fingerprint, len(dataset), 1.0)], 5, dataset.seq_length)
    layout = BatchLayout(micro_batch_size=2, num_microbatches=2, data_parallel_rank=0, data_parallel_size=1)
    settings = {"tensor_group": None, "reads_data": True, "device": torch.device("cpu"), "eod_id": 9, "padded": True}
    builder = BatchBuilder(seq_length=dataset.seq_length, **(settings | options))
    return TrainLoader(ledger, {dataset.fingerprint: dataset}, layout, builder)


@pytest.mark.parametrize("eod_mask_loss", [False, True])
def test_padding_has_no_loss_and_every_rank_counts_the_same(tmp_path: Path, eod_mask_loss: bool) -> None:
    dataset = windows_of(write(tmp_path / "d", [9, 17, 3, 8, 2, 30]), "split", 8)
    epoch = len(dataset) // 4 * 4
    with (
        loaders(dataset, eod_mask_loss=eod_mask_loss) as loader,
        loaders(dataset, eod_mask_loss=eod_mask_loss, reads_data=False) as middle,
    ):
        for first in range(0, epoch + 4, 4):
            batches = loader.step(first)
            _, epochs, numbers = loader.ledger.samples(first, first + 4)
            wanted = [dataset.read(int(n), int(e)).tolist() for e, n in zip(epochs, numbers, strict=True)]
            for place, tokens in enumerate(wanted):
                batch, row = batches[place // 2], place % 2
                n = len(tokens) - 1
                assert batch.tokens_BS[row, :n].tolist() == tokens[:-1]
                assert batch.labels_BS[row].tolist() == tokens[1:] + [0] * (8 - n)
                mask = [float(not (eod_mask_loss and token == 9)) for token in tokens[:-1]]
                assert batch.loss_mask_BS[row].tolist() == mask + [0.0] * (8 - n)
                assert batch.tokens_BS.min() >= 0
            counts = [int(batch.loss_mask_BS.sum()) for batch in batches]
            assert [batch.valid_tokens for batch in batches] == counts
            # A stage in the middle of a pipeline has no tensors, and the same counts.
            assert [batch.valid_tokens for batch in middle.step(first)] == counts
            assert valid_tokens(batches) == sum(counts)


@pytest.mark.parametrize("eod_mask_loss", [False, True])
def test_validation_of_joined_documents_is_the_same_in_every_mode(tmp_path: Path, eod_mask_loss: bool) -> None:
    """Its builder is that of the training data; the last step has samples that are not there."""
    dataset = WindowedDataset(write(tmp_path / "v", [9, 17, 3, 8, 2, 30]), 8, shuffle_documents=False)
    layout = BatchLayout(micro_batch_size=2, num_microbatches=3, data_parallel_rank=0, data_parallel_size=1)
    steps = []
    for padded in (False, True):
        builder = BatchBuilder(
            seq_length=8,
            tensor_group=None,
            reads_data=True,
            device=torch.device("cpu"),
            eod_id=9,
            eod_mask_loss=eod_mask_loss,
            padded=padded,
        )
        steps.append([batch for batches in ValidLoader(dataset, layout, builder, None) for batch in batches])
    assert len(steps[0]) == len(steps[1]) == 6 and len(dataset) % 6
    for plain, padded_one in zip(*steps, strict=True):
        for name in ("tokens_BS", "labels_BS", "loss_mask_BS"):
            assert torch.equal(getattr(plain, name), getattr(padded_one, name)), name
        assert plain.valid_tokens == padded_one.valid_tokens == int(plain.loss_mask_BS.sum())


def test_only_a_padded_loader_takes_short_windows(tmp_path: Path) -> None:
    dataset = windows_of(write(tmp_path / "d", [5, 5, 5, 5]), "split", 8)
    with loaders(dataset, padded=False) as loader, pytest.raises(ValueError, match="could not broadcast"):
        loader.step(0)
