"""A Hugging Face folder read straight into a model, on any layout, against the same folder imported first."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hf_models import make_model
from pool import WorkerPool

from megatron_steel.config.schema import Config, ParallelConfig, TrainingConfig
from megatron_steel.runtime import world as runtime

# A tied and an untied head, biases, gated and plain feed-forwards, experts with and without a layer pattern.
NAMES = ("qwen2-tied", "llama-rope", "gpt2", "gemma2", "steel-dense", "mixtral", "deepseek-v3")
LAYOUTS = {"1": (1, 1, 1), "tp2-pp2": (2, 2, 1), "ep2": (1, 1, 2)}


def work_load(folders: dict[str, tuple[str, str]], layout: tuple[int, int, int], bf16: bool) -> dict[str, int]:
    """Number of tensors of each model that were compared, bit by bit, between both ways."""
    from megatron_steel.checkpoint import store
    from megatron_steel.checkpoint.hf import import_hf, read_hf_config
    from megatron_steel.checkpoint.hf_load import load_hf
    from megatron_steel.model.build import build_model

    tensor, pipeline, expert = layout
    world = runtime.start(
        tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline, expert_model_parallel_size=expert
    )
    compared = {}
    for name, (folder, root) in folders.items():
        parallel = ParallelConfig(
            tensor_model_parallel_size=tensor,
            pipeline_model_parallel_size=pipeline,
            expert_model_parallel_size=expert,
            sequence_parallel=tensor > 1,
            transformer_impl="torch",
        )
        size = read_hf_config(Path(folder)).size
        config = Config(size=size, parallel=parallel, training=TrainingConfig(bf16=bf16))
        if world.rank == 0 and not Path(root).exists():
            import_hf(Path(folder), Path(root))
        runtime.barrier(world)
        ours, other = (build_model(config, size.vocab_size or 0, world, training=False) for _ in range(2))
        assert load_hf(Path(folder), ours, size) == set()
        store.load_weights(Path(root) / "iter_0000000", other)
        mine, theirs = (model.language_models()[0].state_dict() for model in (ours, other))
        tensors = {key: value for key, value in mine.items() if isinstance(value, torch.Tensor) and value.numel()}
        for key, value in tensors.items():
            assert torch.equal(value, theirs[key]), f"{name}: {key}"
        compared[name] = len(tensors)
    return compared


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, str]]:
    root = tmp_path_factory.mktemp("models")
    for name in NAMES:
        make_model(name).save_pretrained(root / name)
    return {name: (str(root / name), str(root / f"{name}-ours")) for name in NAMES}


@pytest.mark.parametrize(("layout", "bf16"), [("1", False), ("tp2-pp2", True), ("ep2", False)])
def test_both_ways_give_the_same_weights(
    pool: WorkerPool, folders: dict[str, tuple[str, str]], layout: str, bf16: bool
) -> None:
    sizes = LAYOUTS[layout]
    chosen = {name: value for name, value in folders.items() if layout != "ep2" or name in ("mixtral", "deepseek-v3")}
    ranks = max(sizes[0] * sizes[1], sizes[2])
    for compared in pool.run(ranks, work_load, chosen, sizes, bf16, join=False, timeout=120):
        assert compared.keys() == chosen.keys() and all(count > 5 for count in compared.values())
