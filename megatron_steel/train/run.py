"""The one place where all rooms meet: build each part from the configuration, train, close."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch

from megatron_steel.checkpoint import store
from megatron_steel.config.check import padded_vocab_size, virtual_chunks
from megatron_steel.config.check_precision import compute_type, fp8_unit
from megatron_steel.config.load import expand_model, to_flat
from megatron_steel.config.rampup import batch_sizes
from megatron_steel.data.batch import Builder
from megatron_steel.data.chat_batches import ChatBatchBuilder
from megatron_steel.data.chat_dataset import PLANES
from megatron_steel.data.document_batches import BatchBuilder
from megatron_steel.data.loader import BatchLayout, TrainLoader, ValidLoader
from megatron_steel.data.pair_dataset import PAIR_PLANES, PairDataset
from megatron_steel.metrics.collapse import RewardWatch
from megatron_steel.metrics.record import MetricRecorder
from megatron_steel.metrics.sinks import Sinks, open_sinks
from megatron_steel.metrics.throughput import Throughput
from megatron_steel.model.build import Model, build_model
from megatron_steel.model.fully_sharded import held_elements
from megatron_steel.objective.language import NextToken, Objective
from megatron_steel.optim.optimizer import build_optimizer
from megatron_steel.plan.estimate import flops_per_token
from megatron_steel.runtime import device, environment
from megatron_steel.runtime import world as runtime
from megatron_steel.runtime.contact import watching
from megatron_steel.runtime.garbage import Collector
from megatron_steel.runtime.signals import StopRequest
from megatron_steel.runtime.world import World
from megatron_steel.train.extras import write_extras
from megatron_steel.train.loop import Session, train
from megatron_steel.train.out_of_memory import OutOfMemory, explained
from megatron_steel.train.preflight import preflight
from megatron_steel.train.prepare import Prepared
from megatron_steel.train.pretrained import Pretrained
from megatron_steel.train.references import load_weights, preference_objective
from megatron_steel.train.replicas import ReplicaError
from megatron_steel.train.rollouts import RolloutLoader, ValidRollouts, open_rollouts


def describe(prepared: Prepared, model: Model, world: World) -> list[str]:
    """The first lines of a log: machine, backend, sizes, data, warnings, all options."""
    config, state = prepared.config, prepared.state
    total = sum(held_elements(p) for module in model.language_models() for p in module.parameters())
    lines = [world.one_line()]
    if world.device.type != "cpu":
        lines.append(environment.one_line(world.tensor_size > 1 or world.context_size > 1))
    lines += [f"layers: {model.backend} ({model.backend_reason}), {total:,} parameters on this rank"]
    if config.model:
        lines.append(f"--model {config.model} stands for: {' '.join(expand_model(config))}")
    left = config.training.train_iters - state.iteration
    total_samples = batch_sizes(config.training).consumed_after(left, state.consumed_samples)
    now = {source.fingerprint: source.weight for source in prepared.ledger.sources_at(state.consumed_samples)}
    for source, row in zip(prepared.ledger.sources, prepared.ledger.epoch_table(total_samples), strict=True):
        dataset = prepared.datasets.get(source.fingerprint)
        selected = dataset.describe() if dataset is not None else ""
        lines.append(
            f"data: {row.name}: share {now.get(source.fingerprint, 0.0):.4f}, {row.windows:,} windows"
            f"{' ' * bool(selected)}{selected}, "
            f"{row.samples:,} samples = {row.epochs:.3f} epochs by the end of the run"
        )
    for segment in prepared.ledger.segments:
        if segment.start > state.consumed_samples:
            shares = ", ".join(f"{source.name} {source.share:.4f}" for source in segment.sources)
            lines.append(f"data from sample {segment.start:,} on: {shares}")
    for name, dataset in prepared.valid_sets.items():
        lines.append(f"validation: {name}: {len(dataset):,} windows")
    origin = prepared.checkpoint or prepared.hf_folder
    if origin is not None:
        what = "weights" if prepared.weights_only else f"iteration {state.iteration}"
        lines.append(f"starting from {origin} ({what})")
    lines += prepared.notes
    lines += [f"warning: {line}" for line in prepared.warnings]
    lines.append("options: " + ", ".join(f"{key}={value}" for key, value in to_flat(config).items()))
    return lines


def deal_batches(prepared: Prepared, world: World) -> tuple[BatchLayout, Builder]:
    """Which samples of a global batch this rank takes, and what it makes of them."""
    config = prepared.config
    training = config.training
    assert training.global_batch_size is not None
    layout = BatchLayout(
        micro_batch_size=training.micro_batch_size,
        num_microbatches=training.global_batch_size // (training.micro_batch_size * world.data_size),
        data_parallel_rank=world.data_rank,
        data_parallel_size=world.data_size,
    )
    if prepared.template is not None:
        return layout, chat_builder(prepared, world)
    return layout, BatchBuilder(
        seq_length=training.seq_length,
        tensor_group=world.sample_group,
        reads_data=world.pipeline_rank in (0, world.pipeline_size - 1),
        device=world.device,
        eod_id=prepared.tokenizer.eos_id,
        eod_mask_loss=config.data.eod_mask_loss,
        reset_attention_mask=config.data.reset_attention_mask,
        reset_position_ids=config.data.reset_position_ids,
        padded=config.data.sequence_mode != "concat",
        context_rank=world.context_rank,
        context_size=world.context_size,
    )


def chat_builder(prepared: Prepared, world: World) -> ChatBatchBuilder:
    """What this rank makes of conversations."""
    config = prepared.config
    # A row is cut into two chunks for each context rank, and by sequence parallelism into one for each tensor rank.
    chunks = 2 * world.context_size if world.context_size > 1 else 1
    # Rows whose prompts are shared are as long as what is in them.
    shared = any(isinstance(data, PairDataset) and data.share for data in prepared.datasets.values())
    return ChatBatchBuilder(
        seq_length=config.training.seq_length,
        packing=config.chat.packing and prepared.reward is None and not shared,
        planes=len(PAIR_PLANES if prepared.preferences else PLANES),
        group=world.sample_group,
        device=world.device,
        one_shape=world.pipeline_size > 1,
        multiple=chunks * world.tensor_size * fp8_unit(config),
        context_rank=world.context_rank,
        context_size=world.context_size,
    )


def build_throughput(prepared: Prepared, world: World) -> Throughput:
    """The stopwatch of this run; measures a matrix product where no data sheet gives the device's peak."""
    config, state = prepared.config, prepared.state
    training, size = config.training, config.size
    padded = padded_vocab_size(state.vocab_size, size.make_vocab_size_divisible_by, world.tensor_size)
    peak, _ = device.peak_flops(getattr(torch, compute_type(training)))
    left = training.train_iters - state.iteration
    return Throughput(
        flops_per_token=flops_per_token(size, training.seq_length, padded),
        tokens_per_sample=prepared.tokens_per_sample or training.seq_length,
        devices=world.size,
        peak_flops=peak,
        total_samples=batch_sizes(training).consumed_after(left, state.consumed_samples),
        iteration=state.iteration,
        samples=state.consumed_samples,
    )


