"""The ranks of a run: start and stop process groups, seeds per rank, and small agreements between ranks.

``start`` gives a :class:`World` that is passed around; no other room asks megatron.core or the environment who it is.
megatron.core is imported inside functions: nothing may import it before ``cpu.install()`` has run.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megatron_steel.runtime import cpu, device, environment
from megatron_steel.runtime.random_state import rng_state, seed_everything, set_rng_state

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """This rank's place among all ranks, and the groups it talks in."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device
    backend: str
    threads: int
    """Threads of this process for operations on the CPU."""
    store: dist.Store | None
    """Key-value store all ranks see; None when somebody else created the process group."""
    host_group: dist.ProcessGroup
    """All ranks, for tensors and objects on the host."""
    tensor_rank: int
    tensor_size: int
    tensor_group: dist.ProcessGroup
    pipeline_rank: int
    pipeline_size: int
    pipeline_group: dist.ProcessGroup
    context_rank: int
    context_size: int
    context_group: dist.ProcessGroup
    data_rank: int
    data_size: int
    data_group: dist.ProcessGroup
    """Ranks that hold the same weights and get other samples."""
    data_context_group: dist.ProcessGroup
    """Ranks that hold the same weights and get other tokens: over these gradients and losses are summed."""
    sample_group: dist.ProcessGroup
    """Tensor- and context-parallel ranks of a pipeline stage: they work on the same samples."""
    expert_tensor_rank: int
    expert_tensor_size: int
    """Ranks that share each expert."""
    expert_rank: int
    expert_size: int
    expert_group: dist.ProcessGroup

    def one_line(self) -> str:
        """For the log, e.g. ``cpu, gloo, 2 ranks (tp 1, pp 1, dp 2), 1 thread each``."""
        sizes = [("tp", self.tensor_size), ("pp", self.pipeline_size), ("dp", self.data_size)]
        sizes += [(name, n) for name, n in (("cp", self.context_size), ("ep", self.expert_size)) if n > 1]
        layout = ", ".join(f"{name} {n}" for name, n in sizes)
        ranks = f"{self.size} rank{'s' if self.size > 1 else ''} ({layout})"
        text = f"{device.device_name() if self.device.type != 'cpu' else 'cpu'}, {self.backend}, {ranks}"
        if self.device.type != "cpu":
            return text
        return f"{text}, {self.threads} thread{'s' if self.threads > 1 else ''}{' each' if self.size > 1 else ''}"


