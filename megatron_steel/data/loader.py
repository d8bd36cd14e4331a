"""From sample numbers to this rank's micro-batches on its device.

Which samples a rank takes is arithmetic (`BatchLayout`); what is in them is read by one background thread, one step
ahead, on the first of the tensor- and context-parallel ranks of a pipeline stage that needs tokens. The main thread
shares them with the others in one broadcast per step and cuts them into batches.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist

from megatron_steel.config.rampup import BatchSizes
from megatron_steel.data.context import cut
from megatron_steel.data.documents import document_bounds, positions_from, row_bounds
from megatron_steel.data.order import Ledger
from megatron_steel.data.windows import WindowedDataset

# Marks what is no token on the way from the reading rank to batches, where it becomes token 0 without loss.
PADDING = -1


@dataclass(kw_only=True, slots=True)
class Batch:
    """One micro-batch. Shapes: B samples of the micro-batch, S tokens of a sample (this context-parallel rank's).

    A rank that needs no tokens (the middle of a pipeline) has zeros that take no memory in place of the tensors;
    the two last fields are right on every rank.
    """

    tokens_BS: torch.Tensor
    """Inputs, int64."""
    labels_BS: torch.Tensor
    """The token after each input, int64."""
    loss_mask_BS: torch.Tensor
    """1 where the label is trained, else 0, float32."""
    position_ids_BS: torch.Tensor
    """Position of each input in its sample, or in its document when positions are reset, int64."""
    sources_B: np.ndarray
    """Source of each sample, int64: index into Ledger.sources, or -1 in validation."""
    valid_tokens: int
    """Trained labels in this micro-batch (the sum of loss_mask_BS), known without a device."""
    cu_seqlens: torch.Tensor | None = None
    """Packed documents: where attention begins anew in the whole rows joined end to end, and their length; int32
    (documents + 1,), the same on all context-parallel ranks.
    None: each row is one text, attended to as a whole, and positions count from its start."""


def valid_tokens(batches: Sequence[Batch]) -> int:
    """Return the number of trained labels in this rank's micro-batches of a step."""
    return sum(batch.valid_tokens for batch in batches)


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


class BatchBuilder:
    """Share the tokens of a step over a group of ranks and turn them into batches on the device.

    tensor_group: ranks that get the same samples, tensor- and context-parallel; its first rank reads. None: every rank
    reads for itself.
    context_rank, context_size: which share of each sample's tokens this rank's batches hold (data/context.py).
    reads_data: False on pipeline stages that need no tokens. They still read under eod_mask_loss and for padded
    windows: the number of valid tokens then depends on the data, and every rank must know it.
    padded: windows may be shorter than seq_length + 1; the rest of their rows is token 0, without loss.
    eod_mask_loss: no loss where the *input* is the end-of-document token (Megatron-LM's meaning). Nothing else is ever
    masked by its id: padding and end of document may be the same token.
    reset_attention_mask: attention ends with a document. reset_position_ids: positions count from its start. With
    either, every pipeline stage reads.
    """

    def __init__(
        self,
        *,
        seq_length: int,
        tensor_group: dist.ProcessGroup | None,
        reads_data: bool,
        device: torch.device,
        eod_id: int | None,
        eod_mask_loss: bool = False,
        reset_attention_mask: bool = False,
        reset_position_ids: bool = False,
        padded: bool = False,
        context_rank: int = 0,
        context_size: int = 1,
    ) -> None:
        for flag, given in (
            ("--eod-mask-loss", eod_mask_loss),
            ("--reset-attention-mask", reset_attention_mask),
            ("--reset-position-ids", reset_position_ids),
        ):
            if eod_id is None and given:
                raise ValueError(f"{flag} needs a tokenizer with an end-of-document token")
        self.seq_length = seq_length
        self.context_rank, self.context_size = context_rank, context_size
        self.group = tensor_group if tensor_group is not None and dist.get_world_size(tensor_group) > 1 else None
        self.is_reader = self.group is None or dist.get_rank(self.group) == 0
        self.packs = reset_attention_mask or reset_position_ids
        self.reset_attention_mask = reset_attention_mask
        self.reset_position_ids = reset_position_ids
        self.reads_data = reads_data or self.packs
        self.device = device
        self.eod_id = -1 if eod_id is None else eod_id  # no token has id -1
        self.eod_mask_loss = eod_mask_loss
        self.padded = padded
        self.equal_counts = not (eod_mask_loss or padded)
        """Whether every sample has seq_length valid tokens, so that no rank needs data to know them."""
        self.reads = self.is_reader and (self.reads_data or not self.equal_counts)

    def read(self, fetch: Callable[[int, int], np.ndarray | None], shape: tuple[int, int]) -> torch.Tensor | None:
        """Read fetch(micro-batch, row) for all micro-batches and rows of `shape` if this is the rank that reads.

        `fetch` gives int64 (S + 1,), fewer if padded, or None for a sample that is not there. Returns int64
        (micro-batches, B, S + 1) in host memory, padding as `PADDING`; or None. Called on the background thread.
        """
        if not self.reads:
            return None
        pinned = self.device.type != "cpu"
        tokens = torch.zeros((*shape, self.seq_length + 1), dtype=torch.int64, pin_memory=pinned)
        rows = tokens.numpy()
        for microbatch, row in np.ndindex(*shape):
            fetched = fetch(microbatch, row)
            if fetched is None:
                continue
            if self.padded:
                rows[microbatch, row, len(fetched) :] = PADDING
                rows[microbatch, row, : len(fetched)] = fetched
            else:
                rows[microbatch, row] = fetched
        return tokens

    def build(self, host: torch.Tensor | None, sources: np.ndarray, present: np.ndarray) -> list[Batch]:
        """Return the micro-batches of a step.

        host: what `read` returned on this rank. sources: int64 (micro-batches, B). present: bool (micro-batches, B),
        False for padding. Called on the main thread of all ranks of the group, in the same order.
        """
        counts = present.sum(axis=1) * (self.seq_length // self.context_size)
        if self.equal_counts and not self.reads_data:
            return [self._without_tokens(source, int(count)) for source, count in zip(sources, counts, strict=True)]
        data = self._share(host, present.shape)
        tokens, labels = self._cut(data[..., :-1]).contiguous(), self._cut(data[..., 1:]).contiguous()
        mask = torch.ones(tokens.shape, device=self.device)
        if not present.all():
            mask *= torch.from_numpy(present[..., None]).to(self.device)
        if self.eod_mask_loss:
            mask = mask * (tokens != self.eod_id)
        if self.padded:
            mask = mask * (labels != PADDING)
            tokens, labels = tokens.clamp(min=0), labels.clamp(min=0)
        if not self.equal_counts:
            counts = self._count(host, present, mask)
        if not self.reads_data:
            return [self._without_tokens(source, int(count)) for source, count in zip(sources, counts, strict=True)]
        positions = self._cut(torch.arange(self.seq_length, device=self.device)).expand(tokens.shape)
        bounds: list[torch.Tensor | None] = [None] * len(sources)
        if self.packs:
            whole, bounds = self._documents((data.cpu() if host is None else host).numpy()[..., :-1])
            positions = self._cut(whole)
        return [
            Batch(
                tokens_BS=tokens[i],
                labels_BS=labels[i],
                loss_mask_BS=mask[i],
                position_ids_BS=positions[i],
                sources_B=sources[i],
                valid_tokens=int(counts[i]),
                cu_seqlens=bounds[i],
            )
            for i in range(len(sources))
        ]

    def _cut(self, whole: torch.Tensor) -> torch.Tensor:
        """This rank's tokens of whole rows [..., S]."""
        return cut(whole, self.context_rank, self.context_size)

    def _documents(self, tokens: np.ndarray) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
        """(position ids as `tokens`, attention bounds of each micro-batch) of int64 (micro-batches, B, S).

        Computed on the host: the number of documents decides shapes.
        """
        _, rows, length = tokens.shape
        whole = torch.from_numpy(row_bounds(rows, length)).to(self.device)
        positions, bounds = [], []
        for tokens_BS in tokens:
            documents = torch.from_numpy(document_bounds(tokens_BS, self.eod_id)).to(self.device)
            bounds.append(documents if self.reset_attention_mask else whole)
            positions.append(positions_from(documents if self.reset_position_ids else whole, rows * length))
        return torch.stack(positions).view(tokens.shape), bounds

    def _share(self, host: torch.Tensor | None, shape: tuple[int, ...]) -> torch.Tensor:
        """The tokens of the step on this rank's device, from the reading rank of the group."""
        if self.is_reader:
            assert host is not None
            data = host.to(self.device, non_blocking=self.device.type != "cpu")
        else:
            data = torch.empty((*shape, self.seq_length + 1), dtype=torch.int64, device=self.device)
        if self.group is not None:
            dist.broadcast(data, group=self.group, group_src=0)
        return data

    def _count(self, host: torch.Tensor | None, present: np.ndarray, mask: torch.Tensor) -> np.ndarray:
        """Trained labels of each micro-batch; the reading rank counts on the host and spares a device sync."""
        if host is None:
            return mask.sum(dim=(1, 2), dtype=torch.int64).cpu().numpy()
        valid = (host[..., 1:].numpy() != PADDING) & present[..., None]
        if self.eod_mask_loss:
            valid &= host[..., :-1].numpy() != self.eod_id
        return self._cut(torch.from_numpy(valid)).sum(dim=(1, 2)).numpy()

    def _without_tokens(self, sources: np.ndarray, valid: int) -> Batch:
        """A batch of the right shapes for a rank that looks at none of its tensors."""
        shape = (len(sources), self.seq_length // self.context_size)
        nothing = torch.zeros((), dtype=torch.int64, device=self.device).expand(shape)
        return Batch(
            tokens_BS=nothing,
            labels_BS=nothing,
            loss_mask_BS=torch.zeros((), device=self.device).expand(shape),
            position_ids_BS=nothing,
            sources_B=sources,
            valid_tokens=valid,
        )


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
        datasets: Mapping[str, WindowedDataset],
        layout: BatchLayout,
        builder: BatchBuilder,
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
        dataset: WindowedDataset,
        layout: BatchLayout,
        builder: BatchBuilder,
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
                return self.dataset[int(windows[microbatch, row])] if present[microbatch, row] else None

            host = self.builder.read(fetch, windows.shape)
            yield self.builder.build(host, np.full(windows.shape, -1), present)


def _check_datasets(ledger: Ledger, datasets: Mapping[str, WindowedDataset], first_sample: int) -> None:
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
