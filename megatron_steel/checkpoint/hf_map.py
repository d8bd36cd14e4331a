"""From the declaration of a family to tensors: where each of ours lies and how it is made of Hugging Face's.

Our names are those of checkpoints: decoder layers are stacked under one name when all are alike, and the norm before a
linear layer belongs to that layer (megatron-core's fused names, for every backend).

Shapes: L layers, V vocabulary rows, H hidden, F feed-forward, N query heads, G key/value heads, D head width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_steel.config.families import FAMILIES
from megatron_steel.config.family import HEAD, expert_count, group_count, head_width, shapes, stacked
from megatron_steel.config.family import Tensor as Declared
from megatron_steel.config.schema import ModelConfig


@dataclass(frozen=True)
class Piece:
    """The part of one of our tensors that a few of Hugging Face's make up: all of it, one layer, or one expert.

    key: name in checkpoints. index and of: its place along the leading axes that are counted by layer and expert, and
    how many there are; empty for a whole tensor. theirs, shapes: Hugging Face's tensors.
    """

    key: str
    index: tuple[int, ...]
    of: tuple[int, ...]
    theirs: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    how: str
    fp32: bool


def pieces(size: ModelConfig) -> Iterator[Piece]:
    """Every piece of a model, in the order of the declaration and then of layers and experts.

    Raises ``ValueError`` for a model with layers of the user's own, which no family declares.
    """
    if size.decoder_layer is not None:
        raise ValueError(f"--decoder-layer {size.decoder_layer}: your own layer has no names in Hugging Face's format")
    family = FAMILIES[size.model_family]
    for tensor in (*family.tensors, HEAD):
        if not tensor.when(size):
            continue
        by_layer, by_expert = (
            ("{layer}" in tensor.ours or "{layer}" in tensor.sources[0]),
            "{expert}" in str(tensor.theirs),
        )
        for layer in range(size.num_layers) if by_layer else (None,):
            if layer is not None and not tensor.layers(size, layer):
                continue
            for expert in range(expert_count(size)) if by_expert else (None,):
                yield piece(tensor, tuple(shapes(family, tensor, size)), size, layer, expert)


def piece(
    tensor: Declared,
    their_shapes: tuple[tuple[int, ...], ...],
    size: ModelConfig,
    layer: int | None,
    expert: int | None,
) -> Piece:
    """One piece of a declared tensor."""
    places = []
    key = tensor.ours
    if layer is not None:
        if stacked(size):
            key = key.replace("{layer}.", "")
            places.append((layer, size.num_layers))
        else:
            key = key.replace("{layer}", str(layer))
    if expert is not None:
        places.append((expert, expert_count(size)))
    names = tuple(name.format(layer=layer, expert=expert) for name in tensor.sources)
    index, of = tuple(at for at, _ in places), tuple(count for _, count in places)
    return Piece(key, index, of, names, their_shapes, tensor.how, tensor.fp32)


def copy_out(tensor: Tensor, size: ModelConfig, rows: int) -> list[Tensor]:
    """Our tensor is theirs."""
    return [tensor.contiguous()]


def copy_in(tensors: list[Tensor], size: ModelConfig, rows: int) -> Tensor:
    """Their tensor is ours."""
    return tensors[0].contiguous()


def vocab_out(tensor: Tensor, size: ModelConfig, rows: int) -> list[Tensor]:
    """Padding rows are left out."""
    return [tensor[:rows].contiguous()]


def vocab_in(tensors: list[Tensor], size: ModelConfig, rows: int) -> Tensor:
    """Padding rows are zero."""
    if tensors[0].shape[0] == rows:
        return tensors[0].contiguous()
    padding = tensors[0].new_zeros(rows - tensors[0].shape[0], *tensors[0].shape[1:])
    return torch.cat((tensors[0], padding))


def halves_out(tensor: Tensor, size: ModelConfig, rows: int) -> list[Tensor]:
    """Gate rows, then up rows."""
    return [part.contiguous() for part in tensor.chunk(2, 0)]


def halves_in(tensors: list[Tensor], size: ModelConfig, rows: int) -> Tensor:
    """The inverse of :func:`halves_out`."""
    return torch.cat(tensors, 0)


def qkv_out(tensor: Tensor, size: ModelConfig, rows: int) -> list[Tensor]:
    """Rows are G blocks of [queries of the group | key | value]; Hugging Face keeps the three kinds apart."""
    groups, width, rest = group_count(size), head_width(size), tensor.shape[1:]
    per_group = size.num_attention_heads // groups
    blocks = tensor.reshape(groups, per_group + 2, width, *rest)
    return [part.reshape(-1, *rest).contiguous() for part in blocks.split([per_group, 1, 1], dim=1)]


def qkv_in(tensors: list[Tensor], size: ModelConfig, rows: int) -> Tensor:
    """The inverse of :func:`qkv_out`."""
    groups, width, rest = group_count(size), head_width(size), tensors[0].shape[1:]
    shares = (size.num_attention_heads // groups, 1, 1)
    blocks = [t.reshape(groups, n, width, *rest) for t, n in zip(tensors, shares, strict=True)]
    return torch.cat(blocks, 1).reshape(-1, *rest)


def transpose_out(tensor: Tensor, size: ModelConfig, rows: int) -> list[Tensor]:
    """Theirs is multiplied from the right (GPT-2)."""
    return [tensor.t().contiguous()]


def transpose_in(tensors: list[Tensor], size: ModelConfig, rows: int) -> Tensor:
    """The inverse of :func:`transpose_out`."""
    return tensors[0].t().contiguous()


def qkv_columns_out(tensor: Tensor, size: ModelConfig, rows: int) -> list[Tensor]:
    """Columns are all queries, all keys, all values (GPT-2); a bias has them along its only axis."""
    return [torch.cat(qkv_out(tensor, size, rows)).t().contiguous()]


def qkv_columns_in(tensors: list[Tensor], size: ModelConfig, rows: int) -> Tensor:
    """The inverse of :func:`qkv_columns_out`."""
    return qkv_in(list(tensors[0].t().chunk(3)), size, rows)


Out = Callable[[Tensor, ModelConfig, int], list[Tensor]]
In = Callable[[list[Tensor], ModelConfig, int], Tensor]
# By the name a declaration gives: from ours to theirs, and back.
TRANSFORMS: dict[str, tuple[Out, In]] = {
    "copy": (copy_out, copy_in),
    "vocab": (vocab_out, vocab_in),
    "qkv": (qkv_out, qkv_in),
    "gate_up": (halves_out, halves_in),
    "transpose": (transpose_out, transpose_in),
    "qkv_columns": (qkv_columns_out, qkv_columns_in),
}


def our_shape(piece: Piece, padded_vocab: int) -> tuple[int, ...]:
    """Shape of what :func:`to_ours` makes of a piece, without doing it.

    Asking ``torch`` on its meta device would import eight hundred modules for the first answer.
    """
    first = piece.shapes[0]
    if piece.how == "vocab":
        return (padded_vocab, *first[1:])
    if piece.how in ("transpose", "qkv_columns"):
        return first[::-1]
    return (sum(shape[0] for shape in piece.shapes), *first[1:])


def to_theirs(how: str, tensor: Tensor, size: ModelConfig, vocab_size: int) -> list[Tensor]:
    """Split one of our tensors (of one layer or expert) into Hugging Face's, as contiguous tensors."""
    return TRANSFORMS[how][0](tensor, size, vocab_size)


def to_ours(how: str, tensors: list[Tensor], size: ModelConfig, padded_vocab: int) -> Tensor:
    """The inverse of :func:`to_theirs`; vocabulary padding rows are zero."""
    return TRANSFORMS[how][1](tensors, size, padded_vocab)
