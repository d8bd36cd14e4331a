"""Megatron-LM's own ``torch_dist`` checkpoints of GPT models: sizes from the arguments they hold, tensors by key.

Tensor keys are megatron-core's, so they are ours; layers lie stacked under one key or each under its own. Optimizer,
random state and Transformer Engine's extra state are left where they are. Nothing pickled is run.
"""

from __future__ import annotations

import argparse
import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_steel.checkpoint.converted import piece_chunk, publish_weights
from megatron_steel.checkpoint.dcp_read import StoredTensors
from megatron_steel.checkpoint.files import TRACKER
from megatron_steel.checkpoint.hf_map import Piece, pieces
from megatron_steel.config.check import padded_vocab_size
from megatron_steel.config.families import FAMILIES
from megatron_steel.config.family import ANY, SWITCHES, Family
from megatron_steel.config.load import apply
from megatron_steel.config.schema import Config, ModelConfig
from megatron_steel.model.initialize import VOCABULARY
from megatron_steel.text.tokenizer import Tokenizer

COMMON = "common.pt"
MODEL = ("embedding.", "decoder.", "output_layer.", "mtp.")
EXTRA_STATE = "_extra_state"
# Arguments with the name and the meaning of our fields.
SAME = (
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "kv_channels", "max_position_embeddings",
    "position_embedding_type", "rotary_base", "rotary_percent", "use_rope_scaling", "rope_scaling_factor",
    "normalization", "norm_epsilon", "apply_layernorm_1p", "add_bias_linear", "add_qkv_bias", "qk_layernorm",
    "softmax_scale", "untie_embeddings_and_output_weights", "init_method_std", "make_vocab_size_divisible_by",
)  # fmt: skip
# Names some of them have in newer versions.
NEWER = {"norm_epsilon": "layernorm_epsilon", "apply_layernorm_1p": "layernorm_zero_centered_gamma"}
# The same for a mixture of experts.
SAME_EXPERTS = (
    "num_experts", "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size", "moe_router_topk",
    "moe_router_score_function", "moe_router_pre_softmax", "moe_router_topk_scaling_factor",
    "moe_router_enable_expert_bias", "moe_router_num_groups", "moe_router_group_topk",
)  # fmt: skip
# Arguments that change what a model computes, with the values that do not.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "moe_expert_capacity_factor": (None,),
    "moe_apply_probs_on_input": (None, False),
    "moe_shared_expert_gate": (None, False),
    "moe_latent_size": (None,),
    "multi_latent_attention": (None, False),
    "squared_relu": (None, False),
    "quick_geglu": (None, False),
    "openai_gelu": (None, False),
    "rotary_interleaved": (None, False),
    "rotary_seq_len_interpolation_factor": (None, 1),
    "window_attn_skip_freq": (None,),
    "no_rope_freq": (None,),
    "qk_l2_norm": (None, False),
    "softmax_type": (None, "vanilla"),
    "attention_output_gate": (None, False),
    "glu_linear_offset": (None, 0.0),
    "activation_func_clamp_value": (None,),
    "experimental_attention_variant": (None,),
    "mtp_num_layers": (None, 0),
    "is_hybrid_model": (None, False),
    "heterogeneous_layers_config_path": (None,),
    "heterogeneous_layers_config_encoded_json": (None,),
    "spec": (None,),
}
# Other names of a norm: with a linear layer that has none of its own, and before a mixture of experts.
OTHER_NAMES = (
    ("self_attention.linear_qkv.layer_norm_", "input_layernorm."),
    ("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm."),
    ("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_"),
)


class Unknown:
    """What stands in for every object of the arguments that is no plain value."""

    def __new__(cls, *args: Any, **named: Any) -> Unknown:
        """Takes whatever the pickle hands over."""
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        """Keeps nothing."""

    def __repr__(self) -> str:
        return "an object"


class ArgumentsUnpickler(pickle.Unpickler):
    """Reads ``common.pt`` without its code: plain values, ``argparse.Namespace``, and :class:`Unknown` for the rest."""

    def find_class(self, module: str, name: str) -> Any:
        """A class that does nothing when it is called, but for the two that hold values."""
        return {"argparse.Namespace": argparse.Namespace, "collections.OrderedDict": OrderedDict}.get(
            f"{module}.{name}", Unknown
        )

    def persistent_load(self, pid: Any) -> Any:
        """Storages of tensors are not read."""
        return Unknown()


