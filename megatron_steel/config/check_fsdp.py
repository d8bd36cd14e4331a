"""Rules about fully sharded models (ZeRO-3 through PyTorch's FSDP2)."""

from __future__ import annotations

from typing import Any

from megatron_steel.config.family import group_count, head_width
from megatron_steel.config.load import to_flat
from megatron_steel.config.schema import Config

FLAG = "--use-torch-fsdp2"
# Options that must have these values beside it.
ALONE: dict[str, Any] = {
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "context_parallel_size": 1,
    "use_distributed_optimizer": False,
    "overlap_grad_reduce": False,
    "check_weight_hash_across_dp_replicas_interval": None,  # no two ranks hold the same weights
    "fp16": False,
    "pure_bf16": False,
    "optimizer_cpu_offload": False,
    "num_experts": None,
    "multi_latent_attention": False,
    "ffn_type": "dense",
    "mlp_type": "swiglu",
    "decoder_layer": None,
    "score_head": False,  # a weight of one row
}


def check_fsdp(config: Config, replicas: int) -> None:
    """Shards go over replicas alone, in fp32 with fp32 or bf16 products, and every weight divides into equal rows."""
    parallel, size = config.parallel, config.size
    if not parallel.use_torch_fsdp2:
        return
    options = to_flat(config)
    for name, neutral in ALONE.items():
        value = options.get(name, neutral)
        if value != neutral:
            shown = "" if value is True else f" {value}"
            raise ValueError(f"{FLAG} does not go with --{name.replace('_', '-')}{shown}; remove one of them")
    if parallel.transformer_impl != "torch":
        raise ValueError(f"{FLAG} needs --transformer-impl torch, not {parallel.transformer_impl}")
    width = head_width(size)
    rows = {
        "--hidden-size": size.hidden_size,
        "--ffn-hidden-size": size.ffn_hidden_size,
        "(query heads + 2 x key heads) x width": (size.num_attention_heads + 2 * group_count(size)) * width,
        "--make-vocab-size-divisible-by": size.make_vocab_size_divisible_by,
    }
    if size.qk_layernorm:
        rows["the width of a head"] = width
    if size.position_embedding_type == "learned_absolute":
        rows["--max-position-embeddings"] = size.max_position_embeddings
    for what, number in rows.items():
        if number % replicas:
            raise ValueError(f"{FLAG}: {what} must be divisible by the {replicas} data-parallel ranks, not {number}")
