"""Lines on stderr about work over files that takes long: share, MB/s and time left."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Sequence

FIRST_LINE_SECONDS = 5.0
LINE_SECONDS = 2.0


class ByteProgress:
    """Counts bytes of a known total, from any thread; silent in the first seconds, so that quick work says nothing."""

    def __init__(self, what: str, total_bytes: int) -> None:
        self.what, self.total, self.done = what, max(total_bytes, 1), 0
        self._start = time.monotonic()
        self._next = self._start + FIRST_LINE_SECONDS
        self._lock = threading.Lock()

    def add(self, count: int) -> None:
        """Note ``count`` more bytes, and print a line when it is time for one."""
        with self._lock:
            self.done += count
            now = time.monotonic()
            if now < self._next:
                return
            self._next = now + LINE_SECONDS
            seconds = now - self._start
            left = seconds * max(self.total - self.done, 0) / max(self.done, 1)
            # Under the lock: print writes a line and its end apart, which another thread's line may come between.
            print(
                f"{self.what}: {100 * min(self.done / self.total, 1.0):.1f}% | {self.done / seconds / 1e6:.1f} MB/s | "
                f"ETA {time.strftime('%H:%M:%S', time.gmtime(left))}",
                file=sys.stderr,
                flush=True,
            )


class TaskProgress:
    """Progress of work cut into tasks of known sizes, done by several processes."""

    def __init__(self, what: str, sizes: Sequence[int], log_interval: int) -> None:
        self.what, self.sizes, self.log_interval = what, sizes, log_interval
        self.left_out = self.finished_bytes = self.documents = self.tokens = 0
        self._running: dict[int, tuple[int, int, int]] = {}
        self._start = time.monotonic()
        self._next, self._next_documents = self._start + FIRST_LINE_SECONDS, log_interval

    def skip(self, number: int) -> None:
        """A task that was done before."""
        self.left_out += self.sizes[number]

    def finish(self, number: int, documents: int, tokens: int) -> None:
        """A task is done."""
        self._running.pop(number, None)
        self.finished_bytes += self.sizes[number]
        self.documents += documents
        self.tokens += tokens
        self._print()

    def update(self, number: int, counts: tuple[int, int, int]) -> None:
        """(bytes, documents, tokens) of a task that is being done."""
        self._running[number] = (min(counts[0], self.sizes[number]), *counts[1:])
        self._print()

    def _print(self) -> None:
        """A line when ``log_interval`` documents and some seconds have passed since the last one."""
        running = [sum(column) for column in zip(*self._running.values(), strict=True)] or [0, 0, 0]
        now, done = time.monotonic(), self.finished_bytes + running[0]
        documents, tokens = self.documents + running[1], self.tokens + running[2]
        if now < self._next or documents < self._next_documents:
            return
        total, seconds = max(sum(self.sizes), 1), now - self._start
        left = seconds * max(total - self.left_out - done, 0) / max(done, 1)
        print(
            f"{self.what}: {documents} documents, {100 * (self.left_out + done) / total:.1f}% | "
            f"{documents / seconds:.0f} docs/s | {done / seconds / 1e6:.2f} MB/s | {tokens / seconds:.0f} tokens/s | "
            f"ETA {time.strftime('%H:%M:%S', time.gmtime(left))}",
            file=sys.stderr,
            flush=True,
        )
        self._next, self._next_documents = now + LINE_SECONDS, documents + self.log_interval
