"""Layer backends: which modules a decoder layer is made of. Families never mention one.

``local`` is megatron-core's plain modules, the reference; ``torch`` replaces everything between the matrix products by
our own functions over PyTorch's kernels; ``transformer_engine`` (model/engine.py) is chosen when it imports and a GPU
is there.
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

from megatron_steel.config.check_engine import engine_only
from megatron_steel.config.schema import Config, ModelConfig
from megatron_steel.model.attention import TorchDotProductAttention, TorchSelfAttention
from megatron_steel.model.layer import get_residual_add
from megatron_steel.model.mlp import TorchMLP
from megatron_steel.model.norms import LayerNorm, RMSNorm, ZeroCentredRMSNorm
from megatron_steel.runtime import device

Uses = Callable[[ModelConfig], Any]
# What only some backends have: how an error names it, whether a model has it, the backends that do.
SPECIAL: tuple[tuple[str, Uses, tuple[str, ...]], ...] = (
    ("--multi-latent-attention", lambda size: size.multi_latent_attention, ("torch", "local")),
    ("--position-embedding-type alibi", lambda size: size.position_embedding_type == "alibi", ("torch",)),
    ("--apply-layernorm-1p", lambda size: size.apply_layernorm_1p, ("torch", "transformer_engine")),
    ("--rotary-base-local", lambda size: size.rotary_base_local is not None, ("torch",)),
    ("--attn-logit-softcapping", lambda size: size.attn_logit_softcapping is not None, ("torch",)),
)


class TorchSpecProvider(LocalSpecProvider):
    """megatron-core's parallel linear layers with PyTorch's attention kernels and our norms."""

    def __init__(self, zero_centred: bool = False) -> None:
        """``zero_centred``: the weights of RMSNorm are stored less 1."""
        self.rms_norm: type = ZeroCentredRMSNorm if zero_centred else RMSNorm

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False) -> type:
        """Our own, which may sit in a sequence-parallel region."""
        return self.rms_norm if rms_norm else LayerNorm

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
    if provider.fuse_layernorm_and_linear():
        from megatron_steel.model.engine import EngineSelfAttention

        # Around Transformer Engine's linear layers too, our activation and residual are fewer passes than
        # megatron-core's, and need no compiler.
        return LayerParts(self_attention=EngineSelfAttention, mlp=TorchMLP, residual=get_residual_add)
    return LayerParts()


def have_transformer_engine() -> bool:
    """Whether Transformer Engine can be imported; a broken install raises its own error when it is asked for."""
    return importlib.util.find_spec("transformer_engine") is not None


def lacking(backend: str, size: ModelConfig) -> list[str]:
    """What a model has and a backend has not."""
    return [what for what, uses, backends in SPECIAL if backend not in backends and uses(size)]


def choose_backend(name: str, size: ModelConfig) -> tuple[str, str]:
    """Resolve ``auto`` and check a wish against the machine and the model: (backend, one line saying why).

    Raises ``ValueError`` when ``transformer_engine`` is asked for and cannot run here, or when the backend that is
    asked for lacks something the model has.
    """
    gpu, engine = device.has_gpu(), have_transformer_engine()
    if name == "transformer_engine" and not (gpu and engine):
        missing = "no GPU is visible" if not gpu else "the package transformer_engine is not installed"
        raise ValueError(f"--transformer-impl transformer_engine: {missing}; use --transformer-impl torch")
    if name != "auto":
        if missing := lacking(name, size):
            raise ValueError(
                f"--transformer-impl {name} has no {' or '.join(missing)}, which this model needs; "
                f"use --transformer-impl torch"
            )
        return name, "asked for"
    if gpu and engine:
        if missing := lacking("transformer_engine", size):
            return "torch", f"Transformer Engine has no {' or '.join(missing)}"
        return "transformer_engine", "Transformer Engine and a GPU are there"
    return "torch", "no GPU" if not gpu else "Transformer Engine is not installed"


def check_engine_only(config: Config, backend: str, reason: str) -> None:
    """``ValueError`` when only Transformer Engine has what is asked for, and a run takes another backend."""
    for flag, given in engine_only(config):
        if given and backend != "transformer_engine":
            raise ValueError(f"{flag} needs Transformer Engine, this run takes {backend} layers: {reason}")


def build_provider(name: str, size: ModelConfig, grouped: bool = False) -> BackendSpecProvider:
    """The spec provider of a resolved backend name for a model; ``grouped``: experts in one product."""
    if name == "transformer_engine":
        from megatron_steel.model.engine import EngineSpecProvider

        return EngineSpecProvider(grouped)
    return TorchSpecProvider(size.apply_layernorm_1p) if name == "torch" else LocalSpecProvider()
