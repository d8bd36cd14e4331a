"""Adapters of low rank beside frozen linear layers (LoRA), one for each of Hugging Face's projections inside ours.

y = W x + scale * B A x with A [R, I] and B [O, R] (Hu et al. 2021, eq. 3). A starts random and B at zero: the model
begins as it was. Rows of B are in Hugging Face's order; :func:`fuse` brings outputs into that of the fused layer.

Tensor parallelism: where the weight's rows are divided B's are too and A is whole; where its columns are divided A's
are too and B is whole. What ranks exchange is R wide. Under sequence parallelism the whole factor sees one rank's part
of the sequence, and megatron-core sums its gradient over the ranks as it does for norms (``sequence_parallel``).

DoRA (Liu et al. 2024, eq. 5): the rows of W + scale * B A are brought to unit length, which counts as a constant in the
backward pass (4.3), and to a length that is trained.

Shapes: S sequence, B micro-batch, R rank, I inputs, O outputs of one projection (per rank).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    set_tensor_model_parallel_attributes,
)
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from megatron_steel.config.adapters import projections, scaling, short, targets
from megatron_steel.config.lora import LoraConfig
from megatron_steel.config.schema import ModelConfig

ADAPTERS = ".adapters."
"""What is in the name of every parameter of an adapter."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The adapters of one linear layer."""

    names: tuple[str, ...]
    """Projections inside the layer, in the order of their rows."""
    adapted: tuple[str, ...]
    """Those with an adapter."""
    rank: int
    scale: float
    dropout: float
    dora: bool


class Adapter(torch.nn.Module):
    """The trained weights of one projection; its layer computes with them."""

    def __init__(self, weight: Tensor, rows: int, plan: Plan, full_inputs: int, row_parallel: bool, mark: bool) -> None:
        """``weight``: the layer's, for type and device. ``mark``: the whole factor sees a part of the sequence."""
        super().__init__()
        self.lora_A = torch.nn.Parameter(weight.new_empty(plan.rank, weight.shape[1]))
        self.lora_B = torch.nn.Parameter(weight.new_empty(rows, plan.rank))
        # The variance of PEFT's uniform distribution over +-1 / sqrt(I).
        self.lora_A.initial_std = 1 / math.sqrt(3 * full_inputs)  # type: ignore[attr-defined]
        self.lora_B.initial_value = 0.0  # type: ignore[attr-defined]
        divided, whole = (self.lora_A, self.lora_B) if row_parallel else (self.lora_B, self.lora_A)
        set_tensor_model_parallel_attributes(divided, True, 1 if row_parallel else 0, 1)
        whole.sequence_parallel = mark  # type: ignore[attr-defined]
        if plan.dora:
            self.lora_magnitude = torch.nn.Parameter(weight.new_empty(rows))
            self.lora_magnitude.initial_value = 1.0  # type: ignore[attr-defined]
            if row_parallel:
                self.lora_magnitude.sequence_parallel = mark  # type: ignore[attr-defined]
            else:
                set_tensor_model_parallel_attributes(self.lora_magnitude, True, 0, 1)

    def forward(self) -> tuple[Tensor, Tensor]:
        """A and B. They must be asked for here: a call is what data parallelism waits in for updated weights."""
        return self.lora_A, self.lora_B


