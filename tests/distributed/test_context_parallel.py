"""A sample shared by several ranks trains the same model: kinds of attention, documents, masks, checkpoints, scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from pool import WorkerPool
from test_experts import FAMILIES as EXPERTS
from tiny_run import (
    CP2,
    LAYOUTS,
    PP2,
    Layout,
    Trace,
    keep_weights,
    largest_relative,
    open_session,
    options,
    take_steps,
    whole_weights,
    write_data,
)

from megatron_steel.data.context import cut
from megatron_steel.evaluate.heldout import HeldOutResult, evaluate
from megatron_steel.model.context import context_attention
from megatron_steel.model.window import causal_attention
from megatron_steel.train.loop import save

STEPS = 4
PLAIN = {"add_qkv_bias": False, "num_query_groups": None}
GEMMA = {"add_qkv_bias": False, "norm_placement": "sandwich", "apply_layernorm_1p": True, "activation": "gelu_tanh"}
GEMMA |= {"embedding_scale": True, "window_size": 7}
NORMS = {**PLAIN, "normalization": "LayerNorm", "activation": "gelu_tanh", "gated_linear_unit": False}
NORMS |= {"add_bias_linear": True}
DOCUMENTS = {"reset_attention_mask": True, "reset_position_ids": True}
# (layout, switches): each model with what its attention has that others have not.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "masked, recomputed": ("cp2", {"eod_mask_loss": True, "recompute_granularity": "selective"}),
    "documents": ("cp4", {**DOCUMENTS, "eod_mask_loss": True}),
    "window": ("cp2", {**PLAIN, "model_family": "mistral", "window_size": 7}),
    "softcap and window, documents": (
        "cp2",
        {
            **GEMMA,
            **DOCUMENTS,
            "model_family": "gemma2",
            "full_attention_layers": [1, 3],
            "softmax_scale": 0.5,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 4.0,
        },
    ),
    "QK norm and two rotary tables, documents": (
        "cp2",
        {
            **GEMMA,
            **DOCUMENTS,
            "model_family": "gemma3",
            "full_attention_layers": [1],
            "qk_layernorm": True,
            "rotary_base_local": 100.0,
        },
    ),
    "ALiBi, documents": (
        "cp2",
        {
            **NORMS,
            "model_family": "bloom",
            "ffn_hidden_size": 128,
            "position_embedding_type": "alibi",
            "stable_embedding": True,
            "init_method_std": 0.1,
            "reset_attention_mask": True,
        },
    ),
    "learned positions, reset": (
        "cp2-pp2-interleaved",
        {
            **NORMS,
            "model_family": "gpt2",
            "position_embedding_type": "learned_absolute",
            "reset_position_ids": True,
        },
    ),
    "latent attention and experts": (
        "cp2-tp2-sp",
        {**EXPERTS["deepseek_v3"], "model_family": "deepseek_v3", "add_qkv_bias": False},
    ),
}


SPREAD = {
    **LAYOUTS,
    "cp2-pp2-interleaved": Layout(ranks=4, flags={**CP2, **PP2, "num_layers_per_virtual_pipeline_stage": 1}),
}


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_data(tmp_path_factory.mktemp("data"))


def work_train(flat: dict[str, Any], save_it: bool = False) -> tuple[Trace, dict[str, np.ndarray], list[HeldOutResult]]:
    """Steps, with the weights before and after them; then the scores of the validation sets."""
    trace, before = Trace(), Trace()
    with open_session(flat) as session:
        keep_weights(session, before)
        take_steps(session, STEPS, trace)
        if save_it:
            save(session)
        keep_weights(session, trace)
        scores = [
            evaluate(session.model, loader, session.byte_lengths, session.world)
            for loader in session.valid_loaders.values()
        ]
    return trace, whole_weights([before]) if session.world.tensor_size == 1 else {}, scores


def train(pool: WorkerPool, prefix: str, layout: str, *changes: dict[str, Any]) -> list[Any]:
    return pool.run(SPREAD[layout].ranks, work_train, options(prefix, SPREAD[layout].flags, *changes), join=False)


def difference(name: str, ours: np.ndarray, theirs: np.ndarray) -> float:
    """Largest difference of a weight."""
    away = np.abs(ours - theirs)
    if name.endswith("linear_qkv.bias") and len(away) == 4 * 3 * 8:
        # Without rotation a bias of keys changes nothing: its gradient is rounding noise, and AdamW follows it.
        away = away.reshape(4, 3, 8)[:, ::2]
    return float(away.max())


def compare(ours: list[Trace], theirs: list[Trace]) -> None:
    assert all((trace.losses, trace.grad_norms) == (ours[0].losses, ours[0].grad_norms) for trace in ours)
    loss = largest_relative(ours[0].losses, theirs[0].losses)
    norm = largest_relative(ours[0].grad_norms, theirs[0].grad_norms)
    mine, reference = whole_weights(ours), whole_weights(theirs)
    assert mine.keys() == reference.keys()
    weights = max(difference(name, mine[name], reference[name]) for name in mine)
    print(f"largest difference: loss {loss:.1e}, gradient norm {norm:.1e}, weights {weights:.1e}")
    assert loss < 1e-5 and norm < 1e-5 and weights < 2e-5


@pytest.mark.parametrize("case", CASES)
def test_trains_the_model_of_one_process(pool: WorkerPool, prefix: str, case: str) -> None:
    layout, switches = CASES[case]
    ours, theirs = (train(pool, prefix, name, switches) for name in (layout, "1"))
    compare([trace for trace, *_ in ours], [trace for trace, *_ in theirs])


def test_checkpoints_and_scores_do_not_depend_on_the_ranks_of_a_sample(
    pool: WorkerPool, prefix: str, tmp_path: Path
) -> None:
    """Saved by two ranks per sample, loaded by one and by four; the last validation batch is not full."""
    run = {"use_distributed_optimizer": True, "valid_data_path": [f"held={prefix}"], "eval_iters": 1}
    run |= {"eod_mask_loss": True, "global_batch_size": 4}
    save_to, load_from = {"save": str(tmp_path / "run")}, {"load": str(tmp_path / "run")}
    first = pool.run(2, work_train, options(prefix, CP2, run, save_to), True, join=False)
    saved = whole_weights([trace for trace, _, _ in first])
    results = {name: train(pool, prefix, name, run, load_from) for name in ("1", "cp4")}
    reference, (_, _, expected) = results["1"][0][0], results["1"][0]
    for name, ranks in results.items():
        for trace, started, scores in ranks:
            assert started.keys() == saved.keys() and all(np.array_equal(started[key], saved[key]) for key in saved)
            assert largest_relative(trace.losses, reference.losses) < 1e-6, name
            assert largest_relative(trace.grad_norms, reference.grad_norms) < 1e-5, name
            assert (scores[0].tokens, scores[0].bytes) == (expected[0].tokens, expected[0].bytes)
            assert abs(scores[0].loss / expected[0].loss - 1) < 1e-6


def work_gather() -> tuple[float, float]:
    """(largest error of attention, of the gradients of queries, keys and values) against the whole, in float64."""

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return causal_attention(query, key, value, None, 0.0, None)

    rank, size = dist.get_rank(), dist.get_world_size()
    group = dist.group.WORLD
    assert group is not None
    generator = torch.Generator().manual_seed(3)
    whole = [torch.randn(24, 2, heads, 8, dtype=torch.float64, generator=generator) for heads in (4, 2, 2)]
    weight = torch.randn(24, 2, 4, 8, dtype=torch.float64, generator=generator)

    def share(x: torch.Tensor) -> torch.Tensor:
        return cut(x.movedim(0, -1), rank, size).movedim(-1, 0).contiguous()

    reference = [x.clone().requires_grad_() for x in whole]
    expected = attend(*(x.permute(1, 2, 0, 3) for x in reference)).permute(2, 0, 1, 3)
    (expected * weight).sum().backward()
    mine = [share(x).requires_grad_() for x in whole]
    out = context_attention(*mine, group, attend)
    (out * share(weight)).sum().backward()
    out, expected = out.detach(), expected.detach()
    errors = [float((ours.grad - share(full.grad)).abs().max()) for ours, full in zip(mine, reference, strict=True)]
    return float((out - share(expected)).abs().max()), max(errors)


@pytest.mark.parametrize("ranks", [2, 3])
def test_gradients_of_gathered_keys_are_those_of_one_process(pool: WorkerPool, ranks: int) -> None:
    for output, gradient in pool.run(ranks, work_gather):
        assert output < 1e-13 and gradient < 1e-13
