"""What comes between the token embedding and the first layer.

Shapes: S positions, B rows, H hidden.
"""

from __future__ import annotations

import math

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_steel.config.schema import ModelConfig
from megatron_steel.model.norms import LayerNorm

# PyTorch's default, which Open-Llama leaves as it is beside RMSNorms with another; BLOOM's is like its other norms.
STABLE_EPSILON = 1e-5


def add_stable_embedding(model: GPTModel, size: ModelConfig, options: TransformerConfig) -> None:
    """Put a LayerNorm with a bias between the lookup and its dropout (Dettmers et al. 2022, arXiv:2110.02861)."""
    epsilon = size.norm_epsilon if size.normalization == "LayerNorm" else STABLE_EPSILON
    norm = LayerNorm(options, size.hidden_size, epsilon)
    model.embedding.layer_norm = norm

    def normalise(words: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """[B, S, H], or this rank's part [S / TP, B, H] under sequence parallelism."""
        return norm(output)

    # megatron-core does lookup, scattering and dropout in one function; the lookup's output is already scattered.
    model.embedding.word_embeddings.register_forward_hook(normalise)


def add_embedding_scale(model: GPTModel, hidden_size: int) -> None:
    """Multiply what is looked up by the root of the width, rounded to the precision of the weight (Gemma).

    A head that shares the weight does not see it.
    """

    def scale(words: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """[B, S, H], or this rank's part [S / TP, B, H] under sequence parallelism."""
        return output * torch.tensor(math.sqrt(hidden_size)).to(output.dtype).item()

    model.embedding.word_embeddings.register_forward_hook(scale)
