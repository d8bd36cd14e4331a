"""Mixture of experts: its settings, its layer specification and its router.

Shapes: T tokens of a micro-batch on this rank, E experts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec_for_backend
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_steel.config.schema import ModelConfig

EXPERTS = re.compile(r"\.local_experts\.|\.mlp\.experts\.linear_fc[12]\.(weight|bias)\d+$")
"""In names of experts' weights, one after another or grouped; a soft mixture's experts are one weight, and dense."""


def expert_options(size: ModelConfig, grouped: bool = False) -> dict[str, Any]:
    """Fields of megatron-core's configuration for a model with experts; empty for one without.

    Experts run one after another (megatron-core's ``SequentialMLP``), the same on every backend, or ``grouped``: all of
    a layer in one call of Transformer Engine. Checkpoints of both are the same.
    """
    if size.num_experts is None:
        return {}
    return {
        "num_moe_experts": size.num_experts,
        # A list, even one of ones, makes megatron-core name every layer of a checkpoint by itself.
        "moe_layer_freq": size.moe_layer_freq or 1,
        "moe_ffn_hidden_size": size.moe_ffn_hidden_size or size.ffn_hidden_size,
        "moe_shared_expert_intermediate_size": size.moe_shared_expert_intermediate_size,
        "moe_router_topk": size.moe_router_topk,
        "moe_router_score_function": size.moe_router_score_function,
        "moe_router_pre_softmax": size.moe_router_pre_softmax,
        "moe_router_topk_scaling_factor": size.moe_router_topk_scaling_factor,
        "moe_router_enable_expert_bias": size.moe_router_enable_expert_bias,
        "moe_router_num_groups": size.moe_router_num_groups,
        "moe_router_group_topk": size.moe_router_group_topk,
        # In bf16, logits of two experts are often equal, and which one is taken would depend on the kernel.
        "moe_router_dtype": "fp32",
        "moe_aux_loss_coeff": size.moe_aux_loss_coeff,
        "moe_router_load_balancing_type": "aux_loss" if size.moe_aux_loss_coeff else "none",
        "moe_token_dispatcher_type": size.moe_token_dispatcher_type,
        "moe_grouped_gemm": grouped,
    }


def expert_spec(provider: BackendSpecProvider, size: ModelConfig) -> ModuleSpec:
    """The feed-forward of a layer with experts, from a backend's linear layers; its norm is a module of its own."""
    grouped: bool = getattr(provider, "grouped", False)
    spec = get_moe_module_spec_for_backend(provider, num_experts=size.num_experts, moe_grouped_gemm=grouped)
    spec.submodules.router = Router
    return spec


def mark_experts(model: torch.nn.Module) -> None:
    """Tell data parallelism which weights of ``model`` are experts, whose copies are on other ranks than dense ones.

    megatron-core 0.16.1 does so where experts are spread over ranks, but not where only an expert is shared by other
    ranks than a dense layer: gradients of its copies would then not be summed. Where the ranks are the same it does not
    either, and the optimizer would have one part instead of two: such a checkpoint would not load on other layouts.
    """
    for name, parameter in model.named_parameters():
        if EXPERTS.search(name):
            parameter.allreduce = False
            # Transformer Engine, which knows nothing of how experts are shared out, says the rows for all of them.
            if getattr(parameter, "tensor_model_parallel", False):
                parameter.partition_dim = int(".linear_fc2.weight" in name)


@dataclass(frozen=True)
class GroupChoice:
    """Choose groups of experts by the sum of their ``best`` scores, then experts inside the chosen groups.

    DeepSeek-V2 takes the best one (arXiv:2405.04434, section 2.2.2), V3 the best two (arXiv:2412.19437, section
    2.1.2); megatron-core as many as each chosen group would have experts.
    """

    best: int

    def get_replay_topk(
        self, scores: Tensor, topk: int, num_groups: int, group_topk: int, usual: Callable[..., Any]
    ) -> tuple[Tensor, Tensor]:
        """scores [T, E] -> scores and numbers of the chosen experts, both [T, topk]."""
        grouped = scores.unflatten(1, (num_groups, -1))
        chosen = grouped.topk(self.best, -1).values.sum(-1).topk(group_topk, -1).indices
        closed = torch.ones(grouped.shape[:2], dtype=torch.bool, device=scores.device).scatter_(1, chosen, False)
        return torch.topk(grouped.masked_fill(closed.unsqueeze(-1), -torch.inf).flatten(1), topk, 1)


class Router(TopKRouter):
    """megatron-core's choice of experts; the loss that balances them is weighted as our loss is, exactly.

    The loss of a micro-batch is that of Switch (Fedus et al. 2021, eq. 4 to 6, for several experts per token): E times
    the sum over experts of the share of assignments it gets times its mean probability. What is trained on is the
    mean over all micro-batches and replicas of a step, summed over layers, times ``moe_aux_loss_coeff``.
    """

    share: float = 1.0
    """Of this micro-batch in the step, see :func:`prepare_balance`."""
    balance: Tensor | None = None
    """Balance loss collected since it was last taken, without the coefficient."""

    def __init__(self, config: TransformerConfig, pg_collection: ProcessGroupCollection | None = None) -> None:
        """Arguments are those of megatron-core's class."""
        super().__init__(config, pg_collection)
        if config.moe_router_group_topk:
            # The one place where megatron-core asks somebody else for the choice.
            self.router_replay = GroupChoice(best=2 if config.moe_router_score_function == "sigmoid" else 1)

    def attach_and_log_load_balancing_loss(
        self, activation: Tensor, aux_loss_coeff: float, aux_loss: Tensor, *names: Any, **rest: Any
    ) -> Tensor:
        """``activation`` as it is, with the gradient of the loss behind it.

        megatron-core would scale by tokens here and divide by the number of tokens after the step, which it does not
        know in this engine; it would also keep the loss in a global table.
        """
        part = aux_loss * self.share
        collected = part.detach().double() / aux_loss_coeff
        self.balance = collected if self.balance is None else self.balance + collected
        return MoEAuxLossAutoScaler.apply(activation, part)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        """Convert the module, but leave what balances experts in fp32: a bias of small steps, and counts of tokens."""
        exact = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, buffer in exact.items():
            converted = self._buffers[name]
            assert converted is not None
            self._buffers[name] = buffer.to(converted.device)
        return self


def routers(modules: Iterable[torch.nn.Module]) -> Iterator[Router]:
    """All routers inside ``modules``."""
    return (part for module in modules for part in module.modules() if isinstance(part, Router))


def prepare_balance(modules: Iterable[torch.nn.Module], micro_batches: int) -> None:
    """Tell routers how many micro-batches the coming step has on each replica."""
    share = 1.0 / (micro_batches * parallel_state.get_data_parallel_world_size())
    for router in routers(modules):
        router.share = share


def take_balance(modules: Iterable[torch.nn.Module], device: torch.device) -> Tensor:
    """This rank's part of the balance losses since the last call, a float64 number; the sum over ranks is the whole.

    Each tensor-parallel rank sees its own part of the sequence, and each stage its own layers.
    """
    total = torch.zeros((), dtype=torch.float64, device=device)
    for router in routers(modules):
        if router.balance is not None:
            total += router.balance
        router.balance = None
    return total
