"""How our weights and Hugging Face's correspond: declared once, used in both directions.

Our names are those of checkpoints: decoder layers are stacked under one name, and the norm before a linear layer
belongs to that layer (megatron-core's fused names, for every backend).

Shapes: L layers, V vocabulary rows, H hidden, F feed-forward, N query heads, G key/value heads, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron_steel.config.schema import ModelConfig

Kind = Literal["copy", "vocab", "qkv", "gate_up"]


@dataclass(frozen=True)
class Rule:
    """One of our tensors and the Hugging Face tensors it holds; ``{layer}`` marks a tensor of every layer."""

    ours: str
    theirs: tuple[str, ...]
    kind: Kind = "copy"

    @property
    def layered(self) -> bool:
        """Whether the tensor exists once per decoder layer."""
        return "{layer}" in self.theirs[0]


def rules(size: ModelConfig) -> list[Rule]:
    """The map of a model; the four families differ only in which tensors exist."""
    ours, theirs = "decoder.layers.", "model.layers.{layer}."
    attention = tuple(f"{theirs}self_attn.{part}_proj." for part in ("q", "k", "v"))
    table = [
        Rule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), "vocab"),
        Rule(f"{ours}self_attention.linear_qkv.layer_norm_weight", (f"{theirs}input_layernorm.weight",)),
        Rule(f"{ours}self_attention.linear_qkv.weight", tuple(f"{name}weight" for name in attention), "qkv"),
        Rule(f"{ours}self_attention.linear_proj.weight", (f"{theirs}self_attn.o_proj.weight",)),
        Rule(f"{ours}mlp.linear_fc1.layer_norm_weight", (f"{theirs}post_attention_layernorm.weight",)),
        Rule(
            f"{ours}mlp.linear_fc1.weight", (f"{theirs}mlp.gate_proj.weight", f"{theirs}mlp.up_proj.weight"), "gate_up"
        ),
        Rule(f"{ours}mlp.linear_fc2.weight", (f"{theirs}mlp.down_proj.weight",)),
        Rule("decoder.final_layernorm.weight", ("model.norm.weight",)),
    ]
    if size.add_qkv_bias:
        table.append(Rule(f"{ours}self_attention.linear_qkv.bias", tuple(f"{n}bias" for n in attention), "qkv"))
    if size.qk_layernorm:
        table.append(Rule(f"{ours}self_attention.q_layernorm.weight", (f"{theirs}self_attn.q_norm.weight",)))
        table.append(Rule(f"{ours}self_attention.k_layernorm.weight", (f"{theirs}self_attn.k_norm.weight",)))
    if size.untie_embeddings_and_output_weights:
        table.append(Rule("output_layer.weight", ("lm_head.weight",), "vocab"))
    return table


def heads(size: ModelConfig) -> tuple[int, int, int]:
    """(G, query heads per group, D)."""
    groups = size.num_query_groups or size.num_attention_heads
    return groups, size.num_attention_heads // groups, size.kv_channels or size.hidden_size // size.num_attention_heads


def to_theirs(kind: Kind, tensor: Tensor, size: ModelConfig, vocab_size: int) -> list[Tensor]:
    """Split one of our tensors (of one layer) into Hugging Face's, as contiguous tensors.

    qkv: rows are G blocks of [queries of the group | key | value]; Hugging Face keeps the three kinds apart.
    """
    if kind == "vocab":
        return [tensor[:vocab_size].contiguous()]
    if kind == "gate_up":
        return [part.contiguous() for part in tensor.chunk(2, 0)]
    if kind == "qkv":
        groups, per_group, width = heads(size)
        rest = tensor.shape[1:]
        blocks = tensor.reshape(groups, per_group + 2, width, *rest)
        parts = blocks.split([per_group, 1, 1], dim=1)
        return [part.reshape(-1, *rest).contiguous() for part in parts]
    return [tensor.contiguous()]


def to_ours(kind: Kind, tensors: list[Tensor], size: ModelConfig, padded_vocab: int) -> Tensor:
    """The inverse of :func:`to_theirs`; vocabulary padding rows are zero."""
    if kind == "vocab":
        rows = tensors[0]
        padding = rows.new_zeros(padded_vocab - rows.shape[0], *rows.shape[1:])
        return torch.cat((rows, padding))
    if kind == "gate_up":
        return torch.cat(tensors, 0)
    if kind == "qkv":
        groups, per_group, width = heads(size)
        rest = tensors[0].shape[1:]
        shares = (per_group, 1, 1)
        blocks = [t.reshape(groups, n, width, *rest) for t, n in zip(tensors, shares, strict=True)]
        return torch.cat(blocks, 1).reshape(-1, *rest)
    return tensors[0]
