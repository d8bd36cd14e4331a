"""Initial weights are a function of the seed and the parameter's name: the same for every layout."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from pool import WorkerPool
from tiny_run import LAYOUTS, OPTIONS, ROWS, Trace, start_world, whole_weights

from megatron_steel.config.load import from_flat
from megatron_steel.model.build import build_model
from megatron_steel.model.initialize import model_wide_name

QWEN3 = {"model_family": "qwen3", "add_qkv_bias": False, "qk_layernorm": True}


def work_build(flat: dict[str, Any]) -> Trace:
    """Build the model and copy this rank's weights, padding rows of the vocabulary included."""
    world = start_world(flat)
    trace = Trace(tensor_rank=world.tensor_rank)
    for model in build_model(from_flat(flat), ROWS, world).language_models():
        for local_name, parameter in model.named_parameters():
            name = model_wide_name(model, local_name)
            trace.weights[name] = parameter.detach().float().numpy().copy()
            if world.tensor_size > 1 and getattr(parameter, "tensor_model_parallel", False):
                trace.splits[name] = parameter.partition_dim
    return trace


@pytest.mark.parametrize("changes", [{}, {"untie_embeddings_and_output_weights": True}, QWEN3, {"bf16": True}])
def test_weights_are_bit_equal_on_every_layout(pool: WorkerPool, changes: dict[str, Any]) -> None:
    reference = whole_weights(pool.run(1, work_build, {**OPTIONS, **changes}, join=False))
    for name in ("tp2", "pp2", "pp2-interleaved", "dp2", "tp2-pp2"):
        layout = LAYOUTS[name]
        flat = {**OPTIONS, **layout.flags, **changes}
        weights = whole_weights(pool.run(layout.ranks, work_build, flat, join=False))
        assert weights.keys() == reference.keys()
        for key, value in weights.items():
            assert np.array_equal(value, reference[key]), f"{key} on {name}"


def test_distribution_padding_and_seed(pool: WorkerPool) -> None:
    flat = {**OPTIONS, "hidden_size": 64, "ffn_hidden_size": 256, "untie_embeddings_and_output_weights": True}
    trace = pool.run(1, work_build, flat, join=False)[0]
    for name, value in trace.weights.items():
        if name.endswith("bias"):
            assert not value.any()
        elif value.ndim == 1:
            assert (value == 1).all()
        else:
            real = value[:ROWS] if value.shape[0] == 1008 else value
            residual = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
            std = 0.02 / math.sqrt(2 * 4) if residual else 0.02
            # The standard error of a standard deviation over n numbers is std / sqrt(2 n); the mean's is std / sqrt(n).
            assert abs(real.std() / std - 1) < 5 / math.sqrt(2 * real.size), name
            assert abs(real.mean()) < 5 * std / math.sqrt(real.size), name
            assert not value[len(real) :].any()
    values = [value.ravel()[:8].tobytes() for value in trace.weights.values() if value.ndim == 2]
    assert len(set(values)) == len(values), "two parameters start from the same numbers"
    other = pool.run(1, work_build, {**flat, "seed": 4321}, join=False)[0]
    assert not any(np.array_equal(other.weights[n], v) for n, v in trace.weights.items() if v.ndim == 2)
