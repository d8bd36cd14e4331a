"""All layer backends on one GPU train the same model, and a run may go on with another one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import as_flags, run
from pool import WorkerPool
from tiny_run import GPT, MIXTURE, PLAIN, Trace, largest_relative, options, work_train, write_data

from megatron_steel.metrics.sinks import METRICS_FILE, read_metrics
from megatron_steel.model.backends import have_transformer_engine

pytestmark = pytest.mark.gpu

ENGINE = pytest.mark.skipif(not have_transformer_engine(), reason="needs Transformer Engine")
BACKENDS = [pytest.param("local", id="local"), pytest.param("transformer_engine", id="engine", marks=ENGINE)]
# Heads of a width that every attention kernel takes.
WIDE: dict[str, Any] = {
    "hidden_size": 256, "ffn_hidden_size": 512, "seq_length": 128, "max_position_embeddings": 128, "bf16": True,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": PLAIN,
    "qwen2": {},
    "qwen3": {**PLAIN, "qk_layernorm": True, "kv_channels": 64},
    "mistral": {**PLAIN, "window_size": 48},
    "gpt_neox": {**GPT, "parallel_residual": True, "rotary_percent": 0.5, "untie_embeddings_and_output_weights": True},
    "olmo2": {**PLAIN, "norm_placement": "post", "qk_layernorm_full": True},
    "qwen3_moe": {**MIXTURE, "moe_ffn_hidden_size": 64},
}
STEPS = 200


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_data(tmp_path_factory.mktemp("data"))


def train(pool: WorkerPool, flat: dict[str, Any], steps: int, save_it: bool = False) -> Trace:
    return pool.run(1, work_train, flat, steps, save_it, timeout=400, join=False)[0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_first_steps_are_the_same(pool: WorkerPool, prefix: str, family: str, backend: str) -> None:
    flat = options(prefix, WIDE, {"model_family": family}, FAMILIES[family])
    theirs, ours = (train(pool, {**flat, "transformer_impl": name}, 5) for name in ("torch", backend))
    apart = largest_relative(ours.losses, theirs.losses), largest_relative(ours.grad_norms, theirs.grad_norms)
    print(f"{family}, {backend}: losses {apart[0]:.1e}, gradient norms {apart[1]:.1e}")
    assert apart[0] < 2e-3 and apart[1] < 5e-2


@pytest.mark.parametrize("backend", BACKENDS)
def test_curves_lie_on_each_other(pool: WorkerPool, prefix: str, backend: str) -> None:
    flat = options(prefix, WIDE, train_iters=STEPS)
    theirs, ours = (
        np.array(train(pool, {**flat, "transformer_impl": name}, STEPS).losses) for name in ("torch", backend)
    )
    apart = np.abs(ours - theirs) / theirs
    tail = abs(ours[-20:].mean() / theirs[-20:].mean() - 1)
    print(f"{backend}: {theirs[0]:.3f} to {theirs[-1]:.3f}, largest {apart.max():.1e}, last 20 steps {tail:.1e}")
    assert theirs[-20:].mean() < theirs[0] - 0.5, "something was learned"
    assert apart.max() < 2e-2 and tail < 5e-3


@ENGINE
@pytest.mark.parametrize("family", ["qwen2", "qwen3_moe"])
def test_a_run_goes_on_with_the_other_backend(pool: WorkerPool, prefix: str, tmp_path: Path, family: str) -> None:
    flat = options(prefix, WIDE, {"model_family": family}, FAMILIES[family])
    whole = train(pool, {**flat, "transformer_impl": "torch"}, 12)
    for first, second in (("torch", "transformer_engine"), ("transformer_engine", "torch")):
        folder = str(tmp_path / first)
        train(pool, {**flat, "transformer_impl": first, "save": folder, "save_interval": 100}, 6, save_it=True)
        rest = train(pool, {**flat, "transformer_impl": second, "load": folder}, 6)
        assert largest_relative(rest.losses, whole.losses[6:]) < 3e-3, "with another optimizer state it would be more"


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_resumed_run_is_the_whole_run(prefix: str, tmp_path: Path, backend: str) -> None:
    flat = options(prefix, WIDE, transformer_impl=backend, deterministic_mode=True, log_interval=1, train_iters=8)

    def losses(folder: Path, **more: Any) -> list[float]:
        assert run(folder, as_flags({**flat, "save": str(folder), **more})) == [0], (folder / "err0").read_text()
        return [row["loss"] for row in read_metrics(folder / METRICS_FILE)]

    whole = losses(tmp_path / "whole")
    losses(tmp_path / "parts", exit_interval=4)
    assert losses(tmp_path / "parts", load=str(tmp_path / "parts")) == whole, "to the bit"
