"""Saving and loading: model and optimizer through megatron-core's ``torch_dist``, the rest as JSON and safetensors."""

from __future__ import annotations

import os
import queue
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.optimizer.optimizer import ChainedOptimizer
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.api import CheckpointException

from megatron_steel.checkpoint import files
from megatron_steel.checkpoint.dcp_read import StoredTensors
from megatron_steel.checkpoint.fp8_state import load_fp8, save_fp8
from megatron_steel.checkpoint.state import STATE_FILE, TrainState
from megatron_steel.config.family import SCORE
from megatron_steel.model.build import Model
from megatron_steel.model.fully_sharded import like_parameters
from megatron_steel.model.lora import ADAPTERS, reset_magnitudes
from megatron_steel.optim.host_adamw import HOST, HostAdamW, first_state
from megatron_steel.runtime import world as runtime
from megatron_steel.runtime.signals import end_with_parent
from megatron_steel.runtime.world import World

# The only layouts of sharded optimizer state that megatron-core 0.16.1 can write; this one loads on any TP x PP x DP.
OPTIMIZER_LAYOUT = {"distrib_optim_sharding_type": "fully_reshardable"}

EXTRA_STATE = "_extra_state"


class SaveError(RuntimeError):
    """A checkpoint could not be written; the previous one is intact."""


def chunk_names(model: Model) -> list[str]:
    """Keys of this rank's chunks in a state dictionary: megatron-core's names for one and for several."""
    count = len(model.chunks)
    return ["model"] if count == 1 else [f"model{index}" for index in range(count)]


def model_state(model: Model, apart: bool = False) -> dict[str, Any]:
    """The sharded state of every chunk this rank holds, under megatron-core's names; ``apart``: each layer its own.

    Layers' extra state (histories of FP8's delayed scaling, pickled bytes) is left out: without it the checkpoints of
    all backends are the same and hold nothing that has to be unpickled. fp8_state.py saves what is in it.
    """
    state: dict[str, Any] = {}
    for name, module in zip(chunk_names(model), model.language_models(), strict=True):
        sharded = module.sharded_state_dict(metadata={"non_homogeneous_layers": True} if apart else None)
        state[name] = {key: value for key, value in sharded.items() if EXTRA_STATE not in key}
    return state


def optimizer_state(model: Model, optimizer: ChainedOptimizer, state: dict[str, Any], loading: bool) -> dict[str, Any]:
    """The sharded state of the optimizer, under the names of the weights; ``state`` is :func:`model_state`.

    Layers are saved as one tensor, which must not have gaps where the state of some of them does not exist.
    """
    named = model_state(model, apart=True) if model.trains_some_layers else state
    return optimizer.sharded_state_dict(named, is_loading=loading, metadata=OPTIMIZER_LAYOUT)


def reason_of(failure: BaseException | None) -> str:
    """What went wrong on this rank in one line, the last of a message that holds a traceback."""
    if failure is None or (isinstance(failure, CheckpointException) and not failure.failures):
        return "another rank failed"
    return (str(failure).strip().splitlines() or [type(failure).__name__])[-1]


def together(world: World, target: Path, work: Callable[[], Any]) -> Any:
    """Run a rank's share of a save; when any rank fails, all of them raise instead of waiting for each other."""
    failure: BaseException | None = None
    result = None
    try:
        result = work()
    # Whatever it is, the other ranks must hear of it first. CheckpointException is no Exception.
    except (Exception, CheckpointException) as error:  # noqa: BLE001
        failure = error
    if runtime.agree(world, failure is not None):
        # To the writers below a full disk looks like anything but that: say what is left.
        free = files.free_bytes(target.parent)
        raise SaveError(f"saving {target}: {reason_of(failure)} ({free:,} bytes are free on that disk)") from failure
    return result


def write_sharded(sharded: dict[str, Any], directory: Path) -> None:
    """Write a sharded state dict into a directory; collective over all ranks.

    megatron-core hands the results of a write over through a queue in a process of its own, which costs a start of
    Python and 270 MB per rank; we write in the rank's process, where a plain queue will do. That process and
    the forked ones that write would live on for ever when the rank is killed.
    """
    filesystem_async._results_queue = queue.SimpleQueue()
    writer, rank = vars(FileSystemWriterAsync)["write_preloaded_data"], os.getpid()

    def write(*args: Any, **kwargs: Any) -> None:
        end_with_parent(rank)
        writer(*args, **kwargs)

    FileSystemWriterAsync.write_preloaded_data = staticmethod(write)
    try:
        dist_checkpointing.save(sharded, str(directory))
    finally:
        FileSystemWriterAsync.write_preloaded_data = writer


