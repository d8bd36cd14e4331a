"""What the ``transformer_engine`` layer backend adds to megatron-core's wrappers; imported only where it is installed.

Shapes: S sequence, B micro-batch, N query heads, G key/value heads, D head width (per rank), T tokens of packed
documents.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from megatron.core.extensions.transformer_engine import TEDotProductAttention
from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor

from megatron_steel.model.packed import packed_attention, seen_before

# What a module of packed documents is told: rows of one text, whose angles come by token. See EngineSelfAttention.
ROWS = "sbhd"


class EngineAttention(TEDotProductAttention):
    """Transformer Engine's attention, which is told of packed documents by :class:`EngineSelfAttention`."""

    def __init__(self, config: Any, layer_number: int, *args: Any, **rest: Any) -> None:
        """Arguments are those megatron-core passes to any core attention; no parameters are created."""
        super().__init__(config, layer_number, *args, **rest)
        windowed = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        self.window = config.window_size[0] + 1 if windowed else None
        self.scale: float | None = rest.get("softmax_scale")

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **rest: Any,
    ) -> Tensor:
        """query [S, B, N, D], key and value [S, B, G, D] -> [S, B, N * D]; packed documents are one row, B = 1."""
        if packed_seq_params is None:
            return super().forward(query, key, value, attention_mask, attn_mask_type, attention_bias, **rest)
        heads = [part.squeeze(1) for part in (query, key, value)]
        # Documents that go on from others, and what Transformer Engine's fused kernels do not take, are computed as
        # by the torch backend.
        if seen_before(packed_seq_params) is not None or query.dtype == torch.float32:
            dropout = self.config.attention_dropout if self.training else 0.0
            out_TND = packed_attention(*heads, packed_seq_params, dropout, self.scale, self.window)
            return out_TND.flatten(1).unsqueeze(1)
        documents = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=packed_seq_params.cu_seqlens_q,
            cu_seqlens_kv=packed_seq_params.cu_seqlens_kv,
            max_seqlen_q=packed_seq_params.max_seqlen_q,
            max_seqlen_kv=packed_seq_params.max_seqlen_kv,
        )
        out = super().forward(
            *heads, attention_mask, attn_mask_type, attention_bias, packed_seq_params=documents, **rest
        )
        return out.reshape(query.shape[0], 1, -1)


class EngineSelfAttention(SelfAttention):
    """megatron-core's self-attention with rotary angles by token for packed documents, as the torch backend has them.

    megatron-core counts positions from the beginning of each document: fused by Transformer Engine's kernel, which
    takes the first angles of the row for every document, or unfused, which asks the device for the bounds of the
    documents in every layer. Here it rotates a packed row as one text, and the core attention alone is told of its
    documents.
    """

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        packed_seq_params: PackedSeqParams | None = None,
        **rest: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states [S, B, H] -> the same shape, and the output projection's bias."""
        if packed_seq_params is not None:
            packed_seq_params = replace(packed_seq_params, qkv_format=ROWS)
        return super().forward(hidden_states, attention_mask, packed_seq_params=packed_seq_params, **rest)


class EngineSpecProvider(TESpecProvider):
    """megatron-core's modules over Transformer Engine, with our attention."""

    def __init__(self, grouped: bool = False) -> None:
        """``grouped``: one call multiplies all experts of a layer."""
        self.grouped = grouped

    def core_attention(self) -> type:
        """Transformer Engine's."""
        return EngineAttention
