"""Rules of training on preferences."""

from __future__ import annotations

from dataclasses import fields

from megatron_steel.config.preference_schema import PreferenceConfig
from megatron_steel.config.schema import Config

ENTRY = "megatron_steel.preference"
NO_REFERENCE = ("orpo", "simpo")
WITH_REFERENCE = ("sigmoid", "sigmoid_norm", "robust", "hinge", "ipo")
# Options that only these losses have.
OF_LOSSES = {
    "label_smoothing": ("sigmoid", "robust"),
    "simpo_gamma": ("simpo",),
    "desirable_weight": ("kto",),
    "undesirable_weight": ("kto",),
    "rpo_alpha": (*WITH_REFERENCE, "simpo"),
    "reference": (*WITH_REFERENCE, "kto"),
    "reference_checkpoint": (*WITH_REFERENCE, "kto"),
}
# Options of conversations that a preference does not leave open: its last answer is what is trained.
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
    for name in CHAT_FIXED:
        if getattr(chat, name) != getattr(type(chat)(), name):
            raise ValueError(f"--{name.replace('_', '-')} is an option of finetuning; {ENTRY} trains the last answer")
    if not options.beta > 0:
        raise ValueError(f"--beta must be greater than 0, not {options.beta}")
    if not 0 <= options.label_smoothing < 0.5:
        raise ValueError(f"--label-smoothing must be at least 0 and below 0.5, not {options.label_smoothing}")
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
