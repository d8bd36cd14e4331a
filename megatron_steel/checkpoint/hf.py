"""Import from and export to a Hugging Face folder, in one CPU process for a checkpoint of any layout."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing import ShardedTensor
from torch import Tensor

from megatron_steel.checkpoint import files
from megatron_steel.checkpoint.hf_folder import (
    DTYPE_NAMES,
    HFWeights,
    check_target,
    remove_empty,
    replaced_when_complete,
    write_shards,
)
from megatron_steel.checkpoint.hf_map import pieces, to_ours, to_theirs
from megatron_steel.checkpoint.state import STATE_FILE, TOKENIZER_FOLDER, TrainState, read_state
from megatron_steel.checkpoint.store import PlainWeights, write_sharded
from megatron_steel.config.check import padded_vocab_size
from megatron_steel.config.families import FAMILIES
from megatron_steel.config.hf_sizes import hf_from_sizes, read_sizes
from megatron_steel.config.load import apply, from_flat, to_flat
from megatron_steel.config.schema import Config, ModelConfig
from megatron_steel.text.tokenizer import DESCRIPTION_FILE, Tokenizer, build_tokenizer

SHARD_BYTES = 5_000_000_000
GENERATION_FILE = "generation_config.json"
CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
---

# {name}

A {family} language model with {parameters:,} parameters in {dtype} ({layers} layers, hidden size {hidden},
vocabulary {vocab:,}, up to {positions:,} tokens), written by megatron_steel.

{training}

```python
from transformers import AutoModelForCausalLM{tokenizer_import}

model = AutoModelForCausalLM.from_pretrained("{name}", dtype="auto")
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


def check_tensors(source: HFWeights, size: ModelConfig) -> None:
    """The folder must hold exactly the tensors config.json promises; ``ValueError`` names the first that is off."""
    used: set[str] = set()
    for piece in pieces(size):
        used.update(piece.theirs)
        for name, wanted in zip(piece.theirs, piece.shapes, strict=True):
            if (found := source.shape(name)) != wanted:
                raise ValueError(f"{source.folder}: {name} is {found}, the sizes in config.json make it {wanted}")
    tied_head = set() if size.untie_embeddings_and_output_weights else {"lm_head.weight"}
    if left := source.unused(used | tied_head, FAMILIES[size.model_family].ignore):
        raise ValueError(f"{source.folder}: tensors this family does not have: {', '.join(left[:3])}")


def sharded_weights(source: HFWeights, size: ModelConfig, padded_vocab: int) -> Iterator[tuple[str, ShardedTensor]]:
    """Our tensors of a Hugging Face folder, each as a whole or as one layer or expert of a stack."""
    for piece in pieces(size):
        ours = to_ours(piece.how, [source.get(name) for name in piece.theirs], size, padded_vocab)
        offsets = [(axis, at, count) for axis, (at, count) in enumerate(zip(piece.index, piece.of, strict=True))]
        whole = ShardedTensor.from_rank_offsets(piece.key, ours, *offsets, prepend_axis_num=len(offsets))
        yield ".".join((piece.key, *map(str, piece.index))), whole


def check_new_root(root: Path) -> None:
    """``ValueError`` when a directory already holds checkpoints, so that an import never takes a run's place."""
    if root.exists() and not root.is_dir():
        raise ValueError(f"--save {root}: exists and is not a directory; give a new name")
    if root.is_dir() and files.published(root):
        raise ValueError(f"--save {root}: already holds checkpoints; give a new name")


