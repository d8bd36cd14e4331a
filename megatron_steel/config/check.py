"""Cross-field rules: one small function each, run before anything heavy is imported.

Each raises ``ValueError`` with one line that names the fields, their values and a way out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from megatron_steel.config.check_batch import check_batch
from megatron_steel.config.check_context import check_context
from megatron_steel.config.check_engine import check_engine
from megatron_steel.config.check_experts import check_expert_ranks, check_experts
from megatron_steel.config.check_fsdp import check_fsdp
from megatron_steel.config.check_latent import check_latent
from megatron_steel.config.check_lora import check_lora
from megatron_steel.config.check_memory import check_memory
from megatron_steel.config.check_precision import check_precision, precision_notes
from megatron_steel.config.check_rope import check_rope, rope_without_effect
from megatron_steel.config.check_score import check_score
from megatron_steel.config.check_soft_mixture import check_soft_mixture
from megatron_steel.config.families import FAMILIES
from megatron_steel.config.family import ANY, SWITCHES, group_count, head_width
from megatron_steel.config.load import to_flat
from megatron_steel.config.pipeline import check_uneven, is_uneven
from megatron_steel.config.rope import longest_sequence
from megatron_steel.config.schema import Config, ModelConfig


def padded_vocab_size(vocab_size: int, make_vocab_size_divisible_by: int, tensor_model_parallel_size: int) -> int:
    """Rows of the embedding: ``vocab_size`` rounded up so that every tensor-parallel rank gets the same number."""
    multiple = make_vocab_size_divisible_by * tensor_model_parallel_size
    return math.ceil(vocab_size / multiple) * multiple


def check(config: Config, world_size: int = 1) -> list[str]:
    """Check and complete a configuration in place; returns warnings about settings without effect."""
    check_finite(config)
    check_positive(config)
    check_ranges(config)
    check_heads(config)
    check_family(config)
    check_rope(config)
    check_experts(config)
    check_latent(config)
    check_soft_mixture(config)
    check_layers(config)
    check_precision(config)
    check_engine(config)
    check_memory(config)
    check_schedule(config)
    check_batch(config, data_parallel_size(config, world_size), virtual_chunks(config) is not None)
    check_expert_ranks(config, world_size)
    check_overlap(config)
    check_fsdp(config, data_parallel_size(config, world_size))
    check_documents(config)
    check_context(config)
    check_checkpoint(config)
    check_lora(config)
    check_score(config)
    return settings_without_effect(config, world_size)


def check_finite(config: Config) -> None:
    """A number that is infinite or not a number would only be noticed as a strange loss."""
    for name, value in to_flat(config).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"--{name.replace('_', '-')} must be a finite number, not {value}")


def check_positive(config: Config) -> None:
    """Sizes and counts must be greater than 0."""
    for group, names in (
        (config.size, ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups")),
        (config.size, ("kv_channels", "make_vocab_size_divisible_by", "vocab_size", "max_position_embeddings")),
        (config.size, ("rotary_base", "rope_scaling_factor", "norm_epsilon", "window_size", "rotary_percent")),
        (config.size, ("rotary_base_local", "softmax_scale", "attn_logit_softcapping", "final_logit_softcapping")),
        (config.size, ("soft_experts", "slots_per_expert", "mlp_div_ratio")),
        (config.parallel, ("tensor_model_parallel_size", "pipeline_model_parallel_size")),
        (config.parallel, ("expert_model_parallel_size", "expert_tensor_parallel_size")),
        (config.parallel, ("decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers")),
        (
            config.parallel,
            ("context_parallel_size", "num_layers_per_virtual_pipeline_stage", "distributed_timeout_minutes"),
        ),
        (config.data, ("max_epochs_per_source",)),
        (config.training, ("micro_batch_size", "global_batch_size", "seq_length", "train_iters", "exit_interval")),
        (config.training, ("exit_duration_in_mins", "check_weight_hash_across_dp_replicas_interval")),
        (config.checkpoint, ("save_interval", "save_total_limit")),
        (config.logging, ("log_interval", "eval_interval", "eval_iters")),
        (config.optimizer, ("lr", "lr_decay_iters", "adam_eps")),
    ):
        for name in names:
            value = getattr(group, name)
            if value is not None and not value > 0:
                raise ValueError(f"--{name.replace('_', '-')} must be greater than 0, not {value}")


def check_ranges(config: Config) -> None:
    """Numbers that may be 0 but not negative, and shares below 1."""
    options = config.optimizer
    for group, names in (
        (config.size, ("init_method_std", "attention_dropout", "hidden_dropout")),
        (config.data, ("seed",)),
        (options, ("min_lr", "lr_warmup_iters", "weight_decay", "clip_grad", "adam_beta1", "adam_beta2")),
        (config.checkpoint, ("ckpt_step",)),
        (config.training, ("manual_gc_interval",)),
    ):
        for name in names:
            value = getattr(group, name)
            if value is not None and value < 0:
                raise ValueError(f"--{name.replace('_', '-')} must be 0 or more, not {value}")
    for epochs in config.data.target_epochs:
        if not (math.isfinite(epochs) and epochs >= 0):
            raise ValueError(f"--target-epochs must be numbers of 0 or more, not {epochs}")
    shares = ((config.size, ("attention_dropout", "hidden_dropout")), (options, ("adam_beta1", "adam_beta2")))
    for owner, share_names in shares:
        for name in share_names:
            if getattr(owner, name) >= 1:
                raise ValueError(f"--{name.replace('_', '-')} must be below 1, not {getattr(owner, name)}")


def divisors_near(number: int, wish: int, allowed: Sequence[int] | None = None) -> list[int]:
    """Divisors of ``number`` closest to ``wish`` (at most two), the nearest first."""
    divisors = [d for d in range(1, number + 1) if number % d == 0 and (allowed is None or d in allowed)]
    return sorted(divisors, key=lambda d: (abs(d - wish), d))[:2]


def check_heads(config: Config) -> None:
    """Heads must divide the width, groups the heads, tensor parallelism both; a rotary head must be even."""
    size, tensor = config.size, config.parallel.tensor_model_parallel_size
    heads, groups = size.num_attention_heads, size.num_query_groups or size.num_attention_heads
    if size.kv_channels is None and size.hidden_size % heads:
        near = " or ".join(str(d) for d in divisors_near(size.hidden_size, heads))
        raise ValueError(
            f"--hidden-size {size.hidden_size} is not divisible by --num-attention-heads {heads}; "
            f"use {near} heads, or set --kv-channels"
        )
    width = head_width(size)
    if size.rotary_percent > 1:
        raise ValueError(f"--rotary-percent {size.rotary_percent} is more than a whole head; use 1 at most")
    if size.position_embedding_type == "rope" and int(width * size.rotary_percent) % 2:
        share = f", of which --rotary-percent {size.rotary_percent}" if size.rotary_percent != 1 else ""
        raise ValueError(f"head width {width}{share} is odd; rotary embeddings need it even")
    if heads % groups:
        near = " or ".join(str(d) for d in divisors_near(heads, groups))
        raise ValueError(f"--num-attention-heads {heads} is not divisible by --num-query-groups {groups}; use {near}")
    for name, value in (("num-attention-heads", heads), ("num-query-groups", groups), ("ffn-hidden-size", None)):
        value = size.ffn_hidden_size if value is None else value
        if value % tensor:
            near = " or ".join(str(d) for d in divisors_near(value, tensor))
            raise ValueError(f"--{name} {value} is not divisible by --tensor-model-parallel-size {tensor}; use {near}")


def check_family(config: Config) -> None:
    """A family fixes the switches; a model that mixes them could not be exported."""
    size, heads = config.size, config.size.num_attention_heads
    family, defaults = FAMILIES[size.model_family], ModelConfig()
    for name in SWITCHES:
        value, allowed = getattr(size, name), family.switches.get(name, (getattr(defaults, name),))
        if allowed is not ANY and value not in allowed:
            flag, wanted = name.replace("_", "-"), " or ".join(map(str, allowed))
            if isinstance(value, bool):
                raise ValueError(f"--model-family {family.name} {'has no' if value else 'needs'} --{flag}")
            raise ValueError(f"--{flag} is {value}, but --model-family {family.name} has {wanted}")
    if family.plain_heads and (group_count(size), head_width(size) * heads) != (heads, size.hidden_size):
        raise ValueError(
            f"--model-family {family.name} has one key head per query head and heads of hidden_size / heads; "
            f"leave --num-query-groups and --kv-channels unset"
        )
    if family.wide_feed_forward and size.ffn_hidden_size != 4 * size.hidden_size:
        raise ValueError(f"--model-family {family.name} needs --ffn-hidden-size {4 * size.hidden_size}, 4 hidden sizes")
    for name in ("full_attention_layers", "no_rope_layers"):
        if beyond := [layer for layer in getattr(size, name) if not 0 <= layer < size.num_layers]:
            raise ValueError(f"--{name.replace('_', '-')} {beyond[0]}: layers count from 0 to {size.num_layers - 1}")
    longest = longest_sequence(size)
    if config.training.seq_length > longest:
        scaled = f" x {size.rope_scaling_factor:g}" if longest != size.max_position_embeddings else ""
        raise ValueError(
            f"--seq-length {config.training.seq_length} is longer than "
            f"--max-position-embeddings {size.max_position_embeddings}{scaled}; raise the latter"
        )


def check_layers(config: Config) -> None:
    """Pipeline stages and virtual chunks must divide the layers."""
    if is_uneven(config):
        check_uneven(config)
        return
    layers, parallel = config.size.num_layers, config.parallel
    stages, chunk = parallel.pipeline_model_parallel_size, parallel.num_layers_per_virtual_pipeline_stage
    if layers % stages:
        near = " or ".join(str(d) for d in divisors_near(layers, stages))
        raise ValueError(
            f"--num-layers {layers} is not divisible by --pipeline-model-parallel-size {stages}; use {near} stages"
        )
    if chunk is None:
        return
    if stages == 1:
        raise ValueError("--num-layers-per-virtual-pipeline-stage needs --pipeline-model-parallel-size 2 or more")
    if (layers // stages) % chunk:
        near = " or ".join(str(d) for d in divisors_near(layers // stages, chunk))
        raise ValueError(
            f"{layers // stages} layers per stage are not divisible by "
            f"--num-layers-per-virtual-pipeline-stage {chunk}; use {near}"
        )


def virtual_chunks(config: Config) -> int | None:
    """Model chunks per pipeline stage, or None without interleaving."""
    chunk = config.parallel.num_layers_per_virtual_pipeline_stage
    if chunk is None:
        return None
    chunks = config.size.num_layers // config.parallel.pipeline_model_parallel_size // chunk
    return chunks if chunks > 1 else None


def data_parallel_size(config: Config, world_size: int) -> int:
    """Replicas of the model; ``ValueError`` when the ranks cannot be divided."""
    parallel = config.parallel
    context = parallel.context_parallel_size
    model_ranks = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size * context
    if world_size % model_ranks:
        shared = f" x --context-parallel-size {context}" if context > 1 else ""
        raise ValueError(
            f"{world_size} processes are not divisible by --tensor-model-parallel-size "
            f"{parallel.tensor_model_parallel_size} x --pipeline-model-parallel-size "
            f"{parallel.pipeline_model_parallel_size}{shared} = {model_ranks}; start a multiple of {model_ranks} "
            f"(torchrun --nproc-per-node)"
        )
    return world_size // model_ranks


def check_schedule(config: Config) -> None:
    """The learning rate must be able to follow its curve."""
    options = config.optimizer
    decay_iters = options.lr_decay_iters or config.training.train_iters
    if options.min_lr > options.lr:
        raise ValueError(f"--min-lr {options.min_lr} is above --lr {options.lr}")
    if options.lr_warmup_fraction is not None:
        if options.lr_warmup_iters:
            raise ValueError("give --lr-warmup-fraction or --lr-warmup-iters, not both")
        if not 0 <= options.lr_warmup_fraction < 1:
            raise ValueError(f"--lr-warmup-fraction {options.lr_warmup_fraction} must be at least 0 and below 1")
    elif options.lr_warmup_iters >= decay_iters and options.lr_warmup_iters > 0:
        raise ValueError(
            f"--lr-warmup-iters {options.lr_warmup_iters} must be below the {decay_iters} iterations of the decay "
            f"(--lr-decay-iters, or --train-iters when unset)"
        )
    if options.lr_decay_style == "WSD":
        last = options.lr_wsd_decay_iters
        warmup = options.lr_warmup_iters or math.ceil((options.lr_warmup_fraction or 0) * decay_iters)
        if last is None or not 0 < last <= decay_iters - warmup:
            raise ValueError(f"--lr-decay-style WSD needs --lr-wsd-decay-iters between 1 and {decay_iters - warmup}")


def check_overlap(config: Config) -> None:
    """megatron-core gathers parameters late only for sharded state whose gradients are reduced early."""
    parallel = config.parallel
    if parallel.overlap_param_gather and not (parallel.use_distributed_optimizer and parallel.overlap_grad_reduce):
        raise ValueError("--overlap-param-gather needs --use-distributed-optimizer and --overlap-grad-reduce")
    if parallel.sequence_parallel and parallel.tensor_model_parallel_size == 1:
        raise ValueError("--sequence-parallel needs --tensor-model-parallel-size 2 or more")
    if parallel.sequence_parallel and parallel.transformer_impl == "local":
        raise ValueError("--transformer-impl local has no --sequence-parallel; use --transformer-impl torch")


def check_documents(config: Config) -> None:
    """Documents are told apart by bounds in a packed row, which megatron-core's own attention does not take."""
    for name in ("reset_attention_mask", "reset_position_ids"):
        if getattr(config.data, name) and config.parallel.transformer_impl == "local":
            raise ValueError(
                f"--{name.replace('_', '-')} does not go with --transformer-impl local, whose attention takes no "
                f"packed documents; use --transformer-impl torch or transformer_engine"
            )


