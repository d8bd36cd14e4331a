"""Configuration of Open-Llama models: Llama's, and what is done with the embedding."""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig


class OpenLlamaConfig(LlamaConfig):
    """use_stable_embedding: a LayerNorm after the embedding. shared_input_output_embedding: it is the head, too.

    Other defaults are those of the published class; its dropout and its memory-efficient attention change no result.
    """

    model_type = "open-llama"
    vocab_size: int = 100_000
    use_stable_embedding: bool = True
    shared_input_output_embedding: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        self.tie_word_embeddings = self.tie_word_embeddings or self.shared_input_output_embedding
        super().__post_init__(**kwargs)
