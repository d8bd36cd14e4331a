"""Cross-entropy over a vocabulary that is split over tensor-parallel ranks and padded to equal shares.

Shapes: S sequence, B micro-batch, V vocabulary rows on this rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_steel.model.blocks import row_blocks
from megatron_steel.model.kernels.choice import takes_kernel


def first_row(rows: int, group: ProcessGroup | None) -> int:
    """Number of the first of this rank's ``rows`` in the whole vocabulary."""
    return rows * group.rank() if group is not None and group.size() > 1 else 0


def widen(logits_SBV: Tensor, valid: int, group: ProcessGroup | None) -> Tensor:
    """The logits in fp32, in their own memory if they are, with minus infinity in the padding rows."""
    exact_SBV = logits_SBV.float() if logits_SBV.dtype != torch.float32 else logits_SBV.detach()
    rows = exact_SBV.shape[-1]
    first = first_row(rows, group)
    if first + rows > valid:
        exact_SBV[..., max(valid - first, 0) :] = -torch.inf
    return exact_SBV


def local_labels(labels_SB: Tensor, rows: int, group: ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """Labels [S, B, 1] counted from this rank's first row, inside its rows; and whether they are its own."""
    local_SB1 = (labels_SB - first_row(rows, group)).unsqueeze(-1)
    return local_SB1.clamp(0, rows - 1), (local_SB1 >= 0) & (local_SB1 < rows)


def exponentials(logits_SBV: Tensor, labels_SB: Tensor, group: ProcessGroup | None) -> tuple[Tensor, Tensor, Tensor]:
    """Overwrite fp32 logits with exp(logit - peak) -> (logit of the label - peak, sum of all, peak), each [S, B, 1].

    The peak is the largest logit, the sum that over the whole vocabulary: collective over ``group``.
    """
    parallel = group is not None and group.size() > 1
    peak_SB1 = logits_SBV.amax(-1, keepdim=True)
    if parallel:
        torch.distributed.all_reduce(peak_SB1, torch.distributed.ReduceOp.MAX, group=group)
    local_SB1, here_SB1 = local_labels(labels_SB, logits_SBV.shape[-1], group)
    target_SB1, total_SB1 = torch.empty_like(peak_SB1), torch.empty_like(peak_SB1)
    for exp, peak, local, target, total in row_blocks(logits_SBV, peak_SB1, local_SB1, target_SB1, total_SB1):
        torch.gather(exp.sub_(peak), -1, local, out=target)
        torch.sum(exp.exp_(), -1, keepdim=True, out=total)
    if parallel:
        target_SB1.masked_fill_(~here_SB1, 0.0)
        both = torch.cat((target_SB1, total_SB1), -1)
        torch.distributed.all_reduce(both, group=group)
        target_SB1, total_SB1 = both.split(1, -1)
    return target_SB1, total_SB1, peak_SB1


def gradient(exp_SBV: Tensor, total_SB1: Tensor, local_SB1: Tensor, here_SB1: Tensor, grad_SB1: Tensor) -> None:
    """Overwrite exp(logit - peak) with the gradient of the logits: (softmax - one_hot(label)) * incoming gradient."""
    exp_SBV.mul_(grad_SB1 / total_SB1)
    exp_SBV.scatter_add_(-1, local_SB1, -grad_SB1 * here_SB1)


def sums(
    logits_SBV: Tensor, labels_SB: Tensor, valid: int, group: ProcessGroup | None
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`exponentials`, on what the device of the logits has for it; fp32 logits may be overwritten."""
    if not takes_kernel(logits_SBV):
        return exponentials(widen(logits_SBV, valid, group), labels_SB, group)
    from megatron_steel.model.kernels.cross_entropy import read_sums

    return read_sums(logits_SBV, labels_SB, valid, first_row(logits_SBV.shape[-1], group), group)


def logits_gradient(
    logits_SBV: Tensor,
    labels_SB: Tensor,
    total_SB1: Tensor,
    peak_SB1: Tensor,
    grad_SB1: Tensor,
    valid: int,
    group: ProcessGroup | None,
) -> Tensor:
    """The gradient of logits from the other two results of :func:`sums`; the logits may be overwritten."""
    rows = logits_SBV.shape[-1]
    if takes_kernel(logits_SBV):
        from megatron_steel.model.kernels.cross_entropy import overwrite

        return overwrite(logits_SBV, labels_SB, total_SB1, peak_SB1, grad_SB1, valid, first_row(rows, group))
    exp_SBV = widen(logits_SBV, valid, group).sub_(peak_SB1).exp_()
    gradient(exp_SBV, total_SB1, *local_labels(labels_SB, rows, group), grad_SB1)
    return exp_SBV


class VocabParallelCrossEntropy(torch.autograd.Function):
    """Loss per token from logits whose last axis is this rank's share of the vocabulary.

    The logits buffer is reused for the softmax and then for its gradient: the output layer, its only producer, does
    not need it for its own backward pass. That keeps one [S, B, V] tensor alive instead of three.
    """

    @staticmethod
    def forward(ctx: Any, logits_SBV: Tensor, labels_SB: Tensor, valid: int, group: ProcessGroup | None) -> Tensor:
        """See :func:`cross_entropy`."""
        exp_SBV = widen(logits_SBV, valid, group)
        target_SB1, total_SB1, _ = exponentials(exp_SBV, labels_SB, group)
        ctx.save_for_backward(exp_SBV, total_SB1, *local_labels(labels_SB, exp_SBV.shape[-1], group))
        ctx.logits_dtype = logits_SBV.dtype
        return (total_SB1.log() - target_SB1).squeeze(-1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        """softmax(logits) - one_hot(label), times the incoming gradient, written over the softmax buffer."""
        exp_SBV, total_SB1, local_SB1, here_SB1 = ctx.saved_tensors
        gradient(exp_SBV, total_SB1, local_SB1, here_SB1, grads[0].unsqueeze(-1))
        return exp_SBV.to(ctx.logits_dtype), None, None, None


class NarrowCrossEntropy(torch.autograd.Function):
    """The same where a kernel reads 16-bit logits as they are: they are overwritten in the backward pass alone.

    No other tensor has a number for each logit.
    """

    @staticmethod
    def forward(ctx: Any, logits_SBV: Tensor, labels_SB: Tensor, valid: int, group: ProcessGroup | None) -> Tensor:
        """See :func:`cross_entropy`."""
        target_SB1, total_SB1, peak_SB1 = sums(logits_SBV, labels_SB, valid, group)
        ctx.save_for_backward(logits_SBV, labels_SB, total_SB1, peak_SB1)
        ctx.valid, ctx.group = valid, group
        return (total_SB1.log() - target_SB1).squeeze(-1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        """softmax(logits) - one_hot(label), times the incoming gradient, written over the logits."""
        return logits_gradient(*ctx.saved_tensors, grads[0].unsqueeze(-1), ctx.valid, ctx.group), None, None, None


def cross_entropy(logits_SBV: Tensor, labels_SB: Tensor, valid_vocab: int, group: ProcessGroup | None) -> Tensor:
    """-log softmax(logits)[label] for each token, in fp32.

    Args:
        logits_SBV: this rank's share of the logits; **overwritten**.
        labels_SB: global token ids.
        valid_vocab: number of real rows of the whole vocabulary; the padding rows after them get probability 0, so
            the loss does not depend on how far a layout pads.
        group: ranks that share the vocabulary, or None.

    Returns: fp32 losses [S, B].
    """
    function = NarrowCrossEntropy if takes_kernel(logits_SBV) else VocabParallelCrossEntropy
    return function.apply(logits_SBV, labels_SB, valid_vocab, group)
