"""Weights, gradients and optimizer state divided over the replicas (ZeRO-3), by PyTorch's FSDP2.

Every layer is gathered when it is needed and divided again afterwards (Zhao et al. 2023, arXiv:2304.11277); embedding,
last norm and head form one group that stays whole during a step, because a tied embedding is used at both ends of it.
megatron-core's own wrapper is not used: it takes GPUs only, averages gradients and needs untied embeddings.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from megatron.core.distributed.data_parallel_base import _BaseDataParallel
from megatron.core.distributed.distributed_data_parallel_config import DistributedDataParallelConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from megatron_steel.runtime.world import World


class FullyShardedModel(_BaseDataParallel):
    """A model whose parameters are shards of fp32 weights, computed in another type if one is given."""

    def __init__(
        self, options: TransformerConfig, module: MegatronModule, world: World, compute: torch.dtype | None
    ) -> None:
        """Divide the parameters of ``module``, which are whole on every replica and the same, over the replicas."""
        super().__init__(config=options, module=module)
        self.shard_group = world.data_context_group
        self.ddp_config = DistributedDataParallelConfig(use_distributed_optimizer=False)
        mesh = DeviceMesh.from_group(world.data_context_group, world.device.type)
        policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)
        marks = {name: dict(vars(parameter)) for name, parameter in module.named_parameters()}
        layers = [part for part in module.modules() if isinstance(part, TransformerLayer)]
        for part in [*layers, module]:
            sharded: Any = fully_shard(part, mesh=mesh, mp_policy=policy)
            assert isinstance(sharded, FSDPModule)
            # The loss is divided by the tokens of the whole step already: gradients are summed.
            sharded.set_gradient_divide_factor(1.0)
            sharded.set_force_sum_reduction_for_comms(True)
        # What megatron-core and we have written on parameters stays on the shards.
        for name, parameter in module.named_parameters():
            for key, value in marks[name].items():
                setattr(parameter, key, value)

    def zero_grad_buffer(self) -> None:
        """Forget the gradients of the last step."""
        for parameter in self.module.parameters():
            parameter.grad = None


def local_shard(parameter: Tensor) -> Tensor:
    """This rank's rows of a sharded parameter, in its own memory."""
    assert isinstance(parameter, DTensor)
    return parameter._local_tensor


def held_elements(parameter: Tensor) -> int:
    """Elements of a parameter on this rank."""
    return local_shard(parameter).numel() if isinstance(parameter, DTensor) else parameter.numel()


def like_parameters(module: torch.nn.Module, state: dict[str, Any]) -> dict[str, Any]:
    """A loaded state dictionary with this rank's rows as what they are a part of, where the module is sharded."""
    sharded = {name: parameter for name, parameter in module.named_parameters() if isinstance(parameter, DTensor)}
    return {
        name: DTensor.from_local(value, sharded[name].device_mesh, sharded[name].placements)
        if name in sharded
        else value
        for name, value in state.items()
    }


def is_sharded(modules: Iterable[torch.nn.Module]) -> bool:
    """Whether the chunks of a model are divided over the replicas."""
    return any(isinstance(module, FullyShardedModel) for module in modules)
