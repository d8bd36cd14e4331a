"""From sizes to megatron-core's own configuration and layer spec. Llama, Mistral, Qwen2 and Qwen3 differ only in
switches (QKV bias, QK norm), so one spec serves all four.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import get_mlp_module_spec_for_backend
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megatron_steel.config.check import virtual_chunks
from megatron_steel.config.schema import Config
from megatron_steel.model.backends import layer_parts
from megatron_steel.runtime import device


def transformer_config(config: Config) -> TransformerConfig:
    """megatron-core's configuration for a checked :class:`Config`."""
    size, parallel, training = config.size, config.parallel, config.training
    dtype = torch.bfloat16 if training.bf16 else torch.float32
    chunks = virtual_chunks(config)
    on_gpu = device.device().type != "cpu"
    return TransformerConfig(
        num_layers=size.num_layers,
        hidden_size=size.hidden_size,
        ffn_hidden_size=size.ffn_hidden_size,
        num_attention_heads=size.num_attention_heads,
        num_query_groups=size.num_query_groups or size.num_attention_heads,
        kv_channels=size.kv_channels or size.hidden_size // size.num_attention_heads,
        normalization="RMSNorm",
        layernorm_epsilon=size.norm_epsilon,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=size.add_qkv_bias,
        qk_layernorm=size.qk_layernorm,
        attention_dropout=size.attention_dropout,
        hidden_dropout=size.hidden_dropout,
        init_method_std=size.init_method_std,
        # Weights are filled by initialize.py, the same way for every layout. megatron-core still has to run its own
        # initialisation: it marks the split parameters there.
        init_method=leave_as_is,
        output_layer_init_method=leave_as_is,
        use_cpu_initialization=not on_gpu,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=training.bf16,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=chunks,
        sequence_parallel=parallel.sequence_parallel,
        # The loss is divided by the number of tokens of the whole step before the first backward pass; megatron-core
        # must neither average over micro-batches nor over replicas.
        calculate_per_token_loss=True,
        # Two interleaved stages exchange forward and backward messages at once; only the overlapped form keeps them
        # apart (with the batched form they are swapped without an error).
        overlap_p2p_comm=chunks is not None,
        batch_p2p_comm=chunks is None,
        bias_activation_fusion=on_gpu,
        bias_dropout_fusion=on_gpu,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        apply_rope_fusion=False,
    )


def leave_as_is(weight: torch.Tensor) -> torch.Tensor:
    """An initialisation that does nothing."""
    return weight


def layer_spec(provider: BackendSpecProvider, options: TransformerConfig, layers: int) -> TransformerBlockSubmodules:
    """``layers`` decoder layers and the final norm, built from a backend's modules.

    Backends that fuse the norm into the following linear layer have no separate one; checkpoints use the fused names
    for every backend (``sharded_state_dict_keys_map``), so they are interchangeable.
    """
    fused = provider.fuse_layernorm_and_linear()
    norm = provider.layer_norm(rms_norm=True)
    parts = layer_parts(provider)
    head_norm = provider.layer_norm(rms_norm=True, for_qk=True) if options.qk_layernorm else IdentityOp
    linear_qkv = provider.column_parallel_layer_norm_linear() if fused else provider.column_parallel_linear()
    names = {
        "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
        "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
    }
    layer = ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=IdentityOp if fused else norm,
            self_attention=ModuleSpec(
                module=parts.self_attention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=linear_qkv,
                    core_attention=provider.core_attention(),
                    linear_proj=provider.row_parallel_linear(),
                    q_layernorm=head_norm,
                    k_layernorm=head_norm,
                ),
            ),
            self_attn_bda=parts.residual,
            pre_mlp_layernorm=IdentityOp if fused else norm,
            mlp=ModuleSpec(module=parts.mlp, submodules=get_mlp_module_spec_for_backend(provider).submodules),
            mlp_bda=parts.residual,
            sharded_state_dict_keys_map={} if fused else names,
        ),
    )
    return TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=norm)
