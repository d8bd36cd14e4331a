"""Loader: every layout delivers the same samples per step, masks are Megatron-LM's, errors reach the main thread."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.datasets.gpt_dataset import _get_ltor_masks_and_position_ids

from megatron_steel.data.batch import Batch, valid_tokens
from megatron_steel.data.document_batches import BatchBuilder
from megatron_steel.data.loader import BatchLayout, TrainLoader, ValidLoader
from megatron_steel.data.order import Ledger, SourceSpec

SEQ_LENGTH = 6
EOD = 3


class FakeWindows:
    """Windows whose tokens tell source and window: no file is needed to test the loader."""

    def __init__(self, number: int, windows: int, broken_from: int | None = None) -> None:
        self.number, self.windows, self.broken_from = number, windows, broken_from
        self.seq_length = SEQ_LENGTH
        self.reads = 0

    def prepare(self) -> None:
        """Nothing to index."""

    def prepared(self) -> bool:
        return False

    def __len__(self) -> int:
        return self.windows

    def __getitem__(self, window: int) -> np.ndarray:
        return self.read(window, 0)

    def read(self, window: int, epoch: int) -> np.ndarray:
        self.reads += 1
        if self.broken_from is not None and window >= self.broken_from:
            raise OSError(f"cannot read window {window}")
        return np.random.RandomState(window * 10 + self.number).randint(0, 8, SEQ_LENGTH + 1).astype(np.int64)


def make_ledger() -> tuple[Ledger, dict[str, Any]]:
    ledger = Ledger.create([SourceSpec("a", "fa", 40, 3.0), SourceSpec("b", "fb", 30, 1.0)], 5, SEQ_LENGTH)
    return ledger, {"fa": FakeWindows(0, 40), "fb": FakeWindows(1, 30)}


def make_loader(ledger: Ledger, datasets: dict[str, Any], **options: Any) -> TrainLoader:
    layout = {"micro_batch_size": 2, "num_microbatches": 3, "data_parallel_rank": 0, "data_parallel_size": 1}
    builder = {"tensor_group": None, "reads_data": True, "device": torch.device("cpu"), "eod_id": EOD}
    for name, value in options.items():
        (layout if name in layout else builder)[name] = value
    return TrainLoader(ledger, datasets, BatchLayout(**layout), BatchBuilder(seq_length=SEQ_LENGTH, **builder))


def expected_rows(ledger: Ledger, datasets: dict[str, Any], start: int, stop: int) -> list[list[int]]:
    fakes = list(datasets.values())
    source, _, window = ledger.samples(start, stop)
    return [fakes[s][int(w)].tolist() for s, w in zip(source, window, strict=True)]


def rows(batches: list[Batch]) -> list[list[int]]:
    """Windows of the batches, put together again from inputs and labels."""
    together = [torch.cat([batch.tokens_BS[:, :1], batch.labels_BS], dim=1) for batch in batches]
    for batch, joined in zip(batches, together, strict=True):
        assert torch.equal(batch.tokens_BS, joined[:, :-1])
    return torch.cat(together).tolist()


def test_one_rank_gets_the_ledgers_samples_in_order() -> None:
    ledger, datasets = make_ledger()
    with make_loader(ledger, datasets) as loader:
        for first in (0, 6, 12, 300, 306, 0):
            batches = loader.step(first)
            assert rows(batches) == expected_rows(ledger, datasets, first, first + 6)
            assert np.array_equal(np.concatenate([b.sources_B for b in batches]), ledger.samples(first, first + 6)[0])


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("micro_batch_size", [1, 2, 3])
def test_every_layout_delivers_the_same_samples(size: int, micro_batch_size: int) -> None:
    """Global batch 24: the multiset per step is the ledger's, and micro-batch j of rank r has the documented place."""
    ledger, datasets = make_ledger()
    microbatches = 24 // size // micro_batch_size
    loaders = [
        make_loader(
            ledger,
            datasets,
            micro_batch_size=micro_batch_size,
            num_microbatches=microbatches,
            data_parallel_rank=rank,
            data_parallel_size=size,
        )
        for rank in range(size)
    ]
    for first in (0, 24, 48):
        per_rank = [loader.step(first) for loader in loaders]
        expected = expected_rows(ledger, datasets, first, first + 24)
        assert sorted(sum((rows(batches) for batches in per_rank), [])) == sorted(expected)
        assert sum(valid_tokens(batches) for batches in per_rank) == 24 * SEQ_LENGTH
        for rank, batches in enumerate(per_rank):
            for j, batch in enumerate(batches):
                at = (j * size + rank) * micro_batch_size
                assert rows([batch]) == expected[at : at + micro_batch_size]
    for loader in loaders:
        loader.close()


@pytest.mark.parametrize("eod_mask_loss", [False, True])
def test_masks_and_positions_are_megatron_cores(eod_mask_loss: bool) -> None:
    ledger, datasets = make_ledger()
    with make_loader(ledger, datasets, eod_mask_loss=eod_mask_loss) as loader:
        batches = loader.step(6)
    assert any((batch.tokens_BS == EOD).any() for batch in batches)
    for batch in batches:
        assert batch.tokens_BS.dtype == batch.labels_BS.dtype == batch.position_ids_BS.dtype == torch.int64
        assert batch.loss_mask_BS.dtype == torch.float32
        assert batch.valid_tokens == int(batch.loss_mask_BS.sum())
        for row in range(2):
            _, mask, positions = _get_ltor_masks_and_position_ids(
                batch.tokens_BS[row], EOD, False, False, eod_mask_loss, False
            )
            assert torch.equal(batch.loss_mask_BS[row], mask)
            assert torch.equal(batch.position_ids_BS[row], positions)


