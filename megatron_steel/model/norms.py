"""Norms of the ``torch`` layer backend. Shapes: H the width of the last axis."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_steel.model.blocks import row_blocks
from megatron_steel.model.kernels.choice import takes_kernel


class RMSNormFunction(torch.autograd.Function):
    """y = x / sqrt(mean(x^2) + eps) * weight with statistics in fp32 (Zhang and Sennrich 2019, eq. 4).

    A weight of the same type as x multiplies the result rounded to it, as in Llama; a wider one multiplies before.
    Saves x and one number per row; PyTorch's composite form on CPU keeps and re-reads several tensors of x's size.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x [..., H], weight [H] -> [..., H] in x's dtype."""
        y, inverse = torch.empty_like(x), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
        for rows, out, inverse_rms in row_blocks(x, y, inverse):
            wide = rows.float()
            torch.rsqrt(torch.linalg.vecdot(wide, wide).div_(x.shape[-1]).add_(eps).unsqueeze(-1), out=inverse_rms)
            if wide is rows:
                torch.mul(wide, inverse_rms, out=out).mul_(weight)
            elif weight.dtype == out.dtype:
                out.copy_(wide * inverse_rms).mul_(weight)
            else:
                out.copy_(wide.mul_(inverse_rms).mul_(weight))
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


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., H], weight [H] -> [..., H] in x's dtype, on what the device of x has for it."""
    if x.is_cpu:
        return RMSNormFunction.apply(x, weight, eps)
    if takes_kernel(x):
        from megatron_steel.model.kernels.rms_norm import RMSNormKernel

        return RMSNormKernel.apply(x, weight, eps)
    if weight.dtype == x.dtype:
        return F.rms_norm(x, (x.shape[-1],), weight, eps)
    return F.rms_norm(x.float(), (x.shape[-1],), weight.float(), eps).to(x.dtype)


def norm_parameter(config: TransformerConfig, width: int, value: float = 1.0) -> torch.nn.Parameter:
    """A weight or bias of a norm; in a model, initialize.py or a checkpoint gives the values."""
    parameter = torch.nn.Parameter(torch.full((width,), value, dtype=config.params_dtype))
    # Each rank sees a part of the sequence: megatron-core sums such gradients over the tensor-parallel ranks.
    parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return parameter


class RMSNorm(torch.nn.Module):
    """RMSNorm that may sit in a sequence-parallel region (megatron-core's wrapper around torch's norm refuses that)."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        """``hidden_size`` is the width of the last axis; other arguments of the seam do not apply to RMSNorm."""
        super().__init__()
        self.eps = eps
        self.weight = norm_parameter(config, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., H] -> [..., H]."""
        return rms_norm(x, self.weight, self.eps)


class ZeroCentredRMSNorm(RMSNorm):
    """RMSNorm whose weight is stored less 1; the product is rounded once, at the end, as Gemma's is."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., H] -> [..., H]."""
        return rms_norm(x, 1.0 + self.weight.float(), self.eps)


class LayerNorm(torch.nn.Module):
    """(x - mean) / sqrt(variance + eps) * weight + bias (Ba et al. 2016); PyTorch's is one function over few passes.

    megatron-core's wrapper around it refuses a sequence-parallel region; this one may sit there.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        """``hidden_size`` is the width of the last axis; other arguments of the seam do not apply here."""
        super().__init__()
        assert not config.layernorm_zero_centered_gamma
        self.eps = eps
        self.weight = norm_parameter(config, hidden_size)
        self.bias = norm_parameter(config, hidden_size, 0.0)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., H] -> [..., H]."""
        return F.layer_norm(x, (x.shape[-1],), self.weight, self.bias, self.eps)
