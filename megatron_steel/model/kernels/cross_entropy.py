"""Softmax cross-entropy on logits in their own type: read once forward, read and overwritten once backward.

Shapes: T tokens, V vocabulary rows on this rank.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_steel.model.kernels.choice import rows_of, warps_of
from megatron_steel.runtime import device

COLUMNS = 4096
"""Logits of a row that a program holds at once, at most."""


@triton.jit
def forward_kernel(
    logits_ptr: tl.tensor,
    label_ptr: tl.tensor,
    target_ptr: tl.tensor,
    total_ptr: tl.tensor,
    peak_ptr: tl.tensor,
    stride: int,
    valid: int,
    first: int,
    BLOCK: tl.constexpr,
) -> None:
    """Of one token: the label's logit (0 if it is another rank's), the sum of exp(logit - peak), the peak.

    Each lane has a peak and a sum of its own, rescaled when the peak rises (Milakov and Gimelshein 2018,
    arXiv:1805.02867, algorithm 3), so that only the end needs all of them.
    """
    token = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + token * stride
    peak = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, valid, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        x = tl.load(row_ptr + column, mask=column < valid, other=float("-inf")).to(tl.float32)
        # One exponential for either case; equal ones, also two of minus infinity, have no difference to take.
        small = tl.where(x == peak, 1.0, tl.exp(-tl.abs(x - peak)))
        total = tl.where(x > peak, total * small + 1.0, total + small)
        peak = tl.maximum(peak, x)
    highest = tl.max(peak, 0)
    total = tl.where(peak == float("-inf"), 0.0, total * tl.exp(peak - highest))
    label = tl.load(label_ptr + token) - first
    target = tl.load(row_ptr + label, mask=(label >= 0) & (label < valid), other=0.0).to(tl.float32)
    tl.store(target_ptr + token, target)
    tl.store(total_ptr + token, tl.sum(total, 0))
    tl.store(peak_ptr + token, highest)


@triton.jit
def backward_kernel(
    logits_ptr: tl.tensor,
    label_ptr: tl.tensor,
    total_ptr: tl.tensor,
    peak_ptr: tl.tensor,
    grad_ptr: tl.tensor,
    stride: int,
    width: int,
    valid: int,
    first: int,
    BLOCK: tl.constexpr,
) -> None:
    """BLOCK columns of one token: (softmax - one_hot(label)) * incoming gradient, over the logits; padding gets 0."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at_ptr = logits_ptr + token * stride + column
    x = tl.load(at_ptr, mask=column < valid, other=float("-inf")).to(tl.float32)
    label, grad = tl.load(label_ptr + token) - first, tl.load(grad_ptr + token)
    share = tl.exp(x - tl.load(peak_ptr + token)) / tl.load(total_ptr + token)
    out = (share - tl.where(column == label, 1.0, 0.0)) * grad
    tl.store(at_ptr, out.to(logits_ptr.dtype.element_ty), mask=column < width)


def own_rows(width: int, valid: int, first: int) -> int:
    """Of ``width`` vocabulary rows from number ``first`` on, those that are no padding."""
    return min(max(valid - first, 0), width)


def local_sums(logits_TV: Tensor, labels_T: Tensor, valid: int, first: int) -> tuple[Tensor, Tensor, Tensor]:
    """Over this rank's share: (logit of the label or 0, sum of exp(logit - peak), peak), each fp32 [T]."""
    logits_TV, labels_T = rows_of(logits_TV), labels_T.reshape(-1).contiguous()
    rows, width = logits_TV.shape
    target, total, peak = torch.empty(3, rows, dtype=torch.float32, device=logits_TV.device)
    block = min(triton.next_power_of_2(width), COLUMNS)
    with device.of(logits_TV):
        forward_kernel[(rows,)](
            logits_TV, labels_T, target, total, peak, logits_TV.stride(0), own_rows(width, valid, first), first,
            BLOCK=block, num_warps=warps_of(block),
        )  # fmt: skip
    return target, total, peak


def read_sums(
    logits_SBV: Tensor, labels_SB: Tensor, valid: int, first: int, group: ProcessGroup | None
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``exponentials`` of model/cross_entropy.py, for logits of any type, which stay as they are.

    -> (logit of the label - peak, sum of exp(logit - peak), peak), fp32 [S, B, 1]; collective over ``group``.
    """
    shape = (*labels_SB.shape, 1)
    target, total, peak = (x.view(shape) for x in local_sums(logits_SBV, labels_SB, valid, first))
    if group is None or group.size() == 1:
        return target - peak, total, peak
    highest = peak.clone()
    torch.distributed.all_reduce(highest, torch.distributed.ReduceOp.MAX, group=group)
    both = torch.cat((target, total * (peak - highest).exp()), -1)
    torch.distributed.all_reduce(both, group=group)
    target, total = both.split(1, -1)
    return target - highest, total, highest


def overwrite(
    logits_SBV: Tensor, labels_SB: Tensor, total_SB1: Tensor, peak_SB1: Tensor, grad_SB1: Tensor, valid: int, first: int
) -> Tensor:
    """The gradient of the logits over the logits, in their type; returns it."""
    logits_TV = rows_of(logits_SBV)
    labels_T, total_T, peak_T, grad_T = (
        x.reshape(-1).contiguous() for x in (labels_SB, total_SB1, peak_SB1, grad_SB1.float())
    )
    rows, width = logits_TV.shape
    block = min(triton.next_power_of_2(width), COLUMNS)
    with device.of(logits_TV):
        backward_kernel[(rows, triton.cdiv(width, block))](
            logits_TV, labels_T, total_T, peak_T, grad_T, logits_TV.stride(0), width,
            own_rows(width, valid, first), first, BLOCK=block, num_warps=warps_of(block),
        )  # fmt: skip
    return logits_TV.view(logits_SBV.shape)
