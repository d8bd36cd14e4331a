"""The double SwiGLU of Steel-LLM, which calls it SENet: gates in front of and behind the inner width.

h = silu(x Wgu) * (x Wu),  y = silu(h Wgd) * (h Wd): four matrices of equal size, no bias.
"""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.mlp import MLPSubmodules, apply_swiglu_sharded_factory
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_steel.config.families.steel import expert_width
from megatron_steel.config.schema import ModelConfig
from megatron_steel.model.mlp import swiglu


class DoubleSwiGLU(MegatronModule):
    """``linear_fc1`` [2 f, H] holds Wgu and Wu, ``linear_fc2`` [2 H, f] Wgd and Wd.

    The second gate is no linear function: outputs of the ranks, which each know a part of h, are summed before it.
    """

    def __init__(self, config: TransformerConfig, submodules: MLPSubmodules, size: ModelConfig) -> None:
        """``submodules`` are a backend's linear layers."""
        super().__init__(config)
        width, hidden = expert_width(size), size.hidden_size
        common: dict[str, Any] = {"config": config, "init_method": config.init_method, "bias": False}
        common |= {"skip_bias_add": True, "is_expert": False}
        self.linear_fc1 = build_module(
            submodules.linear_fc1, hidden, 2 * width, gather_output=False, tp_comm_buffer_name="fc1", stride=2, **common
        )
        self.linear_fc2 = build_module(
            submodules.linear_fc2, width, 2 * hidden, input_is_parallel=True, tp_comm_buffer_name="fc2", **common
        )

    def forward(self, hidden_states: Tensor, **rest: Any) -> tuple[Tensor, None]:
        """hidden_states [S, B, H] -> the same shape, and no bias."""
        inner, _ = self.linear_fc1(hidden_states)
        outer, _ = self.linear_fc2(swiglu(inner))
        return swiglu(outer), None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Gate and up rows of the first matrix are divided each; the second one's columns are."""
        first = self.linear_fc1.sharded_state_dict(f"{prefix}linear_fc1.", sharded_offsets, metadata)
        weight = f"{prefix}linear_fc1.weight"
        first[weight] = apply_swiglu_sharded_factory(first[weight], sharded_offsets)
        return first | self.linear_fc2.sharded_state_dict(f"{prefix}linear_fc2.", sharded_offsets, metadata)
