"""Keys and values of the tokens fed so far, and what a model needs to be fed token by token.

Shapes: S sequence, B rows (texts), G key/value heads, D head width (per rank), K columns fed so far.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megatron_steel.model.attention import TorchDotProductAttention
from megatron_steel.model.build import Model
from megatron_steel.model.fully_sharded import FullyShardedModel
from megatron_steel.model.layer import DecoderLayer
from megatron_steel.runtime.world import World

SEQUENCE_PARALLEL = ("sequence_parallel", "scatter_to_sequence_parallel", "reduce_scatter_embeddings")
"""What megatron-core's modules and configurations call it."""


class KeyValueCache(StaticInferenceContext):
    """megatron-core's cache with rows that may begin later than others, and that can be chosen among.

    Shorter texts are moved to the right, so that all rows end in the same column: attention with relative positions
    is the same wherever a text begins, as long as nobody sees the columns before it.
    """

    def __init__(self, lengths: list[int], columns: int, device: torch.device) -> None:
        """Room for ``columns``, for texts of these lengths that end in the same column."""
        super().__init__(len(lengths), columns)
        missing = [max(lengths) - length for length in lengths]
        self.padding_B = torch.tensor(missing, device=device)
        self.padded = any(missing)

    def positions(self, length: int) -> Tensor:
        """Position of each row's next ``length`` columns in its own text, int64 [B, length]; 0 before it."""
        columns = self.sequence_len_offset + torch.arange(length, device=self.padding_B.device)
        return (columns - self.padding_B.unsqueeze(1)).clamp_(min=0)

    def padding(self, length: int) -> Tensor | None:
        """bool [B, K], true in columns before a row's text, with ``length`` more fed; None where there are none."""
        if not self.padded:
            return None
        columns = torch.arange(self.sequence_len_offset + length, device=self.padding_B.device)
        return columns < self.padding_B.unsqueeze(1)

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keep a layer's new keys and values [S, B, G, D]; all of them so far, [K, B, G, D]."""
        if layer not in self.key_value_memory_dict:
            # A row's columns lie side by side, as attention reads them.
            room = (
                x.new_empty(x.shape[1], self.max_sequence_length, *x.shape[2:]).transpose(0, 1) for x in (key, value)
            )
            self.key_value_memory_dict[layer] = tuple(room)
        begin, end = self.sequence_len_offset, self.sequence_len_offset + key.shape[0]
        keys, values = self.key_value_memory_dict[layer]
        keys[begin:end], values[begin:end] = key, value
        return keys[:end], values[:end]

    def choose_rows(self, rows: Tensor) -> None:
        """Go on with these rows, int64; one may be there several times, or no longer."""
        for name, state in self.key_value_memory_dict.items():
            # Layers are numbers; whatever else keeps a state has a name of its own, and rows first.
            if isinstance(name, int):
                kept = tuple(part.transpose(0, 1).index_select(0, rows).transpose(0, 1) for part in state)
            else:
                kept = tuple(part.index_select(0, rows) for part in state)
            self.key_value_memory_dict[name] = kept
        self.padding_B = self.padding_B[rows]
        self.max_batch_size = len(rows)


def takes_padding(model: Model, world: World) -> bool:
    """Whether rows of different lengths can be fed at once: all attention is ours and nothing else mixes tokens.

    Collective over the pipeline stages, whose layers may differ.
    """
    takes = model.options.moe_expert_capacity_factor is None
    for language_model in model.language_models():
        rotary = getattr(language_model, "rotary_pos_emb", None)
        size = getattr(rotary, "size", None)
        # Its frequencies depend on the length of the whole sequence.
        takes &= not (size is not None and size.use_rope_scaling and size.rope_scaling_type == "dynamic")
        for layer in language_model.decoder.layers:
            takes &= type(layer) in (TransformerLayer, DecoderLayer)
            takes &= isinstance(layer.self_attention.core_attention, TorchDotProductAttention)
            takes &= not getattr(layer.mlp, "reads_sequence", False)
    if world.pipeline_size == 1:
        return takes
    agreed = torch.tensor(int(takes), device=world.device)
    torch.distributed.all_reduce(agreed, torch.distributed.ReduceOp.MIN, group=world.pipeline_group)
    return bool(agreed)


def check_layout(model: Model, world: World) -> None:
    """``ValueError`` on a layout that cannot generate."""
    reasons = [
        (world.context_size > 1, "--context-parallel-size 1"),
        (world.expert_size > 1, "--expert-model-parallel-size 1"),
        (len(model.chunks) > 1, "no virtual pipeline stages"),
        (isinstance(model.chunks[0], FullyShardedModel), "no --use-torch-fsdp2"),
    ]
    for wrong, wish in reasons:
        if wrong:
            raise ValueError(f"generating text needs {wish}: one token at a time cannot be divided like that")


@contextmanager
def feeding(model: Model) -> Iterator[None]:
    """A model that is fed a few tokens at a time, in evaluation mode and without sequence parallelism; as before after.

    It may be in the middle of training. Collective over the replicas where weights still have to be gathered.
    """
    model.gather_parameters()
    modes, fp8 = [chunk.training for chunk in model.chunks], model.options.fp8
    modules = [module for chunk in model.chunks for module in chunk.modules()]
    configs = {id(module.config): module.config for module in modules if hasattr(module, "config")}
    owners = [
        (owner, name)
        for owner in [*modules, *configs.values()]
        for name in SEQUENCE_PARALLEL
        if getattr(owner, name, None) is True and model.options.sequence_parallel
    ]
    try:
        for chunk in model.chunks:
            chunk.eval()
        for owner, name in owners:
            setattr(owner, name, False)
        # FP8 multiplies tokens in multiples of 16.
        model.options.fp8 = None
        yield
    finally:
        for owner, name in owners:
            setattr(owner, name, True)
        model.options.fp8 = fp8
        for language_model in model.language_models():
            language_model.set_input_tensor(None)
        for chunk, mode in zip(model.chunks, modes, strict=True):
            chunk.train(mode)
