"""Random numbers of a rank: seeding, and their whole state as plain tensors for a checkpoint."""

from __future__ import annotations

import math
import random

import numpy as np
import torch

from megatron_steel.runtime import device

_TRACKER = "tracker."


def seed_everything(seed: int, pipeline_rank: int, recordable: bool = False) -> None:
    """Seed Python, NumPy, torch and megatron.core's tracker, as Megatron-LM does.

    Pipeline stages differ by 100; replicas are alike, so they start from the same weights; the tracker gives
    tensor-parallel ranks numbers of their own where the model asks for them (``model_parallel_cuda_manual_seed``).
    ``recordable``: by generators that CUDA graphs can hold on to, Transformer Engine's.
    """
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    stage_seed = seed + 100 * pipeline_rank
    random.seed(stage_seed)
    np.random.seed(stage_seed % 2**32)
    torch.manual_seed(stage_seed)
    model_parallel_cuda_manual_seed(stage_seed, te_rng_tracker=recordable)


def rng_state() -> dict[str, torch.Tensor]:
    """Every generator of this rank as tensors on the host; :func:`set_rng_state` takes it back."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    _, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state = {
        "python.words": torch.tensor(words, dtype=torch.int64),
        "python.gauss": torch.tensor([math.nan if gauss is None else gauss], dtype=torch.float64),
        "numpy.keys": torch.from_numpy(np.asarray(keys).astype(np.int64)),
        "numpy.position": torch.tensor([position, has_gauss], dtype=torch.int64),
        "numpy.gauss": torch.tensor([cached], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    on_gpu = device.get_rng_state()
    if on_gpu is not None:
        state["gpu"] = on_gpu
    for name, value in get_cuda_rng_tracker().get_states().items():
        state[_TRACKER + name] = value.get_state() if isinstance(value, torch.Generator) else value.clone()
    return state


def set_rng_state(state: dict[str, torch.Tensor]) -> None:
    """Put every generator of this rank back. ``ValueError`` when the state was taken on another kind of device."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    if ("gpu" in state) != device.has_gpu():
        raise ValueError("the random state was saved on another kind of device: resume without it")
    gauss = state["python.gauss"].item()
    random.setstate((3, tuple(state["python.words"].tolist()), None if math.isnan(gauss) else gauss))
    position, has_gauss = state["numpy.position"].tolist()
    keys = state["numpy.keys"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, position, has_gauss, state["numpy.gauss"].item()))
    torch.set_rng_state(state["torch"])
    if "gpu" in state:
        device.set_rng_state(state["gpu"])
    tracked = {name.removeprefix(_TRACKER): value for name, value in state.items() if name.startswith(_TRACKER)}
    generators = get_cuda_rng_tracker().get_states()
    if not any(isinstance(value, torch.Generator) for value in generators.values()):
        get_cuda_rng_tracker().set_states(tracked)
        return
    # Graphs that are recorded hold on to these very generators.
    for name, generator in generators.items():
        generator.set_state(tracked[name])
