"""Import from and export to a Hugging Face folder, in one CPU process for a checkpoint of any layout."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_steel.checkpoint import files
from megatron_steel.checkpoint.hf_map import Rule, rules, to_ours, to_theirs
from megatron_steel.checkpoint.state import STATE_FILE, TrainState, read_state
from megatron_steel.checkpoint.store import plain_weights
from megatron_steel.config.check import padded_vocab_size
from megatron_steel.config.hf_sizes import hf_from_sizes, sizes_from_hf
from megatron_steel.config.load import apply, from_flat, to_flat
from megatron_steel.config.schema import Config, ModelConfig
from megatron_steel.text.tokenizer import Tokenizer, build_tokenizer

SHARD_BYTES = 5_000_000_000
TOKENIZER_FOLDER = "tokenizer"
DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


class HFWeights:
    """The tensors of a Hugging Face folder by name, read when asked for."""

    def __init__(self, folder: Path) -> None:
        """Raises ``ValueError`` when the folder holds no safetensors or an index names a missing shard."""
        self.folder = folder
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            places: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            shards = sorted(set(places.values()))
        else:
            shards = ["model.safetensors"]
        for shard in shards:
            if not (folder / shard).is_file():
                raise ValueError(f"{folder / shard}: missing; only safetensors weights are read")
        self.open_shards = {shard: safe_open(folder / shard, framework="pt") for shard in shards}
        self.places = {name: shard for shard, file in self.open_shards.items() for name in file.keys()}  # noqa: SIM118

    def get(self, name: str) -> Tensor:
        """One tensor; ``ValueError`` names it when it is not there."""
        if name not in self.places:
            raise ValueError(f"{self.folder}: holds no tensor {name}")
        return self.open_shards[self.places[name]].get_tensor(name)

    def unused(self, used: set[str]) -> list[str]:
        """Names nobody asked for, but for buffers older versions saved."""
        return sorted(name for name in self.places if name not in used and not name.endswith("rotary_emb.inv_freq"))


def read_hf_config(folder: Path) -> Config:
    """Options with the sizes of a Hugging Face folder; ``ValueError`` names what is missing or not supported."""
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"--hf {folder}: holds no config.json")
    config = Config(model=str(folder))
    apply(config, sizes_from_hf(json.loads(path.read_text(encoding="utf-8")), str(path)), str(path))
    return config


def check_shape(rule: Rule, tensors: list[Tensor], size: ModelConfig, origin: Path) -> None:
    """The sizes in config.json must be those of the weights."""
    hidden, vocab = size.hidden_size, size.vocab_size
    first = tensors[0]
    if rule.kind == "vocab" and tuple(first.shape) != (vocab, hidden):
        raise ValueError(f"{origin}: {rule.theirs[0]} is {tuple(first.shape)}, config.json says {(vocab, hidden)}")
    if first.dim() == 2 and rule.kind != "vocab" and hidden not in first.shape:
        raise ValueError(f"{origin}: {rule.theirs[0]} is {tuple(first.shape)}, config.json says width {hidden}")


def sharded_weights(source: HFWeights, size: ModelConfig, padded_vocab: int) -> Iterator[tuple[str, ShardedTensor]]:
    """Our tensors of a Hugging Face folder, each as a whole or as one layer of a stack."""
    used: set[str] = set()
    for rule in rules(size):
        for layer in range(size.num_layers) if rule.layered else [None]:
            names = [name.format(layer=layer) for name in rule.theirs]
            used.update(names)
            tensors = [source.get(name) for name in names]
            check_shape(rule, tensors, size, source.folder)
            ours = to_ours(rule.kind, tensors, size, padded_vocab)
            if layer is None:
                yield rule.ours, ShardedTensor.from_rank_offsets(rule.ours, ours)
            else:
                offset = (0, layer, size.num_layers)
                yield (
                    f"{rule.ours}.{layer}",
                    ShardedTensor.from_rank_offsets(rule.ours, ours, offset, prepend_axis_num=1),
                )
    tied_head = set() if size.untie_embeddings_and_output_weights else {"lm_head.weight"}
    if left := source.unused(used | tied_head):
        raise ValueError(f"{source.folder}: tensors this family does not have: {', '.join(left[:3])}")


def import_hf(folder: Path, root: Path, tensor_parallel_size: int = 1) -> Path:
    """Write a Hugging Face folder as a checkpoint without optimizer state; returns its directory.

    The checkpoint loads on any layout; ``tensor_parallel_size`` only decides how far the vocabulary is padded in it.
    Raises ``ValueError`` for anything the folder lacks or this engine does not support; nothing is published then.
    """
    config = read_hf_config(folder)
    size = config.size
    assert size.vocab_size is not None
    padded = padded_vocab_size(size.vocab_size, size.make_vocab_size_divisible_by, tensor_parallel_size)
    source = HFWeights(folder)
    tokenizer = tokenizer_of(folder)
    temporary = files.temporary_directory(root, 0)
    root.mkdir(parents=True, exist_ok=True)
    files.remove_leftovers(root)
    temporary.mkdir()
    try:
        dist_checkpointing.save(dict(sharded_weights(source, size, padded)), str(temporary))
        state = TrainState(config=to_flat(config), vocab_size=size.vocab_size, has_optimizer=False)
        if tokenizer is not None:
            tokenizer.save(temporary / TOKENIZER_FOLDER)
            state.tokenizer = tokenizer_facts(tokenizer)
        for name in ("generation_config.json",):
            if (folder / name).is_file():
                shutil.copy(folder / name, temporary / name)
        files.write_json(temporary / STATE_FILE, state.to_json())
        return files.publish(root, 0, files.describe_files(temporary, files.list_files(temporary)))
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def tokenizer_of(folder: Path) -> Tokenizer | None:
    """The tokenizer of a Hugging Face folder, or None when it holds none."""
    if any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        return build_tokenizer("HuggingFaceTokenizer", str(folder))
    return None


def tokenizer_facts(tokenizer: Tokenizer) -> dict[str, Any]:
    """What identifies a tokenizer in checkpoints and sidecars."""
    return {"type": tokenizer.name, "fingerprint": tokenizer.fingerprint(), "vocab_size": tokenizer.vocab_size}


def hf_tensors(weights: dict[str, Tensor], size: ModelConfig, vocab_size: int) -> Iterator[tuple[str, Tensor]]:
    """Hugging Face's tensors from our stacked ones."""
    for rule in rules(size):
        if rule.ours not in weights:
            raise ValueError(f"the checkpoint holds no tensor {rule.ours}")
        stack = weights.pop(rule.ours)
        for layer in range(size.num_layers) if rule.layered else [None]:
            names = [name.format(layer=layer) for name in rule.theirs]
            tensor = stack if layer is None else stack[layer]
            yield from zip(names, to_theirs(rule.kind, tensor, size, vocab_size), strict=True)


