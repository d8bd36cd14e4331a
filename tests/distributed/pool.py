"""Worker processes for tests with several ranks. Importing torch and megatron-core costs seconds, so they are reused.

A test takes the ``pool`` fixture and calls ``pool.run(2, function, *args)`` with a function of its module; the function
runs on ranks 0 and 1 inside a fresh gloo process group, with torchrun's environment variables set.
"""

from __future__ import annotations

import faulthandler
import gc
import importlib
import importlib.util
import multiprocessing
import os
import pickle
import signal
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_steel.runtime import cpu
from megatron_steel.runtime.contact import lost_contact

HOST = "127.0.0.1"
START_SECONDS = 120.0
GRACE_SECONDS = 5.0
# A rank of a large layout has about 70.
MOST_THREADS = 250


class RemoteTraceback(Exception):
    """Where a rank raised; the cause of the exception that :meth:`WorkerPool.run` raises."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


class WorkerPool:
    """Reusable ranks. ``pool.run`` is the whole interface; ``close`` ends the processes."""

    def __init__(self) -> None:
        self._workers: list[tuple[Any, connection.Connection]] = []

    def run(
        self, world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 60.0, join: bool = True
    ) -> list[Any]:
        """Call ``function(*args)`` on ranks 0 .. world_size - 1 and return their results in rank order.

        With ``join=False`` no process group exists yet: the function starts one (``world.start``) from the environment.
        An exception of a rank is raised here with the remote traceback as its cause; ``TimeoutError`` after
        ``timeout`` seconds. Ranks that died or hang are replaced before the next call.
        """
        self._retire()
        self._grow(world_size)
        # The parent serves the store: no port is chosen before it is bound, and it outlives every rank.
        store = dist.TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
        module = sys.modules[function.__module__]
        where = (module.__name__, getattr(module, "__file__", None), function.__qualname__)
        for rank in range(world_size):
            task = (list(sys.path), where, args, rank, world_size, store.port, timeout, join)
            self._workers[rank][1].send_bytes(pickle.dumps(task))
        replies = self._collect(world_size, timeout)
        failed = [reply for reply in replies if reply[1] == "error"]
        if failed:
            # A rank that lost its peer fails too; the first failure that is not about a connection is the cause.
            rank, _, error, text = min(failed, key=lambda reply: lost_contact(reply[2]) is not None)
            raise error from RemoteTraceback(f"rank {rank}: {text}")
        return [reply[2] for reply in sorted(replies, key=lambda reply: reply[0])]

    def close(self) -> None:
        """End all workers; they have nothing to save."""
        self._kill()

    def _retire(self) -> None:
        """End workers in which something has leaked: threads of old process groups slow down all that follows."""
        counts = (len(os.listdir(f"/proc/{process.pid}/task")) for process, _ in self._workers if process.is_alive())
        if max(counts, default=0) > MOST_THREADS:
            self._kill()

    def _grow(self, count: int) -> None:
        context = multiprocessing.get_context("spawn")
        fresh = []
        while len(self._workers) < count:
            here, there = context.Pipe()
            # Not a daemon: saving a checkpoint starts processes of its own.
            process = context.Process(target=serve, args=(there,))
            process.start()
            there.close()
            self._workers.append((process, here))
            fresh.append(here)
        for pipe in fresh:
            if not pipe.poll(START_SECONDS):
                self._kill()
                raise TimeoutError(f"a worker did not start within {START_SECONDS:.0f} s")
            pipe.recv_bytes()

    def _collect(self, world_size: int, timeout: float) -> list[tuple[int, str, Any, str]]:
        waiting = {self._workers[rank][1]: rank for rank in range(world_size)}
        replies: list[tuple[int, str, Any, str]] = []
        deadline, dead = time.monotonic() + timeout, False
        while waiting:
            ready = connection.wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                hanging = sorted(waiting.values())
                self._kill()
                if replies and any(reply[1] == "error" for reply in replies):
                    return replies
                raise TimeoutError(f"ranks {hanging} did not finish within {timeout:.0f} s")
            for pipe in ready:
                rank = waiting.pop(pipe)  # type: ignore[call-overload]
                try:
                    kind, value, text = pickle.loads(pipe.recv_bytes())  # type: ignore[union-attr]
                except (EOFError, ConnectionError):
                    process = self._workers[rank][0]
                    process.join(GRACE_SECONDS)
                    kind, text, dead = "error", "", True
                    value = RuntimeError(f"rank {rank} died with exit code {process.exitcode}")
                replies.append((rank, kind, value, text))
                if kind == "error":
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        if dead:
            self._kill()
        return replies

    def _kill(self) -> None:
        """End the workers and everything they started (each leads a process group)."""
        for process, pipe in self._workers:
            if process.is_alive():
                try:
                    os.killpg(process.pid, signal.SIGKILL)
                except ProcessLookupError:
                    process.kill()
            process.join()
            pipe.close()
        self._workers.clear()


def serve(pipe: connection.Connection) -> None:
    """Life of a worker: run tasks until the pool closes the pipe."""
    os.setsid()
    torch.set_num_threads(1)
    cpu.install()
    import megatron.core.parallel_state  # noqa: F401 - imported once, before the first task

    pipe.send_bytes(b"ready")
    while True:
        try:
            task = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        pipe.send_bytes(perform(*task))


def perform(
    path: list[str],
    where: tuple[str, str | None, str],
    args: tuple[Any, ...],
    rank: int,
    world_size: int,
    port: int,
    timeout: float,
    join: bool,
) -> bytes:
    """Run one task on one rank; the pickled ``(kind, value, traceback)``."""
    sys.path[:] = path
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR=HOST,
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
        # torchrun's way to say that somebody else serves the store.
        TORCHELASTIC_USE_AGENT_STORE="True",
        TORCHELASTIC_RESTART_COUNT="0",
    )
    # A rank that hangs shows where, shortly before the pool gives up.
    faulthandler.dump_traceback_later(timeout * 0.9, file=sys.__stderr__)
    try:
        if join:
            join_ranks(timeout)
        reply = ("ok", load(*where)(*args), "")
    except BaseException as error:  # noqa: BLE001 - whatever it is, the parent raises it
        text = traceback.format_exc()
        # The frames hold process groups; their peers notice the failure when the connections close.
        traceback.clear_frames(error.__traceback__)
        reply = ("error", error if can_travel(error) else RuntimeError(f"{type(error).__name__}: {error}"), text)
    finally:
        leave_ranks()
        faulthandler.cancel_dump_traceback_later()
    try:
        return pickle.dumps(reply)
    except Exception as error:  # noqa: BLE001 - pickle raises all sorts
        return pickle.dumps(("error", TypeError(f"the result of rank {rank} cannot be sent: {error}"), ""))


def join_ranks(timeout: float) -> None:
    """A fresh default process group from the environment."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=timeout))


