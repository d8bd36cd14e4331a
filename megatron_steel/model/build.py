"""Building a model, in one written order: configuration, layer spec, chunks, weights, precision, data parallelism."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import Float16Module, MegatronModule
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group
from torch import Tensor

from megatron_steel.config.check import padded_vocab_size, virtual_chunks
from megatron_steel.config.check_precision import compute_type
from megatron_steel.config.family import tied
from megatron_steel.config.rope import longest_sequence
from megatron_steel.config.schema import Config
from megatron_steel.model.backends import build_provider, choose_backend
from megatron_steel.model.embedding import add_embedding_scale, add_stable_embedding
from megatron_steel.model.families import transformer_config
from megatron_steel.model.fully_sharded import FullyShardedModel
from megatron_steel.model.initialize import initialize_weights
from megatron_steel.model.lora import add_adapters, reset_magnitudes
from megatron_steel.model.moe import mark_experts
from megatron_steel.model.output import set_output_layer
from megatron_steel.model.rope import add_rotary_table
from megatron_steel.model.score import set_score_layer
from megatron_steel.model.spec import layer_spec
from megatron_steel.model.trained import choose_trained
from megatron_steel.model.weight_gradients import fuse_weight_gradients
from megatron_steel.runtime.world import World

# Parameters per gradient bucket when reduction overlaps the backward pass: megatron-core's own choice.
BUCKET_PARAMETERS = 40_000_000
BUCKET_PARAMETERS_PER_RANK = 1_000_000


class LanguageModel(GPTModel):
    """megatron-core's GPT with the loss of our output layer and rotary angles that follow ``position_ids``.

    The latter for packed documents only: megatron-core counts positions from the start of each by itself, whatever
    the position ids say. Every pipeline stage needs the position ids then.
    """

    def _preprocess(
        self, position_ids: Tensor, packed_seq_params: PackedSeqParams | None = None, **rest: Any
    ) -> tuple[Any, ...]:
        """megatron-core's inputs of the decoder; the second is the rotary angles, [T, 1, 1, D] by token when packed."""
        inputs = super()._preprocess(position_ids=position_ids, packed_seq_params=packed_seq_params, **rest)
        if packed_seq_params is None or inputs[1] is None:
            return inputs
        # Angles by token are what megatron-core's own rotation takes too, as long as their number is that of tokens.
        return (inputs[0], inputs[1].index_select(0, position_ids.flatten()), *inputs[2:])

    def _postprocess(self, hidden_states: Tensor, labels: Tensor | None = None, **rest: Any) -> Tensor:
        """hidden_states [S, B, H] -> fp32 losses [B, S] of ``labels`` [B, S]; without them, as in megatron-core."""
        if labels is None or not self.post_process:
            return super()._postprocess(hidden_states=hidden_states, labels=labels, **rest)
        tied = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        losses_SB, _ = self.output_layer(hidden_states, weight=tied, labels_SB=labels.transpose(0, 1))
        # Not a view: a fully sharded model hangs the start of its backward pass on what it returns.
        return losses_SB.transpose(0, 1).clone()


class ScoringModel(LanguageModel):
    """A model of texts' worth: its output are scores of tokens, whatever their labels."""

    def _postprocess(self, hidden_states: Tensor, **rest: Any) -> Tensor:
        """hidden_states [S, B, H] -> fp32 scores [B, S] on the last pipeline stage."""
        if not self.post_process:
            return super()._postprocess(hidden_states=hidden_states, **rest)
        scores_BS: Tensor = self.score(hidden_states)
        return scores_BS

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """That of the modules: megatron-core's of language models would mark a weight of logits, which is not there."""
        known = ensure_metadata_has_dp_cp_group(metadata)
        state: dict[str, Any] = MegatronModule.sharded_state_dict(self, prefix, sharded_offsets, known)
        return state


@dataclass(kw_only=True, slots=True)
class Model:
    """The chunks of the model this rank holds, ready to train or to evaluate."""

    chunks: list[MegatronModule]
    """One module per virtual pipeline stage; wrapped for data parallelism when built for training."""
    options: TransformerConfig
    """megatron-core's configuration."""
    backend: str
    """Resolved layer backend."""
    backend_reason: str
    """Why it was chosen, for the first lines of the log."""
    vocab_size: int
    """Rows of the vocabulary without padding."""
    trains_some_layers: bool = False
    """Whether some decoder layers are trained and others are not."""

    def language_models(self) -> list[LanguageModel]:
        """The bare models inside the wrappers."""
        found = []
        for chunk in self.chunks:
            module = chunk
            while not isinstance(module, LanguageModel):
                module = module.module
            found.append(module)
        return found

    def gather_parameters(self) -> None:
        """Bring weights that the optimizer updated on other ranks here now; collective over the replicas.

        With ``overlap_param_gather`` they would only arrive during the next forward pass: whoever reads weights
        between two steps has to call this first.
        """
        for chunk in self.chunks:
            if isinstance(chunk, DistributedDataParallel) and chunk.ddp_config.overlap_param_gather:
                chunk.start_param_sync(force_sync=True)


