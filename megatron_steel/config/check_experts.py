"""Rules for a mixture of experts, run by config/check.py."""

from __future__ import annotations

from megatron_steel.config.family import has_experts
from megatron_steel.config.model_schema import FeedForwardSizes
from megatron_steel.config.pipeline import layers_by_stage
from megatron_steel.config.schema import Config, ModelConfig

# A token is sent to other ranks in either way, which is no part of the model.
WITHOUT_EFFECT = ("moe_token_dispatcher_type",)


def expert_tensor_size(config: Config) -> int:
    """Ranks that share each expert."""
    return config.parallel.expert_tensor_parallel_size or config.parallel.tensor_model_parallel_size


def check_experts(config: Config) -> None:
    """Numbers of experts, their groups and their widths must go together; raises ``ValueError`` like check.py."""
    size = config.size
    if size.num_experts is None:
        refuse_leftovers(config)
        return
    check_choice(size)
    if size.moe_layer_freq and (len(size.moe_layer_freq) != size.num_layers or {*size.moe_layer_freq} - {0, 1}):
        raise ValueError(
            f"--moe-layer-freq must be {size.num_layers} numbers (--num-layers), 1 for a layer with experts and 0 for "
            f"one without, not {' '.join(map(str, size.moe_layer_freq))}"
        )
    tensor = config.parallel.tensor_model_parallel_size
    width_name = "ffn_hidden_size" if size.moe_ffn_hidden_size is None else "moe_ffn_hidden_size"
    by_expert = "expert-tensor" if config.parallel.expert_tensor_parallel_size else "tensor-model"
    for name, ranks, kind in (
        (width_name, expert_tensor_size(config), by_expert),
        ("moe_shared_expert_intermediate_size", tensor, "tensor-model"),
    ):
        width = getattr(size, name)
        if width is not None and (width <= 0 or width % ranks):
            flag = f"--{name.replace('_', '-')} {width}"
            raise ValueError(f"{flag} must be positive and divisible by --{kind}-parallel-size {ranks}")
    if tensor > 1 and not config.parallel.sequence_parallel:
        raise ValueError("--num-experts with --tensor-model-parallel-size 2 or more needs --sequence-parallel")


def check_expert_ranks(config: Config, world_size: int) -> None:
    """Every rank of a pipeline stage holds an equal share of the experts; raises ``ValueError`` like check.py."""
    parallel, experts = config.parallel, config.size.num_experts
    spread, shared = parallel.expert_model_parallel_size, expert_tensor_size(config)
    if experts is None:
        return
    if experts % spread:
        raise ValueError(f"--num-experts {experts} is not divisible by --expert-model-parallel-size {spread}")
    stages = parallel.pipeline_model_parallel_size
    if world_size % (spread * shared * stages):
        name = "expert-tensor" if parallel.expert_tensor_parallel_size else "tensor-model"
        raise ValueError(
            f"{world_size} processes are not divisible by --expert-model-parallel-size {spread} x "
            f"--{name}-parallel-size {shared} x --pipeline-model-parallel-size {stages}; "
            f"start a multiple of {spread * shared * stages}, or set --expert-tensor-parallel-size 1"
        )
    for stage, layers in enumerate(layers_by_stage(config)):
        # Without, its optimizer has one part where the others have two, and the checkpoint is theirs or its own.
        if not any(has_experts(config.size, layer) for layer in layers):
            raise ValueError(
                f"pipeline stage {stage} of {stages} has no layer with experts (--moe-layer-freq); use fewer "
                f"stages, or uneven ones (--decoder-first-pipeline-num-layers, --decoder-last-pipeline-num-layers)"
            )


def refuse_leftovers(config: Config) -> None:
    """``ValueError`` for settings of experts of a model that has none."""
    size, defaults = config.size, FeedForwardSizes()
    if config.parallel.expert_model_parallel_size > 1 or config.parallel.expert_tensor_parallel_size:
        name = "model" if config.parallel.expert_model_parallel_size > 1 else "tensor"
        raise ValueError(f"--expert-{name}-parallel-size needs --num-experts")
    for name in vars(defaults):
        if name.startswith("moe_") and name not in WITHOUT_EFFECT and getattr(size, name) != getattr(defaults, name):
            raise ValueError(f"--{name.replace('_', '-')} needs --num-experts")


def check_choice(size: ModelConfig) -> None:
    """How many experts a token goes to, out of which."""
    experts, chosen = size.num_experts or 0, size.moe_router_topk
    if experts < 1:
        raise ValueError(f"--num-experts {experts} must be greater than 0")
    if not 1 <= chosen <= experts:
        raise ValueError(f"--moe-router-topk {chosen} must be between 1 and --num-experts {experts}")
    if chosen == 1 and size.moe_router_score_function == "softmax" and not size.moe_router_pre_softmax:
        raise ValueError(
            "--moe-router-topk 1 gives its expert the weight 1, from which a router learns nothing; "
            "use --moe-router-topk 2, or a family with --moe-router-pre-softmax"
        )
    if size.moe_aux_loss_coeff < 0:
        raise ValueError(f"--moe-aux-loss-coeff must be 0 or more, not {size.moe_aux_loss_coeff}")
    groups, open_groups = size.moe_router_num_groups, size.moe_router_group_topk
    if (groups is None) != (open_groups is None):
        raise ValueError("--moe-router-num-groups and --moe-router-group-topk need each other")
    if groups is not None and open_groups is not None:
        if groups < 1 or experts % groups:
            raise ValueError(f"--num-experts {experts} is not divisible by --moe-router-num-groups {groups}")
        best = 2 if size.moe_router_score_function == "sigmoid" else 1
        if not 1 <= open_groups <= groups or chosen > open_groups * (experts // groups) or experts // groups < best:
            raise ValueError(
                f"--moe-router-group-topk {open_groups} of {groups} groups of {experts // groups} experts leaves too "
                f"few for --moe-router-topk {chosen}"
            )
