"""The output layer with its loss, also without ever having all logits in memory.

Shapes: S sequence, B micro-batch, T = S * B tokens, H hidden, V vocabulary rows on this rank, R tokens of one part.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_steel.config.check_memory import tokens_at_once
from megatron_steel.model.attention_math import softcap
from megatron_steel.model.cross_entropy import cross_entropy, logits_gradient, sums
from megatron_steel.model.kernels.choice import takes_kernel


class ChunkedCrossEntropy(torch.autograd.Function):
    """Loss per token from hidden states, with the logits of a few tokens at a time.

    Backward computes the logits again: a third more work in the output layer, for memory that does not grow with the
    sequence. Both passes do what the layer and :mod:`~megatron_steel.model.cross_entropy` do with all tokens.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: Tensor,
        weight_VH: Tensor,
        labels_T: Tensor,
        chunk: int,
        valid: int,
        cap: float | None,
        group: ProcessGroup | None,
    ) -> Tensor:
        """-> fp32 losses [T]; ``valid`` rows of the whole vocabulary are real, logits go through a softcap ``cap``."""
        parts = [
            sums(capped(hidden @ weight_VH.t(), cap), labels, valid, group)
            for hidden, labels in zip(hidden_TH.split(chunk), labels_T.split(chunk), strict=True)
        ]
        target_T1, total_T1, peak_T1 = (torch.cat(column) for column in zip(*parts, strict=True))
        ctx.save_for_backward(hidden_TH, weight_VH, labels_T, total_T1, peak_T1)
        ctx.chunk, ctx.valid, ctx.cap, ctx.group = chunk, valid, cap, group
        return (total_T1.log() - target_T1).squeeze(-1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None, None, None]:
        """Gradients of hidden states and of the weight, which is summed in fp32 over the parts."""
        # That module needs this one.
        from megatron_steel.model.weight_gradients import add_weight_gradient

        hidden_TH, weight_VH, labels_T, total_T1, peak_T1 = ctx.saved_tensors
        grad_hidden_TH = torch.empty_like(hidden_TH)
        grad_weight_VH = torch.zeros_like(weight_VH, dtype=torch.float32)
        tensors = (hidden_TH, labels_T, total_T1, peak_T1, grads[0].unsqueeze(-1), grad_hidden_TH)
        for hidden, labels, total, peak, grad, grad_hidden in zip(*(x.split(ctx.chunk) for x in tensors), strict=True):
            logits_RV = capped(hidden @ weight_VH.t(), ctx.cap)
            slope_RV = None if ctx.cap is None else 1 - (logits_RV / ctx.cap).square()
            grad_RV = logits_gradient(logits_RV, labels, total, peak, grad, ctx.valid, ctx.group).to(weight_VH.dtype)
            if slope_RV is not None:
                grad_RV.mul_(slope_RV)
            torch.mm(grad_RV, weight_VH, out=grad_hidden)
            add_weight_gradient(hidden, grad_RV, grad_weight_VH)
            # Or two parts would exist while the next one is made.
            del logits_RV, slope_RV, grad_RV
        return grad_hidden_TH, grad_weight_VH.to(weight_VH.dtype), None, None, None, None, None


def capped(logits: Tensor, cap: float | None) -> Tensor:
    """Logits through a softcap, if there is one (Gemma 2)."""
    return logits if cap is None else softcap(logits, cap)


class OutputLayer(ColumnParallelLinear):
    """megatron-core's output layer, which also computes the loss, so that it need not have all logits at once."""

    valid_vocab: int
    """Rows of the whole vocabulary without padding."""
    cap: float | None
    """Softcap of the logits, for the loss and for generation."""
    chunk: int | None
    """``--cross-entropy-chunk-size``."""
    temperature: float
    """Divides the logits in the loss."""

    def forward(
        self,
        input_: Tensor,
        weight: Tensor | None = None,
        runtime_gather_output: bool | None = None,
        labels_SB: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """input_ [S, B, H] (a part of S under sequence parallelism) -> logits [S, B, V], or losses [S, B]; no bias."""
        if labels_SB is not None:
            if self.temperature != 1:
                assert self.cap is None
                input_ = input_ / self.temperature
            table = self.weight if weight is None else weight
            in_place = table.element_size() if takes_kernel(table) else None
            chunk = tokens_at_once(self.chunk, labels_SB.numel(), table.shape[0], in_place)
            if chunk < labels_SB.numel():
                return self.chunked_loss(input_, table, labels_SB, chunk), None
        logits, bias = super().forward(input_, weight, runtime_gather_output)
        logits = capped(logits, self.cap)
        if labels_SB is None:
            return logits, bias
        return cross_entropy(logits, labels_SB, self.valid_vocab, self.tp_group), None

    def chunked_loss(self, input_: Tensor, weight: Tensor, labels_SB: Tensor, chunk: int) -> Tensor:
        """The losses, ``chunk`` tokens at a time; tensor-parallel ranks sum the gradient of ``input_``."""
        if self.sequence_parallel:
            hidden_SBH = gather_from_sequence_parallel_region(input_, group=self.tp_group)
        else:
            hidden_SBH = copy_to_tensor_model_parallel_region(input_, group=self.tp_group)
        losses_T = ChunkedCrossEntropy.apply(
            hidden_SBH.flatten(0, 1), weight, labels_SB.flatten(), chunk, self.valid_vocab, self.cap, self.tp_group
        )
        return losses_T.view(labels_SB.shape)


def set_output_layer(model: GPTModel, valid_vocab: int, cap: float | None, chunk: int | None) -> None:
    """Make the output layer that megatron-core has built one of ours: parameters, names and hooks stay."""
    layer = model.output_layer
    layer.__class__ = OutputLayer
    layer.valid_vocab, layer.cap, layer.chunk, layer.temperature = valid_vocab, cap, chunk, 1.0
