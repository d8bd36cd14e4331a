"""Rules about fully sharded models (ZeRO-3 through PyTorch's FSDP2)."""

from __future__ import annotations

from megatron_steel.config.family import group_count, head_width
from megatron_steel.config.schema import Config

FLAG = "--use-torch-fsdp2"


def check_fsdp(config: Config, replicas: int) -> None:
    """Shards go over replicas alone, in fp32 with fp32 or bf16 products, and every weight divides into equal rows."""
    parallel, training, size = config.parallel, config.training, config.size
    if not parallel.use_torch_fsdp2:
        return
    for name, alone in (
        ("tensor_model_parallel_size", parallel.tensor_model_parallel_size == 1),
        ("pipeline_model_parallel_size", parallel.pipeline_model_parallel_size == 1),
        ("use_distributed_optimizer", not parallel.use_distributed_optimizer),
        ("overlap_grad_reduce", not parallel.overlap_grad_reduce),
        ("fp16", not training.fp16),
        ("pure_bf16", not training.pure_bf16),
        ("num_experts", size.num_experts is None),
        ("multi_latent_attention", not size.multi_latent_attention),
        ("ffn_type", size.ffn_type == "dense"),
        ("mlp_type", size.mlp_type == "swiglu"),
        ("decoder_layer", size.decoder_layer is None),
    ):
        if not alone:
            value = getattr(parallel, name, None) or getattr(training, name, None) or getattr(size, name, None)
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
