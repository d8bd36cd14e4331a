"""Attention with linear biases (ALiBi; Press et al. 2022, arXiv:2108.12409): scores fall with the distance of tokens.

Shapes: S sequence, B micro-batch, N query heads, G key/value heads, D head width (all per rank), T tokens of packed
documents, E extra channels.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_steel.data.context import cut
from megatron_steel.model.attention import TorchDotProductAttention

EXTRA = 8
"""Channels more of each head: six are used, and kernels want multiples of eight."""


def slopes(heads: int) -> list[float]:
    """How fast scores fall, by head: 2^(-8 i / n) for i = 1 .. n where n is a power of two.

    Other numbers of heads have those of the power of two below, then every second one of the power of two above.
    """
    power = 2 ** math.floor(math.log2(heads))
    below = [2 ** (-8 * i / power) for i in range(1, power + 1)]
    above = [2 ** (-8 * i / (2 * power)) for i in range(1, 2 * power + 1, 2)]
    return below + above[: heads - power]


@functools.lru_cache(maxsize=8)
def query_channels(factors: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """[N, E]: each factor as a number of ``dtype`` and what is left of it, once for each digit of a position."""
    exact = torch.tensor(factors, dtype=torch.float64)
    coarse = exact.to(dtype)
    rest = (exact - coarse.double()).to(dtype)
    unused = torch.zeros(len(factors), EXTRA - 6, dtype=dtype)
    return torch.cat([coarse.unsqueeze(1).expand(-1, 3), rest.unsqueeze(1).expand(-1, 3), unused], 1).to(device)


def key_channels(positions: Tensor, dtype: torch.dtype) -> Tensor:
    """[S, E] of positions [S]: their digits in base 256, which 8 bits of precision hold exactly, twice."""
    digits = [positions // 65536 * 65536, positions // 256 % 256 * 256, positions % 256]
    unused = [torch.zeros_like(positions)] * (EXTRA - 6)
    return torch.stack([*digits, *digits, *unused], -1).to(dtype)


class DistanceAttention(TorchDotProductAttention):
    """Attention whose scores have slope * (key's position - query's) added.

    Softmax does not change when a query's scores all move by the same amount, so slope * (key's position) is enough,
    and a few more channels of queries and keys bring it in: the kernels, windows and packed documents stay what they
    are, and no bias of the size of the scores is made. In fp32, scores are off by up to 1e-4 at 2,000 tokens.
    """

    def __init__(
        self, config: TransformerConfig, *args: Any, pg_collection: ProcessGroupCollection, **rest: Any
    ) -> None:
        """Arguments are those of :class:`TorchDotProductAttention`; this rank's heads are those of its place."""
        super().__init__(config, *args, pg_collection=pg_collection, **rest)
        heads = config.num_attention_heads
        each = heads // pg_collection.tp.size()
        first = pg_collection.tp.rank() * each
        scale = self.softmax_scale if self.softmax_scale is not None else config.kv_channels**-0.5
        # From now on: the heads that the kernel sees are wider.
        self.softmax_scale = scale
        self.factors = tuple(slope / scale for slope in slopes(heads)[first : first + each])

    def key_positions(self, key: Tensor, packed: PackedSeqParams | None) -> Tensor:
        """Position of each key of this rank, int64 [S] or [T]."""
        ranks = self.context_group.size() if self.context_group is not None else 1
        positions = torch.arange(key.shape[0] * ranks, device=key.device)
        if packed is not None:
            bounds = packed.cu_seqlens_kv.long()
            positions = positions - bounds[:-1].repeat_interleave(bounds.diff(), output_size=len(positions))
        if self.context_group is None:
            return positions
        rows = positions if packed is None else positions.view(-1, packed.max_seqlen_kv)
        return cut(rows, self.context_group.rank(), ranks).flatten()

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        packed_seq_params: PackedSeqParams | None = None,
        **rest: Any,
    ) -> Tensor:
        """query [S, B, N, D], key and value [S', B, G, D] -> [S, B, N * D]; packed [T, N, D], [T, G, D] -> [T, N * D].

        Positions count from the first key, or from the beginning of each document.
        """
        positions = self.key_positions(key, packed_seq_params)
        columns = key_channels(positions, key.dtype)
        columns = columns.view(-1, *[1] * (key.dim() - 2), EXTRA).expand(*key.shape[:-1], EXTRA)
        rows = query_channels(self.factors, query.dtype, query.device).expand(*query.shape[:-1], EXTRA)
        out = super().forward(
            torch.cat([query, rows], -1),
            torch.cat([key, columns], -1),
            F.pad(value, (0, EXTRA)),
            attention_mask,
            packed_seq_params=packed_seq_params,
            **rest,
        )
        return out.unflatten(-1, (query.shape[-2], -1))[..., :-EXTRA].flatten(-2)
