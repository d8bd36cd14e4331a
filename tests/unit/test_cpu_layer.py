"""The table of substitutions against the installed megatron-core, what each row does, and that torch is untouched."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from types import FunctionType
from typing import Any

import megatron.core
import pytest
import torch

from megatron_steel.runtime import cpu, host, quiet
from megatron_steel.runtime.cpu import ROWS, Row

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the layer is for machines without CUDA")

SOURCES = Path(megatron.core.__file__).parent
CPU = torch.device("cpu")


def seen_by_megatron(target: str) -> Any:
    """What code of megatron.core finds under ``torch.a.b``."""
    import megatron.core.parallel_state

    found: Any = vars(megatron.core.parallel_state)["torch"]
    for part in target.split(".")[1:]:
        found = getattr(found, part)
    return found


def inside_megatron(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function as if a module of megatron.core had defined it."""
    return FunctionType(function.__code__, {**function.__globals__, "__name__": "megatron.core.example"})


def type_name(tensor: torch.Tensor) -> str:
    return tensor.type()


def to_gpu(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.cuda()


def factory(target: str, *args: Any) -> Callable[[], bool]:
    def effect() -> bool:
        with pytest.raises((RuntimeError, AssertionError)):
            getattr(torch, target.split(".")[1])(*args, device="cuda")
        build = seen_by_megatron(target)
        devices = ("cuda", "cuda:0", torch.device("cuda"), torch.device("cuda", 0), "cpu", None)
        made = [build(*args, device=device, pin_memory=True) for device in devices] + [build(*args)]
        return all(tensor.device == CPU and not tensor.is_pinned() for tensor in made)

    return effect


def generator_is_switched() -> bool:
    """megatron.core's tracker, on torch's generator for host tensors."""
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    tracker = CudaRNGStatesTracker()
    tracker.add("a", 1)
    torch.manual_seed(7)
    expected = torch.rand(3), torch.rand(3)
    torch.manual_seed(7)
    outside = [torch.rand(3)]
    with tracker.fork("a"):
        first = torch.rand(3)
    outside.append(torch.rand(3))
    with tracker.fork("a"):
        second = torch.rand(3)
    torch.manual_seed(1)
    return (
        all(map(torch.equal, outside, expected))
        and torch.equal(first, torch.rand(3))
        and torch.equal(second, torch.rand(3))
    )


def rng_round_trip() -> bool:
    state = seen_by_megatron("torch.cuda.get_rng_state")()
    drawn = torch.rand(3)
    seen_by_megatron("torch.cuda.set_rng_state")(state)
    again = torch.rand(3)
    seen_by_megatron("torch.cuda.set_rng_state")(seen_by_megatron("torch.cuda.random.get_rng_state")(device="cuda"))
    return torch.equal(drawn, again)


def seeds_host() -> bool:
    torch.manual_seed(3)
    drawn = torch.rand(3)
    seen_by_megatron("torch.cuda.manual_seed")(3)
    return torch.equal(drawn, torch.rand(3))


def default_generator() -> bool:
    generators = seen_by_megatron("torch.cuda.default_generators")
    return generators[0] is generators[CPU] is torch.default_generator


def runs_at_once() -> bool:
    from megatron.core.tensor_parallel import random

    calls: list[int] = []
    random._lazy_call(lambda: calls.append(1))
    random._lazy_init()
    return calls == [1]


def streams() -> bool:
    stream, event = seen_by_megatron("torch.cuda.Stream")(device=CPU), seen_by_megatron("torch.cuda.Event")()
    event.record(stream)
    event.wait(stream)
    stream.wait_event(event)
    stream.wait_stream(seen_by_megatron("torch.cuda.current_stream")())
    seen_by_megatron("torch.cuda.default_stream")().wait_stream(stream)
    with seen_by_megatron("torch.cuda.stream")(stream):
        stream.record_event().synchronize()
    seen_by_megatron("torch.cuda.synchronize")()
    return stream.query() and event.query()


def nothing_compiled() -> bool:
    from megatron.core import jit
    from megatron.core.fusions import fused_bias_swiglu

    plain = isinstance(fused_bias_swiglu.swiglu, FunctionType) and not hasattr(
        fused_bias_swiglu.swiglu, "_torchdynamo_orig_callable"
    )
    return jit.jit_fuser(type_name) is type_name and jit.jit_fuser()(type_name) is type_name and plain


def type_is_gpu_name() -> bool:
    names = {torch.float32: "FloatTensor", torch.bfloat16: "BFloat16Tensor", torch.float16: "HalfTensor"}
    for dtype, name in names.items():
        tensor = torch.zeros(1, dtype=dtype)
        if inside_megatron(type_name)(tensor) != f"torch.cuda.{name}" or type_name(tensor) != f"torch.{name}":
            return False
    return inside_megatron(lambda t: t.type(torch.float64))(torch.zeros(1)).dtype == torch.float64


def stays_on_host() -> bool:
    tensor = torch.zeros(1)
    with pytest.raises((RuntimeError, AssertionError)):
        to_gpu(tensor)
    return inside_megatron(to_gpu)(tensor) is tensor


def host_autocast() -> bool:
    with seen_by_megatron("torch.autocast")("cuda", dtype=torch.bfloat16):
        return (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """A group of this process; unequal sizes take several (tests/distributed/test_matrix.py)."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def gathers() -> bool:
    with alone():
        outputs = [torch.zeros(2, 3)]
        seen_by_megatron("torch.distributed.all_gather")(outputs, torch.ones(2, 3))
        return bool(outputs[0].all())


def scatters_sums() -> bool:
    with alone():
        output = torch.zeros(2, 3)
        seen_by_megatron("torch.distributed.reduce_scatter")(output, [torch.ones(2, 3)])
        return bool(output.all())


def splits_are_numbers() -> bool:
    from megatron.core.transformer.moe import token_dispatcher

    move = token_dispatcher.maybe_move_tensor_to_cpu
    kept = torch.tensor([1, 2])
    return move(kept, as_numpy=True).tolist() == [1, 2] and move(kept) is kept and move(None, as_numpy=True) is None


def router_name_is_defined() -> bool:
    from megatron.core.transformer.moe import moe_utils

    return moe_utils.te_general_gemm is None


RANDOM = "megatron.core.tensor_parallel.random"
MOE = "megatron.core.transformer.moe.moe_utils"
EFFECTS: dict[str, Callable[[], bool]] = {
    "torch.cuda.current_device": lambda: seen_by_megatron("torch.cuda.current_device")() == CPU,
    "torch.tensor": factory("torch.tensor", [1.0]),
    "torch.zeros": factory("torch.zeros", 2),
    "torch.ones": factory("torch.ones", 2),
    "torch.empty": factory("torch.empty", 2),
    "torch.empty_like": factory("torch.empty_like", torch.zeros(2)),
    "torch.autocast": host_autocast,
    "torch.Tensor.cuda": stays_on_host,
    "torch.Tensor.type": type_is_gpu_name,
    "torch.cuda.get_rng_state": rng_round_trip,
    "torch.cuda.random.get_rng_state": generator_is_switched,
    "torch.cuda.set_rng_state": rng_round_trip,
    "torch.cuda.manual_seed": seeds_host,
    "torch.cuda.default_generators": default_generator,
    f"{RANDOM}._lazy_call": runs_at_once,
    f"{RANDOM}._lazy_init": runs_at_once,
    "torch.cuda.synchronize": streams,
    "torch.cuda.Stream": streams,
    "torch.cuda.current_stream": streams,
    "torch.cuda.default_stream": streams,
    "torch.cuda.stream": streams,
    "torch.cuda.Event": streams,
    "megatron.core.jit.jit_fuser": nothing_compiled,
    "torch.distributed.all_gather": gathers,
    "torch.distributed.reduce_scatter": scatters_sums,
    f"{MOE}.te_general_gemm": router_name_is_defined,
    f"{MOE}.maybe_move_tensor_to_cpu": splits_are_numbers,
}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.target)
def test_upstream_line_still_stands(row: Row) -> None:
    assert row.line in (SOURCES / row.file).read_text(), f"megatron-core {version('megatron-core')} changed {row.file}"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.target)
def test_effect(row: Row) -> None:
    assert EFFECTS[row.target]()


def test_every_row_is_tested_once() -> None:
    assert sorted(row.target for row in ROWS) == sorted(EFFECTS)


def test_torch_is_untouched_outside_megatron() -> None:
    for row in ROWS:
        if not row.target.startswith("torch.") or row.target.startswith("torch.Tensor."):
            continue
        found: Any = torch
        for part in row.target.split(".")[1:]:
            found = getattr(found, part)
        assert found is not row.replacement and getattr(found, "__module__", "") != host.__name__, row.target
    with pytest.raises((RuntimeError, AssertionError)):
        torch.cuda.current_device()
    torch_like = seen_by_megatron("torch")
    assert torch_like is not torch and torch_like.float32 is torch.float32 and torch_like.Tensor is torch.Tensor
    assert torch_like.distributed.all_reduce is torch.distributed.all_reduce and torch_like.nn is torch.nn


def test_names_torch_gets_later_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "added_later", 1, raising=False)
    monkeypatch.setattr(torch.cuda, "added_later", 2, raising=False)
    assert (seen_by_megatron("torch.added_later"), seen_by_megatron("torch.cuda.added_later")) == (1, 2)
    with pytest.raises(AttributeError):
        seen_by_megatron("torch.never_added")


def test_install_twice_changes_nothing() -> None:
    before = list(sys.meta_path)
    assert cpu.install() and sys.meta_path == before
    assert sum(isinstance(finder, cpu.MegatronOnHost) for finder in sys.meta_path) == 1


def test_install_after_megatron_core_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    others = [finder for finder in sys.meta_path if not isinstance(finder, cpu.MegatronOnHost)]
    monkeypatch.setattr(sys, "meta_path", others)
    with pytest.raises(RuntimeError, match=r"before megatron_steel\.runtime\.cpu\.install"):
        cpu.install()


def test_a_gpu_run_never_installs(monkeypatch: pytest.MonkeyPatch) -> None:
    others = [finder for finder in sys.meta_path if not isinstance(finder, cpu.MegatronOnHost)]
    monkeypatch.setattr(sys, "meta_path", others)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert not cpu.install() and sys.meta_path == others


def test_bf16_parameters_are_recognised() -> None:
    """megatron.core tells parameters apart with isinstance() on torch.cuda.*Tensor, which stay types."""
    from megatron.core.transformer.module import fp32_to_float16

    converted = fp32_to_float16([torch.ones(2), torch.ones(2, dtype=torch.int64)], lambda tensor: tensor.bfloat16())
    assert [tensor.dtype for tensor in converted] == [torch.bfloat16, torch.int64]


@pytest.mark.parametrize("message", quiet.WARNINGS, ids=lambda message: message.start[:30])
def test_named_warning_is_dropped_and_others_are_not(message: quiet.Message) -> None:
    module = message.module.replace("\\.", ".") + ("x" if message.module.endswith(r"\.") else "")
    with warnings.catch_warnings(record=True) as caught:
        warnings.resetwarnings()
        quiet.install()
        for text, where in ((message.start, module), (f"Not {message.start}", module), (message.start, "elsewhere")):
            warnings.warn_explicit(text, message.category, "file.py", 1, module=where, registry={})
    assert [str(warning.message) for warning in caught] == [f"Not {message.start}", message.start]


@pytest.mark.parametrize("message", quiet.RECORDS, ids=lambda message: message.start[:30])
def test_named_record_is_dropped_and_others_are_not(message: quiet.Message, caplog: pytest.LogCaptureFixture) -> None:
    import logging

    with contextlib.ExitStack() as stack:
        stack.enter_context(caplog.at_level(logging.WARNING))
        logger = logging.getLogger(message.module)
        logger.warning(f"{message.start} and more")
        logger.warning("something else")
    assert [record.getMessage() for record in caplog.records] == ["something else"]
