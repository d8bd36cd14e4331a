"""Queries, keys and values out of one projection, the first two rotated, in one pass over memory each way.

Shapes: S sequence, B micro-batch, N query heads, G key/value heads, D head width, R rotated channels of a head.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_steel.model.kernels.choice import last_contiguous, warps_of
from megatron_steel.runtime import device

TILE = 4096
"""Elements of a program, about: a few heads of one token."""


@triton.jit
def piece(
    mixed_ptr: tl.tensor,
    query_ptr: tl.tensor,
    key_ptr: tl.tensor,
    value_ptr: tl.tensor,
    column: tl.tensor,
    inside: tl.tensor,
    slot: tl.tensor,
    per_group: tl.constexpr,
    FORWARD: tl.constexpr,
) -> tl.tensor:
    """Channels of some heads where they come from: the projection, or one of the three tensors by the head's slot."""
    if FORWARD:
        return tl.load(mixed_ptr + column, mask=inside, other=0.0)
    query = tl.load(query_ptr + column, mask=inside & (slot < per_group - 2), other=0.0)
    key = tl.load(key_ptr + column, mask=inside & (slot == per_group - 2), other=0.0)
    value = tl.load(value_ptr + column, mask=inside & (slot == per_group - 1), other=0.0)
    return tl.where(slot == per_group - 1, value, tl.where(slot == per_group - 2, key, query))


@triton.jit
def put(
    mixed_ptr: tl.tensor,
    query_ptr: tl.tensor,
    key_ptr: tl.tensor,
    value_ptr: tl.tensor,
    x: tl.tensor,
    column: tl.tensor,
    inside: tl.tensor,
    slot: tl.tensor,
    per_group: tl.constexpr,
    FORWARD: tl.constexpr,
) -> None:
    """The other direction of :func:`piece`."""
    x = x.to(mixed_ptr.dtype.element_ty)
    if FORWARD:
        tl.store(query_ptr + column, x, mask=inside & (slot < per_group - 2))
        tl.store(key_ptr + column, x, mask=inside & (slot == per_group - 2))
        tl.store(value_ptr + column, x, mask=inside & (slot == per_group - 1))
    else:
        tl.store(mixed_ptr + column, x, mask=inside)


@triton.jit
def rotate_kernel(
    mixed_ptr: tl.tensor,
    query_ptr: tl.tensor,
    key_ptr: tl.tensor,
    value_ptr: tl.tensor,
    cos_ptr: tl.tensor,
    sin_ptr: tl.tensor,
    cos_stride: int,
    sin_stride: int,
    query_s: int,
    query_b: int,
    query_h: int,
    key_s: int,
    key_b: int,
    key_h: int,
    value_s: int,
    value_b: int,
    value_h: int,
    batch: int,
    heads: tl.constexpr,
    per_group: tl.constexpr,
    width: tl.constexpr,
    turned: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    FORWARD: tl.constexpr,
) -> None:
    """HEADS heads of one token: from the projection to the three tensors, or their gradients back."""
    token = tl.program_id(0).to(tl.int64)
    sequence, sample = token // batch, token % batch
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    group, slot = head // per_group, head % per_group
    mixed_ptr += (token * heads + head) * width
    query_ptr += sequence * query_s + sample * query_b + (group * (per_group - 2) + slot) * query_h
    key_ptr += sequence * key_s + sample * key_b + group * key_h
    value_ptr += sequence * value_s + sample * value_b + group * value_h

    half: tl.constexpr = turned // 2
    column = tl.arange(0, HALF)[None, :]
    cos = tl.load(cos_ptr + sequence * cos_stride + column, mask=column < half, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + sequence * sin_stride + column, mask=column < half, other=0.0).to(tl.float32)
    if not FORWARD:
        # The transposed rotation is the rotation by the negative angle, also where both are scaled.
        sin = -sin
    inside, other, kept = (head < heads) & (column < half), column + half, slot == per_group - 1
    first = piece(mixed_ptr, query_ptr, key_ptr, value_ptr, column, inside, slot, per_group, FORWARD)
    second = piece(mixed_ptr, query_ptr, key_ptr, value_ptr, other, inside, slot, per_group, FORWARD)
    x, y = first.to(tl.float32), second.to(tl.float32)
    left, right = tl.where(kept, x, x * cos - y * sin), tl.where(kept, y, y * cos + x * sin)
    put(mixed_ptr, query_ptr, key_ptr, value_ptr, left, column, inside, slot, per_group, FORWARD)
    put(mixed_ptr, query_ptr, key_ptr, value_ptr, right, other, inside, slot, per_group, FORWARD)
    if REST > 0:
        rest = turned + tl.arange(0, REST)[None, :]
        inside = (head < heads) & (rest < width)
        x = piece(mixed_ptr, query_ptr, key_ptr, value_ptr, rest, inside, slot, per_group, FORWARD)
        put(mixed_ptr, query_ptr, key_ptr, value_ptr, x, rest, inside, slot, per_group, FORWARD)


def launch(mixed: Tensor, parts: tuple[Tensor, Tensor, Tensor], cos: Tensor, sin: Tensor, forward: bool) -> None:
    """Run the kernel: mixed [S, B, heads * D] contiguous; query [S, B, N, D], key, value [S, B, G, D] any strides."""
    sequence, batch, groups, width = parts[1].shape
    turned, per_group = cos.shape[-1], parts[0].shape[2] // groups + 2
    block, heads = triton.next_power_of_2(width), groups * per_group
    together = min(triton.next_power_of_2(heads), max(1, TILE // block))
    strides = [stride for part in parts for stride in part.stride()[:3]]
    with device.of(mixed):
        rotate_kernel[(sequence * batch, triton.cdiv(heads, together))](
            mixed, *parts, last_contiguous(cos), last_contiguous(sin), cos.stride(0), sin.stride(0), *strides, batch,
            heads=heads, per_group=per_group, width=width, turned=turned, HEADS=together,
            HALF=triton.next_power_of_2(max(1, turned // 2)),
            REST=triton.next_power_of_2(width - turned) if turned < width else 0,
            FORWARD=forward, num_warps=warps_of(together * block),
        )  # fmt: skip


class SplitAndRotateKernel(torch.autograd.Function):
    """As :class:`~megatron_steel.model.attention.SplitAndRotate`.

    The results lie in memory as [S, B, heads, D]. The attention kernels take any distance between heads and between
    positions, and give their result the layout of the queries: it enters the output projection without a copy.
    """

    @staticmethod
    def forward(
        ctx: Any, mixed: Tensor, cos: Tensor, sin: Tensor, groups: int, width: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """mixed [S, B, G * (N / G + 2) * D] -> query [S, B, N, D], key and value [S, B, G, D].

        cos [S, 1, 1, 1, R], sin [S, 1, 1, 1, R / 2]. A group's columns are its queries, its key, its value.
        """
        sequence, batch, columns = mixed.shape
        heads = columns // width - 2 * groups
        query, key, value = (mixed.new_empty(sequence, batch, count, width) for count in (heads, groups, groups))
        launch(mixed.contiguous(), (query, key, value), cos, sin, forward=True)
        # Not saved as tensors of the graph: the table may have been made in inference mode, which forbids that.
        ctx.cos, ctx.sin = cos, sin
        return query, key, value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        """The gradient of the projection, in one pass."""
        query, key, value = (last_contiguous(grad) for grad in grads)
        sequence, batch, heads, width = query.shape
        mixed = query.new_empty(sequence, batch, (heads + 2 * key.shape[2]) * width)
        launch(mixed, (query, key, value), ctx.cos, ctx.sin, forward=False)
        return mixed, None, None, None, None
