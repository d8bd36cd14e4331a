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
        sequence, batch = query.shape[:2]
        # All heads of all samples are one axis: the kernels then write [S, B * N, D], which is the layout wanted, and
        # nothing is copied. Query head b * N + n still finds its key head b * G + n // (N / G).
        out_1NSD = F.scaled_dot_product_attention(
            query.flatten(1, 2).transpose(0, 1).unsqueeze(0),
            key.flatten(1, 2).transpose(0, 1).unsqueeze(0),
            value.flatten(1, 2).transpose(0, 1).unsqueeze(0),
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=causal,
            scale=self.softmax_scale,
            enable_gqa=query.shape[2] != key.shape[2],
        )
        return out_1NSD.squeeze(0).transpose(0, 1).reshape(sequence, batch, -1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
    """out = (x1 cos - x2 sin, x2 cos + x1 sin) for the halves x1, x2 of the last axis (Su et al. 2021, eq. 34).

    cos: [..., D], sin: [..., D / 2], both broadcast against x.
    """
    half = x.shape[-1] // 2
    torch.mul(x, cos, out=out)
    out[..., :half].addcmul_(x[..., half:], sin, value=-1.0)
    out[..., half:].addcmul_(x[..., :half], sin)


@functools.lru_cache(maxsize=8)
def rotary_table(angles: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos [S, 1, 1, 1, D] and sin [S, 1, 1, 1, D / 2] of megatron-core's angles [S, 1, 1, D], whose halves are equal.

    Remembered by the identity of ``angles``: megatron-core hands the same tensor to every layer and step.
    """
    angles = angles.unsqueeze(2)
    return angles.cos().to(dtype), angles[..., : angles.shape[-1] // 2].sin().to(dtype)


class SplitAndRotate(torch.autograd.Function):
    """Take queries, keys and values apart and turn the first two by their positions.

    One read of the projection forward; backward writes its gradient in place instead of joining three tensors.
    """

    @staticmethod
    def forward(ctx: Any, mixed: Tensor, cos: Tensor, sin: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
        """mixed [S, B, G * (N / G + 2) * D] -> query [S, B, N, D], key and value [S, B, G, D].

        cos [S, 1, 1, 1, D], sin [S, 1, 1, 1, D / 2]. A group's columns are its queries, its key, its value.
        """
        width = cos.shape[-1]
        mixed_SBGND = mixed.view(*mixed.shape[:2], groups, -1, width)
        per_group = mixed_SBGND.shape[3] - 2
        query = mixed.new_empty(*mixed.shape[:2], groups, per_group, width)
        key = mixed.new_empty(*mixed.shape[:2], groups, 1, width)
        rotate(mixed_SBGND[:, :, :, :per_group], cos, sin, query)
        rotate(mixed_SBGND[:, :, :, per_group:-1], cos, sin, key)
        # Not saved as tensors of the graph: the table may have been made in inference mode, which forbids that.
        ctx.cos, ctx.sin = cos, sin
        return query.flatten(2, 3), key.flatten(2, 3), mixed_SBGND[:, :, :, -1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        """The transposed rotation is the rotation by the negative angle."""
        query, key, value = grads
        groups, width = key.shape[2:]
        per_group = query.shape[2] // groups
        mixed = query.new_empty(*query.shape[:2], groups, per_group + 2, width)
        rotate(query.unflatten(2, (groups, per_group)), ctx.cos, -ctx.sin, mixed[:, :, :, :per_group])
        rotate(key.unsqueeze(3), ctx.cos, -ctx.sin, mixed[:, :, :, per_group:-1])
        mixed[:, :, :, -1].copy_(value)
        return mixed.flatten(2), None, None, None


class TorchSelfAttention(SelfAttention):
    """megatron-core's self-attention with a short way through it for training.

    Anything special (a key/value cache, packed sequences, QK norm, fewer key heads than ranks, recomputation) takes
    megatron-core's own way. Parameters and checkpoint names are the same.
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
        """hidden_states [S, B, H] -> the same shape, and the output projection's bias."""
        special = inference_context is not None or packed_seq_params is not None
        if special or rotary_pos_emb is None or not self.is_plain():
            return super().forward(
                hidden_states,
                attention_mask,
                rotary_pos_emb=rotary_pos_emb,
                inference_context=inference_context,
                packed_seq_params=packed_seq_params,
                **rest,
            )
        mixed, _ = self.linear_qkv(hidden_states)
        cos, sin = rotary_table(rotary_pos_emb, mixed.dtype)
        query, key, value = SplitAndRotate.apply(mixed, cos, sin, self.num_query_groups_per_partition)
        return self.linear_proj(self.core_attention(query, key, value, attention_mask))


class SwiGLUFunction(torch.autograd.Function):
    """silu(gate) * up for [gate | up] in one tensor (Shazeer 2020, eq. 6, without the projections)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """x [..., 2 F] -> [..., F]; keeps x only."""
        ctx.save_for_backward(x)
        gate, up = x.chunk(2, -1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        """Both halves of the gradient are written where they belong, so nothing is joined afterwards."""
        (x,) = ctx.saved_tensors
        gate, up = x.chunk(2, -1)
        grad_x = torch.empty_like(x)
        grad_gate, grad_up = grad_x.chunk(2, -1)
        torch.mul(F.silu(gate), grads[0], out=grad_up)
        torch.ops.aten.silu_backward(grads[0] * up, gate, grad_input=grad_gate)
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