def start(
    *,
    tensor_model_parallel_size: int = 1,
    pipeline_model_parallel_size: int = 1,
    virtual_pipeline_model_parallel_size: int | None = None,
    context_parallel_size: int = 1,
    expert_model_parallel_size: int = 1,
    expert_tensor_parallel_size: int | None = None,
    timeout_minutes: float = 10.0,
    seed: int = 1234,
    recordable_rng: bool = False,
) -> World:
    """Join the other ranks (torchrun's environment; alone without it), build all groups, bind the device, seed.

    Every group gets ``timeout_minutes``. A default process group that exists already is used as it is.
    ``recordable_rng``: dropout may become part of CUDA graphs.
    Raises ``ValueError`` when the sizes do not divide the number of ranks or a rank has no GPU.
    """
    cpu.install()
    from megatron.core import parallel_state

    rank, size = _from_environment("RANK", 0), _from_environment("WORLD_SIZE", 1)
    local_rank, local_size = _from_environment("LOCAL_RANK", rank), _from_environment("LOCAL_WORLD_SIZE", size)
    model_ranks = tensor_model_parallel_size * pipeline_model_parallel_size * context_parallel_size
    if size % model_ranks:
        raise ValueError(
            f"{size} ranks cannot hold replicas of {model_ranks} ranks (tensor {tensor_model_parallel_size} x pipeline "
            f"{pipeline_model_parallel_size} x context {context_parallel_size}): start a multiple of {model_ranks}"
        )
    if device.has_gpu():
        environment.prepare(single_queue=tensor_model_parallel_size > 1 or context_parallel_size > 1)
    where = device.bind(local_rank)
    threads = set_threads(local_size) if where.type == "cpu" else torch.get_num_threads()
    if where.type == "cpu":
        device.keep_freed_memory()
    timeout = timedelta(minutes=timeout_minutes)
    store = None if dist.is_initialized() else _join(rank, size, timeout)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor_model_parallel_size,
        pipeline_model_parallel_size=pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=virtual_pipeline_model_parallel_size,
        context_parallel_size=context_parallel_size,
        expert_model_parallel_size=expert_model_parallel_size,
        expert_tensor_parallel_size=expert_tensor_parallel_size,
        distributed_timeout_minutes=timeout_minutes,  # need not be whole
    )
    on_host = dist.group.WORLD if where.type == "cpu" else dist.new_group(backend="gloo", timeout=timeout)
    assert on_host is not None
    seed_everything(seed, parallel_state.get_pipeline_model_parallel_rank(), recordable_rng)
    return World(
        rank=rank,
        size=size,
        local_rank=local_rank,
        local_size=local_size,
        device=where,
        backend=device.backend(),
        threads=threads,
        store=store,
        host_group=on_host,
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        tensor_size=parallel_state.get_tensor_model_parallel_world_size(),
        tensor_group=parallel_state.get_tensor_model_parallel_group(),
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pipeline_size=parallel_state.get_pipeline_model_parallel_world_size(),
        pipeline_group=parallel_state.get_pipeline_model_parallel_group(),
        context_rank=parallel_state.get_context_parallel_rank(),
        context_size=parallel_state.get_context_parallel_world_size(),
        context_group=parallel_state.get_context_parallel_group(),
        data_rank=parallel_state.get_data_parallel_rank(),
        data_size=parallel_state.get_data_parallel_world_size(),
        data_group=parallel_state.get_data_parallel_group(),
        data_context_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
        sample_group=parallel_state.get_tensor_and_context_parallel_group(),
        expert_tensor_rank=parallel_state.get_expert_tensor_parallel_rank(),
        expert_tensor_size=parallel_state.get_expert_tensor_parallel_world_size(),
        expert_rank=parallel_state.get_expert_model_parallel_rank(),
        expert_size=parallel_state.get_expert_model_parallel_world_size(),
        expert_group=parallel_state.get_expert_model_parallel_group(),
    )


def _from_environment(name: str, otherwise: int) -> int:
    text = os.environ.get(name)
    return otherwise if text is None else int(text)


def _join(rank: int, size: int, timeout: timedelta) -> dist.Store:
    """Create the default process group; alone it needs neither an address nor a port."""
    if size == 1:
        store: dist.Store = dist.HashStore()
    else:
        store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
        store.set_timeout(timeout)
    options = {"device_id": device.device()} if device.has_gpu() else {}
    dist.init_process_group(device.backend(), store=store, rank=rank, world_size=size, timeout=timeout, **options)
    return dist.PrefixStore("steel", store)


def set_threads(local_size: int) -> int:
    """Share the cores among the ranks of this machine, unless the user set OMP_NUM_THREADS. Returns the threads.

    torchrun sets OMP_NUM_THREADS=1 for several ranks when it is unset; under torchrun a 1 therefore says nothing.
    """
    wished = os.environ.get("OMP_NUM_THREADS")
    if wished is not None and not (wished == "1" and "TORCHELASTIC_RUN_ID" in os.environ and local_size > 1):
        return torch.get_num_threads()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(max(1, cores // local_size))
    return torch.get_num_threads()


def stop(world: World, failed: bool) -> None:
    """Leave the run. After a failure nothing is sent or waited for: the other ranks may be gone."""
    if failed:
        return
    from megatron.core import parallel_state

    barrier(world)
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def barrier(world: World) -> None:
    """Wait for all ranks."""
    dist.barrier(group=world.host_group)


def agree(world: World, flag: bool) -> bool:
    """Whether any rank says yes; the same answer on every rank. Hosts talk: nobody waits for a device."""
    if world.size == 1:
        return flag
    votes = torch.tensor([int(flag)])
    dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=world.host_group)
    return bool(votes.item())


def broadcast_object(world: World, value: T, source: int = 0) -> T:
    """The value of rank ``source`` on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=source, group=world.host_group)
    return box[0]


def gather_objects(world: World, value: T) -> list[T]:
    """The values of all ranks in rank order, on every rank."""
    values: list[Any] = [None] * world.size
    dist.all_gather_object(values, value, group=world.host_group)
    return values


__all__ = [
    "World",
    "agree",
    "barrier",
    "broadcast_object",
    "gather_objects",
    "rng_state",
    "set_rng_state",
    "set_threads",
    "start",
    "stop",
]
