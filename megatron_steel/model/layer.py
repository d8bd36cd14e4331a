"""The decoder layer of families that have norms after their branches or branches side by side."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.random import checkpoint
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from megatron.core.utils import make_viewless_tensor
from torch import Tensor

# What megatron-core hands to a layer for its attention, next to the hidden states, the mask and the cache.
ATTENTION_INPUTS = (
    "rotary_pos_emb", "rotary_pos_cos", "rotary_pos_sin", "rotary_pos_cos_sin", "attention_bias", "packed_seq_params",
    "sequence_len_offset",
)  # fmt: skip


def get_residual_add(training: bool, fused: bool) -> Callable[..., Tensor]:
    """megatron-core's seam for bias + dropout + residual: plain additions where there is no dropout."""
    general = get_bias_dropout_add(training, fused)

    def add(x_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, probability: float) -> Tensor:
        x, bias = x_with_bias
        if training and probability > 0.0:
            return general(x_with_bias, residual, probability)
        return residual + x if bias is None else (residual + x).add_(bias)

    return add


@dataclass
class DecoderLayerSubmodules(TransformerLayerSubmodules):
    """megatron-core's parts of a layer, and a norm after each of its two branches."""

    post_self_attn_layernorm: type = IdentityOp
    post_mlp_layernorm: type = IdentityOp


class DecoderLayer(TransformerLayer):
    """megatron-core's layer with optional norms on what its branches add, or with both branches on the same input.

    A feed-forward whose class has ``reads_sequence = True`` (it mixes tokens) is also given ``inference_context`` and
    ``packed_seq_params``, like an attention.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: DecoderLayerSubmodules,
        parallel_residual: bool = False,
        **rest: Any,
    ) -> None:
        """``parallel_residual``: attention and feed-forward both read the layer's input (Black et al. 2022, 2.1)."""
        super().__init__(config, submodules, **rest)
        self.parallel_residual = parallel_residual
        sizes = {"config": config, "hidden_size": config.hidden_size, "eps": config.layernorm_epsilon}
        self.post_self_attn_layernorm = build_module(submodules.post_self_attn_layernorm, **sizes)
        self.post_mlp_layernorm = build_module(submodules.post_mlp_layernorm, **sizes)
        self.mlp_reads_sequence = getattr(type(self.mlp), "reads_sequence", False)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, inference_context: Any = None, **rest: Any
    ) -> tuple[Tensor, None]:
        """hidden_states [S, B, H] -> the same shape, and megatron-core's empty cross-attention context."""
        attended = self.self_attention(
            self.input_layernorm(hidden_states),
            attention_mask=attention_mask,
            inference_context=inference_context,
            **{name: rest[name] for name in ATTENTION_INPUTS if name in rest},
        )
        middle = self.add(self.self_attn_bda, normed(attended, self.post_self_attn_layernorm), hidden_states)
        more: dict[str, Any] = {"padding_mask": rest.get("padding_mask")}
        if self.mlp_reads_sequence:
            more |= {"inference_context": inference_context, "packed_seq_params": rest.get("packed_seq_params")}
        inner = self.pre_mlp_layernorm(hidden_states if self.parallel_residual else middle)
        mlp = functools.partial(self.mlp, **more)
        fed = checkpoint(mlp, False, inner) if self.recompute_mlp and self.training else mlp(inner)
        output = self.add(self.mlp_bda, normed(fed, self.post_mlp_layernorm), middle)
        # Pipelines free the memory of what a stage sends on, which a view would keep.
        return make_viewless_tensor(inp=output, requires_grad=output.requires_grad, keep_graph=True), None

    def add(self, how: Callable[..., Any], branch: tuple[Tensor, Tensor | None], residual: Tensor) -> Tensor:
        """Bias, dropout and residual, through megatron-core's seam."""
        return how(self.training, self.config.bias_dropout_fusion)(branch, residual, self.hidden_dropout)


def normed(branch: tuple[Tensor, Tensor | None], norm: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor | None]:
    """A branch's output with its bias, through a norm where there is one."""
    if isinstance(norm, IdentityOp):
        return branch
    output, bias = branch
    return norm(output if bias is None else output + bias), None
