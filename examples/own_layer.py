"""A decoder layer of one's own: what the feed-forward says is scaled channel by channel, by factors that are learned.

LayerScale (Touvron et al. 2021, "Going deeper with image transformers", section 2). Factors begin small, so that deep
models begin close to the identity. Train with it, from this repository:

    PYTHONPATH=examples python -m megatron_steel.pretrain --decoder-layer own_layer:scaled_layer ...
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_steel.config.schema import ModelConfig
from megatron_steel.model.spec import choose_layer


class Scaled(MegatronModule):
    """A feed-forward whose output is multiplied by one learned factor per channel."""

    def __init__(self, config: TransformerConfig, inner: ModuleSpec, **rest: Any) -> None:
        super().__init__(config)
        self.inner = build_module(inner, config=config, **rest)
        self.factors = torch.nn.Parameter(torch.empty(config.hidden_size))
        # Parameters are filled by the engine, so that every layout starts from the same model: say with what.
        self.factors.initial_value = 0.1
        # With a sequence that is split over tensor-parallel ranks each sees a part: sum their gradients.
        self.factors.sequence_parallel = config.sequence_parallel

    def forward(self, hidden_SBH: Tensor, **rest: Any) -> tuple[Tensor, Tensor | None]:
        """hidden states [S, B, H] -> (output [S, B, H], bias to add to it)."""
        output_SBH, bias = self.inner(hidden_SBH, **rest)
        return output_SBH * self.factors, None if bias is None else bias * self.factors


def scaled_layer(size: ModelConfig, provider: BackendSpecProvider, layer: int) -> ModuleSpec:
    """The family's own layer, from the backend's modules, with the feed-forward inside :class:`Scaled`."""
    spec = choose_layer(provider, size, layer)
    spec.submodules.mlp = ModuleSpec(module=Scaled, params={"inner": spec.submodules.mlp})
    return spec
