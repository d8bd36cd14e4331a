"""The decoder layers of a model, each from its number: which attention, which feed-forward, which norms.

Backends that fuse the norm into the following linear layer have no separate one; checkpoints use the fused names for
every backend (``sharded_state_dict_keys_map``), so they are interchangeable. ``layer`` counts from 0 over the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron.core.models.backends import BackendSpecProvider
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron_steel.config.families.steel import is_soft
from megatron_steel.config.family import group_count, has_experts
from megatron_steel.config.schema import ModelConfig
from megatron_steel.model.alibi import DistanceAttention
from megatron_steel.model.attention_math import SoftcapAttention
from megatron_steel.model.backends import layer_parts
from megatron_steel.model.layer import DecoderLayer, DecoderLayerSubmodules
from megatron_steel.model.mla import LATENT_NAMES, latent_attention
from megatron_steel.model.moe import expert_spec
from megatron_steel.model.own_layer import load_layer_function
from megatron_steel.model.projection_norm import ProjectionNorm
from megatron_steel.model.steel.senet import DoubleSwiGLU
from megatron_steel.model.steel.soft_mixture import SoftMixture


def layer_spec(provider: BackendSpecProvider, size: ModelConfig, layers: Sequence[int]) -> TransformerBlockSubmodules:
    """These decoder layers and the final norm, built from a backend's modules."""
    if size.decoder_layer is not None:
        own = load_layer_function(size.decoder_layer)
        specs = [own(size, provider, layer) for layer in layers]
    else:
        specs = [choose_layer(provider, size, layer) for layer in layers]
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=norm(provider, size))


def norm(provider: BackendSpecProvider, size: ModelConfig, **more: bool) -> type:
    """The norm of the model; ``for_qk=True`` for one on heads."""
    return provider.layer_norm(rms_norm=size.normalization == "RMSNorm", **more)


def fuses_norms(provider: BackendSpecProvider, size: ModelConfig) -> bool:
    """Whether the norms before attention and feed-forward belong to the linear layers behind them."""
    return provider.fuse_layernorm_and_linear() and size.norm_placement != "post"


def first_linear(provider: BackendSpecProvider, size: ModelConfig) -> type | None:
    """The linear layer behind the norm of a branch, with that norm where the backend fuses it."""
    if fuses_norms(provider, size):
        return provider.column_parallel_layer_norm_linear()
    return provider.column_parallel_linear()


def head_norms(provider: BackendSpecProvider, size: ModelConfig) -> tuple[Any, Any]:
    """The norms of queries and of keys: on each head, on all heads together, or none."""
    if size.qk_layernorm_full:
        query_norm, key_norm = (
            ModuleSpec(module=ProjectionNorm, params={"heads": heads})
            for heads in (size.num_attention_heads, group_count(size))
        )
        return query_norm, key_norm
    each = norm(provider, size, for_qk=True) if size.qk_layernorm else IdentityOp
    return each, each


def core_attention(provider: BackendSpecProvider, size: ModelConfig) -> Any:
    """What computes and uses the scores; only our own know a softcap or ALiBi."""
    if size.attn_logit_softcapping is not None:
        return ModuleSpec(module=SoftcapAttention, params={"cap": size.attn_logit_softcapping})
    return DistanceAttention if size.position_embedding_type == "alibi" else provider.core_attention()


def choose_attention(provider: BackendSpecProvider, size: ModelConfig, layer: int) -> ModuleSpec:
    """The attention of a layer."""
    if size.multi_latent_attention:
        return latent_attention(provider, norm(provider, size))
    query_norm, key_norm = head_norms(provider, size)
    params: dict[str, Any] = {"attn_mask_type": AttnMaskType.causal}
    if size.rotary_base_local is not None:
        params["local_rope"] = size.window_size is not None and layer not in size.full_attention_layers
    return ModuleSpec(
        module=layer_parts(provider).self_attention,
        params=params,
        submodules=SelfAttentionSubmodules(
            linear_qkv=first_linear(provider, size),
            core_attention=core_attention(provider, size),
            linear_proj=provider.row_parallel_linear(),
            q_layernorm=query_norm,
            k_layernorm=key_norm,
        ),
    )


def choose_mlp(provider: BackendSpecProvider, size: ModelConfig, layer: int) -> ModuleSpec:
    """The feed-forward of a layer."""
    if is_soft(size):
        return ModuleSpec(module=SoftMixture, params={"size": size})
    if size.mlp_type == "senet":
        linear = MLPSubmodules(linear_fc1=first_linear(provider, size), linear_fc2=provider.row_parallel_linear())
        return ModuleSpec(module=DoubleSwiGLU, submodules=linear, params={"size": size})
    if has_experts(size, layer):
        return expert_spec(provider, size)
    return ModuleSpec(
        module=layer_parts(provider).mlp,
        submodules=MLPSubmodules(linear_fc1=first_linear(provider, size), linear_fc2=provider.row_parallel_linear()),
    )


def choose_layer(provider: BackendSpecProvider, size: ModelConfig, layer: int) -> ModuleSpec:
    """A decoder layer: megatron-core's own where it has the norms and the residual of the family."""
    before = norm(provider, size) if size.norm_placement != "post" else IdentityOp
    after = norm(provider, size) if size.norm_placement != "pre" else IdentityOp
    fused = fuses_norms(provider, size)
    residual = layer_parts(provider).residual
    mlp = choose_mlp(provider, size, layer)
    # A mixture begins with more than one linear layer: the norm stays by itself, under its own name.
    apart = is_soft(size) or has_experts(size, layer)
    # Latent attention begins with two.
    latent = size.multi_latent_attention
    names = LATENT_NAMES.copy() if latent else {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
    if not apart:
        names["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
    special: dict[str, Any] = {"parallel_residual": True} if size.parallel_residual else {}
    ours = special or after is not IdentityOp or getattr(mlp.module, "reads_sequence", False)
    return ModuleSpec(
        module=DecoderLayer if ours else TransformerLayer,
        params=special,
        submodules=DecoderLayerSubmodules(
            input_layernorm=IdentityOp if fused else before,
            self_attention=choose_attention(provider, size, layer),
            self_attn_bda=residual,
            post_self_attn_layernorm=after,
            pre_mlp_layernorm=IdentityOp if fused and not apart else before,
            mlp=mlp,
            mlp_bda=residual,
            post_mlp_layernorm=after,
            sharded_state_dict_keys_map={} if fused else names,
        ),
    )
