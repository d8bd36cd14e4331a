"""A mixture of experts trains the same model on every layout, and what balances it is the published formula."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pool import WorkerPool
from tiny_run import (
    LAYOUTS,
    Trace,
    largest_relative,
    open_session,
    options,
    take_steps,
    whole_weights,
    work_train,
    write_data,
)
from torch import Tensor

STEPS = 10
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_experts": 4, "moe_router_topk": 2, "moe_aux_loss_coeff": 0.05},
    "deepseek_v3": {
        "num_query_groups": None,
        "multi_latent_attention": True,
        "q_lora_rank": 12,
        "kv_lora_rank": 10,
        "qk_head_dim": 6,
        "qk_pos_emb_head_dim": 4,
        "v_head_dim": 8,
        "num_experts": 8,
        "moe_router_topk": 3,
        "moe_ffn_hidden_size": 24,
        "moe_shared_expert_intermediate_size": 48,
        "moe_layer_freq": [0, 1, 1, 1],
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_num_groups": 4,
        "moe_router_group_topk": 2,
        "moe_router_topk_scaling_factor": 2.5,
        "moe_aux_loss_coeff": 0.05,
    },
    "qwen3_moe": {
        "qk_layernorm": True,
        "num_experts": 4,
        "moe_router_topk": 2,
        "moe_router_pre_softmax": True,
        "moe_ffn_hidden_size": 48,
        "moe_layer_freq": [0, 1, 1, 1],
        "moe_aux_loss_coeff": 0.05,
    },
}


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_data(tmp_path_factory.mktemp("data"))


def flat_options(prefix: str, family: str, layout: str, **changes: Any) -> dict[str, Any]:
    fixed = {"model_family": family, "add_qkv_bias": False}
    return options(prefix, fixed, FAMILIES[family], LAYOUTS[layout].flags, changes)


def train(pool: WorkerPool, prefix: str, family: str, layout: str, **changes: Any) -> list[Trace]:
    flat = flat_options(prefix, family, layout, **changes)
    return pool.run(LAYOUTS[layout].ranks, work_train, flat, STEPS, join=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_layouts_train_the_model_of_one_process(pool: WorkerPool, prefix: str, family: str) -> None:
    reference = train(pool, prefix, family, "1")
    whole = whole_weights(reference)
    assert reference[0].losses[-1] < reference[0].losses[0] - 0.3
    for layout in ("tp2-sp", "pp2", "dp2-overlapped"):
        traces = train(pool, prefix, family, layout)
        mine = whole_weights(traces)
        loss = largest_relative(traces[0].losses, reference[0].losses)
        norm = largest_relative(traces[0].grad_norms, reference[0].grad_norms)
        assert mine.keys() == whole.keys()
        weights = max(float(np.abs(mine[name] - whole[name]).max()) for name in mine)
        print(f"{family} on {layout}: loss {loss:.1e}, gradient norm {norm:.1e}, weights {weights:.1e}")
        assert loss < 1e-5 and norm < 1e-5 and weights < 2e-5
    plain = train(pool, prefix, family, "1", transformer_impl="local")
    assert largest_relative(plain[0].grad_norms, reference[0].grad_norms) < 1e-5
    without = train(pool, prefix, family, "1", moe_aux_loss_coeff=0.0)
    assert largest_relative(without[0].grad_norms, reference[0].grad_norms) > 1e-4, "balancing must have a say"


def switch_loss(logits_TE: Tensor, topk: int) -> Tensor:
    """E times the sum of assignments' shares and mean probabilities (Fedus et al. 2021, eq. 4 to 6), token by token."""
    probabilities_TE = logits_TE.softmax(-1)
    tokens, experts = logits_TE.shape
    shares = torch.zeros(experts, dtype=logits_TE.dtype)
    for token in range(tokens):
        for expert in sorted(range(experts), key=lambda e: -probabilities_TE[token, e].item())[:topk]:
            shares[expert] += 1.0 / (tokens * topk)
    return experts * (shares * probabilities_TE.mean(0)).sum()


