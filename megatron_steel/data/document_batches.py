"""From the token ids of a step to this rank's micro-batches on its device: windows of documents.

What is in the samples is read on the first of the tensor- and context-parallel ranks of a pipeline stage that needs
tokens; the main thread shares them with the others in one broadcast per step and cuts them into batches.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist

from megatron_steel.data.batch import PADDING, Batch
from megatron_steel.data.context import cut
from megatron_steel.data.documents import document_bounds, positions_from, row_bounds
from megatron_steel.runtime.device import upload


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
            mask *= upload(torch.from_numpy(present[..., None]), self.device)
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
        bounds: list[np.ndarray | None] = [None] * len(sources)
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
                cu_seqlens=None if (edges := bounds[i]) is None else upload(torch.from_numpy(edges), self.device),
                bounds=None if edges is None else edges.tolist(),
            )
            for i in range(len(sources))
        ]

    def _cut(self, whole: torch.Tensor) -> torch.Tensor:
        """This rank's tokens of whole rows [..., S]."""
        return cut(whole, self.context_rank, self.context_size)

    def _documents(self, tokens: np.ndarray) -> tuple[torch.Tensor, list[np.ndarray | None]]:
        """(position ids as `tokens`, attention bounds of each micro-batch) of int64 (micro-batches, B, S).

        Computed on the host: the number of documents decides shapes.
        """
        _, rows, length = tokens.shape
        whole = row_bounds(rows, length)
        positions: list[torch.Tensor] = []
        bounds: list[np.ndarray | None] = []
        for tokens_BS in tokens:
            documents = document_bounds(tokens_BS, self.eod_id)
            bounds.append(documents if self.reset_attention_mask else whole)
            begins = upload(torch.from_numpy(documents if self.reset_position_ids else whole), self.device)
            positions.append(positions_from(begins, rows * length))
        return torch.stack(positions).view(tokens.shape), bounds

    def _share(self, host: torch.Tensor | None, shape: tuple[int, ...]) -> torch.Tensor:
        """The tokens of the step on this rank's device, from the reading rank of the group."""
        if self.is_reader:
            assert host is not None
            data = upload(host, self.device)
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
