"""What a finetune starts from: sizes, tokenizer and weights of a checkpoint of ours or of a Hugging Face folder."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from megatron_steel.checkpoint.files import find_checkpoint, published
from megatron_steel.checkpoint.hf import read_hf_config, tokenizer_of
from megatron_steel.checkpoint.state import TOKENIZER_FOLDER, TrainState, load_tokenizer, read_state
from megatron_steel.config.load import from_flat
from megatron_steel.config.schema import Config, ModelConfig
from megatron_steel.text.tokenizer import Tokenizer, build_tokenizer


@dataclass(kw_only=True)
class Pretrained:
    """Where weights come from: one of the two folders."""

    checkpoint: Path | None = None
    """An ``iter_*`` directory of ours."""
    hf_folder: Path | None = None
    state: TrainState | None = None
    """That of ``checkpoint``."""

    @staticmethod
    def from_checkpoint(checkpoint: Path) -> Pretrained:
        """One of ours."""
        return Pretrained(checkpoint=checkpoint, state=read_state(checkpoint))

    @staticmethod
    def of(checkpoint: Path | None, hf_folder: Path | None) -> Pretrained | None:
        """Either, or None for random weights."""
        if checkpoint is not None:
            return Pretrained.from_checkpoint(checkpoint)
        return None if hf_folder is None else Pretrained(hf_folder=hf_folder)

    @property
    def name(self) -> str:
        """For messages."""
        return str(self.checkpoint or self.hf_folder)

    def sizes(self) -> ModelConfig:
        """What the model is."""
        if self.state is not None:
            size = from_flat(self.state.config, self.name).size
            size.vocab_size = self.state.vocab_size
            return size
        assert self.hf_folder is not None
        return read_hf_config(self.hf_folder).size

    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer that comes along, or None."""
        if self.checkpoint is not None:
            return load_tokenizer(self.checkpoint) if (self.checkpoint / TOKENIZER_FOLDER).is_dir() else None
        assert self.hf_folder is not None
        return tokenizer_of(self.hf_folder)


def open_pretrained(path: str, step: int | None) -> tuple[Pretrained, list[str]]:
    """The checkpoint or folder at ``path``, and warnings; ``ValueError`` says when it is neither."""
    root = Path(path)
    if (root / "config.json").is_file():
        return Pretrained(hf_folder=root), []
    if not (root.is_dir() and published(root)):
        raise ValueError(
            f"--pretrained-checkpoint {path}: neither a Hugging Face folder (config.json) nor a directory of "
            "checkpoints (iter_0000100)"
        )
    checkpoint, warnings = find_checkpoint(root, step)
    return Pretrained.from_checkpoint(checkpoint), warnings


def adopt_sizes(config: Config, start: Pretrained, free: set[str]) -> None:
    """Give ``config`` the sizes of what it starts from.

    ``ValueError`` for a size that was given and differs; options in ``free`` may, where they were given.
    """
    theirs, defaults = start.sizes(), ModelConfig()
    for item in fields(ModelConfig):
        given, wanted = getattr(config.size, item.name), getattr(theirs, item.name)
        chosen = given != getattr(defaults, item.name)
        if chosen and given != wanted and item.name not in free:
            flag = item.name.replace("_", "-")
            raise ValueError(f"{start.name} has --{flag} {wanted}, not {given}; leave the flag out")
        if not (chosen and item.name in free):
            setattr(config.size, item.name, wanted)
    if config.model is not None:
        # Its sizes were given one by one, and are the same.
        config.model = None


def choose_tokenizer(config: Config, start: Pretrained) -> Tokenizer:
    """The tokenizer of ``--tokenizer-model``, or the one that comes with the weights."""
    options = config.tokenizer
    if options.tokenizer_model is not None:
        return build_tokenizer(options.tokenizer_type, options.tokenizer_model, config.size.vocab_size)
    tokenizer = start.tokenizer()
    if tokenizer is None:
        raise ValueError(f"{start.name} holds no tokenizer; give one as --tokenizer-model")
    return tokenizer
