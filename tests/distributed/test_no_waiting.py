"""A steady training step asks the device for nothing: on a GPU the host would wait until all work is done.

On a CPU nothing waits, but the same calls can be caught: reading a number out of a tensor, and copies between host and
device that PyTorch makes wait (all but non-blocking ones from pinned memory).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from pool import WorkerPool
from tiny_chats import chat_options, write_chats, write_model, write_pairs
from tiny_run import LAYOUTS, open_session, options, write_data
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_steel.runtime import cpu, device
from megatron_steel.train.loop import reason_to_stop, report, take_step

# Tensors that are on the host on every machine: (file, function that asks).
ON_THE_HOST = {
    ("objective/language.py", "measure_step"),
    ("runtime/world.py", "agree"),
    ("data/chat_batches.py", "_batch"),
    ("tensor_parallel/random.py", "fork"),  # compares states of the host's generator
}


def asker() -> str | None:
    """``file:line function`` of the nearest frame inside the library or megatron-core, unless it may ask."""
    frame = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename).as_posix()
        for home in ("/megatron_steel/", "/megatron/core/"):
            if home in path:
                place = path.rsplit(home, 1)[1]
                if (place, frame.f_code.co_name) in ON_THE_HOST:
                    return None
                return f"{home[1:]}{place}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back  # type: ignore[assignment]
    return None


class Asked(TorchDispatchMode):
    """Writes down who reads a number out of a tensor: item, float, int, bool, and conditions."""

    def __init__(self, found: set[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "local_scalar_dense" in str(function) or "nonzero" in str(function):
            where = asker()
            if where is not None:
                self.found.add(f"{function} {where}")
        return function(*args, **(kwargs or {}))


@contextmanager
def listening(found: set[str]) -> Iterator[None]:
    """Write down every call inside that would wait for a GPU."""
    moves = {name: getattr(torch.Tensor, name) for name in ("to", "cpu", "tolist", "cuda")}
    make = torch.tensor

    def note(what: str) -> None:
        where = asker()
        if where is not None:
            found.add(f"{what} {where}")

    def watched(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            moved = any(isinstance(one, torch.device | str) for one in (*args, kwargs.get("device")))
            if name != "to" or (moved and not kwargs.get("non_blocking")):
                note(name)
            return original(tensor, *args, **kwargs)

        return call

    def made(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("device") is not None:
            note("torch.tensor on a device")
        return make(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, Asked(found):
        for name, original in moves.items():
            patch.setattr(torch.Tensor, name, watched(name, original))
        patch.setattr(torch, "tensor", made)
        patch.setattr(device, "synchronize", lambda: note("synchronize"))
        for finder in sys.meta_path:
            if isinstance(finder, cpu.MegatronOnHost):
                patch.setattr(finder.torch.cuda, "synchronize", lambda: note("torch.cuda.synchronize"))
        yield


def work_listen(flat: dict[str, Any]) -> tuple[set[str], set[str]]:
    """Who would wait in a steady step with the decision to go on; and, to see that listening works, in a report."""
    steady: set[str] = set()
    reported: set[str] = set()
    with open_session(flat) as session:
        for _ in range(2):
            take_step(session)
        with listening(steady):
            take_step(session)
            assert reason_to_stop(session) is None
        with listening(reported):
            report(session)
    return steady, reported


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "fp32": ("1", {}),
    "bf16": ("1", {"bf16": True}),
    "recomputed": ("1", {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}),
    "sharded, overlapped": ("dp2-overlapped", {"bf16": True}),
    "sequence parallel": ("tp2-sp", {"bf16": True}),
    "pipeline": ("pp2", {}),
    "no loss at ends": ("dp2", {"eod_mask_loss": True}),
}


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("case", CASES)
def test_pretraining_asks_nothing(pool: WorkerPool, prefix: str, case: str) -> None:
    layout, flags = CASES[case]
    spread = LAYOUTS[layout]
    for steady, reported in pool.run(spread.ranks, work_listen, options(prefix, spread.flags, flags), join=False):
        assert not steady, "\n".join(sorted(steady))
        assert any("skipped_steps" in line for line in reported), "what a report asks must be heard"


CHATS: dict[str, dict[str, Any]] = {
    "chats": {"packing": False},
    "packed chats": {"packing": True},
    "lora": {"packing": True, "lora_rank": 4},
    "dpo": {"preferences": True, "loss_type": "sigmoid"},
    "kto": {"preferences": True, "loss_type": "kto"},
    "rm": {"preferences": True, "loss_type": "rm"},
}


@pytest.mark.parametrize("case", CHATS)
def test_finetuning_asks_nothing(pool: WorkerPool, tmp_path: Path, case: str) -> None:
    flags = CHATS[case]
    model, path = write_model(tmp_path / "model"), tmp_path / "rows.jsonl"
    write = partial(write_pairs, judged=case == "kto") if "preferences" in flags else write_chats
    ranks = 2 if case == "chats" else 1
    for steady, _ in pool.run(ranks, work_listen, chat_options(model, write(path, 40), **flags), join=False):
        assert not steady, "\n".join(sorted(steady))
