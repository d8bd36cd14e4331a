"""Two gloo ranks of a tensor-parallel group: one reads, both get the same batches."""

from __future__ import annotations

import datetime
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from megatron_steel.data.document_batches import BatchBuilder
from megatron_steel.data.loader import BatchLayout, TrainLoader
from megatron_steel.data.order import Ledger, SourceSpec

SEQ_LENGTH = 6


class CountedWindows:
    """40 windows whose tokens tell which window they are."""

    def __init__(self) -> None:
        self.seq_length = SEQ_LENGTH
        self.reads = 0

    def prepare(self) -> None:
        """Nothing to index."""

    def prepared(self) -> bool:
        return False

    def __len__(self) -> int:
        return 40

    def read(self, window: int, epoch: int) -> np.ndarray:
        self.reads += 1
        return np.random.RandomState(window).randint(0, 8, SEQ_LENGTH + 1).astype(np.int64)


def run_rank(rank: int, store: str, eod_mask_loss: bool, reads_data: bool) -> None:
    """Take three steps in a group of two and save what arrived."""
    timeout = datetime.timedelta(seconds=15)
    dist.init_process_group("gloo", init_method=f"file://{store}/rendezvous", rank=rank, world_size=2, timeout=timeout)
    windows = CountedWindows()
    ledger = Ledger.create([SourceSpec("a", "fa", 40, 1.0)], 5, SEQ_LENGTH)
    loader = TrainLoader(
        ledger,
        {"fa": windows},  # type: ignore[dict-item]
        BatchLayout(micro_batch_size=2, num_microbatches=2, data_parallel_rank=0, data_parallel_size=1),
        BatchBuilder(
            seq_length=SEQ_LENGTH,
            tensor_group=dist.group.WORLD,
            reads_data=reads_data,
            device=torch.device("cpu"),
            eod_id=3,
            eod_mask_loss=eod_mask_loss,
        ),
    )
    steps = [loader.step(first) for first in (0, 4, 8)]
    loader.close()
    torch.save(
        {
            "reads": windows.reads,
            "valid": [batch.valid_tokens for batches in steps for batch in batches],
            "tensors": [
                torch.stack([b.tokens_BS, b.labels_BS, b.loss_mask_BS.long(), b.position_ids_BS])
                for batches in steps
                for b in batches
            ],
            "windows": [windows.read(int(window), 0).tolist() for window in ledger.samples(0, 12)[2]],
        },
        f"{store}/rank{rank}.pt",
    )
    dist.destroy_process_group()


@pytest.mark.parametrize(("eod_mask_loss", "reads_data"), [(False, True), (True, True), (True, False), (False, False)])
def test_one_rank_reads_for_its_tensor_group(tmp_path: Path, eod_mask_loss: bool, reads_data: bool) -> None:
    context = mp.spawn(run_rank, args=(str(tmp_path), eod_mask_loss, reads_data), nprocs=2, join=False)
    for _ in range(2):
        # join returns after the first process that ends, and raises what a failed one raised.
        if context.join(timeout=30):
            break
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    assert second["reads"] == 0
    assert (first["reads"] > 0) == (reads_data or eod_mask_loss)
    assert first["valid"] == second["valid"]
    for one, other in zip(first["tensors"], second["tensors"], strict=True):
        assert torch.equal(one, other)
    if reads_data:
        arrived = torch.cat([torch.cat([t[0][:, :1], t[1]], dim=1) for t in second["tensors"]]).tolist()
        assert arrived == first["windows"]
        assert [int(t[2].sum()) for t in second["tensors"]] == second["valid"]
    expected = sum(12 * [1]) * SEQ_LENGTH
    if eod_mask_loss:
        expected -= sum(row[:-1].count(3) for row in first["windows"])
    assert sum(second["valid"]) == expected