def build_chunk(
    config: Config, options: TransformerConfig, backend: str, vocab_size: int, world: World, stage: int | None
) -> LanguageModel:
    """One model chunk with its initial weights; ``stage`` is its virtual pipeline stage or None."""
    size, chunks = config.size, virtual_chunks(config) or 1
    first = world.pipeline_rank == 0 and stage in (None, 0)
    last = world.pipeline_rank == world.pipeline_size - 1 and stage in (None, chunks - 1)
    before = get_transformer_layer_offset(options, stage, world.pipeline_rank)
    layers = range(before, before + get_num_layers_to_build(options, stage, world.pipeline_rank))
    spec = layer_spec(build_provider(backend, size, config.parallel.moe_grouped_gemm), size, layers)
    if config.lora.lora_rank is not None:
        add_adapters(spec, config.lora, size)
    kind = ScoringModel if size.score_head else LanguageModel
    model = kind(
        options,
        spec,
        vocab_size=padded_vocab_size(vocab_size, size.make_vocab_size_divisible_by, world.tensor_size),
        max_sequence_length=longest_sequence(size),
        pre_process=first,
        post_process=last,
        share_embeddings_and_output_weights=tied(size),
        # megatron-core has no ALiBi; the attention brings it in.
        position_embedding_type="none" if size.position_embedding_type == "alibi" else size.position_embedding_type,
        rotary_percent=size.rotary_percent,
        rotary_base=size.rotary_base,  # type: ignore[arg-type]
        vp_stage=stage,
    )
    add_rotary_table(model, size)
    if first and size.stable_embedding:
        add_stable_embedding(model, size, options)
    if first and size.embedding_scale:
        add_embedding_scale(model, size.hidden_size)
    if last and size.score_head:
        set_score_layer(model, options, world.tensor_group)
    elif last:
        chunk = config.memory.cross_entropy_chunk_size
        set_output_layer(model, vocab_size, size.final_logit_softcapping, chunk)
    mark_experts(model)
    initialize_weights(model, size, vocab_size, config.data.seed, world.tensor_group)
    choose_trained(config, model)
    return model


def wrap_data_parallel(
    config: Config, options: TransformerConfig, modules: list[MegatronModule], world: World
) -> list[MegatronModule]:
    """megatron-core's data parallelism: gradients in one flat buffer (fp32 but in pure bf16), summed over replicas."""
    parallel = config.parallel
    bucket = max(BUCKET_PARAMETERS, BUCKET_PARAMETERS_PER_RANK * world.data_size * world.context_size)
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=not config.training.pure_bf16,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        bucket_size=bucket if parallel.overlap_grad_reduce else None,
    )
    wrapped: list[MegatronModule] = []
    for index, module in enumerate(modules):
        # Only the first chunk of a pipeline stage has its gradients reduced during the backward pass of others.
        wrapped.append(DistributedDataParallel(options, settings, module, disable_bucketing=index > 0))
        save_padding(wrapped[-1])
    if config.training.gradient_accumulation_fusion:
        fuse_weight_gradients(options, wrapped)
    if parallel.overlap_grad_reduce:
        # Without it megatron-core counts a parameter's gradients in the first step, and reduces once there are as many:
        # too early, without the rest, in a step of more micro-batches than the first.
        waits = [chunk.no_sync for chunk in wrapped]
        options.no_sync_func = waits[0] if len(waits) == 1 else waits  # type: ignore[assignment]
    return wrapped


def save_padding(chunk: DistributedDataParallel) -> None:
    """Make the sharded optimizer save what it indexes.

    megatron-core 0.16.1 cuts the padding at the end of every bucket from what it saves but counts it in the positions
    of parameters: with several buckets, saved and loaded state is shifted, and a resumed run goes wrong in silence.
    """
    for buffer in chunk.buffers + chunk.expert_parallel_buffers:
        buffer.numel_unpadded = buffer.numel
        for bucket in buffer.buckets:
            bucket.numel_unpadded = bucket.grad_data.numel()


def build_model(config: Config, vocab_size: int, world: World, training: bool = True) -> Model:
    """Build this rank's part of the model on its device.

    ``vocab_size`` is the number of real rows (the tokenizer's, or more). ``training`` wraps for data parallelism.
    Raises ``ValueError`` when the wished backend cannot run here.
    """
    backend, reason = choose_backend(config.parallel.transformer_impl, config.size)
    options = transformer_config(config, backend)
    chunks = virtual_chunks(config)
    stages: list[int | None] = list(range(chunks)) if chunks else [None]
    modules: list[MegatronModule] = [
        build_chunk(config, options, backend, vocab_size, world, stage).to(world.device) for stage in stages
    ]
    if compute_type(config.training) != "float32" and not config.parallel.use_torch_fsdp2:
        modules = [Float16Module(options, module) for module in modules]
    if config.lora.use_dora:
        reset_magnitudes(modules)
    if training and config.parallel.use_torch_fsdp2:
        compute = torch.bfloat16 if config.training.bf16 else None
        modules = [FullyShardedModel(options, module, world, compute) for module in modules]
    elif training:
        modules = wrap_data_parallel(config, options, modules, world)
        options.finalize_model_grads_func = lambda chunks, _tokens=None, **rest: finalize_model_grads(
            chunks, None, **rest
        )
    return Model(
        chunks=modules,
        options=options,
        backend=backend,
        backend_reason=reason,
        vocab_size=vocab_size,
        trains_some_layers=config.lora.freeze_trainable_layers is not None,
    )
