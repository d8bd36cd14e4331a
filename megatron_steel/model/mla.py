"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1): keys and values from a narrow latent.

Shapes: S sequence, B micro-batch, H hidden, R width of a latent.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.extensions import transformer_engine
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer import multi_latent_attention
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.multi_latent_attention import MLASelfAttention, MLASelfAttentionSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_steel.config.schema import ModelConfig
from megatron_steel.model.attention import TorchDotProductAttention

# megatron-core takes Transformer Engine for installed where it is not, and then compares with classes it made up.
multi_latent_attention.HAVE_TE = transformer_engine.HAVE_TE

# Checkpoints have the norms of latents under the linear layer behind them, as backends that fuse the two do.
LATENT_NAMES = {
    "self_attention.q_layernorm.": "self_attention.linear_q_up_proj.layer_norm_",
    "self_attention.kv_layernorm.": "self_attention.linear_kv_up_proj.layer_norm_",
}


def latent_options(size: ModelConfig) -> dict[str, Any]:
    """Fields of megatron-core's ``MLATransformerConfig`` that other attention does not have."""
    yarn = size.use_rope_scaling and size.rope_scaling_type == "yarn"
    return {
        "q_lora_rank": size.q_lora_rank,
        "kv_lora_rank": size.kv_lora_rank,
        "qk_head_dim": size.qk_head_dim,
        "qk_pos_emb_head_dim": size.qk_pos_emb_head_dim,
        "v_head_dim": size.v_head_dim,
        "rope_type": "yarn" if yarn else "rope",
        "rotary_base": size.rotary_base,
        "rotary_scaling_factor": size.rope_scaling_factor if yarn else 1.0,
        "original_max_position_embeddings": size.rope_original_max_position_embeddings,
        "beta_fast": size.rope_beta_fast,
        "beta_slow": size.rope_beta_slow,
        "mscale": 1.0 if size.rope_mscale is None else size.rope_mscale,
        "mscale_all_dim": size.rope_mscale_all_dim or 0.0,
    }


class ReplicatedLinear(torch.nn.Module):
    """A projection that every tensor-parallel rank has whole: its output is narrow and each rank needs all of it."""

    def __init__(self, config: TransformerConfig, width: int) -> None:
        """``width`` of the output; the weight [width, H] is filled later."""
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(width, config.hidden_size, dtype=config.params_dtype))
        # Each rank sees a part of the sequence: megatron-core sums such gradients over the tensor-parallel ranks.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """x [..., H] -> [..., width], and no bias."""
        return F.linear(x, self.weight), None


class LatentAttention(MLASelfAttention):
    """megatron-core's latent attention with down-projections that are the same on every backend.

    Its own are split over tensor-parallel ranks without Transformer Engine, and the gradient of the key's rotary part,
    of which every rank has the share of its heads, is then not summed.
    """

    def __init__(self, config: TransformerConfig, *args: Any, **rest: Any) -> None:
        """Arguments are those of megatron-core's class."""
        super().__init__(config, *args, **rest)
        if self.config.q_lora_rank is not None:
            self.linear_q_down_proj = ReplicatedLinear(config, self.config.q_lora_rank)
        self.linear_kv_down_proj = ReplicatedLinear(config, self.config.kv_lora_rank + self.config.qk_pos_emb_head_dim)


class TorchLatentCore(TorchDotProductAttention):
    """Our attention under keys and values of different widths.

    PyTorch's fused kernels want them equal, and its other one keeps a score for each pair of tokens: narrower values
    get zeros at the end, whose outputs are cut off.
    """

    def __init__(self, *args: Any, k_channels: int = 0, v_channels: int = 0, **rest: Any) -> None:
        """``k_channels`` and ``v_channels`` are the widths of one head; megatron-core also builds one without."""
        super().__init__(*args, **rest)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **rest: Any) -> Tensor:
        """query and key [S, B, N, D], value [S, B, N, E] -> [S, B, N * E]; with packed documents without B."""
        heads, width = value.shape[-2:]
        missing = query.shape[-1] - width
        if missing <= 0:
            return super().forward(query, key, value, *args, **rest)
        out = super().forward(query, key, F.pad(value, (0, missing)), *args, **rest)
        return out.unflatten(-1, (heads, -1))[..., :width].flatten(-2)


class LocalLatentCore(DotProductAttention):
    """megatron-core's attention, which would give its output the width of keys."""

    def __init__(self, *args: Any, k_channels: int = 0, v_channels: int = 0, **rest: Any) -> None:
        """``k_channels`` and ``v_channels`` are the widths of one head; megatron-core also builds one without."""
        super().__init__(*args, **rest)
        self.hidden_size_per_partition = self.num_attention_heads_per_partition * v_channels


def latent_attention(provider: BackendSpecProvider, norm: type) -> ModuleSpec:
    """The attention of a layer from a backend's modules; ``norm`` is for latents."""
    up = provider.column_parallel_linear()
    cores = {DotProductAttention: LocalLatentCore, TorchDotProductAttention: TorchLatentCore}
    core = provider.core_attention()
    return ModuleSpec(
        module=LatentAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=MLASelfAttentionSubmodules(
            linear_q_proj=up,
            linear_q_down_proj=ColumnParallelLinear,
            linear_q_up_proj=up,
            linear_kv_down_proj=ColumnParallelLinear,
            linear_kv_up_proj=up,
            core_attention=cores.get(core, core),
            linear_proj=provider.row_parallel_linear(),
            q_layernorm=norm,
            kv_layernorm=norm,
        ),
    )
