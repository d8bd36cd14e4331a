"""RMSNorm over all heads of a projection at once (OLMo2), which are spread over tensor-parallel ranks.

Shapes: S sequence, B micro-batch, N heads of this rank, D head width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor
from torch.distributed import ProcessGroup


class SumOverRanks(torch.autograd.Function):
    """The sum of what each rank has; every rank goes on with it in its own way, so gradients are summed as well."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        """x of any shape -> the same shape, equal on all ranks."""
        ctx.group = group
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """d(sum over ranks of their losses) / dx."""
        total = grads[0].clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


class ProjectionNorm(torch.nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, mean and weight over all heads; the weight is divided like the heads.

    Products are in fp32 and rounded once, at the end.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, heads: int, eps: float, **_: Any) -> None:
        """``hidden_size`` is the width of one head, ``heads`` their number over all ranks."""
        super().__init__()
        self.group = parallel_state.get_tensor_model_parallel_group()
        self.channels, self.eps = heads * hidden_size, eps
        width = self.channels // self.group.size()
        # No mark for sequence parallelism: between the projections of attention every rank has the whole sequence.
        self.weight = torch.nn.Parameter(torch.ones(width, dtype=config.params_dtype))
        set_tensor_model_parallel_attributes(self.weight, True, 0, 1)

    def forward(self, x_SBND: Tensor) -> Tensor:
        """[S, B, N, D] -> the same shape and dtype."""
        wide = x_SBND.float()
        squares = wide.square().sum((-2, -1), keepdim=True)
        if self.group.size() > 1:
            squares = SumOverRanks.apply(squares, self.group)
        inverse_rms = torch.rsqrt(squares / self.channels + self.eps)
        weight_ND = self.weight.view(x_SBND.shape[-2:])
        return (weight_ND * (wide * inverse_rms)).to(x_SBND.dtype)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """megatron-core's description of the weight for checkpoints: divided along its only axis."""
        state = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(state, prefix, {"weight": 0}, sharded_offsets)
