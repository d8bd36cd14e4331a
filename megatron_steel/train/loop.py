"""The loop: batch, step, record, evaluate, save, stop."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.optimizer.optimizer import ChainedOptimizer
from torch import Tensor

from megatron_steel.checkpoint import store
from megatron_steel.checkpoint.state import TrainState
from megatron_steel.config.family import has_experts
from megatron_steel.config.schema import Config
from megatron_steel.data.loader import TrainLoader, ValidLoader
from megatron_steel.evaluate.heldout import HeldOutResult, combine, evaluate
from megatron_steel.evaluate.heldout_pairs import evaluate_objective
from megatron_steel.metrics.collapse import RewardWatch
from megatron_steel.metrics.record import MetricRecorder
from megatron_steel.metrics.sinks import Sinks
from megatron_steel.metrics.throughput import Throughput
from megatron_steel.model.build import Model
from megatron_steel.model.moe import take_balance
from megatron_steel.objective.language import Objective, measure_step
from megatron_steel.optim.schedule import learning_rate
from megatron_steel.runtime import device
from megatron_steel.runtime import world as runtime
from megatron_steel.runtime.garbage import Collector
from megatron_steel.runtime.signals import StopRequest
from megatron_steel.runtime.world import World
from megatron_steel.train.out_of_memory import explained
from megatron_steel.train.replicas import check_replicas
from megatron_steel.train.rollouts import RolloutLoader, ValidRollouts
from megatron_steel.train.step import train_step


@dataclass(kw_only=True)
class Session:
    """All parts of a running job."""

    config: Config
    world: World
    model: Model
    optimizer: ChainedOptimizer
    objective: Objective
    loader: TrainLoader | RolloutLoader
    source_names: list[str]
    """Sources of the ledger, in its order."""
    loss_sums: Tensor
    """Sums of loss, weights and trained labels of each source since the last report, [sources, 3]."""
    token_sums: Tensor
    """Trained tokens of each source since the run began, [sources] float64."""
    skipped: Tensor
    """Steps without an update that `state` does not count yet, an int64 scalar on the device."""
    valid_loaders: Mapping[str, ValidLoader | ValidRollouts]
    byte_lengths: np.ndarray
    state: TrainState
    recorder: MetricRecorder
    throughput: Throughput
    sinks: Sinks
    stop_request: StopRequest
    write_extras: Callable[[Path], None]
    started: float
    """``time.monotonic`` at the start of the job."""
    collector: Collector = field(default_factory=Collector)
    watch: RewardWatch | None = None
    """Looks for rewards that collapse."""
    last_saved: int = -1
    """Iteration of the newest checkpoint this job wrote or loaded."""
    last_compared: int = -1
    """Iteration after which the weights of all replicas were last found equal."""


def take_step(session: Session) -> None:
    """One optimizer step, or with ``--grpo-iterations`` several on the same batch, and its bookkeeping."""
    state, config = session.state, session.config
    batches = session.loader.step(state.consumed_samples)
    size = measure_step(session.world, batches, equal_ranks=session.loader.builder.equal_counts)
    lr = learning_rate(state.iteration, config.optimizer, config.training.train_iters)
    results = [
        train_step(
            session.model,
            session.optimizer,
            batches,
            session.objective,
            size.weight,
            session.world,
            lr,
            config.optimizer.weight_decay,
            config.optimizer.clip_grad,
            len(session.source_names),
        )
        for _ in range(config.preference.grpo_iterations)
    ]
    result, updated = results[-1], torch.stack([one.updated for one in results]).all()
    samples = session.loader.sizes.at(state.consumed_samples)
    state.iteration += 1
    state.consumed_samples += samples
    state.consumed_tokens += size.trained
    session.skipped += ~updated
    session.loss_sums += sum(result.loss_sums for result in results)
    session.token_sums += result.loss_sums[:, 2]
    for number, name in enumerate(session.objective.metric_names):
        for one in results:
            session.recorder.record(name, one.metric_sums[number] / size.weight)
    session.recorder.record("grad_norm", result.grad_norm, "last")
    if result.loss_scale is not None:
        session.recorder.record("loss_scale", result.loss_scale, "last")
    if config.size.num_experts is not None:
        layers = sum(has_experts(config.size, layer) for layer in range(config.size.num_layers))
        balance = take_balance(session.model.chunks, session.world.device)
        session.recorder.record("moe_balance_loss", balance / layers)
    session.recorder.record("lr", lr, "last")
    session.recorder.record("global_batch_size", samples, "last")
    if size.read_tokens is not None:
        session.recorder.record("trained_token_share", size.trained / size.read_tokens)
    session.recorder.record("nan_iterations", ~updated, "sum")


def mean_losses(session: Session) -> dict[str, Any]:
    """Mean loss per label since the last report, over all sources and for each that was drawn from."""
    sums = session.loss_sums.tolist()
    session.loss_sums.zero_()
    by_source = {
        name: loss / weight for name, (loss, weight, _) in zip(session.source_names, sums, strict=True) if weight
    }
    return {"loss": sum(row[0] for row in sums) / sum(row[1] for row in sums), "loss_by_source": by_source}


def seen_by_source(session: Session) -> dict[str, dict[str, Any]]:
    """Tokens read from each source so far, and how often its windows were seen.

    They are a function of the order, masked ones included; of padded samples, those that were trained are counted.
    """
    ledger, samples = session.loader.ledger, session.state.consumed_samples
    tokens = (ledger.consumed(samples) * ledger.seq_length).tolist()
    if session.loader.builder.padded:
        tokens = [int(count) for count in session.token_sums.tolist()]
    return {
        "consumed_tokens_by_source": dict(zip(session.source_names, tokens, strict=True)),
        "epochs_by_source": dict(zip(session.source_names, ledger.epochs(samples).tolist(), strict=True)),
    }


def skipped_steps(session: Session) -> int:
    """Steps without an update so far, those that the device has counted since included; waits for the device."""
    session.state.skipped_iterations += int(session.skipped)
    session.skipped.zero_()
    return session.state.skipped_iterations


@contextmanager
def paused(session: Session, what: str) -> Iterator[None]:
    """Time in here is no training time; what the device still has to train is done before it begins."""
    device.synchronize()
    what = f"{what} after iteration {session.state.iteration}"
    with session.throughput.pause(), explained(what, session.config, session.world):
        session.collector.collect()
        yield


def report(session: Session) -> None:
    """Write one row of training metrics to every sink."""
    state = session.state
    row = session.recorder.flush(state.iteration)
    if "moe_balance_loss" in row:
        # Each rank has a part of it, from its layers and its tokens.
        row["moe_balance_loss"] = sum(runtime.gather_objects(session.world, row["moe_balance_loss"]))
    warning = session.watch.see(row) if session.watch is not None else None
    if warning is not None and session.world.rank == 0:
        print(warning, flush=True)
    session.sinks.write(
        {
            "iteration": state.iteration,
            "consumed_samples": state.consumed_samples,
            "consumed_tokens": state.consumed_tokens,
            **mean_losses(session),
            **seen_by_source(session),
            **row,
            "global_batch_size": int(row["global_batch_size"]),
            **session.throughput.lap(state.iteration, state.consumed_samples),
            "skipped_iterations": skipped_steps(session),
            "peak_memory_bytes": device.peak_memory_bytes(),
        }
    )


def evaluate_all(session: Session) -> None:
    """Score every validation set and write one row for each; of several sets also one without a name for all."""
    head = {"iteration": session.state.iteration, "split": "valid"}
    results: list[HeldOutResult] = []
    with paused(session, "evaluation"):
        for name, loader in session.valid_loaders.items():
            if session.objective.metric_names:
                scored = evaluate_objective(session.model, loader, session.objective, session.world)
                session.sinks.write({**head, "name": name, **scored})
                continue
            scores = evaluate(session.model, loader, session.byte_lengths, session.world)
            session.sinks.write({**head, "name": name, **scores.as_row()})
            results.append(scores)
        if len(results) > 1:
            session.sinks.write({**head, **combine(results).as_row()})


def compare_replicas(session: Session) -> None:
    """Compare the weights of all replicas unless that was done after this iteration."""
    if session.last_compared == session.state.iteration:
        return
    with paused(session, "comparing replicas"):
        check_replicas(session.model, session.world, session.state.iteration)
    session.last_compared = session.state.iteration


def save(session: Session) -> None:
    """Write a checkpoint of the current iteration unless it is there already.

    A run that compares its replicas does so before: no checkpoint of weights that went astray follows a good one.
    """
    options, state = session.config.checkpoint, session.state
    if options.save is None or session.last_saved == state.iteration:
        return
    if session.config.training.check_weight_hash_across_dp_replicas_interval is not None:
        compare_replicas(session)
    state.skipped_iterations = skipped_steps(session)
    state.world_size = session.world.size
    state.consumed_tokens_by_source = seen_by_source(session)["consumed_tokens_by_source"]
    with paused(session, "saving"):
        store.save(
            Path(options.save),
            session.model,
            session.optimizer,
            state,
            session.world,
            session.write_extras,
            options.save_total_limit,
        )
    session.last_saved = state.iteration


def reason_to_stop(session: Session) -> str | None:
    """Why the loop should end after this step, agreed on by all ranks; None to go on."""
    training = session.config.training
    minutes = (time.monotonic() - session.started) / 60
    late = training.exit_duration_in_mins is not None and minutes >= training.exit_duration_in_mins
    if runtime.agree(session.world, bool(session.stop_request) or late):
        return "time is up" if late else "a signal asked for it"
    if session.watch is not None and session.watch.collapsed:
        return "the rewards of good and bad answers fall together"
    if training.exit_interval and session.state.iteration % training.exit_interval == 0:
        return "exit interval reached"
    return None


def due(iteration: int, interval: int | None) -> bool:
    """Whether something with this interval happens after ``iteration``."""
    return interval is not None and iteration % interval == 0


def train(session: Session) -> str:
    """Repeat until the last iteration or a reason to stop; saves before it returns the reason."""
    config, state = session.config, session.state
    while state.iteration < config.training.train_iters:
        with explained(f"iteration {state.iteration + 1}", config, session.world):
            take_step(session)
        session.collector.after_step(state.iteration)
        if due(state.iteration, config.logging.log_interval) or state.iteration == config.training.train_iters:
            report(session)
        if due(state.iteration, config.training.check_weight_hash_across_dp_replicas_interval):
            compare_replicas(session)
        reason = reason_to_stop(session)
        if reason is None and due(state.iteration, config.logging.eval_interval):
            evaluate_all(session)
        if reason is not None or due(state.iteration, config.checkpoint.save_interval):
            save(session)
        if reason is not None:
            return reason
    if not due(state.iteration, config.logging.eval_interval):
        evaluate_all(session)
    save(session)
    return "all iterations done"
