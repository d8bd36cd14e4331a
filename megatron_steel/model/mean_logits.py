"""The mean logit of each token over the vocabulary, which needs no logits: it is the hidden state times a mean weight.

Shapes: S sequence, B micro-batch, H hidden, V vocabulary rows on this rank.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor

from megatron_steel.model.build import Model
from megatron_steel.model.cross_entropy import first_row
from megatron_steel.model.output import OutputLayer


class MeanLogits:
    """Watches the output layer of a model, if this rank has it: mean logits of the newest micro-batch, fp32.

    They are those before a softcap. Ranks that share the vocabulary add their sums of rows, [H] each.
    """

    def __init__(self, model: Model) -> None:
        """Hooks into the last chunk of ``model``."""
        self.newest_BS: Tensor | None = None
        layer = getattr(model.language_models()[-1], "output_layer", None)
        if isinstance(layer, OutputLayer):
            layer.register_forward_pre_hook(self.see, with_kwargs=True)

    @torch.no_grad()
    def see(self, layer: OutputLayer, inputs: tuple[Tensor, ...], more: dict[str, Any]) -> None:
        """Called before the layer's forward pass with what it gets: hidden states [S, B, H], a tied weight [V, H]."""
        tied = more.get("weight")
        weight_VH = layer.weight if tied is None else tied
        rows, group = weight_VH.shape[0], layer.tp_group
        real = min(max(layer.valid_vocab - first_row(rows, group), 0), rows)
        total_H = weight_VH[:real].sum(0, dtype=torch.float32)
        if group is not None and group.size() > 1:
            torch.distributed.all_reduce(total_H, group=group)
        mean_SB = inputs[0].float() @ (total_H / layer.valid_vocab)
        if layer.sequence_parallel:
            mean_SB = gather_from_sequence_parallel_region(mean_SB, group=group)
        self.newest_BS = mean_SB.t()
