"""The reference of preferences: log-probabilities of all answers under a model that is not trained."""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace
from pathlib import Path

import numpy as np

from megatron_steel.checkpoint import store
from megatron_steel.checkpoint.files import MANIFEST
from megatron_steel.checkpoint.hf_load import load_hf
from megatron_steel.config.check_precision import compute_type
from megatron_steel.config.lora import LoraConfig
from megatron_steel.config.schema import ModelConfig
from megatron_steel.data.batch import Builder
from megatron_steel.data.duplicates import hash_file
from megatron_steel.data.loader import BatchLayout
from megatron_steel.data.pair_dataset import PairDataset
from megatron_steel.evaluate.text_logps import score_texts
from megatron_steel.model.build import Model, build_model
from megatron_steel.objective.grpo_objective import GroupPolicyObjective
from megatron_steel.objective.preference_objective import JudgedObjective, PreferenceObjective, ScoreObjective
from megatron_steel.runtime import world as runtime
from megatron_steel.runtime.world import World
from megatron_steel.train.prepare import Prepared
from megatron_steel.train.prepare_chat import store_folder
from megatron_steel.train.pretrained import Pretrained

FOLDER = "references"


def weights_name(origin: Pretrained) -> str:
    """Hex digest of the weights of a checkpoint or folder."""
    if origin.checkpoint is not None:
        return hash_file(origin.checkpoint / MANIFEST)
    assert origin.hf_folder is not None
    files = sorted([*origin.hf_folder.glob("*.safetensors"), *origin.hf_folder.glob("*.bin")])
    parts = [hash_file(path) for path in [origin.hf_folder / "config.json", *files]]
    return hashlib.sha256("".join(parts).encode()).hexdigest()


def load_weights(origin: Pretrained, model: Model, size: ModelConfig) -> None:
    """Fill a model with the weights of a checkpoint or folder."""
    if origin.checkpoint is not None:
        store.load_weights(origin.checkpoint, model)
    else:
        assert origin.hf_folder is not None
        load_hf(origin.hf_folder, model, size)


def precompute(
    prepared: Prepared, model: Model, world: World, layout: BatchLayout, builder: Builder, folder: Path | None
) -> list[str]:
    """Give every data set its references, from files of an earlier run or by one pass; returns lines for the log.

    Where a pass is needed the model has the reference's weights afterwards. Files are named by all that decides what
    is in them: rows, weights and precision.
    """
    origin = prepared.reference
    assert origin is not None
    sets = {name: data for name, data in prepared.valid_sets.items()}
    sets |= {data.name: data for data in prepared.datasets.values() if isinstance(data, PairDataset)}
    weights = runtime.broadcast_object(world, weights_name(origin) if world.rank == 0 else None)
    loaded, lines = False, []
    for name, dataset in sets.items():
        assert isinstance(dataset, PairDataset)
        key = hashlib.sha256(f"{dataset.content}|{weights}|{compute_type(prepared.config.training)}".encode())
        path = None if folder is None else folder / FOLDER / f"{key.hexdigest()[:32]}.npy"
        found = np.load(path) if world.rank == 0 and path is not None and path.is_file() else None
        known = runtime.broadcast_object(world, found)
        if known is not None and known.shape == dataset.references.shape:
            dataset.references = known
            lines.append(f"{name}: reference log-probabilities from {path}")
            continue
        if not loaded:
            load_weights(origin, model, prepared.config.size)
            loaded = True
        dataset.references = score_texts(model, dataset, layout, builder, world)
        lines.append(f"{name}: reference log-probabilities of {origin.name} computed")
        if world.rank == 0 and path is not None:
            save(path, dataset.references)
    return lines


def save(path: Path, values: np.ndarray) -> None:
    """Write an array under its name when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with open(temporary, "wb") as stream:
        np.save(stream, values)
    os.replace(temporary, path)


def live_model(prepared: Prepared, world: World) -> Model:
    """A second model with the reference's weights, of which nothing is trained."""
    assert prepared.reference is not None
    config = replace(prepared.config, lora=LoraConfig())
    model = build_model(config, prepared.state.vocab_size, world, training=False)
    load_weights(prepared.reference, model, config.size)
    for chunk in model.chunks:
        chunk.requires_grad_(False)
        chunk.eval()
    return model


def preference_objective(
    prepared: Prepared, model: Model, world: World, layout: BatchLayout, builder: Builder
) -> PreferenceObjective | GroupPolicyObjective:
    """The objective of a run on preferences or rewards, with what it compares answers with."""
    options, live = prepared.config.preference, None
    if prepared.reward is not None:
        if prepared.reference is not None:
            live = model if options.reference == "lora-base" else live_model(prepared, world)
        return GroupPolicyObjective(options, world, live)
    if prepared.reference is not None and options.reference == "precomputed":
        lines = precompute(prepared, model, world, layout, builder, store_folder(prepared.config))
        if world.rank == 0:
            print("\n".join(lines), flush=True)
    elif prepared.reference is not None:
        live = model if options.reference == "lora-base" else live_model(prepared, world)
    kinds = {"kto": JudgedObjective, "rm": ScoreObjective}
    return kinds.get(options.loss_type, PreferenceObjective)(options, world, model, live)
