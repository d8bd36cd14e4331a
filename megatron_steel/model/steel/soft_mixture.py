"""Soft mixtures of experts as Steel-LLM has them (v1, v2, v3; Puigcerver et al. 2024), and a causal form of v3.

With x [S, d] one sample, n experts E_i of p slots each, x^ = x / |x| and phi^ = scale * phi / |phi| (each column);
a comma between weights and E(slots) is their product:

v1       y = sum_i softmax_i(x G + b) E_i(x)
v2       Z = x S;  slots = softmax over slots of Z, transposed, times x;  y = softmax over tokens of Z, E(slots)
v3       Z = x^ phi^;  slots = softmax over tokens of Z, transposed, times x^;  y = softmax over slots of Z, E(slots)
causal   as v3, but slots of token t are the softmax over the tokens up to t: every token has slots of its own

v2 and v3 let later tokens into earlier outputs. The causal form gives the last token what v3 gives it.

Experts are divided over the tensor-parallel ranks; each knows all weights of slots and sums what its experts say.
Shapes: S sequence, B micro-batch, H hidden, n experts, p slots of each, f expert width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_steel.config.families.steel import expert_width
from megatron_steel.config.schema import ModelConfig
from megatron_steel.model.packed import host_bounds
from megatron_steel.model.steel.experts import ExpertOutputs
from megatron_steel.model.steel.prefix import PrefixMeans, prefix_means, prefix_totals

# Weights of tokens in a slot are exp(Z - |scale|), at most 1 because |Z| <= |scale|. Below exp(-80) they would vanish
# in fp32, and a slot that has seen nothing else would be 0 / 0.
LEAST_EXPONENT = -80.0


class ContiguousGradient(torch.autograd.Function):
    """The same tensor, with a gradient that lies in memory as the tensor does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Nothing happens here."""
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        """A copy, if need be."""
        return grads[0].contiguous()


def for_my_experts(x: Tensor, group: ProcessGroup) -> Tensor:
    """A tensor every rank has, used by each for its own experts: its gradient is the sum over the ranks.

    megatron-core 0.16.1 sums a copy of a tensor that is not contiguous and goes on with the tensor itself.
    """
    return ContiguousGradient.apply(copy_to_tensor_model_parallel_region(x, group=group))


class Weight(torch.nn.Module):
    """A parameter under the name ``weight``."""

    def __init__(self, config: TransformerConfig, *shape: int) -> None:
        """Filled by initialize.py."""
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(shape, dtype=config.params_dtype))


class Experts(torch.nn.Module):
    """Matrices of this rank's experts: [n, 2 f, H] with gate rows first, and [n, 2 H, f] (double) or [n, H, f]."""

    def __init__(self, config: TransformerConfig, count: int, width: int, double: bool) -> None:
        """``count`` experts of inner width ``width``; ``double``: the second matrix is gated too."""
        super().__init__()
        hidden = config.hidden_size
        self.double = double
        self.linear_fc1 = Weight(config, count, 2 * width, hidden)
        self.linear_fc2 = Weight(config, count, (2 if double else 1) * hidden, width)
        for layer in (self.linear_fc1, self.linear_fc2):
            set_tensor_model_parallel_attributes(layer.weight, True, 0, 1)

    def first(self, x: Tensor) -> Tensor:
        """[..., H] -> every expert's first projections [..., n, 2 f]: one matrix product."""
        weight = self.linear_fc1.weight
        return F.linear(x, weight.flatten(0, 1)).unflatten(-1, weight.shape[:2])

    def second(self, inner: Tensor, combine: Tensor) -> Tensor:
        """First projections [..., n, 2 f] and the weight of each expert [..., n] -> their sum [..., H].

        On a GPU memory is what is scarce: the widest tensor is computed again; on a CPU it is time.
        """
        shape = combine.shape[:-1]
        flat = (inner.flatten(0, -3), combine.flatten(0, -2), self.linear_fc2.weight)
        return ExpertOutputs.apply(*flat, self.double, not inner.is_cpu).view(*shape, -1)

    def slots(self, slots: Tensor) -> Tensor:
        """Slots [B, n, p, H] through their experts -> the same shape."""
        inner = torch.einsum("bnpd,nfd->bnpf", slots, self.linear_fc1.weight)
        gate, up = inner.chunk(2, -1)
        outer = torch.einsum("bnpf,ndf->bnpd", F.silu(gate) * up, self.linear_fc2.weight)
        if not self.double:
            return outer
        gate, up = outer.chunk(2, -1)
        return F.silu(gate) * up