def open_loaders(
    prepared: Prepared, model: Model, world: World, layout: BatchLayout, builder: Builder
) -> tuple[TrainLoader | RolloutLoader, Mapping[str, ValidLoader | ValidRollouts]]:
    """Where batches come from: read, or sampled from the model that is trained."""
    config = prepared.config
    samples = config.logging.eval_iters * (config.training.global_batch_size or 1)
    if prepared.reward is not None:
        return open_rollouts(prepared, model, world, layout, builder, samples)
    first, sizes = prepared.state.consumed_samples, batch_sizes(config.training)
    valid = {name: ValidLoader(dataset, layout, builder, samples) for name, dataset in prepared.valid_sets.items()}
    return TrainLoader(prepared.ledger, prepared.datasets, layout, builder, first, sizes), valid


def build_session(prepared: Prepared, world: World, stop_request: StopRequest, started: float) -> Session:
    """Build model, optimizer, loaders and sinks, and load the checkpoint."""
    config, state = prepared.config, prepared.state
    model = build_model(config, state.vocab_size, world)
    optimizer = build_optimizer(config, model)
    layout, builder = deal_batches(prepared, world)
    # Before the run's own weights: the reference's are in the model meanwhile.
    objective: Objective = NextToken()
    if prepared.preferences or prepared.reward is not None:
        objective = preference_objective(prepared, model, world, layout, builder)
    if prepared.checkpoint is not None and not prepared.weights_only:
        store.load_training(prepared.checkpoint, model, optimizer, state, world)
    elif (origin := Pretrained.of(prepared.checkpoint, prepared.hf_folder)) is not None:
        load_weights(origin, model, config.size)
        optimizer.reload_model_params()
    if world.rank == 0:
        print("\n".join(describe(prepared, model, world)), flush=True)
    loader, valid_loaders = open_loaders(prepared, model, world, layout, builder)
    sources = prepared.ledger.sources
    # The order of a ledger's sources never changes, their names may; new ones come last.
    tokens_before = [*state.consumed_tokens_by_source.values(), *[0] * len(sources)][: len(sources)]
    return Session(
        config=config,
        world=world,
        model=model,
        optimizer=optimizer,
        objective=objective,
        loader=loader,
        source_names=[source.name for source in sources],
        loss_sums=torch.zeros(len(sources), 3, dtype=torch.float64, device=world.device),
        token_sums=torch.tensor(tokens_before, dtype=torch.float64, device=world.device),
        skipped=torch.zeros((), dtype=torch.int64, device=world.device),
        valid_loaders=valid_loaders,
        byte_lengths=prepared.tokenizer.byte_lengths(),
        state=state,
        recorder=MetricRecorder(device=world.device),
        throughput=build_throughput(prepared, world),
        sinks=open_sinks(config, state.iteration) if world.rank == 0 else Sinks([]),
        stop_request=stop_request,
        write_extras=partial(write_extras, prepared),
        collector=Collector(config.training.manual_gc, config.training.manual_gc_interval),
        started=started,
        watch=None
        if objective.watched is None
        else RewardWatch(*objective.watched, config.preference.reward_collapse_patience),
        last_saved=state.iteration if prepared.checkpoint is not None and not prepared.weights_only else -1,
    )


