"""Speed of a run: time per step, tokens/s, TFLOP/s, MFU, time left.

FLOPs are :func:`megatron_steel.plan.estimate.flops_per_token` in the ``full`` convention (attention counts every query
against every key, no recomputation); a causal count would be lower at the same speed.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator


class Throughput:
    """A stopwatch that knows how much work a step is.

    Call :meth:`lap` after the interval's metrics were read from the device, so that the work is really done.
    """

    def __init__(
        self,
        *,
        flops_per_token: float,
        tokens_per_sample: int,
        devices: int,
        peak_flops: float,
        total_samples: int,
        iteration: int = 0,
        samples: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start the clock after ``iteration`` finished steps over ``samples`` samples.

        Args:
            flops_per_token: training FLOPs of one token.
            tokens_per_sample: tokens of a sample.
            devices: devices of the whole run.
            peak_flops: FLOP/s of one device.
            total_samples: samples after which the run ends.
            clock: seconds that never jump back.
        """
        assert devices > 0 and peak_flops > 0
        self.flops_per_token, self.tokens_per_sample = flops_per_token, tokens_per_sample
        self.devices, self.peak_flops, self.total_samples, self.clock = devices, peak_flops, total_samples, clock
        self.started_at = self.lap_at = clock()
        self.iteration = iteration
        self.first = self.samples = samples
        self.paused = 0.0
        self.warm = False

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Time in here (evaluation, saving) does not count as training; the time left still includes its share."""
        start = self.clock()
        try:
            yield
        finally:
            self.paused += self.clock() - start

    def lap(self, iteration: int, samples: int) -> dict[str, float]:
        """Speed of the steps since the last lap, the newest being ``iteration``, after ``samples`` samples.

        ``eta_s`` is the time left at the pace of the run so far, pauses included: per sample, because steps of a
        batch-size ramp grow. The pace is that of this process without its first lap, which has the warm-up of
        compilers and allocators in it.
        """
        assert iteration > self.iteration, (iteration, self.iteration)
        now, steps = self.clock(), iteration - self.iteration
        # A clock too coarse for the interval must not divide by zero.
        seconds = max(now - self.lap_at - self.paused, 1e-9)
        pace = (now - self.started_at) / (samples - self.first)
        tokens_per_second = self.tokens_per_sample * (samples - self.samples) / seconds / self.devices
        if not self.warm:
            self.warm, self.first, self.started_at = True, samples, now
        self.lap_at, self.iteration, self.samples, self.paused = now, iteration, samples, 0.0
        flops = tokens_per_second * self.flops_per_token
        return {
            "step_time_s": seconds / steps,
            "tokens_per_second_per_device": tokens_per_second,
            "tflops_per_device": flops / 1e12,
            "mfu": flops / self.peak_flops,
            "eta_s": pace * (self.total_samples - samples),
        }
