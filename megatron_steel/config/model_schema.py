"""Sizes and switches of the decoder, in groups by subject; the families in config/families say which go together."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

ModelFamily = Literal[
    "bloom",
    "deepseek_v2",
    "deepseek_v3",
    "gemma2",
    "gemma3",
    "gpt2",
    "gpt_neox",
    "llama",
    "mistral",
    "mixtral",
    "olmo2",
    "open_llama",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "smollm3",
    "steel",
]
Normalization = Literal["RMSNorm", "LayerNorm"]
NormPlacement = Literal["pre", "sandwich", "post"]
Activation = Literal["silu", "gelu", "gelu_tanh"]
PositionEmbedding = Literal["rope", "learned_absolute", "alibi"]
RopeScaling = Literal["llama3", "linear", "dynamic", "yarn"]
EmbeddingInit = Literal["normal", "xavier"]
RouterScore = Literal["softmax", "sigmoid"]
Dispatcher = Literal["allgather", "alltoall"]
FeedForward = Literal["dense", "softmoe_v1", "softmoe_v2", "softmoe_v3", "softmoe_causal"]
ExpertKind = Literal["swiglu", "senet"]


@dataclass(kw_only=True)
class PositionSizes:
    """Where a token is."""

    position_embedding_type: PositionEmbedding = "rope"
    """Rotary embedding, a table of positions (GPT-2), or a bias that grows with the distance (ALiBi)."""
    max_position_embeddings: int = 2048
    """Longest sequence the model is declared for; seq_length may not exceed it."""
    rotary_base: float = 10000.0
    """Base of the rotary embedding (rope theta)."""
    rotary_base_local: float | None = None
    """Base in layers with a window, where it differs (Gemma 3)."""
    rotary_percent: float = 1.0
    """Share of each head that is rotated (GPT-NeoX)."""
    no_rope_layers: list[int] = field(default_factory=list)
    """Layers without rotary embedding, counted from 0 (SmolLM3)."""
    use_rope_scaling: bool = False
    """Scale the rotary frequencies for longer sequences."""
    rope_scaling_type: RopeScaling = "llama3"
    """How they are scaled."""
    rope_scaling_factor: float = 8.0
    """Factor of the scaling (8 for Llama 3.1, 32 for Llama 3.2)."""
    rope_original_max_position_embeddings: int = 8192
    """Sequence length before the scaling."""
    rope_low_freq_factor: float = 1.0
    """Llama 3 scaling: frequencies below this many turns are divided by the factor."""
    rope_high_freq_factor: float = 4.0
    """Llama 3 scaling: frequencies above this many turns stay."""
    rope_beta_fast: float = 32.0
    """YaRN: frequencies above this many turns stay."""
    rope_beta_slow: float = 1.0
    """YaRN: frequencies below this many turns are divided by the factor."""
    rope_attention_factor: float | None = None
    """YaRN: scale of cosine and sine; from the factor when unset."""
    rope_truncate: bool = True
    """YaRN: round the channels between which frequencies are mixed to whole numbers."""
    rope_mscale: float | None = None
    """YaRN as DeepSeek has it: coefficient of the scale of cosine and sine."""
    rope_mscale_all_dim: float | None = None
    """YaRN as DeepSeek has it: coefficient of the scale of attention scores."""


@dataclass(kw_only=True)
class AttentionSizes:
    """How tokens attend to each other."""

    num_attention_heads: int = 4
    """Query heads."""
    num_query_groups: int | None = None
    """Key/value heads (grouped-query attention); one per query head when unset."""
    kv_channels: int | None = None
    """Width of one head; hidden_size / num_attention_heads when unset."""
    add_qkv_bias: bool = False
    """Bias on the query, key and value projections (Qwen2)."""
    qk_layernorm: bool = False
    """RMSNorm on each query and key head (Qwen3)."""
    qk_layernorm_full: bool = False
    """RMSNorm on all query heads and on all key heads together (OLMo2)."""
    softmax_scale: float | None = None
    """Scale of attention scores; one over the root of the head width when unset."""
    attn_logit_softcapping: float | None = None
    """Attention scores s become c * tanh(s / c) with this c (Gemma 2)."""
    window_size: int | None = None
    """Tokens a token attends to, itself included; all before it when unset."""
    full_attention_layers: list[int] = field(default_factory=list)
    """Layers without the window, counted from 0."""
    attention_dropout: float = 0.0
    """Dropout on attention probabilities."""
    multi_latent_attention: bool = False
    """Keys and values from a narrow latent (DeepSeek)."""
    q_lora_rank: int | None = None
    """Latent attention: width of the query latent; none when unset."""
    kv_lora_rank: int = 512
    """Latent attention: width of the key/value latent."""
    qk_head_dim: int = 128
    """Latent attention: channels of a head without position."""
    qk_pos_emb_head_dim: int = 64
    """Latent attention: channels of a head with rotary embedding."""
    v_head_dim: int = 128
    """Latent attention: channels of a value head."""


@dataclass(kw_only=True)
class FeedForwardSizes:
    """What happens to each token by itself."""

    ffn_hidden_size: int = 704
    """Width of the feed-forward."""
    activation: Activation = "silu"
    """Its activation function."""
    gated_linear_unit: bool = True
    """Two first projections, one of them through the activation (SwiGLU for silu)."""
    add_bias_linear: bool = False
    """Bias on every linear layer (GPT-2, GPT-NeoX)."""
    num_experts: int | None = None
    """Experts per layer of a mixture of experts; a dense feed-forward when unset."""
    moe_layer_freq: list[int] = field(default_factory=list)
    """One number per layer, 1 with experts and 0 without; experts in all layers when unset."""
    moe_ffn_hidden_size: int | None = None
    """Width of one expert; ffn_hidden_size when unset."""
    moe_shared_expert_intermediate_size: int | None = None
    """Width of all experts together that every token goes through; none when unset."""
    moe_router_topk: int = 2
    """Experts per token."""
    moe_router_score_function: RouterScore = "softmax"
    """How logits of the router become weights."""
    moe_router_pre_softmax: bool = False
    """Softmax over all experts instead of over the chosen ones."""
    moe_router_topk_scaling_factor: float | None = None
    """Factor of the weights of the chosen experts."""
    moe_router_enable_expert_bias: bool = False
    """A bias per expert that decides which are chosen, but not their weights (DeepSeek-V3)."""
    moe_router_num_groups: int | None = None
    """Groups of experts to choose from first."""
    moe_router_group_topk: int | None = None
    """Groups a token may choose experts from."""
    moe_aux_loss_coeff: float = 0.0
    """Weight of the loss that keeps experts equally busy."""
    moe_token_dispatcher_type: Dispatcher = "alltoall"
    """How tokens get to experts on other ranks."""
    ffn_type: FeedForward = "dense"
    """Dense, or a soft mixture of experts; v2 and v3 let later tokens reach earlier ones, causal does not."""
    mlp_type: ExpertKind = "swiglu"
    """One feed-forward: SwiGLU, or the double SwiGLU of Steel-LLM."""
    soft_experts: int = 6
    """Experts of a soft mixture."""
    slots_per_expert: int = 1
    """Slots of each expert of a soft mixture."""
    mlp_div_ratio: int = 4
    """An expert of a soft mixture is this many times narrower than ffn_hidden_size."""


@dataclass(kw_only=True)
class ModelConfig(PositionSizes, AttentionSizes, FeedForwardSizes):
    """Sizes and switches of the decoder."""

    model_family: ModelFamily = "llama"
    """Family, which fixes the Hugging Face names on export and what the switches below may be."""
    num_layers: int = 4
    """Decoder layers."""
    hidden_size: int = 256
    """Width of the residual stream."""
    normalization: Normalization = "RMSNorm"
    """Kind of norm; LayerNorm has a bias."""
    norm_epsilon: float = 1e-6
    """Epsilon of the norms."""
    apply_layernorm_1p: bool = False
    """Norm weights are stored less 1 (Gemma)."""
    norm_placement: NormPlacement = "pre"
    """Norms before attention and feed-forward, after them (OLMo2), or both (sandwich, Gemma)."""
    parallel_residual: bool = False
    """Attention and feed-forward read the same input (GPT-NeoX)."""
    untie_embeddings_and_output_weights: bool = False
    """Give the output layer its own weight instead of the embedding's."""
    score_head: bool = False
    """One number per token as output instead of logits (a reward model)."""
    embedding_scale: bool = False
    """Multiply embeddings by the root of hidden_size (Gemma)."""
    stable_embedding: bool = False
    """A LayerNorm after the embedding (Open-Llama)."""
    final_logit_softcapping: float | None = None
    """Logits z become c * tanh(z / c) with this c (Gemma 2)."""
    init_method_std: float = 0.02
    """Standard deviation of the normal initialisation."""
    embedding_init: EmbeddingInit = "normal"
    """Embeddings start with init_method_std, or with sqrt(2 / (rows + hidden_size)) (xavier)."""
    hidden_dropout: float = 0.0
    """Dropout on the residual branches."""
    vocab_size: int | None = None
    """Rows before padding; the tokenizer's size when unset. May be larger than the tokenizer's, never smaller."""
    make_vocab_size_divisible_by: int = 128
    """The vocabulary is padded to a multiple of this times the tensor-parallel size."""
    decoder_layer: str | None = None
    """Your own decoder layer as package.module:function, which returns its layer specification."""