def run(prepared: Prepared) -> int:
    """Train to the end or to a reason to stop; returns the process's exit code.

    A save that failed, a peer that is gone, replicas that differ and memory that is full are one line each and give 1;
    anything else that goes wrong is raised.
    No rank waits for the others then.
    """
    started = time.monotonic()
    config = prepared.config
    world = runtime.start(
        tensor_model_parallel_size=config.parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=config.parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=virtual_chunks(config),
        context_parallel_size=config.parallel.context_parallel_size,
        expert_model_parallel_size=config.parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=config.parallel.expert_tensor_parallel_size,
        timeout_minutes=config.parallel.distributed_timeout_minutes,
        seed=config.data.seed,
        recordable_rng=config.training.cuda_graph_impl != "none",
    )
    try:
        with watching(world), StopRequest() as stop_request:
            with explained("building model and optimizer", config, world):
                session = build_session(prepared, world, stop_request, started)
            if prepared.template is not None and config.chat.preflight:
                line = preflight(session, prepared.datasets)
                if world.rank == 0:
                    print(line, flush=True)
            with session.loader, session.collector:
                reason = train(session)
            session.sinks.close()
            if world.rank == 0:
                where = f", saved in {Path(config.checkpoint.save)}" if config.checkpoint.save else ""
                print(f"stopped at iteration {session.state.iteration}: {reason}{where}", flush=True)
    except (store.SaveError, ReplicaError, OutOfMemory) as error:
        print(f"error: rank {world.rank}: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        return 1
    return 0
