"""AdamW over the shards that a rank holds of a fully sharded model."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.optimizer import OptimizerConfig
from megatron.core.optimizer.optimizer import ChainedOptimizer, FP32Optimizer
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_steel.model.fully_sharded import local_shard


class FullyShardedOptimizer(FP32Optimizer):
    """megatron-core's fp32 optimizer for parameters that are rows of larger ones.

    torch's AdamW gets the rows as ordinary tensors, so that its state is one too and is saved like the weights.
    """

    def __init__(self, whole: FP32Optimizer, config: OptimizerConfig, group: ProcessGroup) -> None:
        """Take over the parameter groups of ``whole``; ``group`` are the ranks that share each parameter."""
        self.sharded: list[Tensor] = []
        groups: list[dict[str, Any]] = []
        for old in whole.optimizer.param_groups:
            self.sharded += old["params"]
            groups.append({**old, "params": [local_shard(parameter) for parameter in old["params"]]})
        betas = (config.adam_beta1, config.adam_beta2)
        super().__init__(torch.optim.AdamW(groups, config.lr, betas, config.adam_eps), config, whole.init_state_fn)
        self.grad_stats_parallel_group = group
        self.tp_group = whole.tp_group

    @torch.no_grad()
    def prepare_grads(self) -> bool:
        """Hand each shard its summed gradient; nothing is looked for in it here."""
        for parameter in self.sharded:
            local_shard(parameter).grad = None if parameter.grad is None else local_shard(parameter.grad)
        return False

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients of the shards."""
        for parameter in self.sharded:
            parameter.grad = local_shard(parameter).grad = None


def shard_optimizer(optimizer: ChainedOptimizer, config: OptimizerConfig, group: ProcessGroup) -> ChainedOptimizer:
    """The optimizer of a fully sharded model, from the one megatron-core makes of its parameters."""
    (whole,) = optimizer.chained_optimizers
    return ChainedOptimizer([FullyShardedOptimizer(whole, config, group)])
