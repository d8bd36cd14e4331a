"""The random state of a rank whose tracker holds generators, as Transformer Engine's does."""

from __future__ import annotations

import pytest
import torch
from megatron.core import tensor_parallel

from megatron_steel.runtime.random_state import rng_state, set_rng_state


class Tracker:
    """Generators by name, to which recorded graphs hold on."""

    def __init__(self) -> None:
        self.generators = {"model-parallel-rng": torch.Generator().manual_seed(5)}

    def get_states(self) -> dict[str, torch.Generator]:
        return dict(self.generators)

    def set_states(self, states: dict[str, torch.Tensor]) -> None:
        raise AssertionError("a graph would go on with the old generators")


def test_generators_stay_and_their_state_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = Tracker()
    monkeypatch.setattr(tensor_parallel, "get_cuda_rng_tracker", lambda: tracker)
    (generator,) = tracker.generators.values()
    saved = rng_state()
    assert all(isinstance(value, torch.Tensor) for value in saved.values())
    first = torch.rand(4, generator=generator)
    set_rng_state(saved)
    assert torch.equal(torch.rand(4, generator=generator), first)
    assert next(iter(tracker.generators.values())) is generator
