"""Layer backends: which modules a decoder layer is made of. Families never mention one.

``local`` is megatron-core's plain modules, the reference; ``torch`` replaces everything between the matrix products by
our own functions over PyTorch's kernels; ``transformer_engine`` is chosen when it imports and a GPU is there.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import BackendSpecProvider, LocalSpecProvider
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.mlp import MLP

from megatron_steel.model.modules import (
    RMSNorm,
    TorchDotProductAttention,
    TorchMLP,
    TorchSelfAttention,
    get_residual_add,
)
from megatron_steel.runtime import device


class TorchSpecProvider(LocalSpecProvider):
    """megatron-core's parallel linear layers with PyTorch's attention kernels and our RMSNorm."""

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False) -> type:
        """RMSNorm everywhere; every family here uses it."""
        return RMSNorm

    def core_attention(self) -> type:
        """Attention over ``scaled_dot_product_attention``."""
        return TorchDotProductAttention


@dataclass(frozen=True, slots=True)
class LayerParts:
    """The parts of a decoder layer that megatron-core's providers do not choose; its own by default."""

    self_attention: type = SelfAttention
    mlp: type = MLP
    residual: Callable[..., Any] = get_bias_dropout_add


def layer_parts(provider: BackendSpecProvider) -> LayerParts:
    """The layer parts that go with a provider."""
    if isinstance(provider, TorchSpecProvider):
        return LayerParts(self_attention=TorchSelfAttention, mlp=TorchMLP, residual=get_residual_add)
    return LayerParts()


def have_transformer_engine() -> bool:
    """Whether Transformer Engine can be imported; a broken install raises its own error when it is asked for."""
    return importlib.util.find_spec("transformer_engine") is not None


def choose_backend(name: str) -> tuple[str, str]:
    """Resolve ``auto`` and check a wish against the machine: (backend, one line saying why).

    Raises ``ValueError`` when ``transformer_engine`` is asked for and cannot run here.
    """
    gpu, engine = device.has_gpu(), have_transformer_engine()
    if name == "transformer_engine" and not (gpu and engine):
        missing = "no GPU is visible" if not gpu else "the package transformer_engine is not installed"
        raise ValueError(f"--transformer-impl transformer_engine: {missing}; use --transformer-impl torch")
    if name != "auto":
        return name, "asked for"
    if gpu and engine:
        return "transformer_engine", "Transformer Engine and a GPU are there"
    return "torch", "no GPU" if not gpu else "Transformer Engine is not installed"


def build_provider(name: str) -> BackendSpecProvider:
    """The spec provider of a resolved backend name."""
    if name == "transformer_engine":
        from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

        return TESpecProvider()
    return {"torch": TorchSpecProvider, "local": LocalSpecProvider}[name]()
