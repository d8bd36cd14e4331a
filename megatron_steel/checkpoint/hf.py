"""Import from and export to a Hugging Face folder, in one CPU process for a checkpoint of any layout."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_steel.checkpoint import files
from megatron_steel.checkpoint.adapters import model_tensors
from megatron_steel.checkpoint.converted import (
    GENERATION_FILE,
    THREADS,
    check_new_root,
    piece_chunk,
    progress,
    publish_weights,
)
from megatron_steel.checkpoint.dcp_read import StoredTensors
from megatron_steel.checkpoint.dcp_write import Chunk
from megatron_steel.checkpoint.hf_folder import (
    DTYPE_NAMES,
    HFWeights,
    check_target,
    new_shards,
    replaced_when_complete,
)
from megatron_steel.checkpoint.hf_map import Piece, pieces, to_ours, to_theirs
from megatron_steel.checkpoint.safetensors_file import Planned
from megatron_steel.checkpoint.state import TOKENIZER_FOLDER, TrainState, read_state
from megatron_steel.config.check import padded_vocab_size
from megatron_steel.config.families import FAMILIES
from megatron_steel.config.family import tied
from megatron_steel.config.hf_sizes import hf_from_sizes, read_sizes
from megatron_steel.config.load import apply, from_flat
from megatron_steel.config.schema import Config, ModelConfig
from megatron_steel.text.tokenizer import DESCRIPTION_FILE, Tokenizer, build_tokenizer

SHARD_BYTES = 5_000_000_000
CARD = """\
---
library_name: transformers
pipeline_tag: {task}
---

# {name}

A {family} {kind} with {parameters:,} parameters in {dtype} ({layers} layers, hidden size {hidden},
vocabulary {vocab:,}, up to {positions:,} tokens), written by megatron_steel.

{training}

```python
from transformers import {loader}{tokenizer_import}

model = {loader}.from_pretrained("{name}", dtype="auto")
{tokenizer_line}```
"""


def read_hf_config(folder: Path) -> Config:
    """Options with the sizes of a Hugging Face folder; ``ValueError`` names what is missing or not supported."""
    if not folder.is_dir():
        raise ValueError(f"--hf {folder}: no such folder (names of online models are not looked up)")
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"--hf {folder}: holds no config.json")
    config = Config(model=folder.name)
    apply(config, read_sizes(path), str(path))
    return config


class Source(Protocol):
    """Where weights come from under Hugging Face's names."""

    folder: Path

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it; ``ValueError`` names one that is not there."""

    def dtype(self, name: str) -> torch.dtype:
        """Precision of a tensor, without reading it."""

    def get(self, name: str) -> Tensor:
        """A tensor in memory of its own."""

    def unused(self, used: set[str], ignore: Sequence[str]) -> list[str]:
        """Names nobody asked for."""


def check_tensors(source: Source, size: ModelConfig) -> None:
    """The folder must hold exactly the tensors config.json promises; ``ValueError`` names the first that is off."""
    used: set[str] = set()
    for piece in pieces(size):
        used.update(piece.theirs)
        for name, wanted in zip(piece.theirs, piece.shapes, strict=True):
            if (found := source.shape(name)) != wanted:
                raise ValueError(f"{source.folder}: {name} is {found}, the sizes in config.json make it {wanted}")
    own_head = {"lm_head.weight"} if tied(size) else set()
    if left := source.unused(used | own_head, FAMILIES[size.model_family].ignore):
        raise ValueError(f"{source.folder}: tensors this family does not have: {', '.join(left[:3])}")


def check_precision(source: Source, size: ModelConfig, dtype: torch.dtype | None) -> None:
    """``ValueError`` for weights that are no plain numbers, and for layers that differ when none is asked for."""
    kinds: dict[str, torch.dtype] = {}
    for piece in pieces(size):
        for name in piece.theirs:
            kind = source.dtype(name)
            if kind not in DTYPE_NAMES:
                raise ValueError(f"{source.folder}: {name} is {kind}; only {', '.join(DTYPE_NAMES.values())} are read")
            if dtype is None and not piece.fp32 and kinds.setdefault(piece.key, kind) != kind:
                raise ValueError(f"{source.folder}: {name} is {kind}, its like {kinds[piece.key]}; give --dtype")


def weight_chunks(source: Source, size: ModelConfig, padded_vocab: int, dtype: torch.dtype | None) -> list[Chunk]:
    """Our tensors of a folder, each read when it is written; in the folder's precision where ``dtype`` is None."""
    check_precision(source, size, dtype)

    def chunk(piece: Piece) -> Chunk:
        def read() -> Tensor:
            return to_ours(piece.how, [source.get(name) for name in piece.theirs], size, padded_vocab)

        return piece_chunk(piece, padded_vocab, dtype or source.dtype(piece.theirs[0]), read)

    return [chunk(piece) for piece in pieces(size)]


