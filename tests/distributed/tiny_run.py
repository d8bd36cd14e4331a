"""A tiny model trained through the real path (options, checks, ledger, loader, step, checkpoint) on any layout.

Functions that start with ``work_`` run on the ranks of the pool: ``pool.run(2, work_train, flat, 20, join=False)``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_steel.config.check import virtual_chunks
from megatron_steel.config.load import from_flat
from megatron_steel.data.indexed import IndexedWriter
from megatron_steel.model.initialize import model_wide_name
from megatron_steel.runtime import world as runtime
from megatron_steel.runtime.signals import StopRequest
from megatron_steel.runtime.world import World
from megatron_steel.train.loop import Session, mean_losses, save, take_step
from megatron_steel.train.prepare import prepare
from megatron_steel.train.prepare_chat import prepare_chat
from megatron_steel.train.prepare_preference import prepare_preference
from megatron_steel.train.run import build_session

ROWS = 1000
"""Rows of the vocabulary: padded to 1008 by one tensor-parallel rank and to 1024 by two."""

OPTIONS: dict[str, Any] = {
    "model_family": "qwen2",
    "add_qkv_bias": True,
    "num_layers": 4,
    "hidden_size": 32,
    "ffn_hidden_size": 64,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "make_vocab_size_divisible_by": 16,
    "max_position_embeddings": 32,
    "tokenizer_type": "NullTokenizer",
    "vocab_size": ROWS - 1,
    "seq_length": 32,
    "micro_batch_size": 2,
    "global_batch_size": 8,
    "train_iters": 20,
    "lr": 2e-3,
    "lr_warmup_iters": 2,
    "min_lr": 2e-4,
}
# Changes of the above that make other families: Llama's attention, and GPT's norms and feed-forward.
PLAIN: dict[str, Any] = {"add_qkv_bias": False}
GPT: dict[str, Any] = {
    **PLAIN,
    "normalization": "LayerNorm",
    "activation": "gelu",
    "gated_linear_unit": False,
    "add_bias_linear": True,
    "num_query_groups": None,
}


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Ranks and the flags that spread a model over them."""

    ranks: int = 1
    flags: dict[str, Any] = field(default_factory=dict)


TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
CP2 = {"context_parallel_size": 2}
SHARDED = {"use_distributed_optimizer": True}
OVERLAPPED = {**SHARDED, "overlap_grad_reduce": True, "overlap_param_gather": True}

MIXTURE: dict[str, Any] = {
    "model_family": "qwen3_moe",
    "add_qkv_bias": False,
    "qk_layernorm": True,
    "num_experts": 8,
    "moe_router_topk": 2,
    "moe_router_pre_softmax": True,
    "moe_ffn_hidden_size": 24,
    "moe_aux_loss_coeff": 0.05,
}
"""What makes the tiny model a mixture of experts."""

LAYOUTS: dict[str, Layout] = {
    "1": Layout(),
    "tp2": Layout(ranks=2, flags=TP2),
    "tp2-sp": Layout(ranks=2, flags={**TP2, "sequence_parallel": True}),
    "pp2": Layout(ranks=2, flags=PP2),
    "pp2-interleaved": Layout(ranks=2, flags={**PP2, "num_layers_per_virtual_pipeline_stage": 1}),
    "dp2": Layout(ranks=2),
    "dp2-sharded": Layout(ranks=2, flags=SHARDED),
    "dp2-overlapped": Layout(ranks=2, flags=OVERLAPPED),
    "tp2-pp2": Layout(ranks=4, flags={**TP2, **PP2}),
    "tp2-dp2-sharded": Layout(ranks=4, flags={**TP2, **SHARDED}),
    "cp2": Layout(ranks=2, flags=CP2),
    "cp4": Layout(ranks=4, flags={"context_parallel_size": 4}),
    "cp2-tp2-sp": Layout(ranks=4, flags={**CP2, **TP2, "sequence_parallel": True}),
    "cp2-pp2": Layout(ranks=4, flags={**CP2, **PP2}),
    "cp2-dp2-overlapped": Layout(ranks=4, flags={**CP2, **OVERLAPPED}),
}


@dataclass(kw_only=True)
class Trace:
    """What a rank saw; the numbers are the same on every rank, the weights are this rank's."""

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    rows: list[dict[str, float]] = field(default_factory=list)
    """What was recorded of each step."""
    weights: dict[str, np.ndarray] = field(default_factory=dict)
    splits: dict[str, int] = field(default_factory=dict)
    """Axis along which a weight is shared out over tensor-parallel ranks."""
    tensor_rank: int = 0
    expert_tensor_rank: int = 0
    gated: bool = True
    """Whether the first matrix of a feed-forward holds two."""
    consumed_samples: int = 0


