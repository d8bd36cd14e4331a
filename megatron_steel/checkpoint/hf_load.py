"""Weights of a Hugging Face folder straight into a model on any layout: each rank reads what it holds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from torch import Tensor

from megatron_steel.checkpoint.hf import check_tensors, read_hf_config
from megatron_steel.checkpoint.hf_folder import HFWeights
from megatron_steel.checkpoint.hf_map import Piece, pieces, to_ours
from megatron_steel.checkpoint.store import model_state
from megatron_steel.config.families import FAMILIES
from megatron_steel.config.schema import ModelConfig
from megatron_steel.model.build import Model

Place = tuple[str, tuple[int, ...]]


def open_weights(folder: Path, size: ModelConfig) -> HFWeights:
    """The weights of a folder; ``ValueError`` names the first that is not what its config.json promises."""
    source = HFWeights(folder, FAMILIES[size.model_family].base_prefix)
    check_tensors(source, size)
    return source


def held_shards(model: Model) -> Iterator[tuple[Place, ShardedTensor]]:
    """This rank's tensors, each with the piece of the whole model it is a part of."""
    state = model_state(model)
    # Tensors that hold two (gate and up) come as views of both.
    apply_factories(state)
    for shard in nested_values(state):
        if isinstance(shard, ShardedTensor):
            yield (shard.key, tuple(shard.global_offset[: shard.prepend_axis_num])), shard


@torch.no_grad()
def load_hf(folder: Path, model: Model, size: ModelConfig) -> set[str]:
    """Fill the model's weights from a Hugging Face folder, in the model's precision.

    Returns the keys of tensors that the folder does not have: adapters, and the score of a reward model that begins
    from a language model. Raises ``ValueError`` as :func:`open_weights`.
    """
    theirs = replace(size, score_head=read_hf_config(folder).size.score_head)
    source = open_weights(folder, theirs)
    wanted = {(piece.key, piece.index): piece for piece in pieces(theirs)}
    own: set[str] = set()
    last: tuple[Piece, Tensor] | None = None
    for place, shard in held_shards(model):
        piece = wanted.get(place)
        if piece is None:
            own.add(shard.key)
            continue
        axes = shard.prepend_axis_num
        if last is None or last[0] is not piece:
            # Only the vocabulary is padded, and it is the first axis.
            rows = shard.global_shape[axes]
            last = (piece, to_ours(piece.how, [source.get(name) for name in piece.theirs], size, rows))
        begins = shard.global_offset[axes:]
        part = last[1]
        for axis, (begin, length) in enumerate(zip(begins, shard.local_shape, strict=True)):
            part = part.narrow(axis, begin, length)
        shard.data.copy_(part)
    return own
