"""Lines on stderr about work over files that takes long: share, MB/s and time left."""

from __future__ import annotations

import sys
import time

FIRST_LINE_SECONDS = 5.0
LINE_SECONDS = 2.0


class ByteProgress:
    """Counts bytes of a known total; prints nothing in the first seconds, so quick work stays quiet."""

    def __init__(self, what: str, total_bytes: int) -> None:
        self.what, self.total, self.done = what, max(total_bytes, 1), 0
        self._start = time.monotonic()
        self._next = self._start + FIRST_LINE_SECONDS

    def add(self, count: int) -> None:
        """Note ``count`` more bytes, and print a line when it is time for one."""
        self.done += count
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + LINE_SECONDS
        seconds = now - self._start
        left = seconds * max(self.total - self.done, 0) / max(self.done, 1)
        print(
            f"{self.what}: {100 * min(self.done / self.total, 1.0):.1f}% | {self.done / seconds / 1e6:.1f} MB/s | "
            f"ETA {time.strftime('%H:%M:%S', time.gmtime(left))}",
            file=sys.stderr,
            flush=True,
        )
