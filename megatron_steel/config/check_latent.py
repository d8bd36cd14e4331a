"""Rules for latent attention, run by config/check.py."""

from __future__ import annotations

from megatron_steel.config.schema import Config, ModelConfig

SIZES = ("kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim")


def check_latent(config: Config) -> None:
    """Widths of latent attention, and what does not go with it; raises ``ValueError`` like check.py."""
    size, defaults = config.size, ModelConfig()
    if not size.multi_latent_attention:
        for name in ("q_lora_rank", *SIZES):
            if getattr(size, name) != getattr(defaults, name):
                raise ValueError(f"--{name.replace('_', '-')} needs --multi-latent-attention")
        return
    for name in ("q_lora_rank", *SIZES):
        value = getattr(size, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be greater than 0, not {value}")
    if size.qk_pos_emb_head_dim % 2:
        raise ValueError(f"--qk-pos-emb-head-dim {size.qk_pos_emb_head_dim} is odd; rotary embeddings need it even")
    for name in ("kv_channels", "num_query_groups"):
        if getattr(size, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')} has no meaning with --multi-latent-attention; leave it unset")
    if size.norm_epsilon != 1e-6:
        raise ValueError(f"--norm-epsilon {size.norm_epsilon}: latent attention has 1e-06 only")
    if size.use_rope_scaling and size.rope_scaling_type != "yarn":
        raise ValueError(f"--rope-scaling-type {size.rope_scaling_type}: latent attention has yarn only")
    if (size.rope_mscale is None) != (size.rope_mscale_all_dim is None):
        raise ValueError("--rope-mscale and --rope-mscale-all-dim need each other with --multi-latent-attention")
    if size.use_rope_scaling and (size.rope_attention_factor is not None or not size.rope_truncate):
        raise ValueError("--rope-attention-factor and --no-rope-truncate do not go with --multi-latent-attention")
    if config.parallel.tensor_model_parallel_size > 1 and not config.parallel.sequence_parallel:
        raise ValueError("--multi-latent-attention on tensor-parallel ranks needs --sequence-parallel")
    if config.data.reset_position_ids and not config.data.reset_attention_mask:
        raise ValueError("--reset-position-ids with --multi-latent-attention needs --reset-attention-mask")
