"""Steel models for transformers 5: Qwen2 with a double SwiGLU or a soft mixture of experts as feed-forward.

softmoe_v2 and softmoe_v3 are Steel-LLM's: their slots are filled by all tokens that are fed at once, so a token reaches
earlier outputs, and with a cache each new token is alone. softmoe_v1 and softmoe_causal do neither. Padding tokens take
part in slots: feed prompts of one length. The state of softmoe_causal is kept with the cache, in the order of its rows:
choose one continuation per prompt (greedy or sampled), not beams.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import Cache
from transformers.models.qwen2.modeling_qwen2 import (
    Qwen2DecoderLayer,
    Qwen2ForCausalLM,
    Qwen2Model,
    Qwen2PreTrainedModel,
)

from .configuration_steel import SteelConfig


def linear(inputs: int, outputs: int) -> nn.Linear:
    """A projection without a bias."""
    return nn.Linear(inputs, outputs, bias=False)


class SwiGLU(nn.Module):
    """(silu(x Wg) * (x Wu)) Wd."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = linear(hidden, width), linear(hidden, width)
        self.down_proj = linear(width, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DoubleSwiGLU(nn.Module):
    """silu(h Wgd) * (h Wd) with h = silu(x Wgu) * (x Wu)."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate_up_proj, self.up_proj = linear(hidden, width), linear(hidden, width)
        self.gate_down_proj, self.down_proj = linear(width, hidden), linear(width, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = F.silu(self.gate_up_proj(x)) * self.up_proj(x)
        return F.silu(self.gate_down_proj(inner)) * self.down_proj(inner)


def feed_forward(config: SteelConfig, soft: bool) -> nn.Module:
    """The feed-forward by itself, or one expert."""
    narrow = config.intermediate_size // config.mlp_div_ratio
    if config.mlp_type == "senet":
        return DoubleSwiGLU(config.hidden_size, narrow)
    return SwiGLU(config.hidden_size, narrow if soft else config.intermediate_size)


class SteelMixture(nn.Module):
    """A soft mixture of experts. Shapes: B rows, L tokens, d channels, n experts of p slots."""

    def __init__(self, config: SteelConfig) -> None:
        super().__init__()
        self.form, n, p, d = config.FFN_type, config.n_experts, config.slots_per_expert, config.hidden_size
        self.slots_each = p
        self.experts = nn.ModuleList(feed_forward(config, True) for _ in range(n))
        if self.form == "softmoe_v1":
            self.gating = nn.Linear(d, n)
        elif self.form == "softmoe_v2":
            self.score = nn.Parameter(torch.empty(d, n * p))
        else:
            self.phi, self.scale = nn.Parameter(torch.empty(d, n, p)), nn.Parameter(torch.empty(1))

    def forward(self, x: torch.Tensor, state: dict | None = None) -> torch.Tensor:
        """x [B, L, d] -> the same; ``state``: what the causal form knows of earlier tokens, brought up to date here."""
        if self.form == "softmoe_v1":
            share = self.gating(x).softmax(-1, dtype=torch.float32).to(x.dtype)
            return sum(expert(x) * share[..., i, None] for i, expert in enumerate(self.experts))
        if self.form == "softmoe_v2":
            logits = x @ self.score
            dispatch, combine = logits.softmax(-1, dtype=torch.float32), logits.softmax(1, dtype=torch.float32)
        else:
            x = F.normalize(x, dim=-1)
            logits = x @ (self.scale * F.normalize(self.phi, dim=0)).flatten(1)
            dispatch, combine = logits.softmax(1, dtype=torch.float32), logits.softmax(-1, dtype=torch.float32)
        combine = combine.to(x.dtype)
        if self.form == "softmoe_causal":
            weights = (logits.float() - self.scale.detach().float().abs()).clamp_min(-80.0).exp()
            return self.over_prefixes(x, weights, combine, {} if state is None else state)
        slots = dispatch.to(x.dtype).transpose(1, 2) @ x
        filled = slots.split(self.slots_each, dim=1)
        return combine @ torch.cat([expert(part) for expert, part in zip(self.experts, filled, strict=True)], dim=1)

    def over_prefixes(self, x: torch.Tensor, weights: torch.Tensor, combine: torch.Tensor, state: dict) -> torch.Tensor:
        """Each token's slots are means over the tokens up to it, weights [B, L, n p]."""
        y = torch.zeros_like(x)
        for slot in range(weights.shape[-1]):
            weight = weights[..., slot, None]
            numerator, total = (weight * x.float()).cumsum(1), weight.cumsum(1)
            if slot in state:
                numerator, total = numerator + state[slot][0], total + state[slot][1]
            state[slot] = (numerator[:, -1:], total[:, -1:])
            mean = (numerator / total).to(x.dtype)
            y = y + combine[..., slot, None] * self.experts[slot // self.slots_each](mean)
        return y


class SteelDecoderLayer(Qwen2DecoderLayer):
    """Qwen2's layer with Steel's feed-forward, which may have a state beside the key/value cache."""

    def __init__(self, config: SteelConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.layer_idx, self.soft = layer_idx, config.FFN_type != "raw"
        self.mlp = SteelMixture(config) if self.soft else feed_forward(config, False)

    def forward(
        self, hidden_states: torch.Tensor, past_key_values: Cache | None = None, **kwargs: object
    ) -> torch.Tensor:
        states: dict | None = None
        if self.soft and past_key_values is not None:
            # Before the attention: afterwards the cache counts the new tokens too.
            fresh = past_key_values.get_seq_length(self.layer_idx) == 0
            everything = vars(past_key_values).setdefault("steel_states", {})
            states = everything.setdefault(self.layer_idx, {})
            if fresh:
                states.clear()
        attended, _ = self.self_attn(
            hidden_states=self.input_layernorm(hidden_states), past_key_values=past_key_values, **kwargs
        )
        hidden_states = hidden_states + attended
        normed = self.post_attention_layernorm(hidden_states)
        return hidden_states + (self.mlp(normed, states) if self.soft else self.mlp(normed))


class SteelPreTrainedModel(Qwen2PreTrainedModel):
    """Initial weights of what Qwen2 does not have."""

    config: SteelConfig
    config_class = SteelConfig
    _no_split_modules = ["SteelDecoderLayer"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, SteelMixture):
            for name, std in (("score", 1.0), ("phi", self.config.hidden_size**-0.5)):
                if hasattr(module, name) and not getattr(getattr(module, name), "_is_hf_initialized", False):
                    getattr(module, name).normal_(0.0, std)
            if hasattr(module, "scale") and not getattr(module.scale, "_is_hf_initialized", False):
                module.scale.fill_(1.0)


class SteelModel(SteelPreTrainedModel, Qwen2Model):
    """The decoder."""

    def __init__(self, config: SteelConfig) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList(SteelDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.post_init()


class SteelForCausalLM(SteelPreTrainedModel, Qwen2ForCausalLM):
    """The language model."""

    def __init__(self, config: SteelConfig) -> None:
        super().__init__(config)
        self.model = SteelModel(config)
        self.post_init()
