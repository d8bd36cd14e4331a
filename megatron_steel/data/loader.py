"""From sample numbers to this rank's micro-batches on its device.

Which samples a rank takes is arithmetic (`BatchLayout`); what is in them is read by one background thread, one step
ahead, on the first of the tensor- and context-parallel ranks of a pipeline stage that needs tokens. The main thread
shares them with the others in one broadcast per step and cuts them into batches.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch

from megatron_steel.config.rampup import BatchSizes
from megatron_steel.data.batch import Batch, Builder, Dataset
from megatron_steel.data.order import Ledger


@dataclass(kw_only=True, frozen=True, slots=True)
class BatchLayout:
    """How the samples of a global batch are dealt: to micro-batch after micro-batch, within it rank after rank."""

    micro_batch_size: int
    num_microbatches: int
    data_parallel_rank: int
    data_parallel_size: int

    def __post_init__(self) -> None:
        assert self.micro_batch_size > 0 and self.num_microbatches > 0
        assert 0 <= self.data_parallel_rank < self.data_parallel_size

    @property
    def global_batch_size(self) -> int:
        """Samples of a step over all ranks."""
        return self.micro_batch_size * self.num_microbatches * self.data_parallel_size

    def offsets(self) -> np.ndarray:
        """Return this rank's places in the global batch, int64 (micro-batches, B)."""
        dealt = np.arange(self.global_batch_size).reshape(self.num_microbatches, self.data_parallel_size, -1)
        return dealt[:, self.data_parallel_rank]


class TrainLoader:
    """The micro-batches of optimizer steps, in the order of a ledger, read one step ahead.

    datasets: fingerprint -> windows, for every source that samples from `first_sample` on are drawn from (None: those
    of the last segment). layout: of a step of the full size. sizes: of every step; None: all are full.
    Use as a context manager or call close().
    Raises ValueError if a dataset is missing or is not the one the ledger describes.
    """

    def __init__(
        self,
        ledger: Ledger,
        datasets: Mapping[str, Dataset],
        layout: BatchLayout,
        builder: Builder,
        first_sample: int | None = None,
        sizes: BatchSizes | None = None,
    ) -> None:
        _check_datasets(ledger, datasets, ledger.segments[-1].start if first_sample is None else first_sample)
        self.ledger = ledger
        self.layout = layout
        self.sizes = sizes or BatchSizes(final=layout.global_batch_size)
        self.builder = builder
        self._datasets = [datasets.get(source.fingerprint) for source in ledger.sources]
        self._prepared: set[int] = set()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="train-loader")
        self._ahead: tuple[int, Future[tuple[torch.Tensor | None, np.ndarray]]] | None = None

    def step(self, first_sample: int) -> list[Batch]:
        """Return this rank's micro-batches of the step over samples [first_sample, + its size).

        Errors of reading are raised here, for the step they belong to.
        """
        if self._ahead is None or self._ahead[0] != first_sample:
            self._request(first_sample)
        assert self._ahead is not None
        pending, self._ahead = self._ahead[1], None
        host, sources = pending.result()
        self._request(first_sample + self.sizes.at(first_sample))
        return self.builder.build(host, sources, np.ones(sources.shape, dtype=bool))

    def close(self) -> None:
        """Stop the background thread; may be called twice."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._ahead = None

    def __enter__(self) -> TrainLoader:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _request(self, first_sample: int) -> None:
        """Start reading a step; one that was read ahead and is not wanted is thrown away."""
        if self._ahead is not None:
            self._ahead[1].cancel()
        self._ahead = (first_sample, self._thread.submit(self._read, first_sample))

    def _read(self, first_sample: int) -> tuple[torch.Tensor | None, np.ndarray]:
        """Tokens and sources of this rank's samples of a step; runs on the background thread."""
        size = self.sizes.at(first_sample)
        per_pass = self.layout.micro_batch_size * self.layout.data_parallel_size
        offsets = replace(self.layout, num_microbatches=size // per_pass).offsets()
        source, epoch, window = self.ledger.samples(first_sample, first_sample + size)
        sources, epochs, windows = source[offsets], epoch[offsets], window[offsets]
        if self.builder.reads:
            self._prepare(set(sources.ravel().tolist()) - self._prepared)

        def fetch(microbatch: int, row: int) -> np.ndarray:
            dataset = self._datasets[sources[microbatch, row]]
            if dataset is None:
                name = self.ledger.sources[sources[microbatch, row]].name
                raise ValueError(f"sample of source {name!r}, which was dropped before; its file is not open")
            return dataset.read(int(windows[microbatch, row]), int(epochs[microbatch, row]))

        return self.builder.read(fetch, offsets.shape), sources

    def _prepare(self, sources: set[int]) -> None:
        """Index the sources that a step reads for the first time, several at once."""
        if len(sources) > 1:
            found = [dataset for number in sources if (dataset := self._datasets[number]) is not None]
            new = [dataset for dataset in found if not dataset.prepared()]
            if new:
                with ThreadPoolExecutor(os.cpu_count()) as pool:
                    list(pool.map(lambda dataset: dataset.prepare(), new))
        self._prepared |= sources


class ValidLoader:
    """The first windows of a validation set in their order, as global batches of micro-batches; can be iterated again.

    num_samples is at most max_samples. The last global batch is filled up with padding that has no loss, so every rank
    takes part in every step and the sum over all samples is the same for each layout. Read in the calling thread.
    """

    def __init__(
        self,
        dataset: Dataset,
        layout: BatchLayout,
        builder: Builder,
        max_samples: int | None,
    ) -> None:
        self.dataset = dataset
        self.num_samples = len(dataset) if max_samples is None else min(len(dataset), max_samples)
        self.layout = layout
        self.builder = builder

    def __len__(self) -> int:
        """Global batches in one pass."""
        return -(-self.num_samples // self.layout.global_batch_size)

    def __iter__(self) -> Iterator[list[Batch]]:
        for number in range(len(self)):
            windows = self.layout.offsets() + number * self.layout.global_batch_size
            present = windows < self.num_samples

            def fetch(
                microbatch: int, row: int, windows: np.ndarray = windows, present: np.ndarray = present
            ) -> np.ndarray | None:
                return self.dataset.read(int(windows[microbatch, row]), 0) if present[microbatch, row] else None

            host = self.builder.read(fetch, windows.shape)
            yield self.builder.build(host, np.full(windows.shape, -1), present)


def _check_datasets(ledger: Ledger, datasets: Mapping[str, Dataset], first_sample: int) -> None:
    """Raise ValueError unless `datasets` has all that is drawn from `first_sample` on, with the ledger's windows."""
    needed = ledger.drawn_from(first_sample)
    for source in ledger.sources:
        dataset = datasets.get(source.fingerprint)
        if dataset is None:
            if source.fingerprint in needed:
                raise ValueError(f"source {source.name!r} of the data order is not open; give its file in --data-path")
            continue
        if (len(dataset), dataset.seq_length) != (source.windows, ledger.seq_length):
            raise ValueError(
                f"source {source.name!r} has {len(dataset)} windows of {dataset.seq_length} tokens, the data order has "
                f"{source.windows} of {ledger.seq_length}"
            )
