"""What comes between the token embedding and the first layer. Shapes: S positions, B rows, H hidden."""

from __future__ import annotations

from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_steel.model.norms import LayerNorm

# PyTorch's default, which Open-Llama leaves as it is; the norms of its layers have another.
STABLE_EPSILON = 1e-5


def add_stable_embedding(model: GPTModel, options: TransformerConfig) -> None:
    """Put a LayerNorm with a bias between the lookup and its dropout (Dettmers et al. 2022, arXiv:2110.02861)."""
    norm = LayerNorm(options, options.hidden_size, STABLE_EPSILON)
    model.embedding.layer_norm = norm

    def normalise(words: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """[B, S, H], or this rank's part [S / TP, B, H] under sequence parallelism."""
        return norm(output)

    # megatron-core does lookup, scattering and dropout in one function; the lookup's output is already scattered.
    model.embedding.word_embeddings.register_forward_hook(normalise)