def find_iteration(root: Path, step: int | None) -> Path:
    """The ``iter_*`` directory to import; ``root`` may be one itself. ``ValueError`` says what is missing."""
    if (root / ".metadata").is_file():
        return root
    if step is not None:
        directory = root / f"iter_{step:07d}"
    else:
        tracker = root / TRACKER
        text = tracker.read_text(errors="replace").strip() if tracker.is_file() else ""
        if not (text.isdigit() or text == "release"):
            raise ValueError(f"--load {root}: {TRACKER} is missing or names no iteration; give --ckpt-step")
        directory = root / (text if text == "release" else f"iter_{int(text):07d}")
    if list(directory.glob("mp_rank_*")):
        raise ValueError(f"{directory}: a checkpoint of --ckpt-format torch; save it with --ckpt-format torch_dist")
    if not (directory / ".metadata").is_file():
        raise ValueError(f"{directory}: holds no torch_dist checkpoint (no .metadata)")
    return directory


def read_arguments(directory: Path) -> dict[str, Any]:
    """Megatron-LM's arguments in a checkpoint; ``ValueError`` when there are none."""
    path = directory / COMMON
    try:
        with zipfile.ZipFile(path) as archive:
            name = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
            with archive.open(name) as stream:
                common = ArgumentsUnpickler(stream).load()
    # A damaged pickle may raise nearly anything.
    except (OSError, EOFError, StopIteration, zipfile.BadZipFile, pickle.PickleError, ValueError, TypeError,
            AttributeError, IndexError, KeyError) as error:  # fmt: skip
        raise ValueError(f"{path}: not readable ({error})") from error
    arguments = common.get("args") if isinstance(common, dict) else None
    if not isinstance(arguments, argparse.Namespace):
        raise ValueError(f"{path}: holds no arguments of Megatron-LM")
    return vars(arguments)


