"""Self-attention of the ``torch`` layer backend: rotation in one pass, attention on PyTorch's fused kernels.

Each of our functions is one autograd function over few passes: PyTorch without a compiler runs one pass over memory per
operation, and on a CPU those passes are what is left to save next to the matrix products.

Shapes: S sequence, B micro-batch, N query heads, G key/value heads, D head width, H hidden, T tokens of packed
documents, R rotated channels of a head (all per rank).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import _yarn_get_concentration_factor_from_config
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor

from megatron_steel.model.blocks import row_blocks
from megatron_steel.model.context import context_attention, packed_context_attention
from megatron_steel.model.kernels.choice import takes_kernel
from megatron_steel.model.packed import packed_attention
from megatron_steel.model.rope import table_of
from megatron_steel.model.window import causal_attention


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
        assert config.softmax_type == "vanilla"
        assert not config.apply_query_key_layer_scaling
        self.attn_mask_type = attn_mask_type
        windowed = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        assert not windowed or config.window_size[1] == 0
        self.window = config.window_size[0] + 1 if windowed else None
        self.softmax_scale = softmax_scale
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.context_group = pg_collection.cp if pg_collection and config.context_parallel_size > 1 else None
        assert (self.context_group is not None) == (config.context_parallel_size > 1)
        self.attend: Callable[..., Tensor] = causal_attention

    def over_ranks(self, query: Tensor, key: Tensor, value: Tensor, packed: PackedSeqParams | None) -> Tensor:
        """Attention of this rank's chunks of a sample to all of it; shapes as in :meth:`forward`, or [T, 1, ...]."""
        assert self.context_group is not None
        dropout, scale, window = self.dropout if self.training else 0.0, self.softmax_scale, self.window
        attend = functools.partial(self.attend, window=window, dropout=dropout, scale=scale)
        if packed is None:
            return context_attention(query, key, value, self.context_group, attend).flatten(2).contiguous()
        joined = (x.flatten(0, -3) for x in (query, key, value))
        out_TND = packed_context_attention(*joined, packed, self.context_group, attend)
        return out_TND.view(query.shape).flatten(-2)

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

        The mask type decides: causal, or none for one new token against a cache. ``attention_mask`` bool [B, S'] is for
        texts of different lengths: keys before a row's beginning, which nobody sees. With ``packed_seq_params`` the
        tensors hold the tokens of several documents, [T, N, D] and [T, G, D] -> [T, N * D], and each attends within
        its own.
        """
        assert attention_bias is None
        if attention_mask is not None:
            # A dense mask would be taken for another one.
            assert attention_mask.dim() == 2 and self.context_group is None and packed_seq_params is None
        if self.context_group is not None:
            return self.over_ranks(query, key, value, packed_seq_params)
        dropout = self.dropout if self.training else 0.0
        if packed_seq_params is not None:
            out_TND = packed_attention(query, key, value, packed_seq_params, dropout, self.softmax_scale, self.window)
            return out_TND.flatten(1)
        causal = (attn_mask_type or self.attn_mask_type) == AttnMaskType.causal
        if not causal:
            return self.newest(query, key, value, attention_mask)
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        out_BNSD = causal_attention(query, key, value, self.window, dropout, self.softmax_scale, attention_mask)
        return out_BNSD.permute(2, 0, 1, 3).flatten(2).contiguous()

    def newest(self, query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None) -> Tensor:
        """One token after those of a cache: query [1, B, N, D], key and value [K, B, G, D] -> [1, B, N * D].

        The query heads of a group lie where the kernel has positions: each key is read once for all of them.
        """
        assert query.shape[0] == 1
        last = slice(0 if self.window is None else -self.window, None)
        out_BGnD = F.scaled_dot_product_attention(
            query.squeeze(0).unflatten(1, (key.shape[2], -1)),
            *(x[last].permute(1, 2, 0, 3) for x in (key, value)),
            attn_mask=None if padding is None else ~padding[:, None, None, last],
            scale=self.softmax_scale,
        )
        return out_BGnD.flatten(1).unsqueeze(0)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
    """out = (x1 cos - x2 sin, x2 cos + x1 sin) for the halves x1, x2 of the last axis (Su et al. 2021, eq. 34).

    cos: [..., R], sin: [..., R / 2], both broadcast against x; channels behind the first R stay as they are.
    """
    turned = cos.shape[-1]
    if turned < x.shape[-1]:
        out[..., turned:].copy_(x[..., turned:])
        x, out = x[..., :turned], out[..., :turned]
    half = turned // 2
    torch.mul(x, cos, out=out)
    out[..., :half].addcmul_(x[..., half:], sin, value=-1.0)
    out[..., half:].addcmul_(x[..., :half], sin)


def cos_sin(angles: Tensor, dtype: torch.dtype, factor: float = 1.0) -> tuple[Tensor, Tensor]:
    """cos [S, 1, 1, 1, R] and sin [S, 1, 1, 1, R / 2] of megatron-core's angles [S, 1, 1, R] (equal halves)."""
    angles = angles.unsqueeze(2)
    cos, sin = angles.cos(), angles[..., : angles.shape[-1] // 2].sin()
    return (cos * factor).to(dtype), (sin * factor).to(dtype)


# Remembered by the identity of the angles: megatron-core hands the same tensor to every layer and step. Those of packed
# documents are made for one micro-batch and go to its layers one after another.
rotary_table = functools.lru_cache(maxsize=8)(cos_sin)
packed_rotary_table = functools.lru_cache(maxsize=1)(cos_sin)


class SplitAndRotate(torch.autograd.Function):
    """Take queries, keys and values apart and turn the first two by their positions.

    One read of the projection forward; backward writes its gradient in place instead of joining three tensors.
    """

    @staticmethod
    def forward(
        ctx: Any, mixed: Tensor, cos: Tensor, sin: Tensor, groups: int, width: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """mixed [S, B, G * (N / G + 2) * D] -> query [S, B, N, D], key and value [S, B, G, D].

        cos [S, 1, 1, 1, R], sin [S, 1, 1, 1, R / 2]. A group's columns are its queries, its key, its value.
        """
        mixed_SBGND = mixed.view(*mixed.shape[:2], groups, -1, width)
        # One sample's positions follow each other in memory: attention over rows B * N * D apart is a fifth slower on a
        # CPU, where such a distance (a power of two, as a rule) maps them all to the same few lines of the cache.
        sequence, batch, _, per_group, _ = mixed_SBGND.shape
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
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        """The transposed rotation is the rotation by the negative angle, also where both are scaled."""
        query, key, value = grads
        sequence, batch, groups, width = key.shape
        query_SBGND = query.unflatten(2, (groups, -1))
        mixed = query.new_empty(sequence, batch, groups, query_SBGND.shape[3] + 2, width)
        for rows, cos, sin, q, k, v in row_blocks(mixed, ctx.cos, -ctx.sin, query_SBGND, key, value):
            rotate(q, cos, sin, rows[:, :, :, :-2])
            rotate(k.unsqueeze(3), cos, sin, rows[:, :, :, -2:-1])
            rows[:, :, :, -1].copy_(v)
        return mixed.flatten(2), None, None, None, None


def split_and_rotate(mixed: Tensor, cos: Tensor, sin: Tensor, groups: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """:class:`SplitAndRotate`, on what the device of ``mixed`` has for it."""
    if not takes_kernel(mixed):
        return SplitAndRotate.apply(mixed, cos, sin, groups, width)
    from megatron_steel.model.kernels.rotate import SplitAndRotateKernel

    return SplitAndRotateKernel.apply(mixed, cos, sin, groups, width)


class TorchSelfAttention(SelfAttention):
    """megatron-core's self-attention with short ways through it for training and for one token after another.

    Anything special (when training: QK norm, fewer key heads than ranks) takes megatron-core's own way. Parameters and
    checkpoint names are the same.
    """

    def __init__(self, *args: Any, local_rope: bool | None = None, **rest: Any) -> None:
        """``local_rope``: which of two rotary tables is this layer's; None where there is one. The rest: as above."""
        super().__init__(*args, **rest)
        self.local_rope = local_rope

    def is_plain(self, rotary_pos_emb: Tensor | None) -> bool:
        """Whether this layer is projection, rotation of heads or their first channels, attention, projection."""
        config = self.config
        return (
            isinstance(rotary_pos_emb, Tensor)
            and rotary_pos_emb.shape[-1] <= self.hidden_size_per_attention_head
            and isinstance(self.q_layernorm, IdentityOp | None)
            and isinstance(self.k_layernorm, IdentityOp | None)
            and isinstance(self.core_attention, TorchDotProductAttention)
            and config.num_query_groups >= self.world_size
            and not (config.rotary_interleaved or config.attention_output_gate)
            and not (config.no_rope_freq and config.no_rope_freq[self.layer_number - 1])
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
        if self.local_rope is not None and rotary_pos_emb is not None:
            rotary_pos_emb = table_of(rotary_pos_emb, self.local_rope)
        if inference_context is not None and self.takes_cache():
            return self.go_on(hidden_states, attention_mask, rotary_pos_emb, inference_context)
        if inference_context is not None or not self.is_plain(rotary_pos_emb):
            if packed_seq_params is not None and self.config.context_parallel_size > 1:
                # It would cut the angles of packed documents by itself, in another way; these are cut already.
                packed_seq_params = replace(packed_seq_params, qkv_format="sbhd")
            return super().forward(
                hidden_states,
                attention_mask,
                rotary_pos_emb=rotary_pos_emb,
                inference_context=inference_context,
                packed_seq_params=packed_seq_params,
                **rest,
            )
        assert rotary_pos_emb is not None
        mixed, _ = self.linear_qkv(hidden_states)
        packed, factor = packed_seq_params is not None, _yarn_get_concentration_factor_from_config(self.config)
        cos, sin = (packed_rotary_table if packed else rotary_table)(rotary_pos_emb, mixed.dtype, factor)
        query, key, value = split_and_rotate(
            mixed, cos, sin, self.num_query_groups_per_partition, self.hidden_size_per_attention_head
        )
        recomputed = self.checkpoint_core_attention and self.training
        attend = self._checkpointed_attention_forward if recomputed else self.core_attention
        if packed:
            parts = (part.squeeze(1) for part in (query, key, value))
            context = attend(*parts, attention_mask, packed_seq_params=packed_seq_params)
            return self.linear_proj(context.unsqueeze(1))
        return self.linear_proj(attend(query, key, value, attention_mask))

    def takes_cache(self) -> bool:
        """Whether the core attention is ours, with nothing between it and the projection."""
        return isinstance(self.core_attention, TorchDotProductAttention) and not self.config.attention_output_gate

    def go_on(
        self, hidden_states: Tensor, padding: Tensor | None, rotary_pos_emb: Tensor | None, cache: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Tokens after those of a ``KeyValueCache``: as :meth:`forward`; ``padding`` bool [B, K] of all tokens so far.

        Keys are kept rotated; megatron-core rotates all of them again for every token.
        """
        begin, factor = cache.sequence_len_offset, _yarn_get_concentration_factor_from_config(self.config)
        rows = slice(begin, begin + hidden_states.shape[0])
        if self.is_plain(rotary_pos_emb):
            mixed, _ = self.linear_qkv(hidden_states)
            cos, sin = rotary_table(rotary_pos_emb, mixed.dtype, factor)
            query, key, value = split_and_rotate(
                mixed, cos[rows], sin[rows], self.num_query_groups_per_partition, self.hidden_size_per_attention_head
            )
        else:
            query, key, value = self.get_query_key_value_tensors(hidden_states, None)
            skips = self.config.no_rope_freq and self.config.no_rope_freq[self.layer_number - 1]
            if rotary_pos_emb is not None and not skips:
                angles = rotary_pos_emb[rows]
                query = apply_rotary_pos_emb(query, angles, self.config, mscale=factor)
                key = apply_rotary_pos_emb(key, angles, self.config, mscale=factor)
        kind = AttnMaskType.causal if begin == 0 else AttnMaskType.no_mask
        keys, values = cache.extend(self.layer_number, key, value)
        return self.linear_proj(self.core_attention(query, keys, values, padding, attn_mask_type=kind))
