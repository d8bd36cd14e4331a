"""Parameter counts of a model from its sizes alone, part by part. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_steel.config.families.steel import expert_width, is_soft
from megatron_steel.config.family import group_count, has_experts, head_width, untied
from megatron_steel.config.schema import ModelConfig


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a model.

    ``matmul`` are those that work on a token in a matrix product: all layers' matrices and the LM head (the
    embedding matrix itself when tied), but no norms, biases or input lookup. ``per_layer`` is the last layer's.
    ``active`` is the total without experts a token does not go to.
    """

    total: int
    active: int
    embedding: int
    output: int
    per_layer: int
    matmul: int


@dataclass(frozen=True)
class Weights:
    """Parameters of a part of the model, by what tensor parallelism does with them.

    split: divided over the ranks. whole: on every rank. experts: those of experts a token may go to, divided over other
    ranks. matmul: those of all that multiply a token. idle: those in experts that a token does not go to.
    """

    split: int = 0
    whole: int = 0
    experts: int = 0
    matmul: int = 0
    idle: int = 0

    def __add__(self, other: Weights) -> Weights:
        mine, theirs = (vars(weights).values() for weights in (self, other))
        return Weights(*map(sum, zip(mine, theirs, strict=True)))

    @property
    def total(self) -> int:
        """All of them."""
        return self.split + self.whole + self.experts

    def dense_on_rank(self, tensor_parallel_size: int) -> int:
        """Parameters outside of experts that one tensor-parallel rank holds."""
        return self.split // tensor_parallel_size + self.whole


def query_width(model: ModelConfig) -> int:
    """Channels of all query heads together."""
    return model.num_attention_heads * head_width(model)


def key_width(model: ModelConfig) -> int:
    """Channels of all key heads together; the same for values."""
    return group_count(model) * head_width(model)


def norm_weights(model: ModelConfig) -> int:
    """Weights of one norm over the residual stream: a scale, and a bias for LayerNorm."""
    return model.hidden_size * (2 if model.normalization == "LayerNorm" else 1)


def latent_attention(model: ModelConfig) -> Weights:
    """Projections down to the latents and their norms, on every rank; projections up from them, and the output's."""
    heads, hidden = model.num_attention_heads, model.hidden_size
    query, rank = model.qk_head_dim + model.qk_pos_emb_head_dim, model.q_lora_rank
    down = hidden * (model.kv_lora_rank + model.qk_pos_emb_head_dim) + (hidden * rank if rank else 0)
    keys_and_values = model.kv_lora_rank * (model.qk_head_dim + model.v_head_dim)
    up = heads * ((rank or hidden) * query + keys_and_values + hidden * model.v_head_dim)
    return Weights(split=up, whole=down + model.kv_lora_rank + (rank or 0), matmul=up + down)


def attention(model: ModelConfig) -> Weights:
    """Projections, their biases, and the norms of queries and keys."""
    if model.multi_latent_attention:
        return latent_attention(model)
    queries, keys = query_width(model), key_width(model)
    matrices = model.hidden_size * (2 * queries + 2 * keys)
    bias = queries + 2 * keys if model.add_qkv_bias or model.add_bias_linear else 0
    # Norms of single heads are on every rank, norms over all heads are divided like the heads.
    over_heads = queries + keys if model.qk_layernorm_full else 0
    of_heads = 2 * head_width(model) if model.qk_layernorm else 0
    whole = of_heads + (model.hidden_size if model.add_bias_linear else 0)
    return Weights(split=matrices + bias + over_heads, whole=whole, matmul=matrices)


def dense_feed_forward(model: ModelConfig) -> Weights:
    """One or two first projections and the second one; the double SwiGLU has two of both."""
    first = 2 if model.gated_linear_unit else 1
    second = 2 if model.mlp_type == "senet" else 1
    width = expert_width(model)
    matrices = (first + second) * model.hidden_size * width
    bias = model.add_bias_linear
    return Weights(
        split=matrices + (first * width if bias else 0), whole=model.hidden_size if bias else 0, matmul=matrices
    )


def soft_experts(model: ModelConfig) -> int:
    """Weights of all experts of a soft mixture."""
    return model.soft_experts * (4 if model.mlp_type == "senet" else 3) * model.hidden_size * expert_width(model)


