"""Adapters inside a checkpoint under Hugging Face's names, and weights with their adapters merged into them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_steel.checkpoint.dcp_read import StoredTensors
from megatron_steel.checkpoint.hf_map import Piece, pieces, to_ours, to_theirs
from megatron_steel.checkpoint.state import TrainState
from megatron_steel.config.adapters import scaling, short, targets
from megatron_steel.config.load import from_flat
from megatron_steel.config.lora import LoraConfig
from megatron_steel.config.schema import ModelConfig

LINEAR_KEY = re.compile(r"decoder\.layers\.(?:\d+\.)?(.+)\.weight")


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where the adapter of one of Hugging Face's linear layers lies in a checkpoint."""

    module: str
    """Its name there, such as model.layers.0.self_attn.q_proj."""
    key: str
    """Ours, up to the name of the factor."""
    index: tuple[int, ...]
    of: tuple[int, ...]
    """Place among layers that are stacked, as in :class:`Piece`."""
    rows: int
    columns: int

    def shapes(self, lora: LoraConfig) -> dict[str, tuple[int, ...]]:
        """Our names of its weights and their shapes."""
        assert lora.lora_rank is not None
        found: dict[str, tuple[int, ...]] = {
            "lora_A": (lora.lora_rank, self.columns),
            "lora_B": (self.rows, lora.lora_rank),
        }
        return found | ({"lora_magnitude": (self.rows,)} if lora.use_dora else {})


def adapters_of(piece: Piece, lora: LoraConfig, size: ModelConfig) -> Iterator[tuple[str, Place]]:
    """The adapters of a piece's linear layers, each with Hugging Face's name of the weight."""
    found = LINEAR_KEY.fullmatch(piece.key)
    chosen = targets(lora, size).get(found[1], ()) if found else ()
    for name, (rows, *columns) in zip(piece.theirs, piece.shapes, strict=True):
        module = name.removesuffix(".weight")
        if short(module) in chosen and columns:
            key = f"{piece.key.removesuffix('weight')}adapters.{short(module)}."
            yield name, Place(module=module, key=key, index=piece.index, of=piece.of, rows=rows, columns=columns[0])


def places(lora: LoraConfig, size: ModelConfig) -> list[Place]:
    """All adapters of a model."""
    return [place for piece in pieces(size) for _, place in adapters_of(piece, lora, size)]


def merged(weight: Tensor, factors: dict[str, Tensor], scale: float) -> Tensor:
    """W + scale * B A, with the lengths of rows that DoRA says; computed in fp32, in the type of ``weight`` [O, I]."""
    wide = {name: factor.float() for name, factor in factors.items()}
    total = weight.float() + scale * (wide["lora_B"] @ wide["lora_A"])
    if "lora_magnitude" in wide:
        total *= (wide["lora_magnitude"] / torch.linalg.vector_norm(total, dim=1))[:, None]
    return total.to(weight.dtype)


class MergedTensors(StoredTensors):
    """The tensors of a checkpoint with adapters, each linear layer with its adapters merged into it."""

    def __init__(self, directory: Path, lora: LoraConfig, size: ModelConfig) -> None:
        """Raises ``ValueError`` for a directory without a readable index."""
        super().__init__(directory)
        self.lora, self.size, self.scale = lora, size, scaling(lora)
        self.pieces = {(piece.key, piece.index): piece for piece in pieces(size)}

    def read(self, key: str, index: Sequence[int] = ()) -> Tensor:
        """A tensor or its part at ``index``, merged."""
        own = super().read(key, index)
        piece = self.pieces.get((key, tuple(index)))
        found = dict(adapters_of(piece, self.lora, self.size)) if piece else {}
        if piece is None or not found:
            return own
        theirs = dict(zip(piece.theirs, to_theirs(piece.how, own, self.size, 0), strict=True))
        for name, place in found.items():
            theirs[name] = merged(theirs[name], read_adapter(self, place, self.lora), self.scale)
        return to_ours(piece.how, list(theirs.values()), self.size, 0)


def read_adapter(stored: StoredTensors, place: Place, lora: LoraConfig) -> dict[str, Tensor]:
    """One adapter's weights by our names; ``ValueError`` names one that is not there or of another shape."""
    found = {}
    for name, shape in place.shapes(lora).items():
        found[name] = stored.read(place.key + name, place.index)
        if found[name].shape != shape:
            raise ValueError(f"{stored.directory}: {place.key + name} is {tuple(found[name].shape)}, not {shape}")
    return found


def model_tensors(checkpoint: Path, state: TrainState) -> StoredTensors:
    """The weights of a checkpoint of ours as those of a plain model: adapters are merged into them."""
    config = from_flat(state.config)
    if config.lora.lora_rank is None:
        return StoredTensors(checkpoint)
    return MergedTensors(checkpoint, config.lora, config.size)