def work_balance(flat: dict[str, Any]) -> tuple[float, float, float]:
    """(balance loss of one step as it is reported, the formula's, largest relative error of the gradient)."""
    from megatron_steel.model.moe import Router, prepare_balance, routers
    from megatron_steel.train.loop import take_step

    seen: list[Tensor] = []
    original = Router.routing

    def routing(self: Router, logits: Tensor, *args: Any, **rest: Any) -> Any:
        seen.append(logits.detach().double().flatten(0, 1))
        return original(self, logits, *args, **rest)

    Router.routing = routing
    try:
        with open_session(flat) as session:
            take_step(session)
            reported = session.recorder.flush(1)["moe_balance_loss"]
            expected = float(torch.stack([switch_loss(logits, flat["moe_router_topk"]) for logits in seen]).mean())

            prepare_balance(session.model.chunks, 4)
            router = next(routers(session.model.chunks))
            x = torch.randn(8, 2, flat["hidden_size"], generator=torch.Generator().manual_seed(5))
            weights_TE, _ = router(x)
            (ours,) = torch.autograd.grad((weights_TE * 0).sum(), router.weight)
            exact = router.weight.detach().double().requires_grad_()
            loss = (
                flat["moe_aux_loss_coeff"]
                / 4
                * switch_loss(x.double().flatten(0, 1) @ exact.t(), flat["moe_router_topk"])
            )
            (wanted,) = torch.autograd.grad(loss, exact)
            return reported, expected, float((ours - wanted).abs().max() / wanted.abs().max())
    finally:
        Router.routing = original


def test_balance_loss_is_the_formula(pool: WorkerPool, prefix: str) -> None:
    [(reported, expected, gradient)] = pool.run(1, work_balance, flat_options(prefix, "mixtral", "1"), join=False)
    print(f"balance loss {reported:.9f}, formula {expected:.9f}, gradient off by {gradient:.1e}")
    assert reported == pytest.approx(expected, rel=1e-6)
    assert gradient < 1e-5


def work_go_on(flat: dict[str, Any], steps: int, save_it: bool) -> tuple[list[float], dict[int, list[float]]]:
    """Losses of two more steps after ``steps``, and the biases of experts by layer where they begin."""
    from megatron_steel.model.moe import routers
    from megatron_steel.train.loop import save

    trace = Trace()
    with open_session(flat) as session:
        take_steps(session, steps, Trace())
        if save_it:
            save(session)
        biases = {router.layer_number: router.expert_bias.tolist() for router in routers(session.model.chunks)}
        assert all(router.expert_bias.dtype == torch.float32 for router in routers(session.model.chunks))
        take_steps(session, 2, trace)
    return trace.losses, biases


@pytest.mark.parametrize("bf16", [False, True])
def test_a_checkpoint_goes_on_elsewhere(pool: WorkerPool, prefix: str, tmp_path: Path, bf16: bool) -> None:
    """Sharded optimizer on two replicas, then two tensor-parallel ranks: what chooses experts comes along in fp32."""
    changes = {"bf16": bf16, "micro_batch_size": 2}
    written = flat_options(prefix, "deepseek_v3", "dp2-overlapped", save=str(tmp_path), **changes)
    losses, biases = pool.run(2, work_go_on, written, 3, True, join=False)[0]
    values = np.array(list(biases.values()))  # three steps of 0.001 up or down, or none
    assert values.shape == (3, 8) and values.any() and np.abs(values / 1e-3 - np.round(values / 1e-3)).max() < 1e-3
    for layout in ("1", "tp2-sp"):
        read = flat_options(
            prefix, "deepseek_v3", layout, load=str(tmp_path), use_distributed_optimizer=True, **changes
        )
        again, same = pool.run(LAYOUTS[layout].ranks, work_go_on, read, 0, False, join=False)[0]
        assert same == biases
        assert again == pytest.approx(losses, rel=5e-3 if bf16 else 1e-5)
