"""Rules of training on preferences."""

from __future__ import annotations

from dataclasses import fields

from megatron_steel.config.families.steel import is_soft
from megatron_steel.config.preference_schema import PreferenceConfig
from megatron_steel.config.schema import Config

ENTRY = "megatron_steel.preference"
NO_REFERENCE = ("orpo", "simpo", "rm")
WITH_REFERENCE = ("sigmoid", "sigmoid_norm", "robust", "hinge", "ipo")
# Options that only these losses have.
OF_LOSSES = {
    "beta": (*WITH_REFERENCE, "orpo", "simpo", "kto", "grpo"),
    "label_smoothing": ("sigmoid", "robust"),
    "simpo_gamma": ("simpo",),
    "desirable_weight": ("kto",),
    "undesirable_weight": ("kto",),
    "reward_collapse_patience": (*WITH_REFERENCE, "orpo", "simpo", "kto"),
    "rpo_alpha": (*WITH_REFERENCE, "simpo"),
    "share_prompts": (*WITH_REFERENCE, *NO_REFERENCE, "kto"),
    "reference": (*WITH_REFERENCE, "kto", "grpo"),
    "reference_checkpoint": (*WITH_REFERENCE, "kto", "grpo"),
    "reward": ("grpo",),
    "grpo_group_size": ("grpo",),
    "grpo_iterations": ("grpo",),
    "grpo_clamp_eps_lower": ("grpo",),
    "grpo_clamp_eps_upper": ("grpo",),
    "rl_default_temperature": ("grpo",),
    "max_new_tokens": ("grpo",),
    "scale_advantages": ("grpo",),
    "answer_average": ("grpo",),
}
# Options of conversations that a preference does not leave open: its last answer is what is trained.
# And those that sampled answers do not leave open: a row is one prompt, never cut, with one answer.
SAMPLED_FIXED = ("packing", "truncation", "min_answer_tokens", "train_tokens", "max_untrained")
CHAT_FIXED = ("train_turns", "train_on_prompt", "mask_history", "train_newline", "loss_weighting")


def refuse_preference(config: Config, entry: str) -> None:
    """``ValueError`` for an option of preferences in another run."""
    for name in changed(config.preference):
        raise ValueError(f"--{name.replace('_', '-')} is an option of {ENTRY}, not of {entry}")


def changed(options: PreferenceConfig) -> list[str]:
    """Names of options that are not at their defaults."""
    defaults = PreferenceConfig()
    return [item.name for item in fields(options) if getattr(options, item.name) != getattr(defaults, item.name)]


def check_preference(config: Config) -> None:
    """Raises ``ValueError`` like check.py, for a run on preferences."""
    options, chat = config.preference, config.chat
    loss = options.loss_type
    for name in changed(options):
        losses = OF_LOSSES.get(name)
        if losses is not None and loss not in losses:
            raise ValueError(f"--{name.replace('_', '-')} has no meaning for --loss-type {loss}")
    if config.size.score_head and loss != "rm":
        raise ValueError(f"--score-head is a reward model, which --loss-type rm trains, not {loss}")
    for name in CHAT_FIXED:
        if getattr(chat, name) != getattr(type(chat)(), name):
            raise ValueError(f"--{name.replace('_', '-')} is an option of finetuning; {ENTRY} trains the last answer")
    if not options.beta > 0 and loss != "grpo":
        raise ValueError(f"--beta must be greater than 0, not {options.beta}")
    if not 0 <= options.label_smoothing < 0.5:
        raise ValueError(f"--label-smoothing must be at least 0 and below 0.5, not {options.label_smoothing}")
    if options.reward_collapse_patience is not None and options.reward_collapse_patience < 1:
        raise ValueError(f"--reward-collapse-patience must be 1 or more, not {options.reward_collapse_patience}")
    for name in ("simpo_gamma", "rpo_alpha", "desirable_weight", "undesirable_weight"):
        if getattr(options, name) < 0:
            raise ValueError(f"--{name.replace('_', '-')} must be 0 or more, not {getattr(options, name)}")
    if options.reference == "lora-base" and config.lora.lora_rank is None:
        raise ValueError("--reference lora-base needs adapters: give --lora-rank")
    if options.reference == "lora-base" and config.lora.lora_modules_to_save:
        raise ValueError("--reference lora-base is not what the run started from with --lora-modules-to-save")
    if options.reference == "lora-base" and options.reference_checkpoint is not None:
        raise ValueError("--reference lora-base is what the run starts from; leave out --reference-checkpoint")
    if options.reference == "none" and options.reference_checkpoint is not None:
        raise ValueError("--reference none is a reference of 0; leave out --reference-checkpoint")
    if options.reference == "none" and loss == "kto":
        raise ValueError("--loss-type kto compares answers with a reference; take another --reference than none")
    if config.parallel.transformer_impl == "local":
        raise ValueError(f"{ENTRY} does not go with --transformer-impl local, whose attention takes no packed texts")
    for name in ("attention_dropout", "hidden_dropout"):
        if getattr(config.size, name):
            raise ValueError(f"--{name.replace('_', '-')} must be 0: {ENTRY} compares log-probabilities")
    if loss == "grpo":
        check_group_policy(config)


