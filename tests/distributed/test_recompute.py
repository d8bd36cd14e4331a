"""What is computed once more in the backward pass gives the same step to the bit, and less is kept for it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pool import WorkerPool
from test_experts import FAMILIES as EXPERTS
from tiny_run import LAYOUTS, Trace, open_session, options, work_train, write_data

STEPS = 2
FULL = {"recompute_granularity": "full"}
DROPOUT = {"hidden_dropout": 0.1, "attention_dropout": 0.1}
LLAMA = {"model_family": "llama", "add_qkv_bias": False}
LATENT = {**LLAMA, **EXPERTS["deepseek_v3"], "model_family": "deepseek_v3"}
GEMMA = {
    **LLAMA,
    "softmax_scale": 0.5,
    "model_family": "gemma2",
    "norm_placement": "sandwich",
    "activation": "gelu_tanh",
    "apply_layernorm_1p": True,
    "embedding_scale": True,
    "attn_logit_softcapping": 5.0,
    "final_logit_softcapping": 3.0,
    "window_size": 7,
    "full_attention_layers": [1, 3],
}
NEOX = {
    "model_family": "gpt_neox",
    "add_qkv_bias": False,
    "num_query_groups": None,
    "normalization": "LayerNorm",
    "activation": "gelu",
    "gated_linear_unit": False,
    "add_bias_linear": True,
    "parallel_residual": True,
    "rotary_percent": 0.5,
    "untie_embeddings_and_output_weights": True,
}
DOCUMENTS = {"reset_attention_mask": True, "reset_position_ids": True}


def selective(*modules: str) -> dict[str, Any]:
    return {"recompute_granularity": "selective", "recompute_modules": list(modules)}


# Model, layout, and what is recomputed; each compared with the same run without.
CASES: dict[str, tuple[dict[str, Any], str, list[dict[str, Any]]]] = {
    "dropout": (
        DROPOUT,
        "1",
        [FULL, {**FULL, "recompute_method": "block", "recompute_num_layers": 3}, selective("core_attn", "mlp")],
    ),
    "documents": (
        {**LLAMA, **DROPOUT, **DOCUMENTS},
        "1",
        [{**FULL, "recompute_num_layers": 2}, selective("core_attn")],
    ),
    "gemma2": (GEMMA, "1", [{**FULL, "recompute_num_layers": 4}, selective("core_attn", "mlp")]),
    "experts": (LATENT, "1", [FULL, selective("core_attn", "mlp", "moe"), selective("shared_experts", "mla_up_proj")]),
    "tp2-sp": (DROPOUT, "tp2-sp", [FULL, selective("core_attn", "mlp")]),
    "interleaved": (DROPOUT, "pp2-interleaved", [FULL]),
    # Attention and feed-forward side by side, our own layer.
    "parallel": ({**NEOX, **DROPOUT}, "1", [FULL]),
    "overlapped": ({}, "dp2-overlapped", [{**FULL, "recompute_num_layers": 2}]),
}


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_data(tmp_path_factory.mktemp("data"))


def differences(ours: Trace, theirs: Trace) -> list[str]:
    """What is not the same to the bit."""
    found = [name for name in ("losses", "grad_norms") if getattr(ours, name) != getattr(theirs, name)]
    return found + [name for name in ours.weights if not np.array_equal(ours.weights[name], theirs.weights[name])]


@pytest.mark.parametrize("case", CASES)
def test_recomputation_changes_no_bit(pool: WorkerPool, prefix: str, case: str) -> None:
    model, layout, changes = CASES[case]
    spread = LAYOUTS[layout]
    plain, *recomputed = (
        pool.run(spread.ranks, work_train, options(prefix, spread.flags, model, change), STEPS, join=False)
        for change in ({}, *changes)
    )
    for change, traces in zip(changes, recomputed, strict=True):
        for ours, theirs in zip(traces, plain, strict=True):
            assert differences(ours, theirs) == [], change


def work_kept(flat: dict[str, Any]) -> int:
    """Bytes of the distinct storages that one micro-batch keeps for its backward pass, weights aside."""
    with open_session(flat) as session:
        weights = {w.untyped_storage().data_ptr() for c in session.model.chunks for w in c.parameters()}
        kept: dict[int, torch.Tensor] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.untyped_storage().data_ptr() not in weights:
                kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        batch = session.loader.step(0)[0]
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            session.model.chunks[0](batch.tokens_BS, batch.position_ids_BS, None, labels=batch.labels_BS)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def test_less_is_kept(pool: WorkerPool, prefix: str) -> None:
    """In elements per token of 8 layers; H = 32, F = 64, 4 heads and 2 key heads of width 8."""
    wide = {**LLAMA, "num_layers": 8}

    def kept(**changes: Any) -> float:
        [size] = pool.run(1, work_kept, options(prefix, wide, changes), join=False)
        return size / (4 * 2 * 32)

    plain, full = kept(), kept(**FULL)
    # All that remains of a layer is its input.
    layer = 4 * 32 + (3 * 32 + 3 * 16) + 3 * 64 + 4
    assert plain - full == pytest.approx(8 * (layer - 32), rel=0.04)
    # Two layers in one unit: the input of every other.
    assert full - kept(**FULL, recompute_num_layers=2) == 4 * 32
    block = kept(**FULL, recompute_method="block", recompute_num_layers=3)
    assert block - full == pytest.approx((plain - full) * 5 / 8, rel=0.01)
    assert plain - kept(**selective("mlp")) == 8 * 3 * 64
    # Output and log-sum-exp.
    assert plain - kept(**selective("core_attn")) == pytest.approx(8 * (32 + 4), rel=0.01)
