"""Adapters as a folder of PEFT's: ``adapter_config.json`` and ``adapter_model.safetensors``, there and back."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_steel.checkpoint import files
from megatron_steel.checkpoint.adapters import Place, places, read_adapter
from megatron_steel.checkpoint.converted import GENERATION_FILE, check_new_root, publish_weights
from megatron_steel.checkpoint.dcp_read import StoredTensors
from megatron_steel.checkpoint.dcp_write import Chunk
from megatron_steel.checkpoint.hf import read_hf_config, tokenizer_of, weight_chunks
from megatron_steel.checkpoint.hf_folder import DTYPE_NAMES, replaced_when_complete
from megatron_steel.checkpoint.hf_load import open_weights
from megatron_steel.checkpoint.hf_map import pieces, to_theirs
from megatron_steel.checkpoint.safetensors_file import NewFile, Planned, TensorFile
from megatron_steel.checkpoint.state import read_state
from megatron_steel.config.adapters import WHOLE, projections, short, targets
from megatron_steel.config.check import padded_vocab_size
from megatron_steel.config.check_lora import check_lora
from megatron_steel.config.check_score import check_score
from megatron_steel.config.family import SCORE
from megatron_steel.config.load import from_flat
from megatron_steel.config.lora import LoraConfig
from megatron_steel.config.schema import Config, ModelConfig

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
# Our names of an adapter's weights and PEFT's.
SUFFIXES = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "lora_magnitude": "lora_magnitude_vector"}
# Entries of PEFT's configuration that are read, or that say nothing about what an adapter computes.
READ = ("peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "modules_to_save", "bias")
HARMLESS = (
    "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_version",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "megatron_core", "megatron_config",
    "ensure_weight_tying", "qalora_group_size",
    # How adapters began; see BEGINNINGS.
    "init_lora_weights", "eva_config",
)  # fmt: skip
# Beginnings of adapters that leave the weights below them as they were.
BEGINNINGS = (True, False, "gaussian", "orthogonal", "eva")


def whole_names(size: ModelConfig) -> dict[str, str]:
    """Hugging Face's names of weights that may be trained whole, by ours of the modules (embed_tokens, lm_head)."""
    found = {}
    for piece in pieces(size):
        for module in ("embed_tokens", "lm_head"):
            if piece.key == WHOLE[module]:
                found[module] = piece.theirs[0]
    return found


def peft_config(lora: LoraConfig, size: ModelConfig, base: str | None) -> dict[str, Any]:
    """What ``adapter_config.json`` holds; what it does not say has PEFT's defaults."""
    alpha = 2.0 * lora.lora_rank if lora.lora_alpha is None and lora.lora_rank is not None else lora.lora_alpha
    assert alpha is not None
    names = whole_names(size)
    saved = [names[module] for module in lora.lora_modules_to_save] + [SCORE] * size.score_head
    whole = [short(name.removesuffix(".weight")) for name in saved]
    return {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if size.score_head else "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.lora_rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": lora.lora_dropout,
        "target_modules": sorted({name for names in targets(lora, size).values() for name in names}),
        "modules_to_save": sorted(whole) or None,
        "ensure_weight_tying": "embed_tokens" in lora.lora_modules_to_save
        and not size.untie_embeddings_and_output_weights,
        "use_rslora": lora.use_rslora,
        "use_dora": lora.use_dora,
        "bias": "none",
        "inference_mode": True,
    }


