"""Stopping on a signal: the first is remembered and the loop stops at the next step, the second ends at once.

And the other way round: helper processes that end when theirs does.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from types import FrameType, TracebackType
from typing import Any

WATCHED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

# Schedulers and launchers pass one signal on several times (to the process group, then to each child).
REPEAT_SECONDS = 2.0


class StopRequest:
    """Watches SIGTERM, SIGUSR1 and SIGINT while it is open (``with StopRequest() as stop:``); main thread only."""

    def __init__(self) -> None:
        self.signal_name: str | None = None
        """The first signal, e.g. ``SIGTERM``; None while there was none."""
        self._since = 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in WATCHED:
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __bool__(self) -> bool:
        """Whether this rank was asked to stop; use ``world.agree`` before acting on it."""
        return self.signal_name is not None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name, now = signal.Signals(number).name, time.monotonic()
        if self.signal_name is None:
            self.signal_name, self._since = name, now
        elif now - self._since >= REPEAT_SECONDS:
            # A second, later request: the user does not want to wait for the save.
            raise SystemExit(1)


def end_with_parent(parent: int) -> None:
    """In a process that ``parent`` forked: end when it does, also when it is killed (Linux; prctl(2))."""
    pr_set_pdeathsig = 1
    prctl = getattr(ctypes.CDLL(None), "prctl", None) if sys.platform == "linux" else None
    if prctl is not None:
        prctl(pr_set_pdeathsig, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
