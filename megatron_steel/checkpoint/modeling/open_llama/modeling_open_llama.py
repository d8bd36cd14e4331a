"""Open-Llama models for transformers 5: Llama with a LayerNorm after the embedding."""

from __future__ import annotations

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import LlamaForCausalLM, LlamaModel, LlamaPreTrainedModel

from .configuration_open_llama import OpenLlamaConfig


class OpenLlamaPreTrainedModel(LlamaPreTrainedModel):
    """Initial weights: embeddings with a norm behind them are Xavier's, all else is as in Llama."""

    config: OpenLlamaConfig
    config_class = OpenLlamaConfig

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Embedding) and self.config.use_stable_embedding:
            nn.init.xavier_normal_(module.weight)


class OpenLlamaModel(OpenLlamaPreTrainedModel, LlamaModel):
    """The decoder."""

    def __init__(self, config: OpenLlamaConfig) -> None:
        super().__init__(config)
        self.embed_layer_norm = nn.LayerNorm(config.hidden_size) if config.use_stable_embedding else None
        self.post_init()

    def forward(
        self, input_ids: torch.Tensor | None = None, inputs_embeds: torch.Tensor | None = None, **kwargs: object
    ) -> BaseModelOutputWithPast:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give input_ids or inputs_embeds, not both")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if self.embed_layer_norm is not None:
            x = self.embed_layer_norm(x)
        return super().forward(inputs_embeds=x, **kwargs)


class OpenLlamaForCausalLM(OpenLlamaPreTrainedModel, LlamaForCausalLM):
    """The language model."""

    def __init__(self, config: OpenLlamaConfig) -> None:
        super().__init__(config)
        self.model = OpenLlamaModel(config)
        self.post_init()