def leave_ranks() -> None:
    """Forget all groups and what megatron-core remembers of them.

    A group that is remembered anywhere keeps its three threads, which ask for news a hundred times a second each.
    """
    from megatron.core import parallel_state
    from megatron.core.models.common.embeddings import rotary_pos_embedding, yarn_rotary_pos_embedding
    from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher

    parallel_state.destroy_model_parallel()
    # Tables of angles, remembered by module and context-parallel group.
    rotary_pos_embedding.RotaryEmbedding.forward.cache_clear()
    yarn_rotary_pos_embedding.YarnRotaryEmbedding.forward.cache_clear()
    # Dispatchers of experts keep a tensor whose graph leads, through hooks no collector sees, back to the model.
    for found in gc.get_objects():
        if issubclass(type(found), MoETokenDispatcher):
            vars(found).clear()
    if dist.is_initialized():
        dist.destroy_process_group()
    torch.set_num_threads(1)
    gc.collect()


def load(name: str, file: str | None, qualified: str) -> Any:
    """The function of a test module, by name or from its file."""
    if importlib.util.find_spec(name.partition(".")[0]) is None and file is not None and name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(file))
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    found: Any = importlib.import_module(name)
    for part in qualified.split("."):
        found = getattr(found, part)
    return found


def can_travel(error: BaseException) -> bool:
    """Whether an exception survives pickling (some need arguments they do not keep)."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001 - pickle raises all sorts
        return False
    return isinstance(error, Exception)
