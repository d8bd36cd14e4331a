"""Parameters, FLOPs, bytes and time of a run from its configuration alone. No torch.

Conventions, so that numbers can be compared with published ones:

* FLOPs per token are those of training (forward + backward = 3 x forward, 2 FLOPs per multiply-add), without
  recomputation: 6 per weight that takes part in a matrix product, including the LM head and excluding the input
  embedding (a lookup), plus attention scores and values. ``full`` counts every query against every key,
  12 * L * heads * head_width * S per token (PaLM, Chowdhery et al. 2022, appendix B); ``causal`` counts half of that.
  Logs use ``full``. Of a mixture, the experts a token goes to are counted.
* Bytes of weights, gradients and optimizer state: the table of ZeRO (Rajbhandari et al. 2020, section 3.1) with fp32
  gradients. Activations: Korthikanti et al. 2022 (arXiv:2205.05198), section 4, redone for SwiGLU, grouped queries,
  rotary embeddings and an attention that keeps no score matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_steel.config.check import data_parallel_size, virtual_chunks
from megatron_steel.config.check_experts import expert_tensor_size
from megatron_steel.config.check_memory import (
    CHUNK_IN_PLACE,
    layers_of_chunks,
    most_whole,
    recomputed_modules,
    tokens_at_once,
)
from megatron_steel.config.check_precision import compute_type
from megatron_steel.config.families.steel import expert_width, is_soft
from megatron_steel.config.family import has_experts, tied, untied
from megatron_steel.config.pipeline import layers_by_stage
from megatron_steel.config.schema import Config, ModelConfig
from megatron_steel.plan.parameters import (
    before_layers,
    count_parameters,
    key_width,
    layer_weights,
    norm_weights,
    query_width,
    score_width,
    slot_products,
)

AttentionCount = Literal["full", "causal"]

# Share of the device that stays free for the allocator's gaps, library workspaces, communication buffers and the
# transient tensors of the backward pass.
RESERVE = 0.10


@dataclass(frozen=True)
class RankMemory:
    """Bytes on one rank at the peak of a step."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits


@dataclass(frozen=True)
class RunTime:
    """What a token budget takes."""

    flops: float
    seconds: float
    device_hours: float


def flops_per_token(
    model: ModelConfig, seq_length: int, padded_vocab_size: int, attention: AttentionCount = "full"
) -> float:
    """Training FLOPs (forward + backward) per token at a sequence length; see the module's conventions."""
    keys = seq_length if attention == "full" else seq_length / 2
    scores = 12.0 * model.num_layers * score_width(model) * keys
    slots = 6.0 * model.num_layers * slot_products(model, seq_length)
    return 6.0 * count_parameters(model, padded_vocab_size).matmul + scores + slots


@dataclass(frozen=True)
class StageParameters:
    """Parameters on one rank of a pipeline stage: of experts, and the others; copies are not on the same ranks."""

    dense: int
    experts: int


def expert_ranks(config: Config) -> int:
    """Ranks that the experts of a layer are divided over."""
    return config.parallel.expert_model_parallel_size * expert_tensor_size(config)


def stage_parameters(config: Config, padded_vocab_size: int, stage: int) -> StageParameters:
    """Parameters on one rank of a pipeline stage. Norms are whole on every tensor-parallel rank, the rest is split."""
    model, parallel = config.size, config.parallel
    tensor, stages = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    weights = [layer_weights(model, layer) for layer in layers_by_stage(config)[stage]]
    layers = sum(layer.dense_on_rank(tensor) for layer in weights)
    table = padded_vocab_size * model.hidden_size // tensor
    first, last = stage == 0, stage == stages - 1
    # The last stage has a copy of a tied embedding, unless it is the first one too.
    tables = int(first) + int(last and (untied(model) or (stages > 1 and tied(model))))
    score = model.hidden_size if model.score_head else 0
    ends = (before_layers(model) if first else 0) + (norm_weights(model) + score if last else 0)
    experts = sum(layer.experts for layer in weights) // expert_ranks(config)
    return StageParameters(dense=layers + tables * table + ends, experts=experts)


