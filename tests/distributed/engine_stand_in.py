"""Stand-ins for the classes of Transformer Engine that our layers name, so that they run where there is none.

They have the names of parameters and the rules of the real ones (version 2.11): what these refuse raises here too.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.extensions import transformer_engine, transformer_engine_spec_provider
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from megatron_steel.model import build
from megatron_steel.model.norms import LayerNorm, RMSNorm, ZeroCentredRMSNorm

FP8_HISTORY = torch.zeros(4, dtype=torch.uint8)


def norm_type(config: Any) -> type:
    """Our norm that computes what Transformer Engine's would."""
    if config.normalization == "LayerNorm":
        return LayerNorm
    return ZeroCentredRMSNorm if config.layernorm_zero_centered_gamma else RMSNorm


class LayerNormLinear(ColumnParallelLinear):
    """A norm and a linear layer in one module, with Transformer Engine's names and its extra state."""

    def __init__(self, input_size: int, output_size: int, *, config: Any, **rest: Any) -> None:
        super().__init__(input_size, output_size, config=config, **rest)
        norm = norm_type(config)(config, input_size, config.layernorm_epsilon)
        for name, parameter in norm.named_parameters():
            setattr(self, f"layer_norm_{name}", parameter)
        # Not a module of this one: its parameters have the names above.
        self.__dict__["norm"] = norm

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        # Converted and loaded are these.
        for name in ("weight", "bias"):
            if hasattr(self, f"layer_norm_{name}"):
                self.norm._parameters[name] = getattr(self, f"layer_norm_{name}")
        return super().forward(self.norm(x))

    def get_extra_state(self) -> Tensor:
        return FP8_HISTORY

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        assert metadata is not None
        state = self.state_dict(prefix="", keep_vars=True)
        axes = {"weight": 0, "bias": 0}
        groups = {"tp_group": self.tp_group, "dp_cp_group": metadata["dp_cp_group"]}
        return make_sharded_tensors_for_checkpoint(state, prefix, axes, sharded_offsets, **groups)


class Attention(torch.nn.Module):
    """Attention in the formats ``sbhd`` and ``thd``."""

    def __init__(self, config: Any, layer_number: int, softmax_scale: float | None = None, **rest: Any) -> None:
        super().__init__()
        self.config, self.softmax_scale = config, softmax_scale

    def causal(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[S, N, D] and [S, G, D] -> [S, N, D]."""
        out = F.scaled_dot_product_attention(
            *(x.transpose(0, 1) for x in (query, key, value)), is_causal=True, scale=self.softmax_scale, enable_gqa=True
        )
        return out.transpose(0, 1)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        assert attention_mask is None and attention_bias is None and attn_mask_type == AttnMaskType.causal
        if packed_seq_params is None:
            rows = [self.causal(*(x[:, row] for x in (query, key, value))) for row in range(query.shape[1])]
            return torch.stack(rows, 1).flatten(2)
        assert packed_seq_params.qkv_format == "thd"
        bounds = packed_seq_params.cu_seqlens_q
        assert all(x.dim() == 3 for x in (query, key, value)) and bounds.dtype == torch.int32
        assert bounds is packed_seq_params.cu_seqlens_kv and packed_seq_params.cu_seqlens_q_padded is None
        assert (bounds.diff() <= packed_seq_params.max_seqlen_q).all() and bounds[-1] == len(query)
        sizes = bounds.diff().tolist()
        parts = zip(*(x.split(sizes) for x in (query, key, value)), strict=True)
        return torch.cat([self.causal(*part) for part in parts]).flatten(1)


class Norm:
    """The norm that the configuration asks for."""

    def __new__(cls, config: Any, hidden_size: int, eps: float = 1e-5) -> Any:
        return norm_type(config)(config, hidden_size, eps)


class Provider(LocalSpecProvider):
    """megatron-core's modules, with norms fused into the linear layers behind them."""

    def fuse_layernorm_and_linear(self) -> bool:
        return True

    def column_parallel_layer_norm_linear(self) -> type:
        return LayerNormLinear

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False) -> type:
        return Norm


def fused_rope(x: Tensor, angles: Tensor, interleaved: bool = False) -> Tensor:
    """Rotation of [S, B, N, D] by angles [S, 1, 1, R] in fp32, as Transformer Engine's kernel does it."""
    assert not interleaved and angles.dtype == torch.float32 and angles.is_contiguous()
    assert x.dim() == 4 and angles.shape[0] >= x.shape[0] and angles.shape[1:3] == (1, 1)
    turned, rest = x[..., : angles.shape[-1]].float(), x[..., angles.shape[-1] :]
    first, second = turned.chunk(2, -1)
    angles = angles[: x.shape[0]]
    out = turned * angles.cos() + torch.cat((-second, first), -1) * angles.sin()
    return torch.cat((out.to(x.dtype), rest), -1)


def fused_rope_thd(*args: Any, **rest: Any) -> Tensor:
    """The kernel that counts positions from the beginning of each document, whatever the position ids say."""
    raise AssertionError("positions of packed documents are ours")


@contextmanager
def stand_in() -> Iterator[None]:
    """All models are built of ``transformer_engine`` layers, and these are the stand-ins."""
    module = "megatron_steel.model.engine"
    replaced: list[tuple[Any, str, Any]] = [
        (transformer_engine, "TEDotProductAttention", Attention),
        (transformer_engine_spec_provider, "TESpecProvider", Provider),
        (rope_utils, "fused_apply_rotary_pos_emb", fused_rope),
        (rope_utils, "fused_apply_rotary_pos_emb_thd", fused_rope_thd),
        (build, "choose_backend", lambda name, size: ("transformer_engine", "a stand-in")),
    ]
    before = [getattr(owner, name) for owner, name, _ in replaced]
    known = sys.modules.pop(module, None)
    for owner, name, value in replaced:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for (owner, name, _), value in zip(replaced, before, strict=True):
            setattr(owner, name, value)
        sys.modules.pop(module, None)
        if known is not None:
            sys.modules[module] = known
