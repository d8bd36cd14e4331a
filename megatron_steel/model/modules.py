"""Modules of the ``torch`` layer backend: attention on PyTorch's fused kernels and RMSNorm.

Shapes: S sequence, B micro-batch, N query heads, G key/value heads, D head width, H hidden (all per rank).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class TorchDotProductAttention(torch.nn.Module):
    """Scaled dot-product attention through ``scaled_dot_product_attention`` (flash / cuDNN on GPU, flash on CPU)."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        """Arguments are those megatron-core passes to any core attention; no parameters are created."""
        super().__init__()
        assert config.context_parallel_size == 1
        self.attn_mask_type = attn_mask_type
        self.softmax_scale = softmax_scale
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout

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
        """query [S, B, N, D], key and value [S', B, G, D] -> [S, B, N * D].

        The mask type decides: causal, or none for one new token against a cache. A dense mask is never read: whoever
        passes one would be ignored silently, so it must be None.
        """
        assert attention_mask is None and attention_bias is None and packed_seq_params is None
        causal = (attn_mask_type or self.attn_mask_type) == AttnMaskType.causal
        out_BNSD = F.scaled_dot_product_attention(
            query.permute(1, 2, 0, 3),
            key.permute(1, 2, 0, 3),
            value.permute(1, 2, 0, 3),
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=causal,
            scale=self.softmax_scale,
            enable_gqa=query.shape[2] != key.shape[2],
        )
        return out_BNSD.permute(2, 0, 1, 3).flatten(2)


class RMSNormFunction(torch.autograd.Function):
    """y = x / sqrt(mean(x^2) + eps) * weight with statistics in fp32 (Zhang and Sennrich 2019, eq. 4).

    Saves x and one number per row; PyTorch's composite form on CPU keeps and re-reads several tensors of x's size.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x [..., H], weight [H] -> [..., H] in x's dtype."""
        wide = x.float()
        inverse = torch.rsqrt(torch.linalg.vecdot(wide, wide).div_(x.shape[-1]).add_(eps)).unsqueeze(-1)
        ctx.save_for_backward(x, weight, inverse)
        return wide.mul(inverse).to(x.dtype).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        """dx = (g - xhat * mean(g * xhat)) / rms with g = dy * weight; dweight = sum over rows of dy * xhat."""
        x, weight, inverse = ctx.saved_tensors
        grad = grads[0].float()
        xhat = x.float() * inverse
        grad_weight = (grad * xhat).flatten(0, -2).sum(0).to(weight.dtype)
        inner = grad * weight.float()
        shared = torch.linalg.vecdot(inner, xhat).div_(x.shape[-1]).unsqueeze(-1)
        return inner.addcmul_(xhat, shared, value=-1.0).mul_(inverse).to(x.dtype), grad_weight, None


class RMSNorm(torch.nn.Module):
    """RMSNorm that may sit in a sequence-parallel region (megatron-core's wrapper around torch's norm refuses that)."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        """``hidden_size`` is the width of the last axis; other arguments of the seam do not apply to RMSNorm."""
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # Each rank sees a part of the sequence: megatron-core sums such gradients over the tensor-parallel ranks.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """x [..., H] -> [..., H]."""
        if x.is_cpu:
            return RMSNormFunction.apply(x, self.weight, self.eps)
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)