def feed_forward_elements(model: ModelConfig) -> tuple[int, int]:
    """Elements per token a feed-forward keeps besides its input: those tensor parallelism divides, and the others.

    Dense: inputs of the activation, and the product that enters the last projection; a double SwiGLU also its second
    gate's inputs. Soft mixtures: first projections of all experts, and their prefix means for each slot in the causal
    form (its backward pass computes the rest again); v2 and v3 keep next to nothing per token but their input.
    """
    hidden, width = model.hidden_size, expert_width(model)
    if model.ffn_type == "softmoe_causal":
        return 2 * model.soft_experts * width * (1 + model.slots_per_expert), 0
    if is_soft(model):
        return (2 * model.soft_experts * width, 0) if model.ffn_type == "softmoe_v1" else (0, hidden)
    return (3 if model.gated_linear_unit else 2) * width, 2 * hidden if model.mlp_type == "senet" else 0


def attention_activations(model: ModelConfig, modules: Sequence[str] = ()) -> tuple[int, int]:
    """Elements an attention keeps per token: (divided over tensor-parallel ranks, like the residual stream).

    Latent attention keeps queries, keys, values and its output, the last two as wide as queries, the part of the output
    that counts, and inputs and outputs of the norms of latents. Queries and keys are not kept where ``modules``, which
    are computed again, have ``mla_up_proj``.
    """
    if not model.multi_latent_attention:
        queries = 4 if model.qk_layernorm else 3
        return queries * query_width(model) + 3 * key_width(model), 0
    query = model.qk_head_dim + model.qk_pos_emb_head_dim
    each = 2 * max(query, model.v_head_dim) + model.v_head_dim + (0 if "mla_up_proj" in modules else 2 * query)
    return model.num_attention_heads * each, 2 * ((model.q_lora_rank or 0) + model.kv_lora_rank)


def gathered_width(model: ModelConfig) -> int:
    """Elements of a token's keys, or of its values, when attention is reached."""
    if not model.multi_latent_attention:
        return key_width(model)
    return model.num_attention_heads * max(model.qk_head_dim + model.qk_pos_emb_head_dim, model.v_head_dim)


def expert_elements(model: ModelConfig, modules: Sequence[str] = ()) -> tuple[int, int, int]:
    """Elements per token a mixture keeps: those tensor parallelism divides, none like the residual, and on every rank.

    Gate, up and their product in each expert a token goes to; the tokens sorted by expert; less where ``modules`` that
    are computed again have ``moe`` or ``shared_experts``.
    """
    if "moe" in modules:
        return 0, 0, 0
    width = model.moe_ffn_hidden_size or model.ffn_hidden_size
    shared = 0 if "shared_experts" in modules else model.moe_shared_expert_intermediate_size or 0
    return 3 * (model.moe_router_topk * width + shared), 0, model.moe_router_topk * model.hidden_size


def layer_activation_bytes(config: Config, tokens: int) -> int:
    """Bytes one layer keeps for the backward pass of ``tokens`` tokens on one GPU if it is not recomputed as a whole.

    Of a model whose layers differ, the one that keeps most.

    Per token, in elements: norm inputs and outputs 4 H (whole on each tensor-parallel rank unless sequence-parallel);
    output of the fused query-key-value projection (value is a view of it), rotated query and key, attention output;
    query before its norm where it has one; :func:`feed_forward_elements`. Plus fp32 log-sum-exp per head, and one byte
    per dropout mask element. Under context parallelism also the keys and values of whole samples.
    """
    model, tensor = config.size, config.parallel.tensor_model_parallel_size
    element = 4 if compute_type(config.training) == "float32" else 2
    modules = recomputed_modules(config)
    heads, latents = attention_activations(model, modules)
    dense = (0, 0, 0) if "mlp" in modules else (*feed_forward_elements(model), 0)
    kept = (
        expert_elements(model, modules) if has_experts(model, layer) else dense for layer in range(model.num_layers)
    )
    inner, outer, by_expert = max(kept)
    residual = (4 * model.hidden_size + latents + outer) * element
    residual += 2 * model.hidden_size if model.hidden_dropout else 0
    whole = tensor if config.parallel.sequence_parallel else 1
    sums = 0 if "core_attn" in modules else 4 * model.num_attention_heads
    divided = ((heads + inner) * element + sums) // tensor
    ranks = config.parallel.context_parallel_size
    # Gathered inside the attention, and once more where that is computed again.
    kept_gathered = ranks > 1 and "core_attn" not in modules
    gathered = 2 * tokens * ranks * gathered_width(model) * element // tensor if kept_gathered else 0
    # Ranks that share an expert each have all tokens that go to it.
    sorted_tokens = tokens * by_expert * element * expert_tensor_size(config) // tensor
    return tokens * divided + tokens * residual // whole + sorted_tokens + gathered


