"""AdamW with its state on the host is AdamW, and a sharded optimizer loads the state of torch's."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import megatron.core
import torch
from torch import Tensor

from megatron_steel.optim.host_adamw import HostAdamW, load_shard

SHAPES = ((7, 5), (11,), (0,))
OPTIONS = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def weights(dtype: torch.dtype) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def step(optimizer: torch.optim.Optimizer, number: int) -> list[Tensor]:
    """One step with gradients that follow from its number; the last weight has none in even steps."""
    generator = torch.Generator().manual_seed(number)
    (group,) = optimizer.param_groups
    group["lr"] = 0.01 / (1 + number)
    for weight in group["params"]:
        weight.grad = torch.randn(weight.shape, generator=generator).to(weight.dtype)
    if number % 2 == 0:
        group["params"][1].grad = None
    optimizer.step()
    return [weight.detach().clone() for weight in group["params"]]


def test_steps_are_those_of_adamw_and_go_on_from_a_saved_state() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        theirs = torch.optim.AdamW(weights(dtype), fused=True, **OPTIONS)
        ours = HostAdamW(weights(dtype), **OPTIONS)
        for number in range(3):
            for wanted, found in zip(step(theirs, number), step(ours, number), strict=True):
                assert torch.equal(wanted, found)
        again = HostAdamW([torch.nn.Parameter(weight.detach().clone()) for weight in ours.param_groups[0]["params"]])
        again.load_state_dict(deepcopy(ours.state_dict()))
        for wanted, found in zip(step(theirs, 3), step(again, 3), strict=True):
            assert torch.equal(wanted, found)
        assert {value.device.type for state in again.state.values() for value in state.values()} == {"cpu"}


def test_a_shard_is_loaded_with_a_step_count_of_its_own() -> None:
    held = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
    optimizer = torch.optim.AdamW(held, lr=0.1)
    shared = torch.tensor(5.0)
    for weight in held:
        optimizer.state[weight] = {"step": shared, "exp_avg": torch.zeros(2), "exp_avg_sq": torch.zeros(2)}
    places = {weight: (0, index) for index, weight in enumerate(held)}
    part = SimpleNamespace(optimizer=optimizer, model_param_group_index_map=places)
    for value, weight in enumerate(held):
        loaded = {"param": torch.full((2,), 1.0 + value), "exp_avg": torch.ones(2), "exp_avg_sq": torch.ones(2)}
        with torch.no_grad():
            load_shard(part, weight, loaded)  # type: ignore[arg-type]
    assert held[1].tolist() == [2.0, 2.0] and optimizer.state[held[0]]["exp_avg"].tolist() == [1.0, 1.0]
    for weight in held:
        weight.grad = torch.ones(2)
    optimizer.step()
    assert [optimizer.state[weight]["step"].item() for weight in held] == [6.0, 6.0]


def test_upstream_still_asks_the_checkpoint_for_every_state() -> None:
    source = Path(megatron.core.__file__).parent / "optimizer/distrib_optimizer.py"
    assert "dst_tensors[key].copy_(tensors[key])" in source.read_text()