def widths(names: Sequence[str], config: Any, rows: int) -> list[int]:
    """Rows of each projection in a block of the fused layer: one block per key head, or one of them all."""
    if len(names) == 3:
        per_group = config.num_attention_heads // config.num_query_groups
        return [per_group * config.kv_channels, config.kv_channels, config.kv_channels]
    return [rows // len(names)] * len(names)


def fuse(parts: Sequence[Tensor], block: Sequence[int]) -> Tensor:
    """Projections side by side [..., O] -> the fused order along the last axis; ``block`` from :func:`widths`."""
    if len(parts) == 1:
        return parts[0]
    blocks = [part.unflatten(-1, (-1, width)) for part, width in zip(parts, block, strict=True)]
    return torch.cat(blocks, -1).flatten(-2)


def unfuse(fused: Tensor, block: Sequence[int]) -> list[Tensor]:
    """The inverse of :func:`fuse` along the first axis, with whatever follows it: [rows, ...] -> [O, ...] each."""
    parts = fused.unflatten(0, (-1, sum(block))).split(list(block), 1)
    return [part.flatten(0, 1) for part in parts]


class Adapted:
    """What both kinds of linear layers with adapters share."""

    off = False
    """See :func:`adapters_off`."""

    def attach(self: Any, plan: Plan, full_inputs: int, row_parallel: bool) -> None:
        """Make the adapters of a layer that megatron-core has built."""
        self.plan = plan
        self.block = widths(plan.names, self.config, self.weight.shape[0])
        blocks = self.weight.shape[0] // sum(self.block)
        self.adapters = torch.nn.ModuleDict(
            {
                name: Adapter(
                    self.weight, blocks * width, plan, full_inputs, row_parallel, self.config.sequence_parallel
                )
                for name, width in zip(plan.names, self.block, strict=True)
                if name in plan.adapted
            }
        )

    def factors(self: Any) -> tuple[list[Tensor], list[Tensor]]:
        """A and B of each adapter."""
        pairs = [adapter() for adapter in self.adapters.values()]
        return [pair[0] for pair in pairs], [pair[1] for pair in pairs]

    def reduced(self: Any, input_: Tensor, factors: list[Tensor], forked: bool) -> Tensor:
        """scale * A x of all adapters side by side, [..., R * adapters]; ``factors`` are their A.

        ``forked``: ranks hold different inputs and need other randomness.
        """
        if not (self.plan.dropout and self.training):
            narrow = F.linear(input_, torch.cat(factors) if len(factors) > 1 else factors[0])
        else:
            with get_cuda_rng_tracker().fork() if forked else nullcontext():
                inputs = [F.dropout(input_, self.plan.dropout) for _ in factors]
            narrow = torch.cat([F.linear(x, factor) for x, factor in zip(inputs, factors, strict=True)], -1)
        return narrow * self.plan.scale

    def expanded(self: Any, narrow: Tensor, factors: list[Tensor]) -> Tensor:
        """B of each adapter times its part of ``narrow`` [..., R * adapters], in the order of the fused layer."""
        inputs = narrow.split(self.plan.rank, -1)
        outputs = {
            name: F.linear(part, factor) for name, part, factor in zip(self.adapters, inputs, factors, strict=True)
        }
        blocks = self.weight.shape[0] // sum(self.block)
        parts = [
            outputs[name] if name in outputs else narrow.new_zeros(1).expand(*narrow.shape[:-1], blocks * width)
            for name, width in zip(self.plan.names, self.block, strict=True)
        ]
        return fuse(parts, self.block)

    @torch.no_grad()
    def row_norms(self: Any, row_parallel: bool) -> dict[str, Tensor]:
        """||W + scale * B A|| of each row by projection, [O] fp32, without making that matrix.

        ||W||^2 + 2 s <W, B A> + s^2 ||B A||^2, each of them a sum over columns, which ranks may share.
        """
        own = unfuse(torch.linalg.vector_norm(self.weight, dim=1, dtype=torch.float32).square(), self.block)
        squares = dict(zip(self.plan.names, own, strict=True))
        found = {}
        for name, adapter in self.adapters.items():
            position = self.plan.names.index(name)
            factor_A, factor_B = adapter.lora_A.float(), adapter.lora_B.float()
            product = unfuse(F.linear(self.weight, adapter.lora_A).float(), self.block)[position]
            cross = (product * factor_B).sum(1)
            update = ((factor_B @ (factor_A @ factor_A.t())) * factor_B).sum(1)
            total = squares[name] + 2 * self.plan.scale * cross + self.plan.scale**2 * update
            if row_parallel and self.tp_group.size() > 1:
                torch.distributed.all_reduce(total, group=self.tp_group)
            found[name] = total.clamp_(min=0).sqrt_()
        return found

    def combined(self: Any, output: Tensor, update: Tensor, row_parallel: bool) -> Tensor:
        """The layer's output with that of its adapters."""
        if not self.plan.dora:
            return output + update
        norms = self.row_norms(row_parallel)
        blocks = self.weight.shape[0] // sum(self.block)
        factors = [
            self.adapters[name].lora_magnitude / norms[name].to(output.dtype)
            if name in norms
            else output.new_ones(blocks * width)
            for name, width in zip(self.plan.names, self.block, strict=True)
        ]
        factor = fuse(factors, self.block)
        bias = None if self.skip_bias_add else self.bias
        plain = output if bias is None else output - bias
        return output + (factor - 1) * plain + factor * update

    @torch.no_grad()
    def reset_magnitudes(self: Any, row_parallel: bool) -> None:
        """Lengths of DoRA are those of the weight's rows, so that adapters begin without effect."""
        if self.plan.dora:
            for name, norms in self.row_norms(row_parallel).items():
                self.adapters[name].lora_magnitude.copy_(norms)

    def save_sharded(self: Any, axes: dict[str, int], prefix: str, offsets: Any, metadata: Any) -> dict[str, Any]:
        """The layer's and its adapters' weights for a checkpoint; ``axes`` are those of the former."""
        for name, parameter in self.adapters.named_parameters():
            if getattr(parameter, "tensor_model_parallel", False):
                axes[f"adapters.{name}"] = parameter.partition_dim
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            axes,
            offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )


