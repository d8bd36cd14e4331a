"""A larger vocabulary for a trained model: new rows of the embedding and of the output layer, all else unchanged."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from megatron_steel.checkpoint.converted import GENERATION_FILE, publish_weights
from megatron_steel.checkpoint.dcp_read import StoredTensors
from megatron_steel.checkpoint.dcp_write import Chunk
from megatron_steel.checkpoint.state import load_tokenizer, read_state
from megatron_steel.config.check import padded_vocab_size
from megatron_steel.config.load import from_flat
from megatron_steel.model.initialize import VOCABULARY, draw
from megatron_steel.text.extend import new_ids, sub_pieces
from megatron_steel.text.tokenizer import Tokenizer

Method = Literal["mean", "sub-pieces", "random"]
METHODS: tuple[Method, ...] = ("mean", "sub-pieces", "random")
MODEL = ("embedding.", "decoder.", "output_layer.", "score.")


def extended_rows(
    old_VH: Tensor,
    rows: int,
    known: int,
    new: Mapping[int, Sequence[int]],
    method: Method,
    noise: Callable[[list[int]], Tensor],
) -> Tensor:
    """An embedding or output layer [rows, H] with a row for every new id; all other old rows are equal to the bit.

    ``known`` ids had the old tokenizer, which may be fewer than there are rows; ``new`` has, for each new id, the old
    ids that spell it. mean: the mean of the rows of known ids; sub-pieces: the mean over its spelling, over all where
    that is empty; random: ``noise`` of the shape. Means are taken in float64. Rows nobody knows are zero, as padding.
    """
    wide = old_VH.new_zeros(rows, old_VH.shape[1])
    wide[: old_VH.shape[0]] = old_VH
    ids = sorted(new)
    if method == "random":
        wide[ids] = noise([len(ids), old_VH.shape[1]]).to(wide.dtype)
        return wide
    mean = old_VH[[index for index in range(known) if index not in new]].double().mean(0)
    for index in ids:
        spelling = list(new[index]) if method == "sub-pieces" else []
        wide[index] = (old_VH[spelling].double().mean(0) if spelling else mean).to(wide.dtype)
    return wide


def extend_vocabulary(
    checkpoint: Path,
    tokenizer: Tokenizer,
    root: Path,
    method: Method = "mean",
    std: float = 0.001,
    seed: int = 0,
    tensor_parallel_size: int = 1,
) -> Path:
    """Write a checkpoint with rows for a tokenizer that extends the checkpoint's own; returns its directory.

    New rows as ``method`` says, with standard deviation ``std`` for random ones; a model that has more rows than its
    tokenizer has ids fills those first. Weights only; ``tensor_parallel_size`` decides how far rows are padded.
    Raises ``ValueError`` when the tokenizer is no extension of the old one or has nothing new.
    """
    state = read_state(checkpoint)
    old = load_tokenizer(checkpoint)
    fresh = new_ids(old, tokenizer)
    if not fresh:
        raise ValueError(f"the tokenizer has no ids that {checkpoint} does not have")
    new = sub_pieces(old, tokenizer, fresh) if method == "sub-pieces" else dict.fromkeys(fresh, ())
    config = from_flat(state.config)
    rows = max(state.vocab_size, tokenizer.vocab_size)
    config.size.vocab_size = rows
    padded = padded_vocab_size(rows, config.size.make_vocab_size_divisible_by, tensor_parallel_size)
    stored = StoredTensors(checkpoint)

    def vocabulary(key: str) -> Tensor:
        def noise(shape: list[int]) -> Tensor:
            return draw(shape, std, seed, f"{key}/new")

        old_VH = stored.read(key)[: state.vocab_size]
        real = extended_rows(old_VH, rows, old.vocab_size, new, method, noise)
        return torch.cat((real, real.new_zeros(padded - rows, real.shape[1])))

    chunks = []
    for key, facts in stored.tensors.items():
        shape, dtype = tuple(facts.size), facts.properties.dtype
        if key in VOCABULARY:
            wide = (padded, shape[1])
            chunks.append(Chunk(key, wide, (0, 0), wide, dtype, partial(vocabulary, key)))
        elif key.startswith(MODEL):
            for chunk in facts.chunks:
                read = partial(stored.read_chunk, key, chunk)
                chunks.append(Chunk(key, shape, tuple(chunk.offsets), tuple(chunk.sizes), dtype, read))
    return publish_weights(root, config, chunks, lambda: tokenizer, checkpoint / GENERATION_FILE)
