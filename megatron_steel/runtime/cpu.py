"""The one place that lets real megatron-core 0.16.1 run on CPU + gloo: a table of substitutions and how they get in.

megatron.core names CUDA directly. Where there is no CUDA device, :func:`install` makes every module of megatron.core,
right after it is imported, look up ``torch`` in a copy of torch's namespace in which the names of :data:`ROWS` are
replaced. torch itself stays as it is for everybody else, except two ``Tensor`` methods that look at their caller.
Nothing intercepts tensor operations, so a training step pays only for the replaced calls (``benchmarks/cpu_layer.py``).

An upgrade of megatron-core starts here: a test holds every row against the installed sources.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

from megatron_steel.runtime import host, quiet


@dataclass(frozen=True, slots=True)
class Row:
    """One substitution."""

    target: str
    """``torch.X``: what megatron.core sees under that name; ``torch.Tensor.X``: a method; else a megatron.core name."""
    replacement: Any
    """What stands there instead."""
    file: str
    """Upstream file, relative to megatron/core."""
    line: str
    """Part of the upstream line that needs it, verbatim."""
    why: str
    """What would happen without it."""


ROWS: tuple[Row, ...] = (
    # Where tensors live.
    Row(
        "torch.cuda.current_device",
        host.current_device,
        "tensor_parallel/mappings.py",
        "device=torch.cuda.current_device()",
        "about 90 buffers are created on the current device; without CUDA the call raises",
    ),
    Row(
        "torch.tensor",
        host.on_host(torch.tensor),
        "optimizer/optimizer.py",
        "self._scale_one = torch.tensor([1.0], dtype=torch.float, device='cuda')",
        "small constants are created on the literal device 'cuda' (also pinned ones in rope_utils.py)",
    ),
    Row(
        "torch.zeros",
        host.on_host(torch.zeros),
        "pipeline_parallel/schedules.py",
        'total_num_tokens = torch.zeros([], dtype=torch.int, device="cuda")',
        "every schedule counts tokens on the literal device 'cuda'",
    ),
    Row(
        "torch.ones",
        host.on_host(torch.ones),
        "transformer/utils.py",
        'torch.triu(torch.ones(sq, sq, device="cuda"), diagonal=1)',
        "the default causal mask is built on the literal device 'cuda'",
    ),
    Row(
        "torch.empty",
        host.on_host(torch.empty),
        "dist_checkpointing/exchange_utils.py",
        'local_ten = torch.empty(0, dtype=dtype, device="cuda")',
        "checkpoint shards are exchanged between ranks through tensors on 'cuda'",
    ),
    Row(
        "torch.empty_like",
        host.on_host(torch.empty_like),
        "dist_checkpointing/exchange_utils.py",
        'tensor = torch.empty_like(tensor, device="cuda")',
        "same exchange, when a shard is loaded by another rank",
    ),
    Row(
        "torch.autocast",
        host.autocast,
        "pipeline_parallel/schedules.py",
        'context_manager = torch.autocast("cuda", dtype=config.autocast_dtype)',
        "autocast of GPU operations would do nothing on the host and warn",
    ),
    Row(
        "torch.Tensor.cuda",
        host.tensor_cuda,
        "optimizer/distrib_optimizer.py",
        "send_tensor = send_tensor.cuda()",
        "moving a tensor to a GPU raises without one; other callers still get that error",
    ),
    # What tensors are.
    Row(
        "torch.Tensor.type",
        host.tensor_type,
        "optimizer/distrib_optimizer.py",
        "if model_param.type() in ['torch.cuda.HalfTensor', 'torch.cuda.BFloat16Tensor']:",
        "the optimizers sort parameters by the names of GPU tensor types and refuse all others",
    ),
    # Random numbers. Host tensors draw from torch's default generator; the tracker must switch that one.
    Row(
        "torch.cuda.get_rng_state",
        host.get_rng_state,
        "tensor_parallel/random.py",
        "orig_rng_state = torch.cuda.get_rng_state()",
        "the tracker saves the GPU generator around its own seeds",
    ),
    Row(
        "torch.cuda.random.get_rng_state",
        host.get_rng_state,
        "tensor_parallel/random.py",
        "return torch.cuda.random.get_rng_state(device=device)",
        "the tracker saves the GPU generator when it forks",
    ),
    Row(
        "torch.cuda.set_rng_state",
        host.set_rng_state,
        "rerun_state_machine.py",
        'torch.cuda.set_rng_state(rng_state["cuda_rng_state"])',
        "restoring the GPU generator raises without CUDA",
    ),
    Row(
        "torch.cuda.manual_seed",
        host.manual_seed,
        "tensor_parallel/random.py",
        "torch.cuda.manual_seed(data_parallel_seed)",
        "without CUDA the seed would wait for ever in a queue and all tensor-parallel ranks draw the same numbers",
    ),
    Row(
        "torch.cuda.default_generators",
        host.HostGenerators(),
        "tensor_parallel/random.py",
        "default_generator = torch.cuda.default_generators[idx]",
        "the tracker sets the state of the generator itself; the tuple is empty without CUDA",
    ),
    Row(
        "megatron.core.tensor_parallel.random._lazy_call",
        host.call_now,
        "tensor_parallel/random.py",
        "from torch.cuda import _lazy_call, _lazy_init",
        "queues the callback that sets the generator until CUDA is initialised, which never happens",
    ),
    Row(
        "megatron.core.tensor_parallel.random._lazy_init",
        host.nothing,
        "tensor_parallel/random.py",
        "from torch.cuda import _lazy_call, _lazy_init",
        "raises without CUDA",
    ),
    # Streams, events and waiting.
    Row(
        "torch.cuda.synchronize",
        host.nothing,
        "parallel_state.py",
        "torch.cuda.synchronize()",
        "raises without CUDA; the host has nothing pending",
    ),
    Row(
        "torch.cuda.Stream",
        host.new_stream,
        "distributed/distributed_data_parallel.py",
        "communication_stream = torch.cuda.Stream(device=torch.cuda.current_device())",
        "side streams for communication",
    ),
    Row(
        "torch.cuda.current_stream",
        host.new_stream,
        "transformer/moe/shared_experts.py",
        "self.stream.wait_stream(torch.cuda.current_stream())",
        "streams wait for each other",
    ),
    Row(
        "torch.cuda.default_stream",
        host.new_stream,
        "distributed/param_and_grad_buffer.py",
        "torch.cuda.default_stream().wait_stream(self.communication_stream)",
        "streams wait for each other",
    ),
    Row(
        "torch.cuda.stream",
        host.stream_context,
        "transformer/moe/shared_experts.py",
        "with torch.cuda.stream(self.stream):",
        "work is put on a side stream",
    ),
    Row(
        "torch.cuda.Event",
        host.new_event,
        "models/common/model_chunk_schedule_plan.py",
        "self._event = torch.cuda.Event()",
        "the overlapped schedule orders its streams by events",
    ),
    # Collectives that gloo has for equal sizes only, or not at all.
    Row(
        "torch.distributed.all_gather",
        host.all_gather,
        "tensor_parallel/mappings.py",
        "torch.distributed.all_gather(output_tensor_list, input_, group=group)",
        "ranks that share an expert give different numbers of tokens",
    ),
    Row(
        "torch.distributed.reduce_scatter",
        host.reduce_scatter,
        "tensor_parallel/mappings.py",
        "torch.distributed.reduce_scatter(output, input_tensor_list, group=group)",
        "ranks that share an expert get different numbers of tokens back",
    ),
    # Compilation.
    Row(
        "megatron.core.jit.jit_fuser",
        host.undecorated,
        "jit.py",
        "jit_fuser = torch.compile",
        "compiling costs seconds at the first step and saves nothing on the host",
    ),
    # Mixture of experts.
    Row(
        "megatron.core.transformer.moe.moe_utils.te_general_gemm",
        None,
        "transformer/moe/moe_utils.py",
        "if te_general_gemm is not None and router_dtype != torch.float64:",
        "the name is undefined without Transformer Engine (NameError in the router)",
    ),
    Row(
        "megatron.core.transformer.moe.moe_utils.maybe_move_tensor_to_cpu",
        host.splits_as_numpy,
        "transformer/moe/moe_utils.py",
        "if torch.is_tensor(tensor) and tensor.is_cuda:",
        "split sizes stay tensors when they are on the host already and all_to_all_single refuses them",
    ),
)


class MegatronOnHost(MetaPathFinder):
    """Import hook: gives each module of megatron.core the substituted names right after it ran."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.torch = view_of(torch)
        self.names: dict[str, list[tuple[str, Any]]] = {}
        for row in rows:
            where, _, name = row.target.rpartition(".")
            if where == "torch.Tensor":
                setattr(torch.Tensor, name, row.replacement)
            elif row.target.startswith("torch."):
                setattr(self.inner(where), name, row.replacement)
            else:
                module = ".".join(part for part in where.split(".") if part.islower())
                inside = row.target.removeprefix(f"{module}.")
                self.names.setdefault(module, []).append((inside, row.replacement))

    def inner(self, path: str) -> ModuleType:
        """The view that stands for ``torch.a.b``; made on first use."""
        here = self.torch
        for name in path.split(".")[1:]:
            if vars(here).get(name) is getattr(sys.modules[here.__name__], name):
                setattr(here, name, view_of(getattr(here, name)))
            here = getattr(here, name)
        return here

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The ordinary spec, with the substitution added behind the execution of the module."""
        if fullname != "megatron.core" and not fullname.startswith("megatron.core."):
            return None
        others = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in others)), None)
        if spec is not None and hasattr(spec.loader, "exec_module"):
            spec.loader.exec_module = functools.partial(self.run, spec.loader.exec_module)  # type: ignore[union-attr, method-assign]
        return spec

    def run(self, execute: Any, module: ModuleType) -> None:
        """Run a module of megatron.core, then put the substitutions in."""
        execute(module)
        if vars(module).get("torch") is torch:
            vars(module)["torch"] = self.torch
        for path, replacement in self.names.get(module.__name__, ()):
            owner, _, name = path.rpartition(".")
            setattr(getattr(module, owner) if owner else module, name, replacement)


def view_of(module: ModuleType) -> ModuleType:
    """A copy of a module's namespace that can be changed without changing the module.

    Names that the module gets later (lazy submodules) are looked up in the module.
    """
    view = ModuleType(module.__name__, module.__doc__)
    vars(view).update(vars(module))
    vars(view)["__getattr__"] = functools.partial(getattr, module)
    return view


def installed() -> bool:
    """Whether :func:`install` has put the substitutions in."""
    return any(isinstance(finder, MegatronOnHost) for finder in sys.meta_path)


def install() -> bool:
    """Let megatron.core run on this machine; call before the first import of it. Returns whether that was needed.

    Does nothing where there is a CUDA device, and nothing the second time. Raises ``RuntimeError`` when megatron.core
    is already imported: its modules would then hold names that only work with CUDA.
    """
    quiet.install()
    if torch.cuda.is_available() or installed():
        return installed()
    if "megatron.core" in sys.modules:
        raise RuntimeError("megatron.core was imported before megatron_steel.runtime.cpu.install(); call it first")
    sys.meta_path.insert(0, MegatronOnHost(ROWS))
    return True