def write_shards(folder: Path, tensors: Iterator[tuple[str, Tensor]], shard_bytes: int) -> None:
    """Write safetensors files of at most ``shard_bytes`` and, for more than one, their index."""
    shards: list[dict[str, Tensor]] = [{}]
    filled = total = 0
    for name, tensor in tensors:
        count = tensor.numel() * tensor.element_size()
        if filled and filled + count > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += count
        total += count
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        places = {tensor: file for file, shard in zip(names, shards, strict=True) for tensor in shard}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        files.write_json(folder / "model.safetensors.index.json", index)
    for file, shard in zip(names, shards, strict=True):
        save_file(shard, folder / file, metadata={"format": "pt"})
        files.sync(folder / file)


def export_hf(checkpoint: Path, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Write a checkpoint as a Hugging Face folder that loads with nothing but the folder.

    Weights keep their stored precision, padding rows are trimmed, tied heads are not written twice. The folder
    appears under its name only when it is complete. Raises ``ValueError`` when it already holds something else.
    """
    state = read_state(checkpoint)
    size = from_flat(state.config).size
    if folder.exists() and (not folder.is_dir() or not (folder / "config.json").is_file() and any(folder.iterdir())):
        raise ValueError(f"--hf {folder}: exists and is not a Hugging Face folder; give a new name")
    temporary = folder.with_name(f"{folder.name}.tmp{os.getpid()}")
    temporary.mkdir(parents=True)
    try:
        weights = plain_weights(checkpoint)
        dtype = DTYPE_NAMES[weights["decoder.final_layernorm.weight"].dtype]
        write_shards(temporary, hf_tensors(weights, size, state.vocab_size), shard_bytes)
        token_ids = write_tokenizer(checkpoint / TOKENIZER_FOLDER, temporary)
        files.write_json(temporary / "config.json", hf_from_sizes(size, state.vocab_size, token_ids, dtype))
        if (checkpoint / "generation_config.json").is_file():
            shutil.copy(checkpoint / "generation_config.json", temporary)
        else:
            files.write_json(temporary / "generation_config.json", token_ids)
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_tokenizer(source: Path, folder: Path) -> dict[str, int | None]:
    """Copy the checkpoint's tokenizer into the folder; returns the ids ``config.json`` names."""
    if not source.is_dir():
        return {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    facts = json.loads((source / "steel_tokenizer.json").read_text(encoding="utf-8"))
    for path in sorted(source.iterdir()):
        if path.name != "steel_tokenizer.json":
            shutil.copy(path, folder / path.name)
    return {f"{name}_token_id": facts.get(f"{name}_id") for name in ("bos", "eos", "pad")}