def import_hf(folder: Path, root: Path, tensor_parallel_size: int = 1, dtype: torch.dtype | None = None) -> Path:
    """Write a Hugging Face folder as a checkpoint without optimizer state; returns its directory.

    The checkpoint loads on any layout; ``tensor_parallel_size`` only decides how far the vocabulary is padded in it.
    ``dtype`` changes the precision of the weights. Raises ``ValueError`` for anything the folder lacks or this engine
    does not support; nothing is written then.
    """
    config = read_hf_config(folder)
    check_new_root(root)
    if tensor_parallel_size < 1:
        raise ValueError(f"--tensor-model-parallel-size {tensor_parallel_size}: must be at least 1")
    size = config.size
    source = HFWeights(folder, FAMILIES[size.model_family].base_prefix)
    check_tensors(source, size)
    assert size.vocab_size is not None
    padded = padded_vocab_size(size.vocab_size, size.make_vocab_size_divisible_by, tensor_parallel_size)
    chunks = weight_chunks(source, size, padded, dtype)
    return publish_weights(root, config, chunks, partial(tokenizer_of, folder), folder / GENERATION_FILE)


def tokenizer_of(folder: Path) -> Tokenizer | None:
    """The tokenizer of a Hugging Face folder, or None when it holds none."""
    if any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        return build_tokenizer("HuggingFaceTokenizer", str(folder))
    return None


def read_theirs(weights: StoredTensors, piece: Piece, size: ModelConfig, vocab_size: int) -> dict[str, Tensor]:
    """Hugging Face's tensors of one piece, by name."""
    ours = weights.read(piece.key, piece.index)
    return dict(zip(piece.theirs, to_theirs(piece.how, ours, size, vocab_size), strict=True))


def hf_tensors(weights: StoredTensors, size: ModelConfig, vocab_size: int) -> Iterator[tuple[str, Tensor]]:
    """Hugging Face's tensors from ours; one piece is in memory at a time."""
    for piece in pieces(size):
        yield from read_theirs(weights, piece, size, vocab_size).items()


def export_weights(
    weights: StoredTensors, folder: Path, size: ModelConfig, dtype: torch.dtype | None, shard_bytes: int
) -> int:
    """Write all weights as safetensors, several pieces at once; returns the number of parameters."""
    assert size.vocab_size is not None
    vocab_size = size.vocab_size

    def kind(piece: Piece) -> torch.dtype:
        return torch.float32 if piece.fp32 else dtype or weights.dtype(piece.key)

    planned = [
        Planned(name, kind(piece), shape)
        for piece in pieces(size)
        for name, shape in zip(piece.theirs, piece.shapes, strict=True)
    ]
    with new_shards(folder, planned, shard_bytes) as shards, progress(
        sum(tensor.nbytes for tensor in planned), "export"
    ) as advance, ThreadPoolExecutor(THREADS) as pool:  # fmt: skip

        def write(piece: Piece) -> None:
            for name, tensor in read_theirs(weights, piece, size, vocab_size).items():
                shards[name].write(name, tensor.to(kind(piece)))
                advance(tensor.nbytes)

        for _ in pool.map(write, pieces(size)):
            pass  # errors of the threads are raised here
    return sum(math.prod(tensor.shape) for tensor in planned)