def save(
    root: Path,
    model: Model,
    optimizer: ChainedOptimizer | None,
    state: TrainState,
    world: World,
    write_extras: Callable[[Path], None],
    keep: int | None = None,
) -> Path:
    """Write and publish one checkpoint; collective over all ranks.

    ``write_extras`` writes files every reader needs (tokenizer) into the directory, on rank 0. ``keep`` is the number
    of checkpoints that stay. Raises :class:`SaveError` on all ranks when any of them fails; nothing is published then.
    """
    temporary = files.temporary_directory(root, state.iteration)

    def prepare() -> None:
        if world.rank == 0:
            root.mkdir(parents=True, exist_ok=True)
            files.remove_leftovers(root)
            temporary.mkdir()

    def write_tensors() -> None:
        model.gather_parameters()
        sharded = model_state(model)
        if optimizer is not None:
            allocate_moments(optimizer)
            sharded["optimizer"] = optimizer_state(model, optimizer, sharded, loading=False)
        write_sharded(sharded, temporary)

    def write_rest() -> None:
        save_file(runtime.rng_state(), temporary / rng_file(world.rank))
        save_fp8(model, temporary, world.rank)
        if world.rank == 0:
            files.write_json(temporary / STATE_FILE, state.to_json())
            write_extras(temporary)

    def describe() -> dict[str, dict[str, Any]]:
        mine = files.list_files(temporary)[world.rank :: world.size]
        return files.describe_files(temporary, mine)

    def publish() -> None:
        if world.rank == 0:
            merged = {name: facts for part in parts for name, facts in part.items()}
            files.publish(root, state.iteration, dict(sorted(merged.items())))
            files.remove_old(root, keep)

    target = files.checkpoint_directory(root, state.iteration)
    together(world, target, prepare)
    together(world, target, write_tensors)
    together(world, target, write_rest)
    parts = runtime.gather_objects(world, together(world, target, describe))
    together(world, target, publish)
    return target


def rng_file(rank: int) -> str:
    """Name of a rank's random state inside a checkpoint."""
    return f"rng_{rank:05d}.safetensors"


def load_weights(checkpoint: Path, model: Model) -> None:
    """Fill the model's weights from a checkpoint of any layout.

    Adapters that the checkpoint does not have begin anew on its weights, and so does the score of a reward model.
    ``ValueError`` when it has adapters and the model has none: it would be another model without them.
    """
    wanted = model_state(model)
    stored = StoredTensors(checkpoint).tensors
    has = any(ADAPTERS in key for key in stored)
    wants = any(ADAPTERS in key for state in wanted.values() for key in state)
    if has and not wants and model.language_models()[0].decoder.layers:
        raise ValueError(f"{checkpoint} holds adapters; merge them first (tools/convert_hf.py export, then import)")
    begins = wants and not has
    anew = {
        key
        for state in wanted.values()
        for key in state
        if (begins and ADAPTERS in key) or (key == SCORE and key not in stored)
    }
    wanted = {name: {k: v for k, v in state.items() if k not in anew} for name, state in wanted.items()}
    assign(model, dist_checkpointing.load(wanted, str(checkpoint)), anew)
    if begins:
        reset_magnitudes(model.chunks)


def allocate_moments(optimizer: ChainedOptimizer) -> None:
    """Give an AdamW that has not stepped its state.

    megatron-core's sharded optimizer reads a step count from it when loading; and when all steps before a save were
    skipped, a checkpoint without moments would not load.
    """
    for part in optimizer.chained_optimizers:
        inner = part.optimizer
        if not isinstance(inner, torch.optim.Adam):
            if inner is not None:
                part.init_state_fn(inner, part.config)
            continue
        for parameter in (p for group in inner.param_groups for p in group["params"]):
            if not inner.state[parameter]:
                where = HOST if isinstance(inner, HostAdamW) else parameter.device
                inner.state[parameter] = first_state(parameter, where)


def complete_state(optimizer: ChainedOptimizer, loaded: dict[Any, Any]) -> None:
    """Put what megatron-core expects and a checkpoint does not hold into a loaded state.

    That is the step count of 0 of a torch AdamW, and no main weights on a rank that trains nothing.
    """
    for index, part in enumerate(optimizer.chained_optimizers):
        saved = loaded if len(optimizer.chained_optimizers) == 1 else loaded[index]
        states = saved.get("optimizer", saved).get("state")
        if states and isinstance(part.optimizer, torch.optim.Adam):
            states.setdefault("common_step", torch.tensor(0.0))
        groups = getattr(part, "fp32_from_float16_groups", None)
        if groups is not None and not any(groups):
            saved.setdefault("fp32_from_fp16_params", [])


def load_training(checkpoint: Path, model: Model, optimizer: ChainedOptimizer, state: TrainState, world: World) -> None:
    """Fill weights, optimizer and random state from a checkpoint of any layout.

    Random state and FP8's histories are only restored on the number of ranks that wrote them; on another number the
    seeds decide, and histories begin anew.
    """
    allocate_moments(optimizer)
    sharded = model_state(model)
    sharded["optimizer"] = optimizer_state(model, optimizer, sharded, loading=True)
    loaded = dist_checkpointing.load(sharded, str(checkpoint))
    assign(model, loaded)
    complete_state(optimizer, loaded["optimizer"])
    optimizer.load_state_dict(loaded["optimizer"])
    if state.world_size == world.size:
        runtime.set_rng_state(load_file(checkpoint / rng_file(world.rank)))
        load_fp8(model, checkpoint, world.rank)


def assign(model: Model, loaded: dict[str, Any], anew: Collection[str] = ()) -> None:
    """Load each chunk's state dictionary; every weight must be there, except those that begin ``anew``."""
    for name, module in zip(chunk_names(model), model.language_models(), strict=True):
        missing, unexpected = module.load_state_dict(like_parameters(module, loaded[name]), strict=False)
        lacking = [key for key in missing if EXTRA_STATE not in key and key not in anew]
        assert not unexpected and not lacking, (lacking, unexpected)