def layers_in_flight(config: Config, micro_batches: int, stage: int) -> int:
    """Layers x micro-batches whose activations a pipeline stage holds at its peak.

    One-forward-one-backward keeps ``stages - stage`` micro-batches; the interleaved schedule keeps chunks as in
    Narayanan et al. 2021 (arXiv:2104.04473), section 2.2.
    """
    stages, layers = config.parallel.pipeline_model_parallel_size, config.size.num_layers
    chunks = virtual_chunks(config)
    if chunks is None:
        return min(stages - stage, micro_batches) * len(layers_by_stage(config)[stage])
    warm_up = 2 * (stages - stage - 1) + (chunks - 1) * stages + 1
    return min(warm_up, micro_batches * chunks) * layers // (stages * chunks)


def activation_bytes(config: Config, stage: int, layers: int, tokens: int) -> int:
    """Bytes that ``layers`` x micro-batches in flight keep on a pipeline stage.

    Recomputed as a whole, of a unit of layers its input is kept, and everything of the one unit in its backward pass.
    """
    memory, parallel = config.memory, config.parallel
    layer = layer_activation_bytes(config, tokens)
    if memory.recompute_granularity != "full" or not layers:
        return layers * layer
    element = 4 if compute_type(config.training) == "float32" else 2
    whole = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
    entry = tokens * config.size.hidden_size * element // whole
    number = memory.recompute_num_layers or 1
    if memory.recompute_method == "block":
        chunk = layers_of_chunks(config)[stage]
        again = layers * min(number, chunk) // chunk
        return again * entry + (layers - again + 1) * layer
    return layers // number * entry + number * layer


def logits_bytes(config: Config, padded_vocab_size: int, tokens: int) -> int:
    """Bytes of the logits that exist at once, on a GPU: in the computing type, reused for their gradient.

    A reward model has none, but widens hidden states to fp32.
    """
    element = 4 if compute_type(config.training) == "float32" else 2
    if config.size.score_head:
        return 4 * tokens * config.size.hidden_size if element == 2 else 0
    rows = padded_vocab_size // config.parallel.tensor_model_parallel_size
    at_once = tokens_at_once(config.memory.cross_entropy_chunk_size, tokens, rows, element)
    # In parts, the gradient of the table is summed in fp32 beside its own.
    return at_once * rows * element + (4 * rows * config.size.hidden_size if 0 < at_once < tokens else 0)


