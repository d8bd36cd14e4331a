"""From sizes to megatron-core's own configuration. Families are switches of a model; none is mentioned here."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from torch import Tensor

from megatron_steel.config.check import virtual_chunks
from megatron_steel.config.check_experts import expert_tensor_size
from megatron_steel.config.check_precision import compute_type
from megatron_steel.config.family import group_count, head_width
from megatron_steel.config.model_schema import Activation
from megatron_steel.config.schema import Config, MemoryConfig, ModelConfig
from megatron_steel.model.mla import latent_options
from megatron_steel.model.moe import expert_options
from megatron_steel.model.rope import attention_factor
from megatron_steel.runtime import device

ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
}


def feed_forward_options(size: ModelConfig, on_gpu: bool) -> dict[str, Any]:
    """megatron-core's settings of the feed-forward."""
    return {
        "ffn_hidden_size": size.ffn_hidden_size,
        "gated_linear_unit": size.gated_linear_unit,
        "activation_func": ACTIVATIONS[size.activation],
        # Its fused GELU is the tanh form whatever the activation function says; only SwiGLU is the same when fused.
        "bias_activation_fusion": on_gpu and size.activation == "silu" and size.gated_linear_unit,
    }


def attention_options(size: ModelConfig) -> dict[str, Any]:
    """megatron-core's settings of the attention."""
    layers = range(size.num_layers)
    windowed = size.window_size is not None
    return {
        "num_attention_heads": size.num_attention_heads,
        "num_query_groups": group_count(size),
        "kv_channels": head_width(size),
        "add_qkv_bias": size.add_qkv_bias,
        "qk_layernorm": size.qk_layernorm,
        "attention_dropout": size.attention_dropout,
        "softmax_scale": size.softmax_scale,
        # Tokens before and after this one. The lists have a number for each layer: 1 with a window, 1 without rotation.
        "window_size": (size.window_size - 1, 0) if size.window_size is not None else None,
        "window_attn_skip_freq": [int(i not in size.full_attention_layers) for i in layers] if windowed else None,
        "no_rope_freq": [int(i in size.no_rope_layers) for i in layers] if size.no_rope_layers else None,
    }


def recompute_options(memory: MemoryConfig) -> dict[str, Any]:
    """megatron-core's settings of what is computed once more in the backward pass; empty for nothing."""
    if memory.recompute_granularity is None:
        return {}
    return {
        "recompute_granularity": memory.recompute_granularity,
        "recompute_method": memory.recompute_method,
        "recompute_num_layers": memory.recompute_num_layers,
        "recompute_modules": memory.recompute_modules or None,
    }


def engine_options(config: Config, backend: str) -> dict[str, Any]:
    """megatron-core's settings of what only Transformer Engine has."""
    training, size = config.training, config.size
    ours = backend == "transformer_engine"
    return {
        # Its kernel takes no factor of cosine and sine, which megatron-core would warn of in every layer.
        "apply_rope_fusion": ours and size.position_embedding_type == "rope" and attention_factor(size) == 1.0,
        "fp8": training.fp8_format,
        "fp8_recipe": training.fp8_recipe,
        "fp8_margin": training.fp8_margin,
        "fp8_amax_history_len": training.fp8_amax_history_len,
        "fp8_amax_compute_algo": training.fp8_amax_compute_algo,
        "first_last_layers_bf16": training.first_last_layers_bf16,
        "num_layers_at_start_in_bf16": training.num_layers_at_start_in_bf16,
        "num_layers_at_end_in_bf16": training.num_layers_at_end_in_bf16,
        "cuda_graph_impl": training.cuda_graph_impl,
        "use_te_rng_tracker": training.cuda_graph_impl != "none",
    }


def transformer_config(config: Config, backend: str = "torch") -> TransformerConfig:
    """megatron-core's configuration for a checked :class:`Config` and a resolved layer backend."""
    size, parallel, training = config.size, config.parallel, config.training
    dtype = getattr(torch, compute_type(training))
    chunks = virtual_chunks(config)
    on_gpu = device.device().type != "cpu"
    kind = MLATransformerConfig if size.multi_latent_attention else TransformerConfig
    return kind(
        num_layers=size.num_layers,
        hidden_size=size.hidden_size,
        **attention_options(size),
        **(latent_options(size) if size.multi_latent_attention else {}),
        **feed_forward_options(size, on_gpu),
        **expert_options(size, parallel.moe_grouped_gemm),
        **recompute_options(config.memory),
        normalization=size.normalization,
        layernorm_epsilon=size.norm_epsilon,
        layernorm_zero_centered_gamma=size.apply_layernorm_1p,
        add_bias_linear=size.add_bias_linear,
        # Your own layers need not be alike: each is saved under its own number.
        hetereogenous_dist_checkpoint=size.decoder_layer is not None,
        hidden_dropout=size.hidden_dropout,
        init_method_std=size.init_method_std,
        # Weights are filled by initialize.py, the same way for every layout. megatron-core still has to run its own
        # initialisation: it marks the split parameters there.
        init_method=leave_as_is,
        output_layer_init_method=leave_as_is,
        use_cpu_initialization=not on_gpu,
        # Shards are fp32 and are cast when they are gathered.
        params_dtype=torch.float32 if parallel.use_torch_fsdp2 else dtype,
        pipeline_dtype=dtype,
        bf16=training.bf16,
        deterministic_mode=training.deterministic_mode,
        fp16=training.fp16,
        **engine_options(config, backend),
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=chunks,
        num_layers_in_first_pipeline_stage=parallel.decoder_first_pipeline_num_layers,
        num_layers_in_last_pipeline_stage=parallel.decoder_last_pipeline_num_layers,
        sequence_parallel=parallel.sequence_parallel,
        context_parallel_size=parallel.context_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=expert_tensor_size(config),
        # The loss is divided by the number of tokens of the whole step before the first backward pass; megatron-core
        # must neither average over micro-batches nor over replicas.
        calculate_per_token_loss=True,
        # Two interleaved stages exchange forward and backward messages at once; only the overlapped form keeps them
        # apart (with the batched form they are swapped without an error).
        overlap_p2p_comm=chunks is not None,
        batch_p2p_comm=chunks is None,
        # Waiting for the device after each message is for versions of PyTorch before ours.
        batch_p2p_sync=False,
        bias_dropout_fusion=on_gpu,
        masked_softmax_fusion=False,
        # weight_gradients.py switches it on where there are main gradients.
        gradient_accumulation_fusion=False,
    )


def leave_as_is(weight: torch.Tensor) -> torch.Tensor:
    """An initialisation that does nothing."""
    return weight
