"""Whether data-parallel replicas still hold the same weights, to the bit.

They all start from the same weights and take the same steps; a rank whose memory, device or communication went wrong
goes on with other weights without an error, and every later step and checkpoint is worth nothing.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from megatron_steel.model.build import Model
from megatron_steel.model.initialize import model_wide_name
from megatron_steel.runtime import world as runtime
from megatron_steel.runtime.world import World

# Elements hashed at a time: their multipliers, 8 bytes each, are all the memory it takes.
CHUNK = 2**22
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Multiplier of the golden ratio (Knuth, TAOCP vol. 3, 6.4), as a signed 64-bit number.
GOLDEN = 0x9E3779B97F4A7C15 - 2**64


class ReplicaError(RuntimeError):
    """Replicas hold different weights; the message names the ranks and a weight."""


def tensor_hash(tensor: Tensor) -> int:
    """A 64-bit hash of a tensor's bits, computed on its device: the same whatever the order of summation.

    The sum of element i times an odd number that depends on i, modulo 2**64. An odd number has an inverse, so that a
    change of one element always changes the hash; of several, all but one time in about 2**64.
    """
    bits = tensor.detach().contiguous().view(INTEGERS[tensor.element_size()]).flatten()
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, bits.numel(), CHUNK):
        part = bits[start : start + CHUNK].long()
        odd = torch.arange(start, start + part.numel(), device=tensor.device).mul_(GOLDEN)
        # Neighbours must not have multipliers a fixed distance apart: equal and opposite changes would cancel.
        odd.bitwise_xor_(odd >> 29).mul_(GOLDEN).bitwise_or_(1)
        total += part.mul_(odd).sum()
    return int(total.item())


def weight_hashes(model: Model, world: World) -> dict[tuple[Any, ...], int]:
    """Hash of each parameter of this rank by its name and place: what has the same key must have the same weights."""
    hashes: dict[tuple[Any, ...], int] = {}
    dense = (world.tensor_rank,)
    expert = (world.expert_rank, world.expert_tensor_rank)
    for language_model in model.language_models():
        for name, parameter in language_model.named_parameters():
            # megatron-core's mark of a weight that is not the same on all data-parallel ranks, but on some of them.
            place = dense if getattr(parameter, "allreduce", True) else expert
            hashes[(model_wide_name(language_model, name), *place)] = tensor_hash(parameter)
    return hashes


def check_replicas(model: Model, world: World, iteration: int) -> None:
    """Compare the weights of all replicas; collective over all ranks, and every rank comes to the same answer.

    Raises:
        ReplicaError: names the ranks that differ from most replicas of theirs, or, where there is no majority, those
            that differ from each other.
    """
    model.gather_parameters()
    mine = weight_hashes(model, world)
    # A few numbers decide in all steps where nothing is wrong; the rest travels only to find out what it is.
    by_place = defaultdict(list)
    for key, value in mine.items():
        by_place[(world.pipeline_rank, *key[1:])].append(value)
    summary = {place: hash(tuple(values)) for place, values in by_place.items()}
    if not differing(runtime.gather_objects(world, summary)):
        return
    wrong = differing(runtime.gather_objects(world, mine))
    raise ReplicaError(f"after iteration {iteration} {describe(wrong)}; nothing was saved since they agreed")


def differing(by_rank: list[dict[tuple[Any, ...], int]]) -> dict[tuple[Any, ...], list[list[int]]]:
    """Keys that have several values: the ranks of each value, those of the most frequent one last."""
    ranks_of: dict[tuple[Any, ...], dict[int, list[int]]] = {}
    for rank, values in enumerate(by_rank):
        for key, value in values.items():
            ranks_of.setdefault(key, {}).setdefault(value, []).append(rank)
    return {key: sorted(groups.values(), key=len) for key, groups in ranks_of.items() if len(groups) > 1}


def describe(wrong: dict[tuple[Any, ...], list[list[int]]]) -> str:
    """Which ranks hold other weights than most, or than each other where there is no majority; and the first weight."""
    key, groups = next(iter(wrong.items()))
    name = f"{key[0]} and {len(wrong) - 1} more" if len(wrong) > 1 else str(key[0])
    if any(len(groups[-1]) == len(groups[-2]) for groups in wrong.values()):
        sides = " from ".join(listed(ranks) for ranks in groups)
        return f"replicas differ in {name}: {sides}, with no majority to tell which is wrong"
    strays = sorted({rank for groups in wrong.values() for ranks in groups[:-1] for rank in ranks})
    return f"{listed(strays)} held other weights than the {len(groups[-1])} replicas that agree: {name}"


def listed(ranks: list[int]) -> str:
    """``rank 3`` or ``ranks 3, 5``."""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