def export_hf(checkpoint: Path, folder: Path, shard_bytes: int = SHARD_BYTES, dtype: torch.dtype | None = None) -> None:
    """Write a checkpoint as a Hugging Face folder that loads with nothing but the folder.

    Weights keep their stored precision unless ``dtype`` says another, adapters are merged, padding rows are trimmed,
    tied heads are not written twice, and code for transformers comes along for families it does not know. The folder
    appears under its name only when it is complete. Raises ``ValueError`` when it already holds something else.
    """
    state = read_state(checkpoint)
    size = from_flat(state.config).size
    size.vocab_size = state.vocab_size
    check_target(folder)
    folder = folder.resolve()
    weights = model_tensors(checkpoint, state)
    written = DTYPE_NAMES[dtype or weights.dtype("decoder.final_layernorm.weight")]
    with replaced_when_complete(folder) as temporary:
        parameters = export_weights(weights, temporary, size, dtype, shard_bytes)
        token_ids = write_tokenizer(checkpoint, temporary)
        files.write_json(temporary / "config.json", hf_from_sizes(size, state.vocab_size, token_ids, written))
        for path in modeling_files(size):
            shutil.copyfile(path, temporary / path.name)
        if (checkpoint / GENERATION_FILE).is_file():
            shutil.copyfile(checkpoint / GENERATION_FILE, temporary / GENERATION_FILE)
        else:
            files.write_json(temporary / GENERATION_FILE, token_ids)
        tokenizer = (temporary / "tokenizer_config.json").is_file()
        card = model_card(folder.name, state, size, parameters, written, tokenizer)
        files.write_text(temporary / "README.md", card)


def modeling_files(size: ModelConfig) -> list[Path]:
    """The code that goes along with weights of a family transformers does not know."""
    name = FAMILIES[size.model_family].modeling
    if name is None:
        return []
    return sorted(path for path in (Path(__file__).parent / "modeling" / name).glob("*.py") if path.stem != "__init__")


def write_tokenizer(checkpoint: Path, folder: Path) -> dict[str, Any]:
    """Copy the checkpoint's tokenizer into the folder; returns the special ids ``config.json`` names.

    The ids a published model generates with (some end on several tokens) win over those of its tokenizer.
    """
    ids: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    source = checkpoint / TOKENIZER_FOLDER
    if source.is_dir():
        facts = json.loads((source / DESCRIPTION_FILE).read_text(encoding="utf-8"))
        ids = {name: facts.get(name.replace("_token", "")) for name in ids}
        for path in sorted(source.iterdir()):
            if path.name != DESCRIPTION_FILE:
                shutil.copyfile(path, folder / path.name)
    if (checkpoint / GENERATION_FILE).is_file():
        generation = json.loads((checkpoint / GENERATION_FILE).read_text(encoding="utf-8"))
        ids.update({name: generation[name] for name in ids if generation.get(name) is not None})
    return ids


def model_card(name: str, state: TrainState, size: ModelConfig, parameters: int, dtype: str, tokenizer: bool) -> str:
    """A README.md with what the model is, how long it was trained and how to load it."""
    trained = "Converted without training."
    if state.iteration:
        trained = f"Trained for {state.iteration:,} steps on {state.consumed_tokens:,} tokens."
    use = ("text-generation", "language model", "AutoModelForCausalLM")
    if size.score_head:
        use = ("text-classification", "reward model", "AutoModelForSequenceClassification")
    return CARD.format(
        name=name,
        task=use[0],
        kind=use[1],
        loader=use[2],
        family=FAMILIES[size.model_family].architecture.removesuffix("ForCausalLM"),
        parameters=parameters,
        dtype=dtype,
        layers=size.num_layers,
        hidden=size.hidden_size,
        vocab=state.vocab_size,
        positions=size.max_position_embeddings,
        training=trained,
        tokenizer_import=", AutoTokenizer" if tokenizer else "",
        tokenizer_line=f'tokenizer = AutoTokenizer.from_pretrained("{name}")\n' if tokenizer else "",
    )
