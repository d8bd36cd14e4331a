"""Weight gradients of linear layers, added to the main gradient by the product that computes them.

Otherwise the product writes a gradient in the type of the weight, and data parallelism reads it to add it to the main
gradient: more memory traffic, and in bf16 every micro-batch's gradient is rounded to 8 bits first. megatron-core calls
Apex's CUDA extension ``fused_weight_gradient_mlp_cuda`` for it; where that is missing, the functions of the same names
here stand in. The order of the sums is another one: results differ from the unfused ones by rounding.

Shapes: T tokens, I inputs, O outputs of a layer (per rank).
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable

import torch
from megatron.core.tensor_parallel import layers
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_steel.model.output import OutputLayer
from megatron_steel.runtime import device

# What megatron-core's and Transformer Engine's layers look at in their forward pass.
SWITCHES = ("gradient_accumulation_fusion", "fuse_wgrad_accumulation")


@functools.cache
def widens(kind: str) -> bool:
    """Whether PyTorch adds a product of bf16 or fp16 matrices to an fp32 one in one go on a device of this ``kind``.

    cuBLAS does; PyTorch lets it since 2.10 (``addmm`` with an ``out_dtype`` and a sum of that type).
    """
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    return kind != "cpu" and version >= (2, 10)


def add_weight_gradient(inputs_TI: Tensor, grads_TO: Tensor, main_OI: Tensor) -> None:
    """main_OI += grads_TO.t() @ inputs_TI, in place."""
    if main_OI.dtype == inputs_TI.dtype == grads_TO.dtype:
        main_OI.addmm_(grads_TO.t(), inputs_TI)
    elif widens(main_OI.device.type) and main_OI.dtype == torch.float32:
        torch.addmm(main_OI, grads_TO.t(), inputs_TI, out_dtype=torch.float32, out=main_OI)
    else:
        main_OI.add_(grads_TO.t() @ inputs_TI)


# The names that megatron-core calls: for main gradients in fp32, and in the type of the weight.
wgrad_gemm_accum_fp32 = wgrad_gemm_accum_fp16 = add_weight_gradient


def fuse_weight_gradients(options: TransformerConfig, modules: Iterable[torch.nn.Module]) -> None:
    """Let the linear layers of ``modules``, which have main gradients, add to them.

    The output layer does not: whether it computes its weight's gradient in parts depends on the length of a
    micro-batch, and its weight may be the embedding too.
    """
    if not getattr(layers, "_grad_accum_fusion_available", False):
        layers.fused_weight_gradient_mlp_cuda = sys.modules[__name__]
    if not device.has_gpu():
        # Where it is installed, Transformer Engine's place holder of a gradient would be on a GPU.
        layers.HAVE_TE = False
    options.gradient_accumulation_fusion = True
    for module in modules:
        for part in module.modules():
            for switch in SWITCHES:
                if hasattr(part, switch) and not isinstance(part, OutputLayer):
                    setattr(part, switch, True)
