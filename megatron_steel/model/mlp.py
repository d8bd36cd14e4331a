"""Feed-forward of the ``torch`` layer backend: SwiGLU as one autograd function; all others are megatron-core's."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.mlp import MLP
from torch import Tensor
from torch.distributed.tensor import DTensor

from megatron_steel.model.blocks import row_blocks
from megatron_steel.model.kernels.choice import takes_kernel


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


def swiglu(x: Tensor) -> Tensor:
    """x [..., 2 F] -> silu(gate) * up, [..., F], on what the device of x has for it."""
    if not takes_kernel(x):
        return SwiGLUFunction.apply(x)
    from megatron_steel.model.kernels.swiglu import SwiGLUKernel

    return SwiGLUKernel.apply(x)


class TorchMLP(MLP):
    """megatron-core's feed-forward, around :func:`swiglu` where that is its activation."""

    def forward(
        self, hidden_states: Tensor, per_token_scale: Tensor | None = None, **rest: Any
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states [S, B, H] -> the same shape, and the output projection's bias."""
        config = self.config
        gated = config.gated_linear_unit and config.activation_func is F.silu and not config.add_bias_linear
        if per_token_scale is not None or not gated:
            return super().forward(hidden_states, per_token_scale, **rest)
        inner, bias = self.linear_fc1(hidden_states)
        assert bias is None
        return self.linear_fc2(swiglu(inner))

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """megatron-core's, which takes a rank's rows of the first matrix for a half of gate and a half of up.

        In a fully sharded model they are consecutive rows of [gate | up], which is how the whole matrix is saved.
        """
        if not isinstance(self.linear_fc1.weight, DTensor):
            return super().sharded_state_dict(prefix, sharded_offsets, metadata)
        state: dict[str, Any] = {}
        for name in ("linear_fc1", "linear_fc2"):
            part = getattr(self, name)
            state.update(part.sharded_state_dict(f"{prefix}{name}.", sharded_offsets, metadata))
        return state
