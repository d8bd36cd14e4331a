"""Options about conversations: what a finetune is trained on, and which of its tokens count."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

TrainTurns = Literal["all", "last", "first"]
LossWeighting = Literal["token", "sample", "square"]
Truncation = Literal["keep_header", "keep_eos", "proportional"]


@dataclass(kw_only=True)
class ChatConfig:
    """Conversations, for megatron_steel.finetune."""

    pretrained_checkpoint: str | None = None
    """Where weights and tokenizer come from: a checkpoint directory of ours, or a Hugging Face folder."""
    train_data: list[str] = field(default_factory=list)
    """Conversations: files, folders, patterns or names of dataset_info; or WEIGHT and one of them in turns."""
    valid_data: list[str] = field(default_factory=list)
    """Conversations that are evaluated, each as NAME=DATA or DATA."""
    dataset_info: str | None = None
    """A LLaMA-Factory dataset_info.json that gives names to data; in the folder of the data when unset."""
    chat_template: str | None = None
    """A built-in template, a .jinja file, or "tokenizer" for the one it has; what fits the tokenizer when unset."""
    system_text: str | None = None
    """A system turn for conversations without one."""
    system_probability: float = 1.0
    """Share of those conversations that get it, chosen by the seed."""
    train_turns: TrainTurns = "all"
    """Which answers of a conversation are trained."""
    train_on_prompt: bool = False
    """Train what is before the answers too."""
    mask_history: bool = False
    """Train the last answer alone; a conversation that is too long loses its oldest turns."""
    train_newline: bool = False
    """Train the newline after an answer's end token too."""
    num_epochs: float | None = None
    """Passes over the conversations; train_iters follows from it."""
    train_tokens: int | None = None
    """Tokens to see, without padding; train_iters follows from it."""
    packing: bool = True
    """Fill samples of seq_length with whole conversations that do not see each other."""
    loss_weighting: LossWeighting = "token"
    """What counts the same: every trained token, every conversation (sample), or between them, by its root (square)."""
    truncation: Truncation = "keep_header"
    """What a conversation too long loses: ends of prompts stay (keep_header), and of answers (keep_eos), or neither."""
    min_answer_tokens: int = 1
    """Tokens an answer keeps, if it has them, before its prompt keeps any."""
    max_turn_bytes: int = 1_000_000
    """A longer turn makes a row a bad one."""
    max_bad_rows: float = 0.0
    """Share of rows that may be bad; they are counted, named, and left out."""
    max_untrained: float = 0.05
    """Share of conversations that may be cut so far that nothing of them is trained; they are counted and left out."""
    inspect: int = 0
    """Print so many conversations as tokens with what is trained, and end."""
    preflight: bool = True
    """Before the first step, run the longest and widest micro-batch once, so that what does not fit shows at once."""