def import_hf(folder: Path, root: Path, tensor_parallel_size: int = 1) -> Path:
    """Write a Hugging Face folder as a checkpoint without optimizer state; returns its directory.

    The checkpoint loads on any layout; ``tensor_parallel_size`` only decides how far the vocabulary is padded in it.
    Raises ``ValueError`` for anything the folder lacks or this engine does not support; nothing is written then.
    """
    config = read_hf_config(folder)
    check_new_root(root)
    if tensor_parallel_size < 1:
        raise ValueError(f"--tensor-model-parallel-size {tensor_parallel_size}: must be at least 1")
    size = config.size
    source = HFWeights(folder, FAMILIES[size.model_family].base_prefix)
    check_tensors(source, size)
    tokenizer = tokenizer_of(folder)
    assert size.vocab_size is not None
    if tokenizer is not None and tokenizer.vocab_size > size.vocab_size:
        raise ValueError(
            f"{folder}: its tokenizer has {tokenizer.vocab_size} ids, the embedding only {size.vocab_size} rows; "
            f"resize the embedding or remove the added tokens"
        )
    padded = padded_vocab_size(size.vocab_size, size.make_vocab_size_divisible_by, tensor_parallel_size)
    state = TrainState(config=to_flat(config), vocab_size=size.vocab_size, has_optimizer=False)
    temporary = files.temporary_directory(root, 0)
    made = [path for path in (root.absolute(), *root.absolute().parents) if not path.exists()]
    try:
        root.mkdir(parents=True, exist_ok=True)
        files.remove_leftovers(root)
        temporary.mkdir()
        write_sharded(dict(sharded_weights(source, size, padded)), temporary)
        if tokenizer is not None:
            tokenizer.save(temporary / TOKENIZER_FOLDER)
            state.tokenizer = tokenizer_facts(tokenizer)
        if (folder / GENERATION_FILE).is_file():
            shutil.copyfile(folder / GENERATION_FILE, temporary / GENERATION_FILE)
        files.write_json(temporary / STATE_FILE, state.to_json())
        return files.publish(root, 0, files.describe_files(temporary, files.list_files(temporary)))
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        remove_empty(made)
        raise


def tokenizer_of(folder: Path) -> Tokenizer | None:
    """The tokenizer of a Hugging Face folder, or None when it holds none."""
    if any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        return build_tokenizer("HuggingFaceTokenizer", str(folder))
    return None


def tokenizer_facts(tokenizer: Tokenizer) -> dict[str, Any]:
    """What identifies a tokenizer in checkpoints and sidecars."""
    return {"type": tokenizer.name, "fingerprint": tokenizer.fingerprint(), "vocab_size": tokenizer.vocab_size}


def hf_tensors(weights: PlainWeights, size: ModelConfig, vocab_size: int) -> Iterator[tuple[str, Tensor]]:
    """Hugging Face's tensors from our stacked ones; one of ours is in memory at a time."""
    for key, group in itertools.groupby(pieces(size), key=lambda piece: piece.key):
        stack = weights.read(key)
        for piece in group:
            # Parts may be views, which would keep the whole stack in memory for as long as one of them lives.
            parts = (part.clone() for part in to_theirs(piece.how, stack[piece.index], size, vocab_size))
            yield from zip(piece.theirs, parts, strict=True)


def export_hf(checkpoint: Path, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Write a checkpoint as a Hugging Face folder that loads with nothing but the folder.

    Weights keep their stored precision, padding rows are trimmed, tied heads are not written twice. The folder
    appears under its name only when it is complete. Raises ``ValueError`` when it already holds something else.
    """
    state = read_state(checkpoint)
    size = from_flat(state.config).size
    check_target(folder)
    folder = folder.resolve()
    weights = PlainWeights(checkpoint)
    dtype = DTYPE_NAMES[weights.dtype("decoder.final_layernorm.weight")]
    with replaced_when_complete(folder) as temporary:
        parameters = write_shards(temporary, hf_tensors(weights, size, state.vocab_size), shard_bytes)
        token_ids = write_tokenizer(checkpoint, temporary)
        files.write_json(temporary / "config.json", hf_from_sizes(size, state.vocab_size, token_ids, dtype))
        if (checkpoint / GENERATION_FILE).is_file():
            shutil.copyfile(checkpoint / GENERATION_FILE, temporary / GENERATION_FILE)
        else:
            files.write_json(temporary / GENERATION_FILE, token_ids)
        card = model_card(folder.name, state, size, parameters, dtype, (temporary / "tokenizer_config.json").is_file())
        files.write_text(temporary / "README.md", card)


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
    return CARD.format(
        name=name,
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