def why_not_shared(config: Config, backend: str) -> str | None:
    """What keeps both answers of a pair from going on from one prompt, with the resolved layer backend; None: nothing.

    Their tokens see keys of another text, at positions that do not count from their own beginning.
    """
    size = config.size
    wrong = {
        f"{backend} layers": backend != "torch",
        "--context-parallel-size": config.parallel.context_parallel_size > 1,
        "--multi-latent-attention": size.multi_latent_attention,
        "--position-embedding-type alibi": size.position_embedding_type == "alibi",
        f"--ffn-type {size.ffn_type}, which mixes tokens": is_soft(size),
        "--rope-scaling-type dynamic": size.use_rope_scaling and size.rope_scaling_type == "dynamic",
        "--decoder-layer": size.decoder_layer is not None,
    }
    return next((why for why, holds in wrong.items() if holds), None)


def check_group_policy(config: Config) -> None:
    """Those of sampling answers and training on their rewards."""
    options, chat, parallel = config.preference, config.chat, config.parallel
    if options.reward is None:
        raise ValueError("--loss-type grpo needs --reward: math, choice, or a function as package.module:function")
    for name in SAMPLED_FIXED:
        if getattr(chat, name) != getattr(type(chat)(), name):
            raise ValueError(f"--{name.replace('_', '-')} has no meaning for --loss-type grpo, which samples answers")
    for name, least in (("grpo_group_size", 2), ("grpo_iterations", 1), ("max_new_tokens", 1)):
        if getattr(options, name) < least:
            raise ValueError(f"--{name.replace('_', '-')} must be {least} or more, not {getattr(options, name)}")
    if options.max_new_tokens >= config.training.seq_length:
        raise ValueError(
            f"--max-new-tokens {options.max_new_tokens} leaves a prompt no room in --seq-length "
            f"{config.training.seq_length}"
        )
    if options.beta < 0 or not options.rl_default_temperature > 0:
        raise ValueError("--beta must be 0 or more, and --rl-default-temperature greater than 0")
    if not 0 <= options.grpo_clamp_eps_lower < 1 or options.grpo_clamp_eps_upper < 0:
        raise ValueError("--grpo-clamp-eps-lower must be at least 0 and below 1, --grpo-clamp-eps-upper 0 or more")
    for name in ("grpo_clamp_eps_lower", "grpo_clamp_eps_upper"):
        if name in changed(options) and options.grpo_iterations == 1:
            raise ValueError(
                f"--{name.replace('_', '-')} has no effect on the first step on a batch: give more --grpo-iterations"
            )
    if options.reference == "none":
        raise ValueError("--reference none: for grpo without a reference give --beta 0")
    if not options.beta and {"reference", "reference_checkpoint"} & set(changed(options)):
        raise ValueError("--reference and --reference-checkpoint have no effect with --beta 0")
    if config.size.final_logit_softcapping is not None and options.rl_default_temperature != 1:
        raise ValueError("--rl-default-temperature must be 1 with --final-logit-softcapping")
    whole = {
        "--context-parallel-size 1": parallel.context_parallel_size > 1,
        "--expert-model-parallel-size 1": parallel.expert_model_parallel_size > 1,
        "no virtual pipeline stages": parallel.num_layers_per_virtual_pipeline_stage is not None,
        "no --use-torch-fsdp2": parallel.use_torch_fsdp2,
    }
    for wish, wrong in whole.items():
        if wrong:
            raise ValueError(f"--loss-type grpo needs {wish}: the model that is trained samples the answers")
