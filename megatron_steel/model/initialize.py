"""Initial weights that do not depend on the layout.

Each parameter has its own random stream, keyed by the seed and its name in the whole model, and is drawn at its full
size; a rank keeps its share. One process and any TP x PP x VPP layout therefore start from the same model.
"""

from __future__ import annotations

import hashlib
import math
import re

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_steel.config.schema import ModelConfig

VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")
NORMS = ("norm.weight", "layer_norm_weight")
# Projections back into the residual stream start smaller by sqrt(2 * layers) (GPT-2; Radford et al. 2019, 2.3).
RESIDUAL = ("linear_proj.weight", "linear_fc2.weight")


def model_wide_name(model: GPTModel, name: str) -> str:
    """The name of a parameter in the whole model: layers and experts counted over all ranks, a tied head under the
    embedding.
    """
    if name == "output_layer.weight" and model.share_embeddings_and_output_weights:
        return "embedding.word_embeddings.weight"

    match = re.match(r"decoder\.layers\.(\d+)\.", name)
    if match is None:
        return name
    layer = model.decoder.layers[int(match.group(1))]
    name = f"decoder.layers.{layer.layer_number - 1}.{name[match.end() :]}"
    # Grouped experts are weights of one module; run one after another, they are modules.
    name = re.sub(r"\.experts\.(linear_fc[12]\.)(weight|bias)(\d+)$", r".experts.local_experts.\3.\1\2", name)
    # Each rank counts its experts from 0.
    return re.sub(r"(?<=\.local_experts\.)\d+", lambda local: str(layer.mlp.local_expert_indices[int(local[0])]), name)


def is_norm(name: str) -> bool:
    """Whether a parameter is the weight of a norm, on its own or fused into a linear layer."""
    return name.endswith(NORMS)


def rank_share(full: Tensor, axis: int, rank: int, size: int, gated: bool) -> Tensor:
    """This rank's part of a full parameter along ``axis``.

    The gated first feed-forward matrix holds gate rows, then up rows; every rank gets its share of both.
    """
    if gated:
        gate, up = full.chunk(2, 0)
        return torch.cat((gate.chunk(size, 0)[rank], up.chunk(size, 0)[rank]))
    return full.chunk(size, axis)[rank]


def draw(shape: list[int], std: float, seed: int, name: str) -> Tensor:
    """fp32 normal values of a parameter's own stream, on the CPU so that every device starts from the same numbers."""
    key = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)
    return torch.empty(shape).normal_(0.0, std, generator=generator)


def initial_value(name: str, local: Tensor, size: ModelConfig, rows: int, seed: int, group: ProcessGroup) -> Tensor:
    """The initial value of one parameter on this rank; ``rows`` is the vocabulary without padding.

    A module that knows better marks its parameter: ``initial_value``, or ``initial_std`` of a normal distribution.
    """
    if hasattr(local, "initial_value"):
        return torch.full_like(local, local.initial_value)
    if name.endswith("bias"):
        return torch.zeros_like(local)
    if is_norm(name):
        return torch.full_like(local, 0.0 if size.apply_layernorm_1p else 1.0)
    std = size.init_method_std / (math.sqrt(2 * size.num_layers) if name.endswith(RESIDUAL) else 1.0)
    std = getattr(local, "initial_std", std)
    if name == VOCABULARY[0] and size.embedding_init == "xavier":
        # Glorot and Bengio 2010, eq. 12, of the matrix without padding.
        std = math.sqrt(2 / (rows + local.shape[1]))
    if name in VOCABULARY:
        # Padding rows are zero: they are never trained and never counted in the loss.
        padded = torch.zeros(local.shape[0] * group.size(), local.shape[1])
        padded[:rows] = draw([rows, local.shape[1]], std, seed, name)
        return padded.chunk(group.size(), 0)[group.rank()]
    split = getattr(local, "tensor_model_parallel", False)
    axis = getattr(local, "partition_dim", 0) if split else 0
    shape = list(local.shape)
    if split:
        shape[axis] *= group.size()
    full = draw(shape, std, seed, name)
    # Three axes: experts, which are divided whole.
    gated = size.gated_linear_unit and local.dim() == 2 and name.endswith("linear_fc1.weight")
    return rank_share(full, axis, group.rank(), group.size(), gated) if split else full


@torch.no_grad()
def initialize_weights(model: GPTModel, size: ModelConfig, rows: int, seed: int, group: ProcessGroup) -> None:
    """Fill every parameter of one model chunk in place; ``group`` are the tensor-parallel ranks."""
    # An expert may be spread over fewer ranks than the rest.
    expert_group = parallel_state.get_expert_tensor_parallel_group()
    for local_name, parameter in model.named_parameters():
        name = model_wide_name(model, local_name)
        ranks = expert_group if ".local_experts." in name else group
        parameter.copy_(initial_value(name, parameter, size, rows, seed, ranks))
