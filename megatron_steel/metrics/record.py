"""Collect metrics over a logging interval and reduce them once, when the interval ends.

Nothing waits for the device before :meth:`MetricRecorder.flush`, and a flush costs one collective for all sums and
one for all maxima, whatever the number of metrics.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

Reduction = Literal["mean", "sum", "max", "last"]


class MetricRecorder:
    """Named numbers of one interval.

    ``mean`` and ``sum`` go over all records of all ranks of ``group``, ``max`` over the same, ``last`` is this rank's
    most recent value. Every rank of the group has to record the same names; how often may differ. Values are summed
    in float64. A NaN anywhere makes mean, sum and max NaN or, for max over ranks, infinite; it is never hidden.
    """

    def __init__(self, group: ProcessGroup | None = None, device: torch.device | str = "cpu") -> None:
        """``device`` is where the collectives of ``group`` want their tensors."""
        self.group = group if group is not None and group.size() > 1 else None
        self.device = torch.device(device)
        self.reductions: dict[str, Reduction] = {}
        self.values: dict[str, float | Tensor] = {}
        self.counts: dict[str, int] = {}

    def record(self, name: str, value: float | Tensor, reduction: Reduction = "mean") -> None:
        """Add a number or a one-element tensor; a tensor may be changed afterwards, its value now is what counts."""
        if self.reductions.setdefault(name, reduction) != reduction:
            raise ValueError(f"metric {name} is recorded as {reduction} and as {self.reductions[name]}; use one")
        if isinstance(value, Tensor):
            value = value.detach().to(torch.float64, copy=True).reshape(())
        old = self.values.get(name)
        if old is None or reduction == "last":
            self.values[name] = value
        elif reduction == "max":
            self.values[name] = larger(old, value)
        else:
            self.values[name] = old + value
        self.counts[name] = self.counts.get(name, 0) + 1

    def flush(self, iteration: int) -> dict[str, float]:
        """``{"iteration": iteration, name: value, ...}`` in order of first use; the interval starts anew.

        Waits for the device once.
        """
        names, reductions = list(self.reductions), self.reductions
        # By name: ranks may have met the metrics in different order.
        maxima = sorted(name for name in names if reductions[name] == "max")
        sums = sorted(name for name in names if reductions[name] in ("mean", "sum"))
        means = [name for name in sums if reductions[name] == "mean"]
        lasts = [name for name in names if reductions[name] == "last"]
        totals = [self.values[name] for name in sums] + [float(self.counts[name]) for name in means]
        totals = self.all_reduce(totals, torch.distributed.ReduceOp.SUM)
        peaks = self.all_reduce([self.values[name] for name in maxima], torch.distributed.ReduceOp.MAX)
        numbers = to_floats(totals + peaks + [self.values[name] for name in lasts], self.device)

        counts = dict(zip(means, numbers[len(sums) :], strict=False))
        del numbers[len(sums) : len(sums) + len(means)]
        values = dict(zip(sums + maxima + lasts, numbers, strict=True))
        values.update({name: values[name] / counts[name] for name in means})
        self.reductions, self.values, self.counts = {}, {}, {}
        return {"iteration": iteration, **{name: values[name] for name in names}}

    def all_reduce(self, values: list[float | Tensor], operation: Any) -> list[float | Tensor]:
        """The values reduced over the group, unchanged when there is one rank."""
        if self.group is None or not values:
            return values
        stacked = stack(values, self.device)
        if operation == torch.distributed.ReduceOp.MAX:
            # What a maximum makes of NaN depends on the order of the ranks.
            stacked = torch.where(stacked.isnan(), math.inf, stacked)
        torch.distributed.all_reduce(stacked, operation, group=self.group)
        return list(stacked.unbind())


def larger(one: float | Tensor, two: float | Tensor) -> float | Tensor:
    """The larger value, NaN when one of them is."""
    if isinstance(one, Tensor) or isinstance(two, Tensor):
        return torch.maximum(torch.as_tensor(one, dtype=torch.float64), torch.as_tensor(two, dtype=torch.float64))
    return two if two > one or two != two else one


def stack(values: list[float | Tensor], device: torch.device) -> Tensor:
    """One float64 vector; all host numbers travel to the device together."""
    host = torch.tensor([math.nan if isinstance(v, Tensor) else v for v in values], dtype=torch.float64)
    vector = host.to(device)
    places = [index for index, value in enumerate(values) if isinstance(value, Tensor)]
    if places:
        tensors = torch.stack([value.to(device) for value in values if isinstance(value, Tensor)])
        vector[torch.tensor(places, device=device)] = tensors
    return vector


def to_floats(values: list[float | Tensor], device: torch.device) -> list[float]:
    """Host numbers, with one transfer for all tensors."""
    tensors = [value.to(device) for value in values if isinstance(value, Tensor)]
    numbers = iter(torch.stack(tensors).tolist()) if tensors else iter(())
    return [next(numbers) if isinstance(value, Tensor) else float(value) for value in values]


def nest(row: dict[str, float]) -> dict[str, Any]:
    """``{"loss_by_source/zh": x}`` as ``{"loss_by_source": {"zh": x}}``, the form of metrics.jsonl."""
    nested: dict[str, Any] = {}
    for name, value in row.items():
        outer, slash, inner = name.partition("/")
        if slash:
            nested.setdefault(outer, {})[inner] = value
        else:
            nested[name] = value
    return nested