class AdaptedColumnLinear(Adapted, ColumnParallelLinear):
    """megatron-core's linear layer with divided rows, and adapters."""

    def __init__(self, input_size: int, output_size: int, *, plan: Plan, **rest: Any) -> None:
        """Arguments are megatron-core's, and the adapters."""
        super().__init__(input_size, output_size, **rest)
        self.attach(plan, input_size, row_parallel=False)

    def forward(
        self, input_: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """input_ [S, B, I] (a part of S under sequence parallelism) -> [S, B, rows] of this rank, and the bias."""
        output, bias = super().forward(input_, weight, runtime_gather_output)
        if self.off:
            return output, bias
        factors_A, factors_B = self.factors()
        narrow = self.reduced(input_, factors_A, forked=False)
        if self.sequence_parallel:
            narrow = gather_from_sequence_parallel_region(narrow, group=self.tp_group)
        else:
            narrow = copy_to_tensor_model_parallel_region(narrow, group=self.tp_group)
        return self.combined(output, self.expanded(narrow, factors_B), row_parallel=False), bias

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> dict[str, Any]:
        """megatron-core's, with the adapters."""
        return self.save_sharded({"weight": 0, "bias": 0}, prefix, sharded_offsets, metadata)


class AdaptedRowLinear(Adapted, RowParallelLinear):
    """megatron-core's linear layer with divided columns, and an adapter."""

    def __init__(self, input_size: int, output_size: int, *, plan: Plan, **rest: Any) -> None:
        """Arguments are megatron-core's, and the adapter."""
        super().__init__(input_size, output_size, **rest)
        self.attach(plan, input_size, row_parallel=True)

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """input_ [S, B, I] of this rank -> [S, B, rows] (a part of S under sequence parallelism), and the bias."""
        output, bias = super().forward(input_)
        if self.off:
            return output, bias
        factors_A, factors_B = self.factors()
        narrow = self.reduced(input_, factors_A, forked=not self.sequence_parallel)
        if self.sequence_parallel:
            narrow = reduce_scatter_to_sequence_parallel_region(narrow, group=self.tp_group)
        else:
            narrow = reduce_from_tensor_model_parallel_region(narrow, group=self.tp_group)
        return self.combined(output, self.expanded(narrow, factors_B), row_parallel=True), bias

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> dict[str, Any]:
        """megatron-core's, with the adapter."""
        return self.save_sharded({"weight": 1}, prefix, sharded_offsets, metadata)


def add_adapters(layers: TransformerBlockSubmodules, lora: LoraConfig, size: ModelConfig) -> None:
    """Replace linear layers in the spec of a model by ones with adapters."""
    assert lora.lora_rank is not None
    adapted, names = targets(lora, size), projections(size)
    for layer in layers.layer_specs:
        for part, chosen in adapted.items():
            module, linear = part.split(".")
            submodules = getattr(layer.submodules, module).submodules
            before = getattr(submodules, linear)
            kind = AdaptedColumnLinear if before is ColumnParallelLinear else AdaptedRowLinear
            assert before in (ColumnParallelLinear, RowParallelLinear), before
            plan = Plan(
                names=tuple(short(name) for name in names[part]),
                adapted=chosen,
                rank=lora.lora_rank,
                scale=scaling(lora),
                dropout=lora.lora_dropout,
                dora=lora.use_dora,
            )
            setattr(submodules, linear, ModuleSpec(module=kind, params={"plan": plan}))


def reset_magnitudes(modules: Sequence[torch.nn.Module]) -> None:
    """Begin DoRA from the weights that modules have now; collective over the tensor-parallel ranks."""
    for module in modules:
        for part in module.modules():
            if isinstance(part, Adapted):
                part.reset_magnitudes(isinstance(part, AdaptedRowLinear))


@contextmanager
def adapters_off(modules: Sequence[torch.nn.Module]) -> Iterator[None]:
    """The modules as they were before adapters were added."""
    adapted = [part for module in modules for part in module.modules() if isinstance(part, Adapted)]
    for part in adapted:
        part.off = True
    try:
        yield
    finally:
        for part in adapted:
            part.off = False
