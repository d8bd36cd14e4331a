"""From rows of conversations to this rank's micro-batches on its device.

Packed, a row has seq_length tokens and attention begins anew with each conversation. Otherwise a row is one
conversation and a micro-batch as long as its longest, or, where a pipeline wants one shape, as the step's longest.
Shapes: M micro-batches, B rows of one, P planes (chat_dataset.py), W tokens of a row with its padding.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist

from megatron_steel.data.batch import Batch, Seen, Texts
from megatron_steel.data.chat_dataset import PLANES
from megatron_steel.data.context import cut
from megatron_steel.data.pair_dataset import PAIR_PLANES, Role, judged
from megatron_steel.runtime.device import upload

_, LABEL, WEIGHT, POSITION, ROLE, _ = range(len(PAIR_PLANES))
# A token that is none: no label, no weight, and a position that no token has.
PADDING = np.array([0, -1, 0, -1, 0, 0], dtype=np.int32)


class ChatBatchBuilder:
    """Share the rows of a step over a group of ranks and turn them into batches on the device.

    group: ranks that get the same rows, tensor- and context-parallel; its first rank reads. None: every rank reads for
    itself. Every pipeline stage reads: lengths, bounds and weights depend on the data.
    planes: how many of a token are read: those of chat_dataset.py, or pair_dataset.py's for losses of whole texts.
    one_shape: all micro-batches of a step have the same length (pipelines). multiple: what the length of a row that is
    not packed is divisible by. context_rank, context_size: which share of a row's tokens is this rank's.
    """

    equal_counts = False
    padded = True

    def __init__(
        self,
        *,
        seq_length: int,
        packing: bool,
        group: dist.ProcessGroup | None,
        device: torch.device,
        one_shape: bool,
        multiple: int,
        planes: int = len(PLANES),
        context_rank: int = 0,
        context_size: int = 1,
    ) -> None:
        self.seq_length, self.packing, self.device = seq_length, packing, device
        self.group = group if group is not None and dist.get_world_size(group) > 1 else None
        self.reads = self.group is None or dist.get_rank(self.group) == 0
        self.one_shape, self.multiple, self.planes = one_shape, multiple, planes
        self.context_rank, self.context_size = context_rank, context_size

    def read(self, fetch: Callable[[int, int], np.ndarray | None], shape: tuple[int, int]) -> torch.Tensor | None:
        """Read fetch(micro-batch, row), int32 (P, tokens) or None for a row that is not there, on the rank that reads.

        Returns int32 (M, B, P, W) in host memory, W that of the longest row: padding has the position -1. Called on
        the background thread.
        """
        if not self.reads:
            return None
        rows = {place: fetch(*place) for place in np.ndindex(*shape)}
        longest = max((row.shape[1] for row in rows.values() if row is not None), default=1)
        width = self.seq_length if self.packing else self._rounded(longest)
        planes = torch.empty((*shape, self.planes, width), dtype=torch.int32, pin_memory=self.device.type != "cpu")
        out = planes.numpy()
        out[:] = PADDING[: self.planes, None]
        for place, row in rows.items():
            if row is not None:
                out[place][:, : row.shape[1]] = row
        return planes

    def build(self, host: torch.Tensor | None, sources: np.ndarray, present: np.ndarray) -> list[Batch]:
        """Return the micro-batches of a step.

        host: what `read` returned on this rank. sources: int64 (M, B). Rows that are not `present` are all padding.
        Called on the main thread of all ranks of the group, in the same order.
        """
        device = self._share(host, sources.shape)
        host = device.cpu() if host is None else host
        return [self._batch(host[i], device[i], sources[i]) for i in range(len(sources))]

    def _batch(self, host_BPW: torch.Tensor, device_BPW: torch.Tensor, sources_B: np.ndarray) -> Batch:
        """One micro-batch, from its planes in host memory and on the device."""
        width = host_BPW.shape[-1]
        if not (self.packing or self.one_shape):
            longest = int((host_BPW[:, POSITION] >= 0).sum(-1).max())
            width = self._rounded(max(longest, 1))
        own = self._cut(host_BPW[..., :width])
        tokens, labels, weights, positions, *_ = self._cut(device_BPW[..., :width]).unbind(1)
        trained = own[:, LABEL] >= 0
        bounds, texts, seen = None, None, None
        if self.packing or self.planes > len(PLANES):
            bounds = text_bounds(host_BPW[:, POSITION, :width].numpy())
        if self.planes > len(PLANES):
            assert bounds is not None
            texts = self._texts(host_BPW[..., :width].numpy(), bounds)
            seen = self._seen(host_BPW[:, POSITION, :width].numpy(), bounds)
            trained &= own[:, ROLE] != Role.MISMATCHED
        weight = float(own[:, WEIGHT].contiguous().view(torch.float32).double().sum())
        return Batch(
            tokens_BS=tokens.long(),
            labels_BS=labels.clamp(min=0).long(),
            loss_mask_BS=weights.contiguous().view(torch.float32),
            position_ids_BS=positions.clamp(min=0).long(),
            sources_B=sources_B,
            valid_tokens=int(trained.sum()),
            cu_seqlens=None if bounds is None else upload(torch.from_numpy(bounds), self.device),
            bounds=None if bounds is None else bounds.tolist(),
            seen=seen,
            weight=weight if texts is None else judged(texts) / self.context_size,
            read_tokens=int((own[:, POSITION] >= 0).sum()),
            texts=texts,
        )

    def _texts(self, planes_BPW: np.ndarray, bounds: np.ndarray) -> Texts:
        """What losses of whole texts need, from the planes of pair_dataset.py."""
        rows, _, width = planes_BPW.shape
        begins = bounds[:-1]
        numbers = np.repeat(np.arange(len(begins)), np.diff(bounds)).reshape(rows, width)
        _, labels, _, _, roles, references = (planes_BPW[:, plane].reshape(-1) for plane in range(self.planes))
        is_last = np.zeros((rows, width), dtype=np.float32)
        is_last.reshape(-1)[bounds[1:] - 1] = 1
        counts = np.add.reduceat((labels >= 0).astype(np.float32), begins)
        return Texts(
            of_token_BS=upload(self._cut(torch.from_numpy(numbers)), self.device),
            roles_T=roles[begins],
            rows_T=begins // width,
            counts_T=upload(torch.from_numpy(counts), self.device),
            is_last_BS=upload(self._cut(torch.from_numpy(is_last)), self.device),
            references_T=upload(torch.from_numpy(references[begins].view(np.float32)), self.device),
        )

    def _seen(self, positions_BW: np.ndarray, bounds: np.ndarray) -> Seen | None:
        """What texts see that go on from the one before them; None where all begin at position 0."""
        before = np.maximum(positions_BW.reshape(-1)[bounds[:-1]], 0)
        if not before.any():
            return None
        keys, cu_seqlens = seen_keys(bounds, before)
        return Seen(
            before=before.tolist(),
            keys=upload(torch.from_numpy(keys), self.device),
            cu_seqlens=upload(torch.from_numpy(cu_seqlens), self.device),
        )

    def _cut(self, whole: torch.Tensor) -> torch.Tensor:
        """This rank's tokens of whole rows [..., W]."""
        return cut(whole, self.context_rank, self.context_size)

    def _rounded(self, length: int) -> int:
        """The length of a row that holds so many tokens."""
        return -(-length // self.multiple) * self.multiple

    def _share(self, host: torch.Tensor | None, shape: tuple[int, ...]) -> torch.Tensor:
        """The planes of the step on this rank's device, from the reading rank of the group."""
        data = None if host is None else upload(host, self.device)
        if self.group is None:
            assert data is not None
            return data
        width = torch.tensor(0 if data is None else data.shape[-1], device=self.device)
        dist.broadcast(width, group=self.group, group_src=0)
        if data is None:
            data = torch.empty((*shape, self.planes, int(width)), dtype=torch.int32, device=self.device)
        dist.broadcast(data, group=self.group, group_src=0)
        return data


def text_bounds(positions_BW: np.ndarray) -> np.ndarray:
    """Where each conversation of the joined rows begins, and their length: int32 (texts + 1,), strictly increasing.

    The padding at the end of a row is a text of its own. A text that goes on from another begins where positions jump.
    """
    begins = np.ones(positions_BW.shape, dtype=bool)
    # A row begins a text even where it is all padding.
    before, after = positions_BW[:, :-1], positions_BW[:, 1:]
    begins[:, 1:] = np.where(after < 0, before >= 0, after != before + 1)
    return np.append(np.flatnonzero(begins), positions_BW.size).astype(np.int32)


def seen_keys(bounds: np.ndarray, before: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tokens that each text sees, text after text, int64, and where each text's begin, int32 (texts + 1,).

    before: how many of the tokens at the beginning of the text before it a text sees beside its own.
    """
    spans = []
    for text, (begin, end) in enumerate(itertools.pairwise(bounds.tolist())):
        if before[text]:
            start = int(bounds[text - 1])
            spans.append(np.arange(start, start + int(before[text])))
        spans.append(np.arange(begin, end))
    cu_seqlens = np.cumsum([0, *(np.diff(bounds) + before)], dtype=np.int32)
    return np.concatenate(spans), cu_seqlens
