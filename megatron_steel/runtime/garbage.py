"""Python's garbage collector, at chosen moments instead of any.

A full collection looks at all objects of the process, hundreds of milliseconds with torch and megatron-core loaded;
in a step it keeps the device waiting, and with many ranks each one waits for the others' collections. Reference
counting frees tensors anyway: what is left for the collector are cycles.
"""

from __future__ import annotations

import gc
from types import TracebackType


class Collector:
    """``with Collector(manual, interval) as collector:`` around training; Python's own collector where not manual."""

    def __init__(self, manual: bool = False, interval: int = 0) -> None:
        """``interval``: steps between collections; 0: only around what is no training anyway."""
        self.manual, self.interval = manual, interval
        self.frozen = False

    def __enter__(self) -> Collector:
        if self.manual:
            gc.disable()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.manual:
            gc.unfreeze()
            gc.enable()

    def after_step(self, iteration: int) -> None:
        """Collect when it is time. What is alive after the first step stays so: it is not looked at again."""
        if not self.manual:
            return
        if not self.frozen:
            gc.collect()
            gc.freeze()
            self.frozen = True
        elif self.interval and iteration % self.interval == 0:
            gc.collect()

    def collect(self) -> None:
        """Collect now, where nobody waits for the next step."""
        if self.manual:
            gc.collect()
