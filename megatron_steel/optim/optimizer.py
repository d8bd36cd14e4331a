"""AdamW over megatron-core's optimizers: fp32 main weights, sharded or not, with decay decided by parameter kind."""

from __future__ import annotations

import torch
from megatron.core import optimizer as megatron_optimizer
from megatron.core.optimizer import (
    MegatronOptimizer,
    OptimizerConfig,
    ParamKey,
    distrib_optimizer,
    get_megatron_optimizer,
)
from megatron.core.optimizer.optimizer import ChainedOptimizer
from torch import Tensor

from megatron_steel.config.check_precision import compute_type
from megatron_steel.config.schema import Config
from megatron_steel.model.build import Model
from megatron_steel.model.fully_sharded import is_sharded
from megatron_steel.optim.fully_sharded import shard_optimizer
from megatron_steel.optim.host_adamw import allow_loading, keep_moments_on_host
from megatron_steel.optim.loss_scale import add_loss_scale, move_scale, scale_of
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
    use_torch_adamw()
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
    if options.optimizer_cpu_offload:
        keep_moments_on_host(optimizer)
    allow_loading(optimizer)
    return optimizer


def use_torch_adamw() -> None:
    """Make megatron-core take torch's AdamW, also where it finds that of Transformer Engine or Apex.

    torch's skips a step by a number on the device, keeps moments in the type of the weights, and counts its steps for
    each weight: with one class a checkpoint does not depend on what is installed.
    """
    megatron_optimizer.USING_PYTORCH_OPTIMIZER = True
    distrib_optimizer.HAVE_APEX_OR_TE = False


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


def square_sums(grads: list[Tensor]) -> Tensor:
    """Sum of squares over all ``grads`` as a float64 scalar on their device."""
    where = device.device()
    if where.type != "cpu" and any(grad.numel() for grad in grads):
        # A GPU adds up in a tree: one launch over all gradients is exact enough, and there are hundreds of them.
        norms = torch._foreach_norm([grad for grad in grads if grad.numel()], 2, dtype=torch.float32)
        return torch.stack(norms).double().square().sum()
    squares = torch.zeros((), dtype=torch.float64, device=where)
    for grad in grads:
        squares += square_sum(grad)
    return squares


def gradient_norm(optimizer: ChainedOptimizer) -> Tensor:
    """L2 norm of all gradients of the whole model, each counted once: a float64 scalar, the same on every rank.

    It stays on the device, so that nobody waits for the backward pass here.
    """
    total = torch.zeros((), dtype=torch.float64, device=device.device())
    for part in optimizer.chained_optimizers:
        squares = square_sums(part.get_main_grads_for_grad_norm())
        torch.distributed.all_reduce(squares, group=part.get_grad_stats_parallel_group())
        total += squares
    return total.sqrt()


def scale_gradients(optimizer: ChainedOptimizer, factor: Tensor) -> None:
    """Multiply all gradients by an fp32 scalar on their device."""
    grads = [p.grad for part in optimizer.chained_optimizers for p in part.get_parameters() if p.grad is not None]
    exact = [grad for grad in grads if grad.dtype == torch.float32]
    if exact:
        torch._foreach_mul_(exact, factor)
    for grad in grads:
        if grad.dtype != torch.float32:
            # A scalar tensor would be rounded to the type of the gradient before the product.
            grad.copy_(grad.float() * factor)


@torch.no_grad()
def update(optimizer: ChainedOptimizer, clip_grad: float) -> tuple[Tensor, Tensor]:
    """Clip the reduced gradients and step: (global gradient norm before clipping, whether the weights moved).

    Both are scalars on the device (float64, bool), which decides by itself: torch's AdamW leaves weights, moments and
    step counts as they are where ``found_inf`` is 1, and what copies weights afterwards copies the same ones. Only the
    loss scale of fp16 asks the device in every step. The norm is taken over all ranks, so every rank sees the same
    value and a norm that is not finite is skipped by all of them alike. What a part of the optimizer finds by itself
    in fp16 is not asked: other ranks may find nothing.
    """
    optimizer.prepare_grads()
    grad_norm = gradient_norm(optimizer)
    finite = grad_norm.isfinite()
    if scale_of(optimizer) is not None:
        move_scale(optimizer, overflow=not finite.item())
    if clip_grad > 0.0:
        most = grad_norm.new_full((), clip_grad)
        scale_gradients(optimizer, (most / (grad_norm + NORM_EPSILON)).clamp(max=1.0).float())
    skip = (~finite).float()
    for part in optimizer.chained_optimizers:
        if part.optimizer is not None:
            part.optimizer.found_inf = skip
    optimizer.step_with_ready_grads()
    return grad_norm, finite