def check_checkpoint(config: Config) -> None:
    """Flags about checkpoints that need each other."""
    options = config.checkpoint
    for name in ("save_interval", "save_total_limit", "auto_resume"):
        if getattr(options, name) and options.save is None:
            raise ValueError(f"--{name.replace('_', '-')} needs --save DIRECTORY")
    if options.ckpt_step is not None and options.load is None:
        raise ValueError("--ckpt-step needs --load DIRECTORY")
    if options.finetune and options.load is None:
        raise ValueError("--finetune needs --load DIRECTORY")
    if config.data.data_path and config.data.train_data_path:
        raise ValueError("give --data-path with --split, or --train-data-path with --valid-data-path, not both")


def settings_without_effect(config: Config, world_size: int) -> list[str]:
    """One line for each setting that changes nothing in this run."""
    notes = []
    options, logging, parallel = config.optimizer, config.logging, config.parallel
    if options.lr_wsd_decay_iters is not None and options.lr_decay_style != "WSD":
        notes.append(f"--lr-wsd-decay-iters has no effect with --lr-decay-style {options.lr_decay_style}")
    if options.lr_decay_style == "constant" and options.min_lr:
        notes.append("--min-lr has no effect with --lr-decay-style constant")
    for name in ("wandb_exp_name", "wandb_save_dir"):
        if getattr(logging, name) and not logging.wandb_project:
            notes.append(f"--{name.replace('_', '-')} has no effect without --wandb-project")
    if config.training.allow_non_causal_softmoe and config.size.ffn_type not in ("softmoe_v2", "softmoe_v3"):
        notes.append("--allow-non-causal-softmoe has no effect without --ffn-type softmoe_v2 or softmoe_v3")
    notes += rope_without_effect(config.size) + precision_notes(config)
    if config.training.manual_gc_interval and not config.training.manual_gc:
        notes.append("--manual-gc-interval has no effect without --manual-gc")
    model_ranks = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    if config.training.check_weight_hash_across_dp_replicas_interval and world_size == model_ranks:
        notes.append("--check-weight-hash-across-dp-replicas-interval has no effect: there is one replica")
    if config.size.full_attention_layers and config.size.window_size is None:
        notes.append("--full-attention-layers has no effect without --window-size")
    if parallel.num_layers_per_virtual_pipeline_stage and virtual_chunks(config) is None:
        notes.append("--num-layers-per-virtual-pipeline-stage has no effect: a stage holds no more layers than that")
    replicas = data_parallel_size(config, world_size) * parallel.context_parallel_size
    if parallel.use_distributed_optimizer and replicas == 1:
        notes.append("--use-distributed-optimizer shards nothing on one data-parallel rank")
    resumes = config.checkpoint.auto_resume or (config.checkpoint.load and not config.checkpoint.finetune)
    for flag, given in (
        ("--override-opt-param-scheduler", options.override_opt_param_scheduler),
        ("--append-data", config.data.append_data),
    ):
        if given and not resumes:
            notes.append(f"{flag} has no effect unless a run is resumed (--load without --finetune, or --auto-resume)")
    return notes