def sizes_from_arguments(arguments: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """Our fields; ``ValueError`` names an argument this engine would compute differently."""
    for name, values in NEUTRAL.items():
        if arguments.get(name) not in values:
            raise ValueError(f"{origin}: {name} {arguments[name]!r} is not supported")
    arguments = {**arguments, **{old: arguments[new] for old, new in NEWER.items() if new in arguments}}
    sizes = {name: arguments[name] for name in SAME if arguments.get(name) is not None}
    for name in ("num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size", "norm_epsilon"):
        if name not in sizes:
            raise ValueError(f"{origin}: {name} is missing")
    if arguments.get("group_query_attention"):
        sizes["num_query_groups"] = arguments["num_query_groups"]
    if arguments.get("num_experts"):
        sizes |= {name: arguments[name] for name in SAME_EXPERTS if arguments.get(name) is not None}
        if sizes.get("moe_ffn_hidden_size") == sizes["ffn_hidden_size"]:
            del sizes["moe_ffn_hidden_size"]  # Mixtral has one width
        every = arguments.get("moe_layer_freq", 1)
        pattern = [int(i % every == 0) for i in range(sizes["num_layers"])] if isinstance(every, int) else list(every)
        sizes["moe_layer_freq"] = [] if all(pattern) else pattern
    gated = bool(arguments.get("swiglu"))
    # Megatron-LM's fused GELU with bias, the default, is the tanh form, the one that is not fused the exact form.
    plain = "gelu_tanh" if arguments.get("bias_gelu_fusion") else "gelu"
    window = arguments.get("window_size")
    return sizes | {
        "rotary_base": float(sizes.get("rotary_base", 10000)),
        "rope_scaling_factor": float(sizes.get("rope_scaling_factor", 8)),
        "gated_linear_unit": gated,
        "activation": "silu" if gated else plain,
        "window_size": window[0] + 1 if window else None,
    }


def misfit(family: Family, size: ModelConfig) -> str | None:
    """The first switch whose value a family does not have."""
    default = ModelConfig()
    for name in SWITCHES:
        allowed = family.switches.get(name, (getattr(default, name),))
        if allowed is not ANY and getattr(size, name) not in allowed:
            return f"{name} {getattr(size, name)}"
    return None


def choose_family(size: ModelConfig, wish: str | None, origin: str) -> str:
    """The family asked for, or the first that has the model's switches; ``ValueError`` when none has."""
    if wish is not None and wish not in FAMILIES:
        raise ValueError(f"--model-family {wish}: must be one of {', '.join(FAMILIES)}")
    reasons = {name: misfit(FAMILIES[name], size) for name in ([wish] if wish else FAMILIES)}
    for name, reason in reasons.items():
        if reason is None:
            return name
    if wish:
        raise ValueError(f"{origin}: --model-family {wish} has no {reasons[wish]}")
    raise ValueError(f"{origin}: no family has this combination; llama has no {reasons['llama']}, for one")


class MegatronWeights:
    """The tensors of a Megatron-LM checkpoint, one piece of ours at a time."""

    def __init__(self, directory: Path) -> None:
        self.stored = StoredTensors(directory)
        self.used: set[str] = set()

    def places(self, piece: Piece) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Where a piece may be: (key, index along its first axes)."""
        names = [piece.key]
        for ours, theirs in OTHER_NAMES:
            names += [piece.key.replace(ours, theirs)] if ours in piece.key else []
        for name in names:
            yield name, piece.index
            if piece.index and name.startswith("decoder.layers."):
                yield name.replace("decoder.layers.", f"decoder.layers.{piece.index[0]}."), piece.index[1:]

    def find(self, piece: Piece) -> tuple[list[str], tuple[int, ...]]:
        """Keys that hold a piece, to be joined, and its index in each; ``ValueError`` when it is not there."""
        for key, index in self.places(piece):
            # Gate and up projection under keys of their own, as newer versions may write them.
            for keys in ([key], [f"{key}_w", f"{key}_v"]):
                if all(part in self.stored.tensors for part in keys):
                    self.used.update(keys)
                    return keys, index
        raise ValueError(f"{self.stored.directory}: holds no tensor {piece.key}")

    def facts(self, piece: Piece) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and precision of a piece."""
        keys, index = self.find(piece)
        facts = [self.stored.facts(key) for key in keys]
        shape = tuple(facts[0].size[len(index) :])
        return (len(keys) * shape[0], *shape[1:]), facts[0].properties.dtype

    def read(self, piece: Piece) -> Tensor:
        """A piece."""
        keys, index = self.find(piece)
        parts = [self.stored.read(key, index) for key in keys]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def left_over(self) -> list[str]:
        """Keys of the model that nobody asked for."""
        keys = (key for key in self.stored.tensors if key.startswith(MODEL) and EXTRA_STATE not in key)
        return sorted(set(keys) - self.used)


def with_rows(whole: Tensor, rows: int, padded: int) -> Tensor:
    """An embedding or output layer with other padding: zero rows, as everywhere here."""
    return torch.cat((whole[:rows], whole.new_zeros(padded - rows, *whole.shape[1:])))


def import_megatron(
    root: Path,
    save: Path,
    *,
    step: int | None = None,
    family: str | None = None,
    vocab_size: int | None = None,
    tokenizer: Tokenizer | None = None,
    tensor_parallel_size: int = 1,
) -> Path:
    """Write a Megatron-LM checkpoint as one of ours, weights only; returns its directory.

    ``vocab_size`` is the number of rows without padding; the tokenizer's when left out, all rows without one. Raises
    ``ValueError`` for whatever is missing or not supported; nothing is written then.
    """
    directory = find_iteration(root, step)
    origin = str(directory / COMMON)
    arguments = read_arguments(directory)
    source = MegatronWeights(directory)
    stored_rows = source.stored.facts(VOCABULARY[0]).size[0]
    rows = vocab_size or (tokenizer.vocab_size if tokenizer else stored_rows)
    if rows > stored_rows:
        raise ValueError(f"--vocab-size {rows}: {directory} has {stored_rows} rows, padding included")
    config = Config()
    apply(config, sizes_from_arguments(arguments, origin) | {"vocab_size": rows}, origin)
    size = config.size
    apply(config, {"model_family": choose_family(size, family, origin)}, origin)
    padded = padded_vocab_size(rows, size.make_vocab_size_divisible_by, tensor_parallel_size)

    def read(piece: Piece) -> Tensor:
        whole = source.read(piece)
        return with_rows(whole, rows, padded) if piece.key in VOCABULARY else whole

    chunks = []
    for piece in pieces(size):
        shape, dtype = source.facts(piece)
        if piece.key not in VOCABULARY and math.prod(shape) != sum(map(math.prod, piece.shapes)):
            raise ValueError(f"{directory}: {piece.key} is {shape}, not what the arguments say")
        chunks.append(piece_chunk(piece, padded, dtype, partial(read, piece)))
    if left := source.left_over():
        raise ValueError(f"{directory}: tensors --model-family {size.model_family} does not have: {left[0]}")
    return publish_weights(save, config, chunks, lambda: tokenizer, None)
