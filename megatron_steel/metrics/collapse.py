"""Rewards that collapse: training on preferences that makes good answers less probable together with the bad ones."""

from __future__ import annotations

from collections.abc import Mapping

WARN_AFTER = 3
"""Reports in a row."""


class RewardWatch:
    """Looks at the rewards of good and bad answers in each report.

    They fall together when both are below 0 and below their values at the report before: the model goes away from the
    reference without making good answers more probable (Pal et al. 2024, arXiv:2402.13228).
    """

    def __init__(self, good: str, bad: str, patience: int | None) -> None:
        """``good`` and ``bad`` are names of metrics; ``patience`` reports in a row end the run, None: none do."""
        self.good, self.bad, self.patience = good, bad, patience
        self.before: tuple[float, float] | None = None
        self.falls = 0

    def see(self, row: Mapping[str, float]) -> str | None:
        """Take a report; returns a line of warning in the report that makes it :data:`WARN_AFTER` falls in a row."""
        now = (row[self.good], row[self.bad])
        falling = self.before is not None and all(v < min(b, 0.0) for v, b in zip(now, self.before, strict=True))
        self.falls = self.falls + 1 if falling else 0
        self.before = now
        if self.falls != WARN_AFTER:
            return None
        return (
            f"warning: {self.good} ({now[0]:.3g}) and {self.bad} ({now[1]:.3g}) have fallen together for {WARN_AFTER} "
            "reports: good answers become less probable too; lower --lr, raise --beta or add --rpo-alpha"
        )

    @property
    def collapsed(self) -> bool:
        """Whether the run should end."""
        return self.patience is not None and self.falls >= self.patience