def adapter_tensors(stored: StoredTensors, lora: LoraConfig, size: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """PEFT's tensors by name, one adapter in memory at a time."""
    assert size.vocab_size is not None
    for place in places(lora, size):
        for name, tensor in read_adapter(stored, place, lora).items():
            yield f"{PREFIX}{place.module}.{SUFFIXES[name]}", tensor
    for module, name in whole_names(size).items():
        if module in lora.lora_modules_to_save:
            (whole,) = to_theirs("vocab", stored.read(WHOLE[module]), size, size.vocab_size)
            yield PREFIX + name, whole
            if module == "embed_tokens" and not size.untie_embeddings_and_output_weights:
                # PEFT saves and asks for both names of a tied weight.
                yield f"{PREFIX}lm_head.weight", whole
    if size.score_head:
        yield PREFIX + SCORE, stored.read(SCORE)


def check_adapter_target(folder: Path) -> None:
    """``ValueError`` when a folder is not new, empty, or an adapter and nothing else."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"{folder}: exists and is not a folder; give a new name")
    for path in sorted(folder.iterdir()):
        if path.name not in (CONFIG, WEIGHTS):
            raise ValueError(f"{folder}: holds {path.name}, which an adapter does not; give a new name")


def export_adapter(checkpoint: Path, folder: Path, base: str | None, dtype: torch.dtype | None = None) -> None:
    """Write the adapters of a checkpoint as a folder that PEFT loads onto the model they were trained on.

    ``base`` is the name of that model, for loaders that look it up. Weights keep their stored precision unless
    ``dtype`` says another. Raises ``ValueError`` for a checkpoint without adapters.
    """
    state = read_state(checkpoint)
    config = from_flat(state.config)
    lora, size = config.lora, config.size
    size.vocab_size = state.vocab_size
    if lora.lora_rank is None:
        raise ValueError(f"{checkpoint} holds no adapters; write the whole model with export")
    check_adapter_target(folder)
    stored = StoredTensors(checkpoint)
    planned = [
        Planned(name, dtype or tensor.dtype, tuple(tensor.shape))
        for name, tensor in adapter_tensors(stored, lora, size)
    ]
    with replaced_when_complete(folder.resolve()) as temporary:
        with closing(NewFile(temporary / WEIGHTS, planned)) as file:
            for name, tensor in adapter_tensors(stored, lora, size):
                file.write(name, tensor.to(dtype or tensor.dtype))
        files.write_json(temporary / CONFIG, peft_config(lora, size, base))


def read_peft_config(folder: Path) -> dict[str, Any]:
    """The entries of an adapter's configuration; ``ValueError`` names one that asks for what we do not compute."""
    path = folder / CONFIG
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as the configuration of an adapter ({error})") from error
    if not isinstance(values, dict) or values.get("peft_type") != "LORA":
        raise ValueError(f"{path}: not an adapter of PEFT's LoRA")
    beginning = values.get("init_lora_weights", True)
    if beginning not in BEGINNINGS:
        raise ValueError(f"{path}: init_lora_weights {beginning} changes the base model; merge it with PEFT")
    if values.get("bias", "none") != "none":
        raise ValueError(f"{path}: bias {values['bias']} is not read; merge it with PEFT")
    for name, value in values.items():
        if value and name not in (*READ, *HARMLESS):
            raise ValueError(f"{path}: {name} is not read; merge it with PEFT")
    if not isinstance(values.get("r"), int) or not isinstance(values.get("lora_alpha"), int | float):
        raise ValueError(f"{path}: r and lora_alpha must be numbers")
    return values


def read_lora(folder: Path, file: TensorFile, config: Config) -> LoraConfig:
    """The options that make the adapters of a folder, decided by the tensors it holds.

    ``ValueError`` names the first tensor that such adapters do not have, or that is missing or of another shape.
    """
    values, size = read_peft_config(folder), config.size
    known = {short(name) for names in projections(size).values() for name in names}
    modules = {name.rsplit(".lora_", 1)[0].rsplit(".", 1)[-1] for name in file.places if ".lora_" in name}
    names = whole_names(size)
    lora = LoraConfig(
        lora_rank=values["r"],
        lora_alpha=float(values["lora_alpha"]),
        lora_dropout=float(values.get("lora_dropout", 0.0)),
        lora_target_modules=sorted(known & modules),
        lora_modules_to_save=[module for module, name in names.items() if PREFIX + name in file.places],
        use_rslora=bool(values.get("use_rslora")),
        use_dora=bool(values.get("use_dora")),
    )
    if not lora.lora_target_modules:
        raise ValueError(f"{file.path}: no adapters of {', '.join(sorted(known))}")
    wanted: dict[str, tuple[int, ...]] = {
        f"{PREFIX}{place.module}.{SUFFIXES[name]}": shape
        for place in places(lora, size)
        for name, shape in place.shapes(lora).items()
    }
    for name, shape in wanted.items():
        if name not in file.places:
            raise ValueError(f"{file.path}: holds no tensor {name}; adapters of some layers only are not read")
        if file.places[name].shape != shape:
            raise ValueError(f"{file.path}: {name} is {file.places[name].shape}, the base model makes it {shape}")
    whole = {PREFIX + names[module] for module in lora.lora_modules_to_save}
    if size.score_head:
        whole.add(PREFIX + SCORE)
    tied = f"{PREFIX}lm_head.weight"
    if "embed_tokens" in lora.lora_modules_to_save and not size.untie_embeddings_and_output_weights:
        if tied not in file.places or not torch.equal(file.read(tied), file.read(PREFIX + names["embed_tokens"])):
            raise ValueError(f"{file.path}: the embedding is no longer the output layer of this model; untie it first")
        whole.add(tied)
    if left := sorted(file.places.keys() - wanted.keys() - whole):
        raise ValueError(f"{file.path}: {left[0]} has no place in this model's adapters")
    return lora


class WithModules:
    """The weights of a base model, with those an adapter brings whole in their places."""

    def __init__(self, base: Any, file: TensorFile, names: list[str]) -> None:
        """``names``: Hugging Face's, of the weights that come from ``file``."""
        self.base, self.file, self.names, self.folder = base, file, names, base.folder

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor."""
        return self.file.places[PREFIX + name].shape if name in self.names else self.base.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """Precision of one tensor."""
        return self.file.places[PREFIX + name].dtype if name in self.names else self.base.dtype(name)

    def get(self, name: str) -> Tensor:
        """One tensor."""
        return self.file.read(PREFIX + name) if name in self.names else self.base.get(name)

    def unused(self, used: set[str], ignore: Any) -> list[str]:
        """Names nobody asked for."""
        return self.base.unused(used, ignore)


def adapter_chunks(file: TensorFile, lora: LoraConfig, size: ModelConfig, dtype: torch.dtype | None) -> list[Chunk]:
    """Our tensors of an adapter, each read when it is written."""

    def chunk(place: Place, name: str, shape: tuple[int, ...]) -> Chunk:
        theirs = f"{PREFIX}{place.module}.{SUFFIXES[name]}"
        kind = dtype or file.places[theirs].dtype
        ones, zeros = (1,) * len(place.index), (0,) * len(shape)

        def read() -> Tensor:
            return file.read(theirs).to(kind)

        return Chunk(place.key + name, (*place.of, *shape), (*place.index, *zeros), (*ones, *shape), kind, read)

    return [chunk(place, name, shape) for place in places(lora, size) for name, shape in place.shapes(lora).items()]


def import_adapter(
    folder: Path, base: Path, root: Path, tensor_parallel_size: int = 1, dtype: torch.dtype | None = None
) -> Path:
    """Write a Hugging Face folder and an adapter of it as a checkpoint, the adapter apart; returns its directory.

    Raises ``ValueError`` for anything either of them lacks or this engine does not support; nothing is written then.
    """
    config = read_hf_config(base)
    check_new_root(root)
    size = config.size
    source = open_weights(base, size)
    if not (folder / WEIGHTS).is_file():
        raise ValueError(f"--adapter {folder}: holds no {WEIGHTS}")
    file = TensorFile(folder / WEIGHTS)
    # A reward model's adapter brings the score, whether its base was a language model or had one.
    score = {SCORE: (1, size.hidden_size)} if PREFIX + SCORE in file.places else {}
    size.score_head = size.score_head or bool(score)
    config.lora = read_lora(folder, file, config)
    check_lora(config)
    check_score(config)
    for name, place in file.places.items():
        if place.dtype not in DTYPE_NAMES:
            raise ValueError(f"{file.path}: {name} is {place.dtype}; only {', '.join(DTYPE_NAMES.values())} are read")
    names = whole_names(size)
    whole = [names[module] for module in config.lora.lora_modules_to_save]
    wanted = {name: source.shape(name) for name in whole} | score
    weights = WithModules(source, file, list(wanted))
    for name, shape in wanted.items():
        if weights.shape(name) != shape:
            raise ValueError(f"{file.path}: {name} is {weights.shape(name)}, in the base model {shape}")
    assert size.vocab_size is not None
    padded = padded_vocab_size(size.vocab_size, size.make_vocab_size_divisible_by, tensor_parallel_size)
    chunks = weight_chunks(weights, size, padded, dtype) + adapter_chunks(file, config.lora, size, dtype)
    return publish_weights(root, config, chunks, partial(tokenizer_of, base), base / GENERATION_FILE)
