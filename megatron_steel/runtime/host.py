"""What megatron.core gets in place of CUDA on a machine without it; ``runtime/cpu.py`` says where each goes."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

HOST = torch.device("cpu")


class HostEvent:
    """Work on the host is done when the call returns, so an event has always happened."""

    def record(self, stream: HostStream | None = None) -> None:
        """Nothing is pending."""

    def wait(self, stream: HostStream | None = None) -> None:
        """Nothing to wait for."""

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def query(self) -> bool:
        """All work is done."""
        return True


class HostStream:
    """The one queue of the host: everything in it is done."""

    def wait_stream(self, stream: HostStream) -> None:
        """The other queue is this one."""

    def wait_event(self, event: HostEvent) -> None:
        """The event has happened."""

    def record_event(self, event: HostEvent | None = None) -> HostEvent:
        """An event that has happened."""
        return event or HostEvent()

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def query(self) -> bool:
        """All work is done."""
        return True


class HostGenerators:
    """The default generators by device: the host has one."""

    def __getitem__(self, index: object) -> torch.Generator:
        return torch.default_generator


def current_device() -> torch.device:
    """The host; megatron.core only passes it on as ``device=``."""
    return HOST


def device_count() -> int:
    """One host."""
    return 1


def nothing(*_: object, **__: object) -> None:
    """For calls that only wait for, or tune, a GPU."""


def new_stream(*_: object, **__: object) -> HostStream:
    """A stream, whatever device or priority was asked for."""
    return HostStream()


def new_event(*_: object, **__: object) -> HostEvent:
    """An event, whatever timing was asked for."""
    return HostEvent()


def stream_context(_: HostStream | None) -> contextlib.AbstractContextManager[None]:
    """There is no other stream to switch to."""
    return contextlib.nullcontext()


def get_rng_state(device: object = None) -> torch.Tensor:
    """State of the generator that random numbers of host tensors come from."""
    return torch.default_generator.get_state()


def set_rng_state(state: torch.Tensor, device: object = None) -> None:
    """Set the generator that random numbers of host tensors come from."""
    torch.default_generator.set_state(state)


def manual_seed(seed: int) -> None:
    """Seed the generator that random numbers of host tensors come from."""
    torch.default_generator.manual_seed(seed)


def all_gather(
    outputs: list[torch.Tensor], mine: torch.Tensor, group: dist.ProcessGroup | None = None, **options: Any
) -> Any:
    """``dist.all_gather`` of tensors whose first axis may differ between ranks: padded on the way."""
    rows = [len(output) for output in outputs]
    if len(set(rows)) == 1:
        return dist.all_gather(outputs, mine, group=group, **options)
    padded = mine.new_zeros((max(rows), *mine.shape[1:]))
    padded[: len(mine)] = mine
    gathered = [torch.empty_like(padded) for _ in outputs]
    dist.all_gather(gathered, padded, group=group)
    for output, whole in zip(outputs, gathered, strict=True):
        output.copy_(whole[: len(output)])
    return None


def reduce_scatter(output: torch.Tensor, inputs: list[torch.Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Sum ``inputs`` over ranks, rank r keeps the r-th; their first axis may differ."""
    total = torch.cat(inputs)
    dist.all_reduce(total, group=group)
    output.copy_(total.split([len(part) for part in inputs])[dist.get_rank(group)])


def call_now(callback: Callable[[], None], **_: object) -> None:
    """Run a callback that waits for CUDA's initialisation; there is none to wait for."""
    callback()


def undecorated(function: Callable[..., Any] | None = None, **_: object) -> Any:
    """A decorator that leaves the function alone."""
    return function if function is not None else undecorated


def names_cuda(device: object) -> bool:
    """Whether a ``device`` argument asks for a GPU."""
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, torch.device) and device.type == "cuda"


def on_host(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A tensor factory that builds on the host what was asked for on a GPU, in ordinary (not pinned) memory."""

    @functools.wraps(factory)
    def build(*args: object, **options: object) -> torch.Tensor:
        if names_cuda(options.get("device")):
            options["device"] = HOST
        options.pop("pin_memory", None)
        return factory(*args, **options)

    return build


def autocast(device_type: str, *args: Any, **options: Any) -> torch.autocast:
    """``torch.autocast`` for the host."""
    return torch.autocast("cpu" if device_type == "cuda" else device_type, *args, **options)


def splits_as_numpy(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """megatron.core's ``maybe_move_tensor_to_cpu`` for tensors that are on the host already."""
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def called_by_megatron() -> bool:
    """Whether the caller of our caller is code of megatron.core."""
    return str(sys._getframe(2).f_globals.get("__name__", "")).startswith("megatron.core.")


_tensor_type = torch.Tensor.type
_tensor_cuda = torch.Tensor.cuda


def tensor_type(self: torch.Tensor, *args: Any, **options: Any) -> Any:
    """``Tensor.type``; without arguments megatron.core gets the name the tensor would have on a GPU."""
    if args or options or not called_by_megatron():
        return _tensor_type(self, *args, **options)
    return _tensor_type(self).replace("torch.", "torch.cuda.")


def tensor_cuda(self: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
    """``Tensor.cuda``; megatron.core gets the tensor where it is."""
    return self if called_by_megatron() else _tensor_cuda(self, *args, **options)
