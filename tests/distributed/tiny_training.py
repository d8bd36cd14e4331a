"""A few steps of a tiny GPT on bare megatron-core with its plain layers, for any layout: the runtime's own proof.

Weights are a function of their name in the whole model, so every layout starts from the same model.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from megatron_steel.runtime import world as runtime
from megatron_steel.runtime.world import World

LAYERS, HIDDEN, VOCAB, LENGTH, BATCH = 4, 32, 64, 16, 8


@dataclass(frozen=True, kw_only=True)
class Layout:
    tensor: int = 1
    pipeline: int = 1
    virtual: int | None = None
    expert: int = 1
    experts: int | None = None
    sequence_parallel: bool = False
    overlap: bool = False
    bf16: bool = False
    steps: int = 3


class Norm(torch.nn.RMSNorm):
    """RMSNorm whose weight gradient is summed over tensor ranks when each sees a part of the sequence.

    megatron-core's own torch norm refuses sequence parallelism.
    """

    def __init__(self, config, hidden_size: int, eps: float = 1e-5) -> None:  # noqa: ANN001
        super().__init__(hidden_size, eps)
        self.weight.sequence_parallel = config.sequence_parallel


def transformer_config(layout: Layout):  # noqa: ANN201 - the type is megatron-core's, imported late
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.transformer.transformer_config import TransformerConfig

    dtype = torch.bfloat16 if layout.bf16 else torch.float32
    moe = dict(
        num_moe_experts=layout.experts, moe_ffn_hidden_size=64, moe_router_topk=2, moe_token_dispatcher_type="alltoall"
    )
    return TransformerConfig(
        num_layers=LAYERS,
        hidden_size=HIDDEN,
        ffn_hidden_size=64,
        num_attention_heads=4,
        num_query_groups=2,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        use_cpu_initialization=True,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=layout.bf16,
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual,
        expert_model_parallel_size=layout.expert,
        sequence_parallel=layout.sequence_parallel,
        overlap_p2p_comm=layout.virtual is not None,
        batch_p2p_comm=layout.virtual is None,
        finalize_model_grads_func=finalize_model_grads,
        **(moe if layout.experts else {}),
    )


def fill(model: torch.nn.Module, layer_offset: int, world: World, experts_offset: int) -> None:
    """Give every parameter the values of its name and, when split, this rank's part of them."""
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        if "layers" in parts:
            parts[parts.index("layers") + 1] = str(int(parts[parts.index("layers") + 1]) + layer_offset)
        if "local_experts" in parts:
            parts[parts.index("local_experts") + 1] = str(int(parts[parts.index("local_experts") + 1]) + experts_offset)
        name = ".".join(parts)
        if "norm" in name:
            parameter.data.fill_(1.0 if name.endswith("weight") else 0.0)
            continue
        name = name.replace("output_layer", "embedding.word_embeddings")
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        split = getattr(parameter, "tensor_model_parallel", False) and world.tensor_size > 1
        shape = list(parameter.shape)
        if split:
            shape[parameter.partition_dim] *= world.tensor_size
        whole = torch.randn(shape, generator=generator) * 0.1
        if split and "linear_fc1" in name:
            halves = [half.chunk(world.tensor_size)[world.tensor_rank] for half in whole.chunk(2)]
            whole = torch.cat(halves)
        elif split:
            whole = whole.chunk(world.tensor_size, dim=parameter.partition_dim)[world.tensor_rank]
        parameter.data.copy_(whole)


