"""Reward models against sequence classification of transformers: scores, and folders in both directions."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hf_models import LAYOUTS, make_model, pipeline_logits, text_ids, work_export, work_import
from pool import WorkerPool
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForSequenceClassification

from megatron_steel.checkpoint.hf import read_hf_config
from megatron_steel.config.schema import Config, ParallelConfig, TrainingConfig
from megatron_steel.runtime import world as runtime

# One of every family that transformers has a classifier for, tied and untied; a softcap that scores have none of.
NAMES = (
    "llama-untied", "qwen2-tied", "qwen3", "smollm3-window", "gpt2", "gpt-neox",
    "bloom", "gemma2", "gemma3", "olmo2", "mixtral", "deepseek-v3",
)  # fmt: skip
SPREAD = ("llama-untied", "qwen2-tied")
TOLERANCE = 1e-5
PAD = 7


def texts(vocab_size: int) -> torch.Tensor:
    """Texts without padding, [B, S]."""
    ids_BS = text_ids(vocab_size)
    return torch.where(ids_BS == PAD, PAD + 1, ids_BS)


def work_scores(folders: dict[str, tuple[str, str]], layout: tuple[int, int]) -> dict[str, list[np.ndarray]]:
    """Scores [B, S] of the texts: from the folder, and from the checkpoint it becomes."""
    from megatron_steel.checkpoint.hf import import_hf
    from megatron_steel.checkpoint.hf_load import load_hf
    from megatron_steel.checkpoint.store import load_weights
    from megatron_steel.model.build import build_model

    tensor, pipeline = layout
    world = runtime.start(tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline)
    parallel = ParallelConfig(
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        sequence_parallel=tensor > 1 and pipeline == 1,
        transformer_impl="torch",
    )
    found: dict[str, list[np.ndarray]] = {}
    for name, (folder, root) in folders.items():
        size = read_hf_config(Path(folder)).size
        config = Config(size=size, parallel=parallel, training=TrainingConfig())
        if world.rank == 0 and not Path(root).exists():
            import_hf(Path(folder), Path(root))
        runtime.barrier(world)
        found[name] = []
        for way in ("folder", "checkpoint"):
            model = build_model(config, size.vocab_size or 0, world, training=False)
            for chunk in model.chunks:
                chunk.eval()
            if way == "folder":
                assert load_hf(Path(folder), model, size) == set()
            else:
                load_weights(Path(root) / "iter_0000000", model)
            with torch.no_grad():
                scores = pipeline_logits(model, texts(size.vocab_size or 0), world)
            found[name].append(runtime.gather_objects(world, scores)[-1].numpy())
    return found


def work_start(folders: dict[str, tuple[str, str]], layout: tuple[int, int]) -> dict[str, list[np.ndarray]]:
    """The score weight of reward models that begin from language models: from a folder, from a checkpoint, as drawn."""
    from megatron_steel.checkpoint.hf import import_hf
    from megatron_steel.checkpoint.hf_load import load_hf
    from megatron_steel.checkpoint.store import load_weights
    from megatron_steel.config.family import SCORE
    from megatron_steel.model.build import build_model

    tensor, pipeline = layout
    world = runtime.start(tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline)
    parallel = ParallelConfig(
        tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline, transformer_impl="torch"
    )
    found: dict[str, list[np.ndarray]] = {}
    for name, (folder, root) in folders.items():
        base = read_hf_config(Path(folder)).size
        config = Config(size=replace(base, score_head=True), parallel=parallel)
        if world.rank == 0:
            import_hf(Path(folder), Path(root))
        runtime.barrier(world)
        models = [build_model(config, base.vocab_size or 0, world, training=False) for _ in range(3)]
        last = world.pipeline_rank == world.pipeline_size - 1
        assert load_hf(Path(folder), models[0], config.size) == ({SCORE} if last else set())
        load_weights(Path(root) / "iter_0000000", models[1])
        states = [model.language_models()[0].state_dict() for model in models]
        for key, value in states[0].items():
            assert key.endswith("_extra_state") or torch.equal(value, states[1][key]), key
        fc1 = "decoder.layers.0.mlp.linear_fc1.weight"
        assert not torch.equal(states[0][fc1], states[2][fc1])
        scores = [state[SCORE].numpy() for state in states] if last else []
        found[name] = runtime.gather_objects(world, scores)[-1]
    return found


def work_verify(folder: str, root: str) -> tuple[bool, int, str]:
    """What `convert_hf.py verify` finds, over how many texts; what generation says of such a checkpoint."""
    from megatron_steel.checkpoint.hf import import_hf
    from megatron_steel.checkpoint.verify import compare_with_hf, load_for_inference

    world, checkpoint = runtime.start(), import_hf(Path(folder), Path(root))
    found = compare_with_hf(checkpoint, Path(folder), world)
    try:
        load_for_inference(checkpoint, world)
    except ValueError as error:
        return found.same, found.tokens, str(error)
    return found.same, found.tokens, ""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, str]]:
    """Language models and what transformers makes of them when it is to classify, with weights for the score."""
    root = tmp_path_factory.mktemp("models")
    for name in NAMES:
        base = make_model(name)
        base.save_pretrained(root / name / "base")
        config = AutoConfig.from_pretrained(root / name / "base", num_labels=1, pad_token_id=PAD)
        scorer = AutoModelForSequenceClassification.from_pretrained(root / name / "base", config=config)
        with torch.no_grad():
            noise = torch.randn(scorer.score.weight.shape, generator=torch.Generator().manual_seed(3))
            scorer.score.weight.copy_(noise * noise.numel() ** -0.5)
        scorer.save_pretrained(root / name / "scorer")
    return {name: (str(root / name / "scorer"), str(root / name / "ours")) for name in NAMES}


def scores_of_transformers(folder: str) -> np.ndarray:
    """Scores [B, S] of every token of the texts: the last one's is what the classifier returns."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    ids_BS = texts(model.config.vocab_size)
    with torch.no_grad():
        scores_BS = model.score(model.base_model(ids_BS).last_hidden_state)[..., 0]
        # Row by row: a folder without a tokenizer names no padding.
        assert torch.allclose(
            scores_BS[:, -1:], torch.cat([model(row.unsqueeze(0)).logits for row in ids_BS]), atol=1e-5
        )
        return scores_BS.numpy()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_scores_are_those_of_transformers(pool: WorkerPool, folders: dict[str, tuple[str, str]], layout: str) -> None:
    chosen = {name: pair for name, pair in folders.items() if layout == "1" or name in SPREAD}
    tensor, pipeline = LAYOUTS[layout]
    for found in pool.run(tensor * pipeline, work_scores, chosen, (tensor, pipeline), join=False, timeout=120):
        for name, (folder, _) in chosen.items():
            truth = scores_of_transformers(folder)
            assert np.abs(truth).max() > 0.5
            assert np.array_equal(found[name][0], found[name][1]), name
            assert np.abs(found[name][0] - truth).max() <= TOLERANCE, name


