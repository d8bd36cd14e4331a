"""Meta's own Llama checkpoints: ``params.json`` and one ``consolidated.NN.pth`` per model-parallel rank.

Llama 1, 2 and 3 (https://github.com/meta-llama/llama-models): matrices are cut over the ranks, and the rows of the
query and key projections are ordered for rotating neighbours (2i, 2i + 1) of a head; Hugging Face and megatron-core
rotate i and i + D / 2.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_steel.checkpoint.converted import publish_weights
from megatron_steel.checkpoint.hf import check_tensors, weight_chunks
from megatron_steel.config.check import padded_vocab_size
from megatron_steel.config.hf_sizes import sizes_from_hf
from megatron_steel.config.load import apply
from megatron_steel.config.schema import Config
from megatron_steel.text.tokenizer import SENTENCEPIECE_FILE, Tokenizer, build_tokenizer

PARAMETERS = "params.json"
# Hugging Face's name -> Meta's, and the axis that is cut over the ranks (None: every rank has it all).
NAMES: dict[str, tuple[str, int | None]] = {
    "model.embed_tokens.weight": ("tok_embeddings.weight", 1),
    "model.norm.weight": ("norm.weight", None),
    "lm_head.weight": ("output.weight", 0),
}
LAYER_NAMES: dict[str, tuple[str, int | None]] = {
    "input_layernorm.weight": ("attention_norm.weight", None),
    "post_attention_layernorm.weight": ("ffn_norm.weight", None),
    "self_attn.q_proj.weight": ("attention.wq.weight", 0),
    "self_attn.k_proj.weight": ("attention.wk.weight", 0),
    "self_attn.v_proj.weight": ("attention.wv.weight", 0),
    "self_attn.o_proj.weight": ("attention.wo.weight", 1),
    "mlp.gate_proj.weight": ("feed_forward.w1.weight", 0),
    "mlp.up_proj.weight": ("feed_forward.w3.weight", 0),
    "mlp.down_proj.weight": ("feed_forward.w2.weight", 1),
}
UNUSED = r"(.*\.)?rope\.freqs"
# Scaling that use_scaled_rope stands for: factor of Llama 3.1 (3.2 has 32, which params.json does not say).
SCALING = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, "factor": 8.0}
SCALED_FROM = 8192


class MetaWeights:
    """The tensors of a folder under Hugging Face's names, joined over the ranks and in Hugging Face's order of rows."""

    def __init__(self, folder: Path) -> None:
        """Raises ``ValueError`` for a folder without readable ``params.json`` and ``consolidated.*.pth``."""
        self.folder = folder
        self.parameters = read_parameters(folder)
        paths = sorted(folder.glob("consolidated.*.pth"))
        if not paths or [path.name for path in paths] != [f"consolidated.{rank:02d}.pth" for rank in range(len(paths))]:
            raise ValueError(f"{folder}: holds no consolidated.00.pth, or ranks are missing")
        self.ranks: list[dict[str, Tensor]] = []
        for path in paths:
            try:
                self.ranks.append(torch.load(path, map_location="cpu", mmap=True, weights_only=True))
            except (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
                raise ValueError(f"{path}: not readable as tensors ({error})") from error

    def parts(self, name: str) -> tuple[list[Tensor], int | None]:
        """A tensor's parts on the ranks and the axis they are joined along; ``ValueError`` when it is not there."""
        layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
        known = LAYER_NAMES.get(layer.group(2)) if layer else NAMES.get(name)
        theirs = f"layers.{layer.group(1)}.{known[0]}" if known and layer else known[0] if known else ""
        if known is None or any(theirs not in rank for rank in self.ranks):
            raise ValueError(f"{self.folder}: holds no tensor {theirs or name} on every rank")
        parts, axis = [rank[theirs] for rank in self.ranks], known[1]
        if axis is None:
            return parts[:1], None
        # Llama 3 cuts the embedding by rows, its predecessors by columns.
        if theirs == "tok_embeddings.weight" and parts[0].shape[1] == self.parameters["dim"]:
            axis = 0
        return parts, axis

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor, without reading it."""
        parts, axis = self.parts(name)
        shape = list(parts[0].shape)
        if axis is not None:
            shape[axis] = sum(part.shape[axis] for part in parts)
        return tuple(shape)

    def dtype(self, name: str) -> torch.dtype:
        """Precision of one tensor, without reading it."""
        return self.parts(name)[0][0].dtype

    def get(self, name: str) -> Tensor:
        """One tensor; ``ValueError`` names it when it is not there."""
        parts, axis = self.parts(name)
        whole = parts[0] if axis is None else torch.cat(parts, axis)
        heads = {"q": self.heads, "k": self.groups}.get(name.rsplit("_proj", 1)[0][-1])
        return half_split(whole, heads) if heads and ".self_attn." in name else whole

    @property
    def heads(self) -> int:
        """Query heads."""
        return int(self.parameters["n_heads"])

    @property
    def groups(self) -> int:
        """Key and value heads."""
        return int(self.parameters.get("n_kv_heads") or self.heads)

    def unused(self, used: set[str], ignore: Sequence[str] = ()) -> list[str]:
        """Meta's names of tensors nobody asked for, but for tables of angles."""
        asked = set()
        for name in used:
            layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
            asked.add(f"layers.{layer.group(1)}.{LAYER_NAMES[layer.group(2)][0]}" if layer else NAMES[name][0])
        return sorted(name for name in self.ranks[0].keys() - asked if not re.fullmatch(UNUSED, name))