def write_data(folder: Path, documents: int = 120, seed: int = 0, name: str = "set") -> str:
    """Documents of a noisy arithmetic over the ids, so that there is something to learn; returns the prefix."""
    rng = np.random.default_rng(seed)
    prefix = str(folder / name)
    with IndexedWriter(prefix, np.dtype(np.uint16)) as writer:
        for _ in range(documents):
            length, first = int(rng.integers(20, 200)), int(rng.integers(0, 50))
            ids = (first + 7 * np.arange(length)) % 90 + (rng.random(length) < 0.1) * rng.integers(0, ROWS - 95, length)
            writer.add_document([*ids.tolist(), ROWS - 1])
        writer.commit()
    return prefix


def options(prefix: str, *changes: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Flat options of a run on the data at ``prefix``."""
    merged: dict[str, Any] = {**OPTIONS, "train_data_path": [prefix]}
    for change in (*changes, more):
        merged.update(change)
    return merged


@contextmanager
def open_session(flat: dict[str, Any]) -> Iterator[Session]:
    """The run of these options on this rank, built by the code that the command line uses."""
    preferences = flat.get("preferences", False)
    flat = {name: value for name, value in flat.items() if name != "preferences"}
    config = from_flat(flat)
    prepare_rows = prepare_preference if preferences else prepare_chat
    prepared = prepare_rows(config) if config.chat.train_data else prepare(config)
    world = start_world(flat)
    session = build_session(prepared, world, StopRequest(), 0.0)
    with session.loader:
        yield session
    session.sinks.close()


def start_world(flat: dict[str, Any]) -> World:
    config = from_flat(flat)
    return runtime.start(
        tensor_model_parallel_size=config.parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=config.parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=virtual_chunks(config),
        context_parallel_size=config.parallel.context_parallel_size,
        expert_model_parallel_size=config.parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=config.parallel.expert_tensor_parallel_size,
        timeout_minutes=1.0,
        seed=config.data.seed,
    )


def take_steps(session: Session, steps: int, trace: Trace) -> None:
    """Optimizer steps, each with its loss and gradient norm written down."""
    for _ in range(steps):
        take_step(session)
        row = session.recorder.flush(session.state.iteration)
        trace.losses.append(mean_losses(session)["loss"])
        trace.grad_norms.append(row["grad_norm"])
        trace.rates.append(row["lr"])
        trace.rows.append(row)


def keep_weights(session: Session, trace: Trace) -> None:
    """Copy this rank's weights under their names in the whole model."""
    session.model.gather_parameters()
    trace.tensor_rank, trace.expert_tensor_rank = session.world.tensor_rank, session.world.expert_tensor_rank
    trace.gated = session.model.options.gated_linear_unit
    for model in session.model.language_models():
        for local_name, parameter in model.named_parameters():
            name = model_wide_name(model, local_name)
            trace.weights[name] = parameter.detach().float().cpu().numpy().copy()
            world = session.world
            ranks = world.expert_tensor_size if ".local_experts." in name else world.tensor_size
            if ranks > 1 and getattr(parameter, "tensor_model_parallel", False):
                trace.splits[name] = parameter.partition_dim


def work_train(flat: dict[str, Any], steps: int, save_it: bool = False) -> Trace:
    """Train from what the options say, keep the weights, and save them when asked to."""
    trace = Trace()
    with open_session(flat) as session:
        take_steps(session, steps, trace)
        if save_it:
            # First: what follows gathers weights that a save has to gather by itself.
            save(session)
        keep_weights(session, trace)
        trace.consumed_samples = session.state.consumed_samples
    return trace


def whole_weights(traces: Sequence[Trace], rows: int = ROWS) -> dict[str, np.ndarray]:
    """The weights of the whole model from the shares of all ranks, without the padding of the vocabulary.

    Asserts that replicas and the two ends of a tied embedding hold the same bits.
    """
    whole: dict[str, np.ndarray] = {}
    names = {name for trace in traces for name in trace.weights}
    for name in sorted(names):
        by_rank: dict[int, np.ndarray] = {}
        for trace in (trace for trace in traces if name in trace.weights):
            rank = trace.expert_tensor_rank if ".local_experts." in name else trace.tensor_rank
            known = by_rank.setdefault(rank, trace.weights[name])
            assert np.array_equal(known, trace.weights[name]), f"{name} differs between ranks"
        shares = [by_rank[rank] for rank in sorted(by_rank)]
        axis = next((trace.splits[name] for trace in traces if name in trace.splits), None)
        if axis is None:
            assert all(np.array_equal(shares[0], share) for share in shares), f"{name} differs between ranks"
            joined = shares[0]
        elif "linear_fc1" in name and ".adapters." not in name and traces[0].gated and shares[0].ndim == 2:
            halves = [np.split(share, 2) for share in shares]
            joined = np.concatenate([half[0] for half in halves] + [half[1] for half in halves])
        else:
            joined = np.concatenate(shares, axis)
        vocabulary = name.startswith(("embedding.", "output_layer."))
        whole[name] = joined[:rows] if vocabulary else joined
    return whole


def largest_relative(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Largest relative difference of two lists of numbers."""
    assert len(ours) == len(theirs) > 0
    return float(np.max(np.abs(np.array(ours) - np.array(theirs)) / np.abs(np.array(theirs))))
