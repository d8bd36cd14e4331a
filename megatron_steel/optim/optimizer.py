"""AdamW over megatron-core's optimizers: fp32 main weights, sharded or not, with decay decided by parameter kind."""

from __future__ import annotations

import math

import torch
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, ParamKey, get_megatron_optimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer
from torch import Tensor

from megatron_steel.config.check_precision import compute_type
from megatron_steel.config.schema import Config
from megatron_steel.config.schema import OptimizerConfig as OptimizerOptions
from megatron_steel.model.build import Model
from megatron_steel.model.fully_sharded import is_sharded
from megatron_steel.optim.fully_sharded import shard_optimizer
from megatron_steel.optim.host_adamw import allow_loading, keep_moments_on_host
from megatron_steel.optim.loss_scale import add_loss_scale, move_scale
from megatron_steel.runtime import device

NO_DECAY = "without_weight_decay"
NORM_ROW = 4096
# Added to the norm that gradients are divided by; Megatron-LM's, so that curves can be laid over each other.
NORM_EPSILON = 1e-6


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
        # Without fp32 weights of its own megatron-core's optimizer is the one for fp32, whatever type the model has.
        bf16=config.training.bf16 and not (config.training.pure_bf16 or parallel.use_torch_fsdp2),
        fp16=config.training.fp16,
        params_dtype=getattr(torch, compute_type(config.training)),
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        overlap_param_gather=parallel.overlap_param_gather,
    )
    optimizer: MegatronOptimizer = get_megatron_optimizer(
        settings, model.chunks, config_overrides={ParamKey(attr=NO_DECAY): {"wd_mult": 0.0}}
    )
    assert isinstance(optimizer, ChainedOptimizer)
    if is_sharded(model.chunks):
        return shard_optimizer(optimizer, settings, model.chunks[0].shard_group)
    if config.training.fp16:
        add_loss_scale(config.training, optimizer, model)
    if config.training.pure_bf16:
        keep_moments_narrow(optimizer, options)
    if options.optimizer_cpu_offload:
        keep_moments_on_host(optimizer)
    allow_loading(optimizer)
    return optimizer


def keep_moments_narrow(optimizer: ChainedOptimizer, options: OptimizerOptions) -> None:
    """Moments in the type of the weights, which torch's AdamW keeps and Transformer Engine's does not."""
    betas = (options.adam_beta1, options.adam_beta2)
    for part in optimizer.chained_optimizers:
        if part.optimizer is not None:
            part.optimizer = torch.optim.AdamW(part.optimizer.param_groups, options.lr, betas, options.adam_eps)


def set_rates(optimizer: ChainedOptimizer, lr: float, weight_decay: float) -> None:
    """Write this step's learning rate and decay into every parameter group.

    Groups restored from a checkpoint carry the values of the past; setting all of them at every step leaves no way
    for a stale one to be used.
    """
    for group in optimizer.param_groups:
        # PyTorch's one-pass kernel; its default goes over the parameters once for each of AdamW's ten operations.
        group["fused"] = True
        group["lr"] = lr * group["lr_mult"]
        group["weight_decay"] = weight_decay * group["wd_mult"]


def square_sum(values: Tensor) -> Tensor:
    """Sum of squares as a float64 scalar, from fp32 sums over short rows.

    PyTorch's norm on the CPU adds up in fp32 without pairing: it is off by 2e-5 of the norm at half a million elements
    and by 2e-3 at 30 million, so that a layout with other shapes would get another norm.
    """
    flat = values.flatten()
    whole = flat.numel() // NORM_ROW * NORM_ROW
    total = torch.linalg.vector_norm(flat[whole:], dtype=torch.float32).double().square()
    if whole:
        rows = flat[:whole].view(-1, NORM_ROW)
        total += torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32).double().square().sum()
    return total


def gradient_norm(optimizer: ChainedOptimizer) -> float:
    """L2 norm of all gradients of the whole model, each counted once; the same on every rank."""
    total = 0.0
    for part in optimizer.chained_optimizers:
        squares = torch.zeros((), dtype=torch.float64, device=device.device())
        for grad in part.get_main_grads_for_grad_norm():
            squares += square_sum(grad)
        torch.distributed.all_reduce(squares, group=part.get_grad_stats_parallel_group())
        total += squares.item()
    return math.sqrt(total)


@torch.no_grad()
def update(optimizer: ChainedOptimizer, clip_grad: float) -> tuple[float, bool]:
    """Clip the reduced gradients and step: (global gradient norm before clipping, whether the weights moved).

    The norm is taken over all ranks, so every rank sees the same value and a norm that is not finite is skipped by
    all of them alike. What a part of the optimizer finds by itself in fp16 is not asked: other ranks may find nothing.
    """
    optimizer.prepare_grads()
    grad_norm = gradient_norm(optimizer)
    finite = math.isfinite(grad_norm)
    move_scale(optimizer, overflow=not finite)
    if not finite:
        return grad_norm, False
    if 0.0 < clip_grad < grad_norm + NORM_EPSILON:
        grads = [p.grad for part in optimizer.chained_optimizers for p in part.get_parameters() if p.grad is not None]
        torch._foreach_mul_(grads, clip_grad / (grad_norm + NORM_EPSILON))
    return grad_norm, bool(optimizer.step_with_ready_grads())
