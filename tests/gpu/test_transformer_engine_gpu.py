"""Transformer Engine's layers on a GPU: logits, packed documents, every recipe of FP8, grouped experts, CUDA graphs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import as_flags, run
from pool import WorkerPool
from test_backends_agree_gpu import FAMILIES, WIDE
from tiny_chats import chat_options, write_chats, write_model
from tiny_run import MIXTURE, ROWS, Trace, largest_relative, options, start_world, work_train, write_data

from megatron_steel.config.load import from_flat
from megatron_steel.metrics.sinks import METRICS_FILE, read_metrics
from megatron_steel.model.backends import have_transformer_engine
from megatron_steel.model.build import build_model
from megatron_steel.model.packed import PackedDocuments
from megatron_steel.train.prepare import check_run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not have_transformer_engine(), reason="needs Transformer Engine"),
]

ENGINE = {"transformer_impl": "transformer_engine"}
LENGTHS = [1, 40, 7, 80]
RECIPES: dict[str, dict[str, Any]] = {
    "tensorwise": {"fp8_recipe": "tensorwise"},
    "tensorwise, e4m3": {"fp8_recipe": "tensorwise", "fp8_format": "e4m3"},
    "tensorwise, ends in bf16": {"fp8_recipe": "tensorwise", "first_last_layers_bf16": True},
    "delayed": {"fp8_recipe": "delayed"},
    "delayed, history": {"fp8_recipe": "delayed", "fp8_amax_history_len": 16, "fp8_amax_compute_algo": "max"},
    "blockwise": {"fp8_recipe": "blockwise"},
}


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_data(tmp_path_factory.mktemp("data"))


def train(pool: WorkerPool, flat: dict[str, Any], steps: int) -> Trace:
    return pool.run(1, work_train, flat, steps, timeout=400, join=False)[0]


def logits_of(model: Any, tokens: torch.Tensor, positions: torch.Tensor, packed: Any = None) -> torch.Tensor:
    """fp32 logits [T, V] of one row."""
    out = model.chunks[0](tokens, positions, None, packed_seq_params=packed)
    return out.squeeze(0).float().detach()


def apart(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Root of the mean square difference, in deviations of the second."""
    return float((ours - theirs).square().mean().sqrt() / theirs.std())


def joined(lengths: list[int]) -> PackedDocuments:
    bounds = torch.tensor([0, *np.cumsum(lengths).tolist()], dtype=torch.int32, device="cuda")
    return PackedDocuments(
        qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds,
        max_seqlen_q=sum(lengths), max_seqlen_kv=sum(lengths), bounds=bounds.tolist(),
    )  # fmt: skip


def work_logits(flat: dict[str, Any]) -> dict[str, float]:
    """How far the engine's logits are from torch's, in the latter's deviations; both from the same first weights."""
    world = start_world(flat)
    theirs, ours = (
        build_model(from_flat({**flat, "transformer_impl": name}), ROWS, world, training=False)
        for name in ("torch", "transformer_engine")
    )
    tokens = torch.randint(0, ROWS, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(3)).to("cuda")
    places = torch.arange(tokens.shape[1], device="cuda").unsqueeze(0)
    restarted = torch.cat([torch.arange(length) for length in LENGTHS]).unsqueeze(0).to("cuda")
    found: dict[str, float] = {}
    for name, positions, packed in (
        ("one text", places, None),
        ("documents, positions of the row", places, joined(LENGTHS)),
        ("documents, positions of their own", restarted, joined(LENGTHS)),
    ):
        reference, logits = (logits_of(model, tokens, positions, packed) for model in (theirs, ours))
        found[name] = apart(logits, reference)
    alone = torch.cat(
        [
            logits_of(ours, part, torch.arange(part.shape[1], device="cuda").unsqueeze(0))
            for part in tokens.split(LENGTHS, 1)
        ]
    )
    found["documents alone"] = apart(logits, alone)
    return found


@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_torch_layers(pool: WorkerPool, family: str, bf16: bool) -> None:
    flat = {**options("none"), **WIDE, "model_family": family, **FAMILIES[family], "bf16": bf16, "init_method_std": 0.1}
    del flat["train_data_path"]
    found = pool.run(1, work_logits, flat, timeout=300, join=False)[0]
    print(f"{family}, bf16 {bf16}: " + ", ".join(f"{name} {value:.1e}" for name, value in found.items()))
    # In bf16 an expert that is chosen by a hair may be another one.
    assert max(found.values()) < ((0.15 if "num_experts" in flat else 0.03) if bf16 else 5e-3)


