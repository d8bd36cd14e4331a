"""AdamW over megatron-core's optimizers: fp32 main weights, sharded or not, with decay decided by parameter kind."""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, ParamKey, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.optimizer import ChainedOptimizer

from megatron_steel.config.schema import Config
from megatron_steel.model.build import Model

NO_DECAY = "without_weight_decay"


def mark_parameters(model: Model, decay_embeddings: bool) -> None:
    """Mark parameters without weight decay by what they are: norms and biases (one axis), embeddings by choice."""
    for language_model in model.language_models():
        for name, parameter in language_model.named_parameters():
            vocabulary = name.startswith(("embedding.", "output_layer."))
            setattr(parameter, NO_DECAY, parameter.dim() == 1 or (vocabulary and not decay_embeddings))


def build_optimizer(config: Config, model: Model) -> ChainedOptimizer:
    """The optimizer of a model built for training; learning rate and decay are set anew at every step."""
    options, parallel = config.optimizer, config.parallel
    mark_parameters(model, options.decay_embeddings)
    settings = OptimizerConfig(
        optimizer="adam",
        lr=options.lr,
        min_lr=options.min_lr,
        weight_decay=options.weight_decay,
        adam_beta1=options.adam_beta1,
        adam_beta2=options.adam_beta2,
        adam_eps=options.adam_eps,
        clip_grad=options.clip_grad,
        bf16=config.training.bf16,
        params_dtype=torch.bfloat16 if config.training.bf16 else torch.float32,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        overlap_param_gather=parallel.overlap_param_gather,
    )
    optimizer: MegatronOptimizer = get_megatron_optimizer(
        settings, model.chunks, config_overrides={ParamKey(attr=NO_DECAY): {"wd_mult": 0.0}}
    )
    assert isinstance(optimizer, ChainedOptimizer)
    return optimizer


def set_rates(optimizer: ChainedOptimizer, lr: float, weight_decay: float) -> None:
    """Write this step's learning rate and decay into every parameter group.

    Groups restored from a checkpoint carry the values of the past; setting all of them at every step leaves no way
    for a stale one to be used.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_mult"]
        group["weight_decay"] = weight_decay * group["wd_mult"]


@torch.no_grad()
def update(optimizer: ChainedOptimizer, clip_grad: float) -> tuple[float, bool]:
    """Clip the reduced gradients and step: (global gradient norm before clipping, whether the weights moved).

    The norm is taken over all ranks, so every rank sees the same value and a norm that is not finite is skipped by
    all of them alike.
    """
    if optimizer.prepare_grads():
        return math.inf, False
    grad_norm = float(optimizer.get_grad_norm())
    if not math.isfinite(grad_norm):
        return grad_norm, False
    if clip_grad > 0.0:
        for part in optimizer.chained_optimizers:
            parameters: list[Any] = part.get_parameters()
            if parameters:
                clip_grad_by_total_norm_fp32(parameters, max_norm=clip_grad, total_norm=grad_norm)
    return grad_norm, bool(optimizer.step_with_ready_grads())
