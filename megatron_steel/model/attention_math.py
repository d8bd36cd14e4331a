"""Attention whose scores go through a softcap, which the fused kernels do not know (Gemma 2; Gemma team 2024, 2).

Shapes: B batch, N query heads, G key/value heads, S queries, K keys, D head width; Q queries of one block.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_steel.model.attention import TorchDotProductAttention
from megatron_steel.model.packed import document_attention, host_bounds, seen_before
from megatron_steel.model.window import QUERIES, seen_keys


def softcap(x: Tensor, cap: float) -> Tensor:
    """cap * tanh(x / cap): nearly x where it is small, never beyond the cap."""
    return torch.tanh(x / cap) * cap


def block_attention(
    query: Tensor, key: Tensor, value: Tensor, seen: Tensor, dropout: float, scale: float, cap: float
) -> Tensor:
    """query [B, N, Q, D], key and value [B, G, K, D] -> [B, N, Q, D]; softcap and softmax in fp32.

    ``seen`` is bool [Q, K] or [B, 1, Q, K].
    """
    groups = key.shape[1]
    grouped = query.unflatten(1, (groups, -1))
    scores = torch.matmul(grouped.flatten(2, 3), key.transpose(2, 3)).unflatten(2, grouped.shape[2:4])
    capped = softcap(scores.float() * scale, cap).masked_fill(~seen.unsqueeze(-3), -torch.inf)
    weights = F.dropout(capped.softmax(-1).to(value.dtype), dropout)
    return torch.matmul(weights.flatten(2, 3), value).unflatten(2, grouped.shape[2:4]).flatten(1, 2)


def capped_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: int | None,
    dropout: float,
    scale: float | None,
    padding: Tensor | None = None,
    *,
    cap: float,
) -> Tensor:
    """query [B, N, S, D], key and value [B, G, K, D] -> [B, N, S, D]; the queries are the last S of K positions.

    Nobody sees keys of ``padding`` bool [B, K]. A few queries at a time see the keys up to themselves, or those of the
    window. Their scores are computed once more in the backward pass, so memory does not grow with the square of the
    sequence.
    """
    length, before = query.shape[2], key.shape[2] - query.shape[2]
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    outputs = []
    for begin in range(0, length, QUERIES):
        end = min(begin + QUERIES, length)
        queries = range(before + begin, before + end)
        keys = range(0 if window is None else max(0, queries.start - window + 1), queries.stop)
        part = slice(keys.start, keys.stop)
        inputs = (query[:, :, begin:end], key[:, :, part], value[:, :, part])
        seen = seen_keys(queries, keys, window, padding, query.device)
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
            outputs.append(
                checkpoint(
                    block_attention, *inputs, seen, dropout, scale, cap,
                    use_reentrant=False, preserve_rng_state=dropout > 0,
                )
            )  # fmt: skip
        else:
            outputs.append(block_attention(*inputs, seen, dropout, scale, cap))
    return torch.cat(outputs, 2)


class SoftcapAttention(TorchDotProductAttention):
    """Causal attention with a softcap on scores, applied before the mask."""

    def __init__(self, *args: Any, cap: float, **rest: Any) -> None:
        """``cap``: largest score; other arguments are those of :class:`TorchDotProductAttention`."""
        super().__init__(*args, **rest)
        self.attend = functools.partial(capped_attention, cap=cap)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """query [S, B, N, D], key and value [S', B, G, D] -> [S, B, N * D]; packed [T, N, D] -> [T, N * D].

        Without a mask, that is for one new token against a cache, it is the last position; causal means the same then.
        ``attention_mask`` is that of :class:`TorchDotProductAttention`.
        """
        assert attention_bias is None
        if attention_mask is not None:
            assert self.context_group is None and packed_seq_params is None
        if self.context_group is not None:
            return self.over_ranks(query, key, value, packed_seq_params)
        dropout, attend = self.dropout if self.training else 0.0, self.attend
        if packed_seq_params is not None:
            bounds, before = host_bounds(packed_seq_params), seen_before(packed_seq_params)
            options = (dropout, self.softmax_scale, self.window, attend, before)
            out_TND = document_attention(query, key, value, bounds, *options)
            return out_TND.flatten(1)
        causal = (attn_mask_type or self.attn_mask_type) == AttnMaskType.causal
        assert query.shape[0] in (1, key.shape[0]) and (causal or query.shape[0] == 1)
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        out_BNSD = attend(query, key, value, self.window, dropout, self.softmax_scale, attention_mask)
        return out_BNSD.permute(2, 0, 1, 3).flatten(2).contiguous()