@pytest.mark.parametrize("positions", [False, True])
def test_packed_training(pool: WorkerPool, prefix: str, positions: bool) -> None:
    flat = options(prefix, WIDE, reset_attention_mask=True, reset_position_ids=positions)
    theirs, ours = (train(pool, {**flat, "transformer_impl": name}, 5) for name in ("torch", "transformer_engine"))
    assert largest_relative(ours.losses, theirs.losses) < 2e-3
    assert largest_relative(ours.grad_norms, theirs.grad_norms) < 5e-2


def test_conversations(pool: WorkerPool, tmp_path: Path) -> None:
    model, data = write_model(tmp_path / "model"), write_chats(tmp_path / "rows.jsonl", 40)
    for packing in (True, False):
        flat = chat_options(model, data, packing=packing, bf16=True, train_iters=4)
        theirs, ours = (train(pool, {**flat, "transformer_impl": name}, 4) for name in ("torch", "transformer_engine"))
        assert largest_relative(ours.losses, theirs.losses) < 3e-3


@pytest.mark.parametrize("recipe", RECIPES)
def test_fp8_follows_bf16(pool: WorkerPool, prefix: str, recipe: str) -> None:
    flat = options(prefix, WIDE, ENGINE, train_iters=60)
    plain = train(pool, flat, 60).losses
    eighth = train(pool, {**flat, "fp8_format": "hybrid", **RECIPES[recipe]}, 60).losses
    apart = largest_relative(eighth, plain)
    print(f"{recipe}: {eighth[0]:.3f} to {eighth[-1]:.3f}, bf16 {plain[-1]:.3f}, largest difference {apart:.1e}")
    assert np.mean(eighth[-10:]) < eighth[0] - 0.3
    assert apart < 0.02 and eighth != plain, "close to bf16, and not bf16"


def lines(folder: Path, flat: dict[str, Any], **more: Any) -> list[float]:
    """Losses of a run from the command line."""
    assert run(folder, as_flags({**flat, "save": str(folder), **more})) == [0], (folder / "err0").read_text()
    return [row["loss"] for row in read_metrics(folder / METRICS_FILE)]


@pytest.mark.parametrize("recipe", ["tensorwise", "delayed, history", "blockwise"])
def test_fp8_resumes_exactly(prefix: str, tmp_path: Path, recipe: str) -> None:
    """The delayed recipe's histories come along; with fresh ones the first steps would be others."""
    flat = options(prefix, WIDE, ENGINE, RECIPES[recipe], fp8_format="hybrid", deterministic_mode=True)
    flat |= {"log_interval": 1, "train_iters": 8}
    whole = lines(tmp_path / "whole", flat)
    lines(tmp_path / "parts", flat, exit_interval=4)
    assert lines(tmp_path / "parts", flat, load=str(tmp_path / "parts")) == whole


@pytest.mark.parametrize("fp8", [None, "hybrid"])
def test_grouped_experts_are_the_experts(pool: WorkerPool, prefix: str, fp8: str | None) -> None:
    flat = options(prefix, WIDE, MIXTURE, ENGINE, moe_ffn_hidden_size=64, fp8_format=fp8)
    apart, together = (train(pool, {**flat, "moe_grouped_gemm": grouped}, 10) for grouped in (False, True))
    assert largest_relative(together.losses, apart.losses) < (5e-3 if fp8 else 1e-3)
    assert together.weights.keys() == apart.weights.keys(), "under the same names"


def test_graphs_take_the_same_steps(prefix: str, tmp_path: Path) -> None:
    flat = options(prefix, WIDE, ENGINE, log_interval=1, train_iters=12)
    eager, recorded = (lines(tmp_path / name, flat, cuda_graph_impl=name) for name in ("none", "local"))
    print(f"largest difference {largest_relative(recorded, eager):.1e}")
    assert largest_relative(recorded, eager) < 2e-3 and recorded[-1] < recorded[0]


def test_adapters_are_refused() -> None:
    with pytest.raises(ValueError, match="--lora-rank does not go with --transformer-impl transformer_engine; use"):
        check_run(from_flat({**options("none"), **ENGINE, "lora_rank": 4}))
