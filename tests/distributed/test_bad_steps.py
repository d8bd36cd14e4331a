"""A step whose gradient is not finite leaves weights, moments and step counts as they are, to the bit."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pool import WorkerPool
from test_precision import poisoned
from tiny_run import LAYOUTS, MIXTURE, Trace, open_session, options, take_steps, work_train, write_data

from megatron_steel.train.loop import Session, save, skipped_steps, take_step

BF16 = {"bf16": True}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "fp32": ("1", {}),
    "bf16": ("1", BF16),
    "pure bf16": ("1", {**BF16, "pure_bf16": True}),
    "moments on the host": ("1", {"optimizer_cpu_offload": True}),
    "sharded bf16": ("dp2-sharded", BF16),
    "sharded fp32, overlapped": ("dp2-overlapped", {}),
    "experts": ("1", MIXTURE),
}


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_data(tmp_path_factory.mktemp("data"))


def bits(session: Session) -> dict[str, str]:
    """A hash of each tensor that a step may change: weights of the model, main weights, moments and step counts."""
    session.model.gather_parameters()
    tensors = {
        f"model {index} {name}": value
        for index, model in enumerate(session.model.language_models())
        for name, value in model.named_parameters()
    }
    for number, part in enumerate(session.optimizer.chained_optimizers):
        for index, weight in enumerate(part.get_parameters()):
            tensors[f"main {number} {index}"] = weight
            for name, value in part.optimizer.state[weight].items():
                tensors[f"{name} {number} {index}"] = value
    return {
        name: hashlib.sha256(value.detach().contiguous().view(-1).view(torch.uint8).cpu().numpy().tobytes()).hexdigest()
        for name, value in tensors.items()
    }


def work_bad_step(flat: dict[str, Any], value: float) -> dict[str, Any]:
    """A good step, two bad ones and a good one; what of the state the third and fourth changed."""
    with open_session(flat) as session:
        take_step(session)
        before = bits(session)
        # The last rank's alone: all have to leave the step out.
        with poisoned(session, session.world.size - 1, value):
            take_step(session)
            take_step(session)
        between = bits(session)
        row = session.recorder.flush(3)
        take_step(session)
        after = bits(session)
        return {
            "kept": before == between,
            "names": sorted({name.split()[0] for name in before}),
            "moved": sum(between[name] != after[name] for name in between) / len(between),
            "norm": row["grad_norm"],
            "nan_iterations": row["nan_iterations"],
            "skipped": [skipped_steps(session), skipped_steps(session), session.state.skipped_iterations],
        }


@pytest.mark.parametrize(("case", "value"), [*((case, math.nan) for case in CASES), ("bf16", math.inf)])
def test_nothing_moves(pool: WorkerPool, prefix: str, case: str, value: float) -> None:
    layout, flags = CASES[case]
    spread = LAYOUTS[layout]
    flat = options(prefix, spread.flags, flags, lr_warmup_iters=0)
    for found in pool.run(spread.ranks, work_bad_step, flat, value, join=False):
        assert found["kept"]
        assert found["names"] == ["exp_avg", "exp_avg_sq", "main", "model", "step"]
        assert found["moved"] > 0.8, "the next step is one again"
        assert not math.isfinite(found["norm"])
        assert found["nan_iterations"] == 2 and found["skipped"] == [2, 2, 2]


def work_first_step(flat: dict[str, Any], bad: bool) -> dict[str, str]:
    """The state after one good step, perhaps with a bad one on the same samples before it."""
    with open_session(flat) as session:
        if bad:
            with poisoned(session, 0, math.nan):
                take_step(session)
            session.state.iteration = session.state.consumed_samples = 0
        take_step(session)
        return bits(session)


def test_a_bad_first_step_leaves_no_trace(pool: WorkerPool, prefix: str) -> None:
    flat = options(prefix, lr_warmup_iters=0)
    with_it, without = (pool.run(1, work_first_step, flat, bad, join=False)[0] for bad in (True, False))
    assert with_it == without


class Foreign(torch.optim.SGD):
    """What Transformer Engine would bring."""


def work_beside_foreign(flat: dict[str, Any]) -> tuple[list[str], list[float]]:
    """Train, save and load where megatron-core has found another AdamW; which one was taken, and norms of gradients."""
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optimizer, "Adam", Foreign)
        patch.setattr(optimizer, "USING_PYTORCH_OPTIMIZER", False)
        for name in ("HAVE_APEX_OR_TE", "USING_TE_OPTIMIZER"):
            patch.setattr(distrib_optimizer, name, True)
        trace = Trace()
        with open_session(flat) as session:
            take_steps(session, 3, trace)
            save(session)
            kinds = [type(part.optimizer).__name__ for part in session.optimizer.chained_optimizers]
        return kinds, trace.grad_norms


@pytest.mark.parametrize("layout", ["1", "dp2-sharded"])
def test_torch_s_adamw_is_taken_beside_others(pool: WorkerPool, prefix: str, tmp_path: Path, layout: str) -> None:
    spread = LAYOUTS[layout]
    flat = options(prefix, spread.flags, BF16, save=str(tmp_path / "run"))
    kinds, norms = pool.run(spread.ranks, work_beside_foreign, flat, join=False)[0]
    again = {**flat, "load": str(tmp_path / "run"), "save": str(tmp_path / "again")}
    also, later = pool.run(spread.ranks, work_beside_foreign, again, join=False)[0]
    whole = pool.run(spread.ranks, work_train, options(prefix, spread.flags, BF16), 6, join=False)[0]
    assert kinds == also == ["AdamW"] * len(kinds) and norms + later == whole.grad_norms


def test_clipping_is_the_product_with_one_number() -> None:
    """Rounded once from float64, as a host would do it; narrow gradients are multiplied in fp32."""
    from types import SimpleNamespace

    from megatron_steel.optim.optimizer import scale_gradients

    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        weights = [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in ((7, 5), (3,))]
        grads = [torch.randn(weight.shape, generator=generator).to(dtype) for weight in weights]
        for weight, grad in zip(weights, grads, strict=True):
            weight.grad = grad.clone()
        factor = 1.0 / 3.7
        part = SimpleNamespace(get_parameters=lambda weights=weights: weights)
        scale_gradients(SimpleNamespace(chained_optimizers=[part]), torch.tensor(factor))  # type: ignore[arg-type]
        for weight, grad in zip(weights, grads, strict=True):
            assert weight.grad is not None and torch.equal(weight.grad, grad * factor)
