"""When a rank dies: the others end within a bounded time with one line that names it, instead of hanging.

gloo notices a dead peer at once (the connection closes) and a silent one after the timeout of the group, and raises a
plain ``RuntimeError``. NCCL's watchdog does the same after the timeout. Each rank that ends early leaves a note in the
store of the run; who left none is the one that died.
"""

from __future__ import annotations

import contextlib
import faulthandler
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta

import torch.distributed as dist

from megatron_steel.runtime import world as runtime
from megatron_steel.runtime.world import World

# Parts of the messages of gloo, of torch's stores and of NCCL, and what they mean.
SIGNS: tuple[tuple[str, str], ...] = (
    ("Connection closed by peer", "connection closed"),
    ("Connection reset by peer", "connection closed"),
    ("Broken pipe", "connection closed"),
    ("Connection refused", "connection refused"),
    ("Timed out waiting", "no answer within the timeout"),
    ("Socket Timeout", "no answer within the timeout"),
    ("timed out", "no answer within the timeout"),
    ("third_party/gloo", "gloo error"),
)
LOST = "lost"
NOTE_SECONDS = 3.0
EXIT_SECONDS = 30.0


def lost_contact(error: BaseException) -> str | None:
    """Why an exception means that a peer is gone, in a few words; None when it means something else."""
    if not isinstance(error, RuntimeError):
        return None
    from_torch = isinstance(error, dist.DistError) or "gloo" in str(error)
    if not from_torch:
        return None
    found = (meaning for sign, meaning in SIGNS if sign in str(error))
    return next(found, type(error).__name__ if isinstance(error, dist.DistError) else None)


@contextlib.contextmanager
def watching(world: World) -> Iterator[None]:
    """Run the body as one of many ranks and leave the world afterwards.

    An exception is raised on; when it only means that a peer is gone, one line goes to stderr and the process exits
    with code 1. After either, nothing can keep the process alive for more than ``EXIT_SECONDS``.
    """
    try:
        yield
    except BaseException as error:
        # A timer in C: it also works while destructors of process groups wait for ranks that are gone.
        faulthandler.dump_traceback_later(EXIT_SECONDS, exit=True)
        reason = lost_contact(error)
        leave_note(world, LOST if reason else f"{type(error).__name__}: {error}")
        runtime.stop(world, failed=True)
        if reason is None:
            raise
        print(
            f"error: rank {world.rank}: lost contact with {name_peers(world)} ({reason})", file=sys.stderr, flush=True
        )
        raise SystemExit(1) from None
    runtime.stop(world, failed=False)


def leave_note(world: World, text: str) -> None:
    """Tell the others why this rank ends; nothing when the store is gone too."""
    if world.store is not None:
        with contextlib.suppress(RuntimeError):
            world.store.set_timeout(timedelta(seconds=NOTE_SECONDS))
            world.store.set(f"ended/{world.rank}", " ".join(text.split()))


def name_peers(world: World) -> str:
    """The ranks that failed or vanished, e.g. ``rank 3`` or ``rank 3, which failed: ValueError: ...``.

    When the network is cut, the store behind it does not answer either, and its timeout covers only some requests:
    they are made on a thread that can be left behind.
    """
    store = world.store
    if store is None:
        return "a peer"
    names: list[str] = []
    thread = threading.Thread(target=lambda: names.append(read_notes(world, store)), daemon=True)
    thread.start()
    thread.join(3 * NOTE_SECONDS)
    # The store is served where rank 0 is, by its launcher or itself.
    return names[0] if names else "the node of rank 0"


def read_notes(world: World, store: dist.Store) -> str:
    """Ask the store who left a note; for ``name_peers``."""
    silent = {rank for rank in range(world.size) if rank != world.rank}
    deadline = time.monotonic() + NOTE_SECONDS
    with contextlib.suppress(RuntimeError):
        while silent and time.monotonic() < deadline:
            for rank in [rank for rank in sorted(silent) if store.check([f"ended/{rank}"])]:
                note = store.get(f"ended/{rank}").decode()
                if note != LOST:
                    return f"rank {rank}, which failed: {note}"
                silent.discard(rank)
            time.sleep(0.05)
    if not silent:
        return "a peer"
    return f"rank{'s' if len(silent) > 1 else ''} {', '.join(map(str, sorted(silent)))}"
