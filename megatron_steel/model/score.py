"""The output of a reward model: one number per token instead of logits.

What transformers' sequence classification has with one label: a linear layer without bias on the last hidden states,
whose value at the last token of a text is the text's (Ouyang et al. 2022, arXiv:2203.02155, section 3.5).

Shapes: S sequence, B micro-batch, H hidden.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.distributed import ProcessGroup


class ScoreLayer(torch.nn.Module):
    """Scores of tokens; the weight [1, H] is whole on every tensor-parallel rank."""

    def __init__(self, options: TransformerConfig, group: ProcessGroup) -> None:
        """``group``: the tensor-parallel ranks, which share the sequence out under sequence parallelism."""
        super().__init__()
        self.group, self.sequence_parallel = group, options.sequence_parallel
        self.weight = torch.nn.Parameter(torch.empty(1, options.hidden_size, dtype=options.params_dtype))
        # Each rank sees a part of the sequence: megatron-core sums the gradient over the ranks, as it does for norms.
        self.weight.sequence_parallel = options.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden_SBH: Tensor) -> Tensor:
        """hidden_SBH (a part of S under sequence parallelism) -> fp32 scores [B, S] of all S, the same on all ranks.

        Products are fp32 in any precision of the model: 8 bits would make different answers equally good.
        """
        scores_SB = F.linear(hidden_SBH.float(), self.weight.float()).squeeze(-1)
        if self.sequence_parallel:
            # All ranks go on with the same scores: each needs its own part of the gradient, not a sum.
            scores_SB = gather_from_sequence_parallel_region(
                scores_SB, tensor_parallel_output_grad=False, group=self.group
            )
        return scores_SB.transpose(0, 1).contiguous()


def set_score_layer(model: GPTModel, options: TransformerConfig, group: ProcessGroup) -> None:
    """Replace the output layer that megatron-core has built, before weights are drawn."""
    del model.output_layer
    model.score = ScoreLayer(options, group)
