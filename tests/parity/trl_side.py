"""TRL's ``SFTTrainer`` (1.16) in float32 on a CPU, step by step: what finetuning is compared with.

What it does, as read in its source and seen here:

* The loss of a step is the sum over trained labels divided by their number in the whole step: ``Trainer`` counts the
  labels that are not -100 over all micro-batches of an optimizer step (``num_items_in_batch``, the first label of a row
  left out) and ``compute_loss`` divides each micro-batch's sum by it. So gradient accumulation changes nothing. Its
  weights are counts: a weight of a turn or of a sample does not exist.
* Loss per token comes from a fused output layer that works in tiles and returns log-probabilities; on a CPU it scores
  every position and masks afterwards.
* ``packing=True`` with the strategy "bfd" sets ``padding_free``: the rows of a micro-batch are joined to one, and the
  first label of each conversation is set to -100. It is documented for flash attention alone, but with no attention
  mask in the batch, transformers 5 finds the bounds of conversations where ``position_ids`` restart and gives sdpa a
  mask of blocks: they are kept apart on a CPU too, by a dense (tokens x tokens) mask of all rows of the micro-batch.
* A data set with ``input_ids``, ``labels`` and, packed, ``seq_lengths`` is taken as it is with
  ``skip_prepare_dataset``. bf16 and gradient checkpointing are on unless switched off.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

IGNORED = -100
Row = list[tuple[list[int], list[int]]]
"""Conversations of a row, each its ids and, of the same length, its labels: the id itself or -100."""


@dataclass(kw_only=True)
class TrlRun:
    """What TRL trained."""

    losses: list[float] = field(default_factory=list)
    """Of each step."""
    token_losses: list[np.ndarray] = field(default_factory=list)
    """Of each step, the losses of its trained tokens in the order of its rows."""


class Watched(SFTTrainer):
    """Writes down the losses of each optimizer step."""

    def watch(self, run: TrlRun) -> None:
        """Fill ``run``; once, before training."""
        self.run = run
        self.model.register_forward_hook(self._forward_ended)
        self.add_callback(StepEnds(self))
        self._begin()

    def _begin(self) -> None:
        self.loss, self.parts = 0.0, []

    def _forward_ended(self, _module: Any, _inputs: Any, outputs: Any) -> None:
        kept = outputs.label_mask
        self.parts.append(-outputs.log_probs.detach()[kept].numpy())

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As it is; each micro-batch's loss is its part of the step's."""
        loss = super().training_step(*args, **kwargs)
        self.loss += loss.item()
        return loss

    def end_step(self) -> None:
        """Take down a step."""
        self.run.losses.append(self.loss)
        self.run.token_losses.append(np.concatenate(self.parts))
        self._begin()


class StepEnds(TrainerCallback):
    """Tells a `Watched` when an optimizer step is over."""

    def __init__(self, trainer: Watched) -> None:
        self.trainer = trainer

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Called by the trainer."""
        self.trainer.end_step()


def settings(output: Path, **more: Any) -> SFTConfig:
    """Float32, one thread of work, no reports, rows in their order."""
    return SFTConfig(
        output_dir=str(output),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        train_sampling_strategy="sequential",
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **more,
    )


def as_dataset(rows: Sequence[Row], packed: bool) -> Dataset:
    """Rows as TRL would have made them itself."""
    columns: dict[str, list[list[int]]] = {
        "input_ids": [[token for ids, _ in row for token in ids] for row in rows],
        "labels": [[label for _, labels in row for label in labels] for row in rows],
    }
    if packed:
        columns["seq_lengths"] = [[len(ids) for ids, _ in row] for row in rows]
    else:
        assert all(len(row) == 1 for row in rows)
    return Dataset.from_dict(columns)


def train_trl(
    folder: str, output: Path, rows: Sequence[Row], *, packed: bool, batch: int, micro_batch: int, **options: Any
) -> TrlRun:
    """Train the model in ``folder`` on all rows once, ``batch`` of them in a step, with PyTorch's AdamW.

    The result is written to ``output``. ``options`` are SFTConfig's: learning_rate, adam_beta1, ...
    """
    assert len(rows) % batch == 0 and batch % micro_batch == 0
    arguments = settings(
        output,
        packing=packed,
        dataset_kwargs={"skip_prepare_dataset": True},
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=batch // micro_batch,
        num_train_epochs=1,
        optim="adamw_torch",
        lr_scheduler_type="constant",
        **options,
    )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    trainer = Watched(
        model=model,
        args=arguments,
        train_dataset=as_dataset(rows, packed),
        processing_class=AutoTokenizer.from_pretrained(folder),
    )
    run = TrlRun()
    trainer.watch(run)
    trainer.train()
    assert len(run.losses) == len(rows) // batch
    trainer.save_model(str(output))
    return run


def prepare_trl(folder: str, output: Path, data: Sequence[dict[str, Any]], **options: Any) -> list[dict[str, Any]]:
    """Rows with ``input_ids`` and ``labels`` that TRL makes of conversations; ``options`` are SFTConfig's."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    template = options.pop("chat_template", None)
    if template is not None:
        tokenizer.chat_template = template
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    dataset = Dataset.from_list(list(data))
    trainer = SFTTrainer(
        model=model, args=settings(output, **options), train_dataset=dataset, processing_class=tokenizer
    )
    return list(trainer.train_dataset)