def parameter_bytes(config: Config, held: StageParameters, replicas: int) -> tuple[int, int, int]:
    """Bytes of weights, gradients and optimizer state of a rank that holds these parameters.

    Fully sharded (Zhao et al. 2023, arXiv:2304.11277): shards in fp32, and in the computing type what is outside the
    layers, two layers' weights (one is fetched ahead) and one layer's gradients.
    """
    model, training = config.size, config.training
    element = 4 if compute_type(training) == "float32" else 2
    parameters = held.dense + held.experts
    if config.parallel.use_torch_fsdp2:
        layers = [layer_weights(model, layer).total for layer in range(model.num_layers)]
        outside, largest, shard = parameters - sum(layers), max(layers), -(-parameters // replicas)
        return 4 * shard + (outside + 2 * largest) * element, 4 * shard + (outside + largest) * element, 8 * shard
    # Two fp32 moments, and an fp32 copy of 16-bit weights; or two moments of the weights' type alone.
    each = 4 if training.pure_bf16 else 12 if element == 2 else 8
    if config.optimizer.optimizer_cpu_offload:
        each -= 4 if training.pure_bf16 else 8
    state = parameters * each
    if config.parallel.use_distributed_optimizer:
        copies = replicas * config.parallel.context_parallel_size
        of_experts = copies * config.parallel.tensor_model_parallel_size // expert_ranks(config)
        state = -(-held.dense * each // copies) - (-held.experts * each // of_experts)
    return parameters * element, parameters * (2 if training.pure_bf16 else 4), state


def stage_memory(
    config: Config, padded_vocab_size: int, replicas: int, stage: int, micro_batch_size: int, micro_batches: int
) -> RankMemory:
    """Bytes on one rank of a pipeline stage, for ``micro_batches`` per step of ``micro_batch_size`` samples each."""
    model, training, parallel = config.size, config.training, config.parallel
    tensor, last = parallel.tensor_model_parallel_size, stage == parallel.pipeline_model_parallel_size - 1
    element = 4 if compute_type(training) == "float32" else 2
    held = stage_parameters(config, padded_vocab_size, stage)
    weights, gradients, state = parameter_bytes(config, held, replicas)
    tokens = training.seq_length * micro_batch_size // parallel.context_parallel_size
    # Input and output of the last norm.
    final_norm = 2 * tokens * model.hidden_size * element // (tensor if parallel.sequence_parallel else 1)
    layers = layers_in_flight(config, micro_batches, stage)
    return RankMemory(
        weights=weights,
        gradients=gradients,
        optimizer=state,
        activations=activation_bytes(config, stage, layers, tokens) + final_norm * int(last),
        logits=logits_bytes(config, padded_vocab_size, tokens) if last else 0,
    )


def memory_per_rank(config: Config, padded_vocab_size: int, world_size: int) -> RankMemory:
    """Bytes on the fullest rank of a checked configuration that runs on ``world_size`` devices."""
    training, replicas = config.training, data_parallel_size(config, world_size)
    per_pass = training.micro_batch_size * replicas
    micro_batches = (training.global_batch_size or per_pass) // per_pass
    stages = (
        stage_memory(config, padded_vocab_size, replicas, stage, training.micro_batch_size, micro_batches)
        for stage in range(config.parallel.pipeline_model_parallel_size)
    )
    return max(stages, key=lambda memory: memory.total)


def max_micro_batch(config: Config, padded_vocab_size: int, world_size: int, memory_bytes: float) -> int:
    """Largest micro-batch that leaves :data:`RESERVE` of a device free; 0 when not even one sample fits.

    ``global_batch_size`` is taken as large enough to fill the pipeline.
    """
    replicas, stages = data_parallel_size(config, world_size), config.parallel.pipeline_model_parallel_size
    usable = memory_bytes * (1 - RESERVE)

    def total(stage: int, size: int) -> int:
        return stage_memory(config, padded_vocab_size, replicas, stage, size, 2 * stages).total

    def fitting(stage: int, start: int) -> int:
        slope = total(stage, start + 1) - total(stage, start)
        return start + int((usable - total(stage, start)) // slope)

    # Bytes are one straight line up to the size from which logits are computed in parts, and another from there on.
    whole = whole_logits(config, padded_vocab_size)
    if whole is not None:
        most = min(fitting(stage, whole + 1) for stage in range(stages))
        if most > whole:
            return most
    most = max(0, min(fitting(stage, 0) for stage in range(stages))) if whole != 0 else 0
    return most if whole is None else min(most, whole)


def whole_logits(config: Config, padded_vocab_size: int) -> int | None:
    """The largest micro-batch whose logits all exist at once; None where they always do, or there are none."""
    if config.size.score_head:
        return None
    chunk, rows = (
        config.memory.cross_entropy_chunk_size,
        padded_vocab_size // config.parallel.tensor_model_parallel_size,
    )
    tokens = most_whole(rows, 4 if compute_type(config.training) == "float32" else 2) if chunk is None else chunk
    of_sample = config.training.seq_length // config.parallel.context_parallel_size
    return None if chunk == 0 else max(tokens, CHUNK_IN_PLACE if chunk is None else 0) // of_sample


def run_time(tokens: float, flops_each: float, devices: int, peak_flops: float, mfu: float) -> RunTime:
    """Time for a token budget at a model FLOPs utilisation.

    Args:
        tokens: tokens of the run.
        flops_each: :func:`flops_per_token`, in the convention that ``mfu`` was measured in.
        devices: how many work on it.
        peak_flops: FLOP/s of one device.
        mfu: share of the peak that is reached, in (0, 1].
    """
    if not (devices > 0 and peak_flops > 0 and 0 < mfu <= 1):
        raise ValueError(f"need devices > 0, peak > 0 and 0 < mfu <= 1, not {devices}, {peak_flops:g} and {mfu}")
    flops = tokens * flops_each
    seconds = flops / (devices * peak_flops * mfu)
    return RunTime(flops=flops, seconds=seconds, device_hours=seconds * devices / 3600)