def test_round_trip(pool: WorkerPool, folders: dict[str, tuple[str, str]], tmp_path: Path) -> None:
    """A folder comes back with its names, bits and class, and without a language model's head."""
    roots = {name: (folder, str(tmp_path / f"{name}-ours")) for name, (folder, _) in folders.items()}
    checkpoints = pool.run(1, work_import, roots, join=False)[0]
    pool.run(1, work_export, {n: (checkpoints[n], str(tmp_path / n)) for n in roots}, 10**9, join=False)
    for name, (folder, _) in roots.items():
        before, after = (load_file(Path(path) / "model.safetensors") for path in (folder, tmp_path / name))
        assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
        mine, theirs = (json.loads((Path(path) / "config.json").read_text()) for path in (tmp_path / name, folder))
        assert mine["architectures"] == theirs["architectures"]
        assert mine["architectures"][0].endswith("ForSequenceClassification")
        assert np.array_equal(scores_of_transformers(str(tmp_path / name)), scores_of_transformers(folder))
        assert "AutoModelForSequenceClassification" in (tmp_path / name / "README.md").read_text()


@pytest.mark.parametrize("layout", ["1", "tp2-pp2"])
def test_start_from_a_language_model(
    pool: WorkerPool, folders: dict[str, tuple[str, str]], tmp_path: Path, layout: str
) -> None:
    """Its weights are taken over; the score is drawn by its name, the same on every layout."""
    chosen = {name: (folders[name][0].replace("scorer", "base"), str(tmp_path / name)) for name in SPREAD}
    tensor, pipeline = LAYOUTS[layout]
    for found in pool.run(tensor * pipeline, work_start, chosen, (tensor, pipeline), join=False):
        for name in chosen:
            folder, checkpoint, drawn = found[name]
            assert np.array_equal(folder, drawn) and np.array_equal(checkpoint, drawn)
            # The deviation of the models, 0.15.
            assert drawn.shape == (1, 48) and 0.1 < drawn.std() < 0.2


def test_verify_compares_scores_and_generation_refuses(
    pool: WorkerPool, folders: dict[str, tuple[str, str]], tmp_path: Path
) -> None:
    same, count, said = pool.run(1, work_verify, folders["qwen2-tied"][0], str(tmp_path / "ours"), join=False)[0]
    assert same and count == 1 and "is a reward model" in said