class SoftMixture(MegatronModule):
    """The feed-forward of a decoder layer; the form is :attr:`ModelConfig.ffn_type`."""

    reads_sequence = True
    """The decoder layer hands over the key/value cache and the bounds of packed documents."""

    def __init__(self, config: TransformerConfig, size: ModelConfig) -> None:
        """Weights are filled by initialize.py. ``ValueError`` when the ranks do not divide the experts."""
        super().__init__(config)
        self.group = parallel_state.get_tensor_model_parallel_group()
        ranks, total, hidden = self.group.size(), size.soft_experts, size.hidden_size
        if total % ranks:
            raise ValueError(f"--soft-experts {total} is not divisible by --tensor-model-parallel-size {ranks}")
        self.form, self.slots_each, self.layer_number = size.ffn_type, size.slots_per_expert, 0
        self.mine = slice(self.group.rank() * (total // ranks), (self.group.rank() + 1) * (total // ranks))
        self.experts = Experts(config, total // ranks, expert_width(size), size.mlp_type == "senet")
        dtype = config.params_dtype
        if self.form == "softmoe_v1":
            self.gating = torch.nn.Linear(hidden, total, dtype=dtype)
        elif self.form == "softmoe_v2":
            self.score = torch.nn.Parameter(torch.empty(hidden, total * self.slots_each, dtype=dtype))
            self.score.initial_std = 1.0  # type: ignore[attr-defined]
        else:
            self.phi = torch.nn.Parameter(torch.empty(hidden, total, self.slots_each, dtype=dtype))
            self.scale = torch.nn.Parameter(torch.empty(1, dtype=dtype))
            self.phi.initial_std, self.scale.initial_value = hidden**-0.5, 1.0  # type: ignore[attr-defined]

    def set_layer_number(self, layer_number: int) -> None:
        """The layer's number in the model, from 1: what its state is filed under while generating."""
        self.layer_number = layer_number

    def forward(
        self,
        hidden_states: Tensor,
        inference_context: Any = None,
        packed_seq_params: PackedSeqParams | None = None,
        **rest: Any,
    ) -> tuple[Tensor, None]:
        """hidden_states [S, B, H] (S / ranks with sequence parallelism) -> the same shape, and no bias.

        With a cache the causal form goes on from the tokens before; v2 and v3 see only what is fed, as released.
        """
        sequence_parallel = self.config.sequence_parallel
        if sequence_parallel:
            x = gather_from_sequence_parallel_region(hidden_states, group=self.group)
        else:
            x = for_my_experts(hidden_states, self.group)
        if self.form == "softmoe_v1":
            y = self.gated_mixture(x)
        elif self.form == "softmoe_causal":
            y = self.causal_mixture(x, inference_context, packed_seq_params)
        else:
            assert packed_seq_params is None, "config.check lets no packed documents through here"
            y = self.slot_mixture(x)
        y = y.contiguous()  # for the reason given in for_my_experts
        if sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(y, group=self.group), None
        return reduce_from_tensor_model_parallel_region(y, group=self.group), None

    def replicated(self, parameter: Tensor) -> Tensor:
        """A parameter every rank has."""
        return for_my_experts(parameter, self.group)

    def gated_mixture(self, x: Tensor) -> Tensor:
        """v1: every token through every expert, [S, B, H] -> [S, B, H]."""
        logits = F.linear(x, self.replicated(self.gating.weight), self.replicated(self.gating.bias))
        combine = wide(logits).softmax(-1).to(x.dtype)[..., self.mine]
        return self.experts.second(self.experts.first(x), combine)

    def slot_mixture(self, x: Tensor) -> Tensor:
        """v2 and v3 as released, [S, B, H] -> [S, B, H]; precision of each step as there."""
        x = x.transpose(0, 1)
        if self.form == "softmoe_v2":
            logits = (x @ self.replicated(self.score)).unflatten(-1, (-1, self.slots_each))
            dispatch = wide(logits).flatten(2).softmax(-1).view_as(logits)
            combine = wide(logits).softmax(1)
        else:
            x = F.normalize(x, dim=-1)
            logits = torch.einsum("bmd,dnp->bmnp", x, self.directions())
            dispatch = wide(logits).softmax(1)
            combine = wide(logits).flatten(2).softmax(-1).view_as(logits)
        dispatch, combine = (weights.to(x.dtype)[:, :, self.mine] for weights in (dispatch, combine))
        slots = torch.einsum("bmd,bmnp->bnpd", x, dispatch)
        return torch.einsum("bnpd,bmnp->mbd", self.experts.slots(slots), combine)

    def directions(self) -> Tensor:
        """phi^ [H, n, p]."""
        return self.replicated(self.scale) * F.normalize(self.replicated(self.phi), dim=0)

    def causal_mixture(self, x: Tensor, cache: Any, packed: PackedSeqParams | None) -> Tensor:
        """The causal form of v3, [S, B, H] -> [S, B, H].

        |x| divides weights instead of x, so that x^ is never made: x^ W = (x W) / |x|.
        """
        precise = torch.promote_types(x.dtype, torch.float32)
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=precise)
        inverse = length.clamp_min(1e-12).reciprocal()
        directions = self.directions()
        logits = wide(x @ directions.flatten(1)) * inverse
        combine = logits.softmax(-1).unflatten(-1, directions.shape[1:])[..., self.mine, :]
        exponents = (logits - self.scale.detach().abs()).clamp_min(LEAST_EXPONENT)
        weights = exponents.exp().unflatten(-1, directions.shape[1:])[..., self.mine, :]
        bounds = (0, x.shape[0]) if packed is None else tuple(host_bounds(packed))
        projected = self.experts.first(x)
        # Slots of one expert share its first matrix; slots are told apart by their weights.
        parts = []
        for slot in range(self.slots_each):
            weight = weights[..., slot]
            if cache is None:
                means = PrefixMeans.apply(projected, weight * inverse, prefix_totals(weight, bounds), bounds)
            else:
                means = self.go_on(projected, weight, inverse, cache, slot)
            parts.append(self.experts.second(means, combine[..., slot].to(x.dtype)))
        return sum(parts[1:], parts[0])

    def go_on(self, projected: Tensor, weight: Tensor, inverse: Tensor, cache: Any, slot: int) -> Tensor:
        """Means of tokens that follow those the cache has seen; its state is one mean and one sum for each slot."""
        states, name = cache.key_value_memory_dict, ("soft_mixture", self.layer_number, slot)
        before = states[name] if cache.sequence_len_offset > 0 else None
        totals = weight.cumsum(0) if before is None else before[1] + weight.cumsum(0)
        means, last = prefix_means(projected, weight * inverse, totals, (0, len(projected)), before)
        states[name] = (last, totals[-1])
        return means

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Experts are divided along their first axis, everything else is on every rank."""
        axes = {"experts.linear_fc1.weight": 0, "experts.linear_fc2.weight": 0}
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(keep_vars=True), prefix, axes, sharded_offsets,
            tp_group=self.group, dp_cp_group=(metadata or {})["dp_cp_group"],
        )  # fmt: skip


def wide(x: Tensor) -> Tensor:
    """At least fp32."""
    return x if x.dtype == torch.float64 else x.float()