@pytest.mark.parametrize("eod_mask_loss", [False, True])
def test_a_rank_without_data_knows_shapes_counts_and_sources(eod_mask_loss: bool) -> None:
    ledger, datasets = make_ledger()
    with make_loader(ledger, datasets, eod_mask_loss=eod_mask_loss) as loader:
        full = loader.step(0)
    for dataset in datasets.values():
        dataset.reads = 0
    with make_loader(ledger, datasets, eod_mask_loss=eod_mask_loss, reads_data=False) as loader:
        empty = loader.step(0)
    for one, other in zip(full, empty, strict=True):
        assert one.valid_tokens == other.valid_tokens
        assert np.array_equal(one.sources_B, other.sources_B)
        assert one.tokens_BS.shape == other.tokens_BS.shape == other.loss_mask_BS.shape
        assert other.tokens_BS.untyped_storage().nbytes() == 8
    assert (datasets["fa"].reads > 0) == eod_mask_loss


def test_eod_options_need_an_eod() -> None:
    with pytest.raises(ValueError, match="end-of-document"):
        make_loader(*make_ledger(), eod_id=None, eod_mask_loss=True)


def test_errors_of_reading_are_raised_for_their_step() -> None:
    """Windows 20 and up cannot be read: the steps before the first of them still arrive."""
    ledger = Ledger.create([SourceSpec("a", "fa", 40, 1.0)], 5, SEQ_LENGTH)
    window = ledger.samples(0, 40)[2]
    bad_step = int(np.argmax(window >= 38)) // 2
    loader = make_loader(ledger, {"fa": FakeWindows(0, 40, 38)}, micro_batch_size=1, num_microbatches=2)
    for step in range(bad_step):
        loader.step(step * 2)
    with pytest.raises(OSError, match="cannot read window 3[89]"):
        loader.step(bad_step * 2)
    loader.close()


def test_close_ends_the_thread() -> None:
    loader = make_loader(*make_ledger())
    loader.step(0)
    assert any(thread.name.startswith("train-loader") for thread in threading.enumerate())
    loader.close()
    loader.close()
    assert not any(thread.name.startswith("train-loader") for thread in threading.enumerate())


def test_the_next_step_is_read_ahead() -> None:
    ledger, datasets = make_ledger()
    with make_loader(ledger, datasets) as loader:
        loader.step(0)
        loader._ahead[1].result(timeout=5)
        reads = [dataset.reads for dataset in datasets.values()]
        assert sum(reads) == 12
        loader.step(6)


def test_wrong_datasets_are_refused() -> None:
    ledger, datasets = make_ledger()
    with pytest.raises(ValueError, match="'b' of the data order is not open"):
        make_loader(ledger, {"fa": datasets["fa"]})
    with pytest.raises(ValueError, match="'b' has 29 windows of 6 tokens, the data order has 30 of 6"):
        make_loader(ledger, datasets | {"fb": FakeWindows(1, 29)})
    grown = ledger.append(10, [SourceSpec("a", "fa", 40, 1.0)], 1)
    with make_loader(grown, {"fa": datasets["fa"]}) as loader:
        loader.step(12)
        with pytest.raises(ValueError, match="'b', which was dropped"):
            loader.step(0)


@pytest.mark.parametrize(("size", "micro_batch_size", "microbatches"), [(1, 1, 1), (1, 4, 2), (2, 2, 1), (4, 3, 2)])
@pytest.mark.parametrize("max_samples", [None, 7, 100])
def test_validation_is_the_same_for_every_layout(
    size: int, micro_batch_size: int, microbatches: int, max_samples: int | None
) -> None:
    """Unmasked rows of all ranks are windows 0..N-1, once each; the ranks take the same number of steps."""
    dataset = FakeWindows(0, 11)
    count = 7 if max_samples == 7 else 11
    seen = []
    lengths = set()
    for rank in range(size):
        layout = BatchLayout(
            micro_batch_size=micro_batch_size,
            num_microbatches=microbatches,
            data_parallel_rank=rank,
            data_parallel_size=size,
        )
        builder = BatchBuilder(
            seq_length=SEQ_LENGTH, tensor_group=None, reads_data=True, device=torch.device("cpu"), eod_id=None
        )
        loader = ValidLoader(dataset, layout, builder, max_samples)
        assert loader.num_samples == count
        passes = [[batches for batches in loader] for _ in range(2)]
        assert [rows(batches) for batches in passes[0]] == [rows(batches) for batches in passes[1]]
        lengths.add(len(passes[0]))
        for batch in sum(passes[0], []):
            masks = batch.loss_mask_BS
            assert batch.valid_tokens == int(masks.sum())
            for row, mask in zip(rows([batch]), masks, strict=True):
                assert mask.min() == mask.max()
                if mask[0]:
                    seen.append(row)
                else:
                    assert row == [0] * (SEQ_LENGTH + 1)
    assert lengths == {-(-count // (size * micro_batch_size * microbatches))}
    assert sorted(seen) == sorted(dataset[i].tolist() for i in range(count))


def test_offsets_tile_the_global_batch() -> None:
    layouts = [
        BatchLayout(micro_batch_size=2, num_microbatches=3, data_parallel_rank=rank, data_parallel_size=4)
        for rank in range(4)
    ]
    assert layouts[1].offsets().tolist() == [[2, 3], [10, 11], [18, 19]]
    assert sorted(np.concatenate([layout.offsets().ravel() for layout in layouts])) == list(range(24))
