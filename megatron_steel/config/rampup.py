"""Samples per step as a pure function of the samples consumed before it: constant, or rising in equal parts.

``--rampup-batch-size START INCREMENT SAMPLES`` is Megatron-LM's: n = (global batch - START) / INCREMENT parts of
SAMPLES / n samples each, every one INCREMENT larger than the one before. Whole numbers all through: the sizes cannot
depend on how a quotient was rounded.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_steel.config.schema import TrainingConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchSizes:
    """The size of every step of a run."""

    final: int
    """Samples per step after the ramp."""
    start: int = 0
    """Samples of the first step; counts only with ``parts``."""
    increment: int = 0
    parts: int = 0
    """Sizes before the final one; 0 without a ramp."""
    samples: int = 0
    """Samples over which the size rises."""

    def at(self, consumed: int) -> int:
        """Samples of the step that begins after ``consumed`` samples."""
        if consumed >= self.samples:
            return self.final
        return self.start + consumed * self.parts // self.samples * self.increment

    def consumed_after(self, steps: int, consumed: int = 0) -> int:
        """Samples consumed after ``steps`` more steps."""
        while steps > 0 and consumed < self.samples:
            part = consumed * self.parts // self.samples
            end = -(-self.samples * (part + 1) // self.parts)  # the first sample of the next part
            size = self.start + part * self.increment
            same = min(steps, -(-(end - consumed) // size))
            steps, consumed = steps - same, consumed + same * size
        return consumed + steps * self.final


def batch_sizes(training: TrainingConfig) -> BatchSizes:
    """The sizes of a checked configuration's steps."""
    assert training.global_batch_size is not None
    if not training.rampup_batch_size:
        return BatchSizes(final=training.global_batch_size)
    start, increment, samples = training.rampup_batch_size
    parts = (training.global_batch_size - start) // increment
    return BatchSizes(final=training.global_batch_size, start=start, increment=increment, parts=parts, samples=samples)
