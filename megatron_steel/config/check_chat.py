"""Rules of finetuning on conversations, and which options belong to which entry."""

from __future__ import annotations

from dataclasses import fields

from megatron_steel.config.chat_schema import ChatConfig
from megatron_steel.config.schema import Config, DataConfig, TrainingConfig

ENTRY = "megatron_steel.finetune"
# What a run on conversations shares with one on documents.
SHARED = ("seed", "data_cache_path", "append_data", "max_epochs_per_source")


def changed(group: ChatConfig | DataConfig) -> list[str]:
    """Names of options that are not at their defaults."""
    defaults = type(group)()
    return [item.name for item in fields(group) if getattr(group, item.name) != getattr(defaults, item.name)]


def refuse_chat(config: Config) -> None:
    """``ValueError`` for an option of conversations in a run on documents."""
    for name in changed(config.chat):
        raise ValueError(f"--{name.replace('_', '-')} is an option of {ENTRY}; pretraining takes --data-path")


def check_chat(config: Config) -> None:
    """Raises ``ValueError`` like check.py, for a run on conversations."""
    chat, training = config.chat, config.training
    for name in changed(config.data):
        if name not in SHARED:
            raise ValueError(f"--{name.replace('_', '-')} is an option of pretraining; {ENTRY} takes --train-data")
    if not chat.train_data:
        raise ValueError("--train-data: give files, folders or names of conversations to train on")
    if chat.pretrained_checkpoint is None and config.checkpoint.load is None and not config.checkpoint.auto_resume:
        raise ValueError("--pretrained-checkpoint: give a checkpoint directory or a Hugging Face folder to start from")
    if chat.pretrained_checkpoint is not None and config.checkpoint.load is not None:
        raise ValueError("give --pretrained-checkpoint to start, or --load to go on with a run of finetuning, not both")
    if config.checkpoint.finetune:
        raise ValueError("--finetune: give the checkpoint as --pretrained-checkpoint, of which weights are taken")
    if chat.num_epochs is not None and chat.train_tokens is not None:
        raise ValueError("give --num-epochs or --train-tokens, not both")
    if training.train_iters != TrainingConfig().train_iters and (chat.num_epochs or chat.train_tokens) is not None:
        raise ValueError("--train-iters follows from --num-epochs and --train-tokens; give one of the three")
    for name in ("num_epochs", "train_tokens", "max_turn_bytes"):
        value = getattr(chat, name)
        if value is not None and not value > 0:
            raise ValueError(f"--{name.replace('_', '-')} must be greater than 0, not {value}")
    for name in ("system_probability", "max_bad_rows", "max_untrained"):
        value = getattr(chat, name)
        if not 0 <= value <= 1:
            raise ValueError(f"--{name.replace('_', '-')} must be between 0 and 1, not {value}")
    if chat.inspect < 0:
        raise ValueError(f"--inspect must be 0 or more, not {chat.inspect}")
    if chat.system_probability < 1 and chat.system_text is None:
        raise ValueError("--system-probability needs --system-text")
    if config.size.ffn_type in ("softmoe_v2", "softmoe_v3"):
        raise ValueError(f"--ffn-type {config.size.ffn_type} mixes all tokens of a row; {ENTRY} takes softmoe_causal")
    if chat.packing and config.parallel.transformer_impl == "local":
        raise ValueError("--packing does not go with --transformer-impl local; add --no-packing, or take torch")
    if training.rampup_batch_size and (chat.num_epochs is not None or chat.train_tokens is not None):
        raise ValueError("--rampup-batch-size needs --train-iters; leave out --num-epochs and --train-tokens")