def half_split(weight: Tensor, heads: int) -> Tensor:
    """Rows of each head from pairs (2i, 2i + 1) to two halves (i, i + D / 2); [heads * D, H]."""
    return weight.view(heads, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def read_parameters(folder: Path) -> dict[str, Any]:
    """``params.json``; ``ValueError`` for a missing one, or one without the sizes."""
    path = folder / PARAMETERS
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not readable as JSON ({error})") from error
    for name in ("dim", "n_layers", "n_heads", "norm_eps"):
        if not isinstance(values, dict) or name not in values:
            raise ValueError(f"{path}: {name} is missing")
    return dict(values)


def hf_config(source: MetaWeights, max_positions: int, rope_factor: float | None) -> dict[str, Any]:
    """The ``config.json`` of the same model.

    ``params.json`` says neither how long sequences may be nor Llama 3.2's factor of the rotary scaling, 32; the
    feed-forward width and the rows of the vocabulary are those of the tensors.
    """
    values = source.parameters
    rows = source.shape("model.embed_tokens.weight")[0]
    tied = "output.weight" not in source.ranks[0] or torch.equal(
        source.get("model.embed_tokens.weight"), source.get("lm_head.weight")
    )
    scaled = values.get("use_scaled_rope", False)
    if rope_factor is not None and not scaled:
        raise ValueError(f"{source.folder / PARAMETERS}: use_scaled_rope is not set; leave --rope-scaling-factor out")
    factor = rope_factor or values.get("rope_scaling_factor") or SCALING["factor"]
    scaling = {**SCALING, "factor": factor, "original_max_position_embeddings": SCALED_FROM}
    return {
        "model_type": "llama",
        "vocab_size": rows,
        "hidden_size": values["dim"],
        "intermediate_size": source.shape("model.layers.0.mlp.gate_proj.weight")[0],
        "num_hidden_layers": values["n_layers"],
        "num_attention_heads": source.heads,
        "num_key_value_heads": source.groups,
        "head_dim": values["dim"] // source.heads,
        "max_position_embeddings": max_positions,
        "rms_norm_eps": values["norm_eps"],
        "rope_theta": float(values.get("rope_theta", 10000.0)),
        "rope_scaling": scaling if scaled else None,
        "tie_word_embeddings": tied,
    }


def own_tokenizer(folder: Path) -> Tokenizer | None:
    """The SentencePiece model of Llama 1 and 2; None for Llama 3, whose file is of another kind, or without a file."""
    path = folder / SENTENCEPIECE_FILE
    # A protocol buffer of pieces begins with field 1; Llama 3's file of the same name is lines of text.
    if path.is_file() and path.read_bytes()[:1] == b"\x0a":
        return build_tokenizer("SentencePieceTokenizer", str(path))
    return None


def import_meta(
    folder: Path,
    root: Path,
    max_positions: int,
    rope_factor: float | None = None,
    tokenizer: Tokenizer | None = None,
    tensor_parallel_size: int = 1,
) -> Path:
    """Write a folder of Meta's as a checkpoint without optimizer state; returns its directory.

    ``tokenizer`` goes into the checkpoint, the folder's own where it is left out. Raises ``ValueError`` for whatever
    the folder lacks or this engine does not support; nothing is written then.
    """
    source = MetaWeights(folder)
    config = Config(model=folder.name)
    origin = str(folder / PARAMETERS)
    apply(config, sizes_from_hf(hf_config(source, max_positions, rope_factor), origin), origin)
    size = config.size
    check_tensors(source, size)
    assert size.vocab_size is not None
    padded = padded_vocab_size(size.vocab_size, size.make_vocab_size_divisible_by, tensor_parallel_size)
    chunks = weight_chunks(source, size, padded, None)
    return publish_weights(root, config, chunks, lambda: tokenizer or own_tokenizer(folder), None)
