"""Modules of the ``torch`` layer backend: attention on PyTorch's fused kernels, rotary embedding, SwiGLU and RMSNorm.

Each is written as one autograd function over few passes: PyTorch without a compiler runs one pass over memory per
operation, and on a CPU those passes are what is left to save next to the matrix products.

Shapes: S sequence, B micro-batch, N query heads, G key/value heads, D head width, H hidden, F feed-forward width
(all per rank).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_steel.model.blocks import row_blocks
from megatron_steel.model.packed import packed_attention


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
        passes one would be ignored silently, so it must be None. With ``packed_seq_params`` the tensors hold the tokens
        of several documents, [T, N, D] and [T, G, D] -> [T, N * D], and each attends within its own.
        """
        assert attention_mask is None and attention_bias is None
        if packed_seq_params is not None:
            dropout = self.dropout if self.training else 0.0
            return packed_attention(query, key, value, packed_seq_params, dropout, self.softmax_scale).flatten(1)
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
        return out_BNSD.permute(2, 0, 1, 3).flatten(2).contiguous()


def rotate(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
    """out = (x1 cos - x2 sin, x2 cos + x1 sin) for the halves x1, x2 of the last axis (Su et al. 2021, eq. 34).

    cos: [..., D], sin: [..., D / 2], both broadcast against x.
    """
    half = x.shape[-1] // 2
    torch.mul(x, cos, out=out)
    out[..., :half].addcmul_(x[..., half:], sin, value=-1.0)
    out[..., half:].addcmul_(x[..., :half], sin)


def cos_sin(angles: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos [S, 1, 1, 1, D] and sin [S, 1, 1, 1, D / 2] of megatron-core's angles [S, 1, 1, D] (equal halves)."""
    angles = angles.unsqueeze(2)
    return angles.cos().to(dtype), angles[..., : angles.shape[-1] // 2].sin().to(dtype)


# Remembered by the identity of the angles: megatron-core hands the same tensor to every layer and step. Those of packed
# documents are made for one micro-batch and go to its layers one after another.
rotary_table = functools.lru_cache(maxsize=8)(cos_sin)
packed_rotary_table = functools.lru_cache(maxsize=1)(cos_sin)


class SplitAndRotate(torch.autograd.Function):
    """Take queries, keys and values apart and turn the first two by their positions.

    One read of the projection forward; backward writes its gradient in place instead of joining three tensors.
    """

    @staticmethod
    def forward(ctx: Any, mixed: Tensor, cos: Tensor, sin: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
        """mixed [S, B, G * (N / G + 2) * D] -> query [S, B, N, D], key and value [S, B, G, D].

        cos [S, 1, 1, 1, D], sin [S, 1, 1, 1, D / 2]. A group's columns are its queries, its key, its value.
        """
        mixed_SBGND = mixed.view(*mixed.shape[:2], groups, -1, cos.shape[-1])
        # One sample's positions follow each other in memory: attention over rows B * N * D apart is a fifth slower on a
        # CPU, where such a distance (a power of two, as a rule) maps them all to the same few lines of the cache.
        sequence, batch, _, per_group, width = mixed_SBGND.shape
        query = mixed.new_empty(batch, sequence, groups, per_group - 2, width).transpose(0, 1)
        key, value = (mixed.new_empty(batch, sequence, groups, width).transpose(0, 1) for _ in range(2))
        for rows, cos_rows, sin_rows, q, k, v in row_blocks(mixed_SBGND, cos, sin, query, key, value):
            rotate(rows[:, :, :, :-2], cos_rows, sin_rows, q)
            rotate(rows[:, :, :, -2:-1], cos_rows, sin_rows, k.unsqueeze(3))
            v.copy_(rows[:, :, :, -1])
        # Not saved as tensors of the graph: the table may have been made in inference mode, which forbids that.
        ctx.cos, ctx.sin = cos, sin
        return query.flatten(2, 3), key, value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        """The transposed rotation is the rotation by the negative angle."""
        query, key, value = grads
        sequence, batch, groups, width = key.shape
        query_SBGND = query.unflatten(2, (groups, -1))
        mixed = query.new_empty(sequence, batch, groups, query_SBGND.shape[3] + 2, width)
        for rows, cos, sin, q, k, v in row_blocks(mixed, ctx.cos, -ctx.sin, query_SBGND, key, value):
            rotate(q, cos, sin, rows[:, :, :, :-2])
            rotate(k.unsqueeze(3), cos, sin, rows[:, :, :, -2:-1])
            rows[:, :, :, -1].copy_(v)
        return mixed.flatten(2), None, None, None


class TorchSelfAttention(SelfAttention):
    """megatron-core's self-attention with a short way through it for training.

    Anything special (a key/value cache, QK norm, fewer key heads than ranks, recomputation) takes megatron-core's own
    way. Parameters and checkpoint names are the same.
    """

    def is_plain(self) -> bool:
        """Whether this layer is nothing but projection, rotation, attention, projection."""
        config = self.config
        return (
            isinstance(self.q_layernorm, IdentityOp | None)
            and isinstance(self.k_layernorm, IdentityOp | None)
            and config.num_query_groups >= self.world_size
            and not (config.rotary_interleaved or config.attention_output_gate or config.no_rope_freq)
            and not self.checkpoint_core_attention
        )

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        rotary_pos_emb: Tensor | None = None,
        inference_context: Any = None,
        packed_seq_params: PackedSeqParams | None = None,
        **rest: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states [S, B, H] -> the same shape, and the output projection's bias.

        With ``packed_seq_params`` B is 1 and ``rotary_pos_emb`` [S, 1, 1, D] holds the angles of each token.
        """
        if inference_context is not None or rotary_pos_emb is None or not self.is_plain():
            return super().forward(
                hidden_states,
                attention_mask,
                rotary_pos_emb=rotary_pos_emb,
                inference_context=inference_context,
                packed_seq_params=packed_seq_params,
                **rest,
            )
        mixed, _ = self.linear_qkv(hidden_states)
        packed = packed_seq_params is not None
        cos, sin = (packed_rotary_table if packed else rotary_table)(rotary_pos_emb, mixed.dtype)
        query, key, value = SplitAndRotate.apply(mixed, cos, sin, self.num_query_groups_per_partition)
        if packed:
            parts = (part.squeeze(1) for part in (query, key, value))
            context = self.core_attention(*parts, attention_mask, packed_seq_params=packed_seq_params)
            return self.linear_proj(context.unsqueeze(1))
        return self.linear_proj(self.core_attention(query, key, value, attention_mask))


class SwiGLUFunction(torch.autograd.Function):
    """silu(gate) * up for [gate | up] in one tensor (Shazeer 2020, eq. 6, without the projections)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """x [..., 2 F] -> [..., F]; keeps x only."""
        ctx.save_for_backward(x)
        result = x.new_empty(*x.shape[:-1], x.shape[-1] // 2)
        for both, out in row_blocks(x, result):
            gate, up = both.chunk(2, -1)
            torch.ops.aten.silu.out(gate, out=out).mul_(up)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        """Both halves of the gradient are written where they belong, so nothing is joined afterwards."""
        (x,) = ctx.saved_tensors
        grad_x = torch.empty_like(x)
        for both, grad, grad_both in row_blocks(x, grads[0], grad_x):
            gate, up = both.chunk(2, -1)
            grad_gate, grad_up = grad_both.chunk(2, -1)
            torch.mul(F.silu(gate), grad, out=grad_up)
            torch.ops.aten.silu_backward(grad * up, gate, grad_input=grad_gate)
        return grad_x


class TorchMLP(MLP):
    """megatron-core's gated feed-forward around :class:`SwiGLUFunction`."""

    def forward(
        self, hidden_states: Tensor, per_token_scale: Tensor | None = None, **rest: Any
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states [S, B, H] -> the same shape, and the output projection's bias."""
        config = self.config
        if per_token_scale is not None or config.activation_func is not F.silu or not config.gated_linear_unit:
            return super().forward(hidden_states, per_token_scale, **rest)
        inner, bias = self.linear_fc1(hidden_states)
        assert bias is None
        return self.linear_fc2(SwiGLUFunction.apply(inner))


def get_residual_add(training: bool, fused: bool) -> Callable[..., Tensor]:
    """megatron-core's seam for bias + dropout + residual: a plain addition where there is neither bias nor dropout."""
    general = get_bias_dropout_add(training, fused)

    def add(x_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, probability: float) -> Tensor:
        if x_with_bias[1] is not None or (training and probability > 0.0):
            return general(x_with_bias, residual, probability)
        return residual + x_with_bias[0]

    return add


class RMSNormFunction(torch.autograd.Function):
    """y = x / sqrt(mean(x^2) + eps) * weight with statistics in fp32 (Zhang and Sennrich 2019, eq. 4).

    Saves x and one number per row; PyTorch's composite form on CPU keeps and re-reads several tensors of x's size.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x [..., H], weight [H] -> [..., H] in x's dtype."""
        y, inverse = torch.empty_like(x), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
        for rows, out, inverse_rms in row_blocks(x, y, inverse):
            wide = rows.float()
            torch.rsqrt(torch.linalg.vecdot(wide, wide).div_(x.shape[-1]).add_(eps).unsqueeze(-1), out=inverse_rms)
            out.copy_(wide * inverse_rms) if wide is not rows else torch.mul(wide, inverse_rms, out=out)
            out.mul_(weight)
        ctx.save_for_backward(x, weight, inverse)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        """dx = (dy * weight - x * mean(dy * weight * x) / rms^2) / rms; dweight = sum over rows of dy * x / rms."""
        x, weight, inverse = ctx.saved_tensors
        wide_weight = weight.float()
        grad_x, grad_weight = torch.empty_like(x), torch.zeros_like(wide_weight)
        everything = (part.flatten(0, -2) for part in (x, grads[0], inverse, grad_x))
        for rows, grad, inverse_rms, out in row_blocks(*everything):
            rows, grad = rows.float(), grad.float()
            product = grad * rows
            grad_weight.addmv_(product.t(), inverse_rms.squeeze(-1))
            shared = torch.mv(product, wide_weight).unsqueeze(-1).mul_(inverse_rms.square()).div_(-x.shape[-1])
            inner = torch.mul(rows, shared, out=product).addcmul_(grad, wide_weight)
            out.copy_(inner.mul_(inverse_rms)) if out.dtype != inner.dtype else torch.mul(inner, inverse_rms, out=out)
        return grad_x, grad_weight.to(weight.dtype), None


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