def build(layout: Layout, world: World) -> list:
    """The wrapped chunks of this rank."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.module import Float16Module
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    config = transformer_config(layout)
    layer = get_gpt_layer_local_spec(num_experts=layout.experts, normalization="RMSNorm")
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = Norm
    chunks = []
    for stage in range(layout.virtual) if layout.virtual else [None]:
        model = GPTModel(
            config,
            TransformerBlockSubmodules([layer] * get_num_layers_to_build(config, stage, world.pipeline_rank), Norm),
            vocab_size=VOCAB,
            max_sequence_length=LENGTH,
            pre_process=world.pipeline_rank == 0 and stage in (None, 0),
            post_process=world.pipeline_rank == world.pipeline_size - 1 and stage in (None, (layout.virtual or 0) - 1),
            position_embedding_type="rope",
            share_embeddings_and_output_weights=True,
            vp_stage=stage,
        )
        offset = get_transformer_layer_offset(config, stage, world.pipeline_rank)
        fill(model, offset, world, world.expert_rank * (layout.experts or 0) // world.expert_size)
        settings = DistributedDataParallelConfig(
            use_distributed_optimizer=True,
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=layout.overlap,
            bucket_size=10_000 if layout.overlap else None,
        )
        wrapped = Float16Module(config, model) if layout.bf16 else model
        chunks.append(DistributedDataParallel(config, settings, wrapped, disable_bucketing=bool(stage)))
        keep_padding(chunks[-1])
    return chunks


def keep_padding(chunk) -> None:  # noqa: ANN001
    """Make the sharded optimizer save what it indexes: megatron-core 0.16.1 cuts the padding of all buckets but counts
    it in the positions of parameters, so with several buckets it saves and loads shifted state."""
    for buffer in chunk.buffers + chunk.expert_parallel_buffers:
        buffer.numel_unpadded = buffer.numel
        for bucket in buffer.buckets:
            bucket.numel_unpadded = bucket.grad_data.numel()


def optimizer_for(layout: Layout, chunks: list):  # noqa: ANN201 - see transformer_config
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    options = OptimizerConfig(
        optimizer="adam",
        lr=1e-2,
        weight_decay=0.1,
        clip_grad=1.0,
        bf16=layout.bf16,
        params_dtype=torch.bfloat16 if layout.bf16 else torch.float32,
        use_distributed_optimizer=True,
    )
    return get_megatron_optimizer(options, chunks)


def forward_step(iterator, model):  # noqa: ANN001, ANN201 - megatron-core's callback
    tokens = next(iterator)
    positions = torch.arange(LENGTH).expand(tokens.shape[0], -1)
    mask = torch.ones(1, 1, LENGTH, LENGTH).tril() < 0.5
    output = model(tokens[:, :-1], positions, mask, labels=tokens[:, 1:])

    def loss(values: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        mean = values.float().mean()
        return mean, {"loss": mean.detach().clone()}

    return output, loss


def train(layout: Layout) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step; the same on all ranks."""
    world = start(layout)
    chunks = build(layout, world)
    optimizer = optimizer_for(layout, chunks)
    return [step(world, layout, chunks, optimizer, number) for number in range(layout.steps)]


def start(layout: Layout) -> World:
    return runtime.start(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual,
        expert_model_parallel_size=layout.expert,
        timeout_minutes=1,
    )


def step(world: World, layout: Layout, chunks: list, optimizer, number: int) -> tuple[float, float]:  # noqa: ANN001
    from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

    generator = torch.Generator().manual_seed(number)
    samples = torch.randint(0, VOCAB, (BATCH, LENGTH + 1), generator=generator)
    mine = samples.chunk(world.data_size)[world.data_rank]
    micro_batches = mine.split(1 if layout.pipeline > 1 else 2)
    for chunk in chunks:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    run = partial(
        get_forward_backward_func(),
        forward_step_func=forward_step,
        num_microbatches=len(micro_batches),
        seq_length=LENGTH,
        micro_batch_size=len(micro_batches[0]),
    )
    iterators = [iter(micro_batches) for _ in chunks]
    single = layout.virtual is None
    outputs = run(
        data_iterator=iterators[0] if single else iterators, model=chunks[0] if single else chunks, forward_only=False
    )
    _, norm, _ = optimizer.step()
    parts = runtime.gather_objects(world, [output["loss"].item() for output in outputs])
    losses = [loss for part in parts for loss in part]
    return sum(losses) / len(losses), float(norm)


def save_and_load(layout: Layout, directory: str) -> bool:
    """Train, save in torch_dist, train on; load into a fresh model and train on: the same numbers to the bit?"""
    from megatron.core import dist_checkpointing

    from megatron_steel.checkpoint.store import allocate_moments
    from megatron_steel.optim.host_adamw import allow_loading

    how = {"distrib_optim_sharding_type": "fully_reshardable"}
    world = start(layout)
    chunks = build(layout, world)
    optimizer = optimizer_for(layout, chunks)

    def state(loading: bool) -> dict:
        model = {f"model{index}": chunk.module.sharded_state_dict() for index, chunk in enumerate(chunks)}
        return model | {"optimizer": optimizer.sharded_state_dict(model, is_loading=loading, metadata=how)}

    def train_on() -> list[tuple[float, float]]:
        return [step(world, layout, chunks, optimizer, number) for number in (2, 3)]

    for number in range(2):
        step(world, layout, chunks, optimizer, number)
    dist_checkpointing.save(state(False), directory)
    wanted = train_on()
    chunks = build(layout, world)
    optimizer = optimizer_for(layout, chunks)
    allow_loading(optimizer)
    allocate_moments(optimizer)
    loaded = dist_checkpointing.load(state(True), directory)
    for index, chunk in enumerate(chunks):
        chunk.module.load_state_dict(loaded[f"model{index}"])
    optimizer.load_state_dict(loaded["optimizer"])
    found = train_on()
    return found == wanted
