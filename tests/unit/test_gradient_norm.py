"""The gradient norm against float64, at sizes where a plain fp32 sum on the CPU is wrong."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_steel.optim.optimizer import NORM_ROW, square_sum


@pytest.mark.parametrize("count", [1, 7, NORM_ROW - 1, NORM_ROW, NORM_ROW + 1, 500_000, 4_000_000])
def test_sum_of_squares_is_exact_at_any_size(count: int) -> None:
    values = np.random.default_rng(count).standard_normal(count).astype(np.float32) * np.float32(1e-3)
    exact = float(np.square(values.astype(np.float64)).sum())
    assert abs(square_sum(torch.from_numpy(values)).item() / exact - 1) < 1e-6


def test_shape_and_what_is_not_finite() -> None:
    values = torch.arange(12.0).reshape(3, 4)
    assert square_sum(values).item() == pytest.approx(506.0)
    assert square_sum(torch.zeros(0)).item() == 0.0
    for bad in (float("inf"), float("nan")):
        values[1, 1] = bad
        assert not np.isfinite(square_sum(values).item())