def soft_mixture(model: ModelConfig) -> Weights:
    """Experts and what decides between them: a gate with a bias (v1), scores (v2), or phi and its scale (v3).

    The first and the causal form send every token through every expert; a causal one through the second matrices of
    each expert once for each of its slots. In the other forms only the slots go through experts.
    """
    experts, hidden = soft_experts(model), model.hidden_size
    if model.ffn_type == "softmoe_v1":
        gate = hidden * model.soft_experts
        return Weights(split=experts, whole=gate + model.soft_experts, matmul=experts + gate)
    phi = hidden * model.soft_experts * model.slots_per_expert
    whole = phi + (0 if model.ffn_type == "softmoe_v2" else 1)
    if model.ffn_type != "softmoe_causal":
        return Weights(split=experts, whole=whole, matmul=phi)
    first = 2 * model.soft_experts * hidden * expert_width(model)
    return Weights(split=experts, whole=whole, matmul=phi + first + (experts - first) * model.slots_per_expert)


def slot_products(model: ModelConfig, seq_length: int) -> float:
    """Multiply-adds of one layer per token that depend on the length: slots of a soft mixture of the forms v2 and v3.

    Every sequence has a fixed number of slots; filling them and handing them out takes a product per token and slot.
    """
    if model.ffn_type not in ("softmoe_v2", "softmoe_v3"):
        return 0.0
    slots = model.soft_experts * model.slots_per_expert
    experts = soft_experts(model) * model.slots_per_expert / seq_length if seq_length else 0.0
    return experts + 2.0 * model.hidden_size * slots


def expert_mixture(model: ModelConfig) -> Weights:
    """The router, all experts, and those that every token goes through."""
    each = 3 if model.gated_linear_unit else 2
    experts, hidden = model.num_experts or 0, model.hidden_size
    expert = each * hidden * (model.moe_ffn_hidden_size or model.ffn_hidden_size)
    shared = each * hidden * (model.moe_shared_expert_intermediate_size or 0)
    router, chosen = experts * hidden, model.moe_router_topk
    return Weights(
        split=shared,
        whole=router,
        experts=experts * expert,
        matmul=chosen * expert + shared + router,
        idle=(experts - chosen) * expert,
    )


def score_width(model: ModelConfig) -> float:
    """Multiply-adds of one layer for each token and each key before it: the mean width of queries and values."""
    if not model.multi_latent_attention:
        return query_width(model)
    return model.num_attention_heads * (model.qk_head_dim + model.qk_pos_emb_head_dim + model.v_head_dim) / 2


def feed_forward(model: ModelConfig, layer: int) -> Weights:
    """The feed-forward of one layer, counted from 0."""
    if has_experts(model, layer):
        return expert_mixture(model)
    return soft_mixture(model) if is_soft(model) else dense_feed_forward(model)


def layer_norms(model: ModelConfig) -> Weights:
    """Norms on the residual stream: one for attention and one for the feed-forward, two for each in a sandwich."""
    return Weights(whole=(4 if model.norm_placement == "sandwich" else 2) * norm_weights(model))


def layer_weights(model: ModelConfig, layer: int) -> Weights:
    """All of one layer, counted from 0."""
    return attention(model) + feed_forward(model, layer) + layer_norms(model)


def before_layers(model: ModelConfig) -> int:
    """What comes between the token embedding and the first layer: a table of positions, a norm with a bias."""
    table = model.max_position_embeddings if model.position_embedding_type == "learned_absolute" else 0
    return model.hidden_size * (table + (2 if model.stable_embedding else 0))


def count_parameters(model: ModelConfig, vocab_size: int) -> ParameterCount:
    """Exact number of parameters.

    ``vocab_size`` is the padded number of rows for what is trained, the unpadded one for what is exported.
    """
    embedding = vocab_size * model.hidden_size
    output = model.hidden_size if model.score_head else embedding if untied(model) else 0
    layers = [layer_weights(model, layer) for layer in range(model.num_layers)]
    outside = embedding + before_layers(model) + norm_weights(model) + output
    return ParameterCount(
        total=outside + sum(layer.total for layer in layers),
        active=outside + sum(layer.total - layer.idle for layer in layers),
        embedding=embedding,
        output=output,
        per_layer=layers[-1].total,
        matmul=sum(layer.matmul for layer in layers) + (output if model.score_head else embedding),
    )
