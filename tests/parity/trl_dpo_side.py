"""TRL's ``DPOTrainer`` (1.16) in float32 on a CPU, step by step: what preferences are compared with.

Its loss is the mean over the pairs of a micro-batch, and ``Trainer`` takes the mean over micro-batches: where they are
of equal size, the mean over the pairs of the step. Rewards are beta times the log-ratio of the whole answer. What it
makes of a data set are the columns ``prompt_ids``, ``chosen_ids`` and ``rejected_ids``, which are given to it here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

Pair = tuple[list[int], list[int], list[int]]
"""Ids of a prompt, of the chosen answer and of the rejected one."""
WATCHED = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen")


@dataclass(kw_only=True)
class TrlDpoRun:
    """What TRL trained: of each step the loss and its metrics."""

    losses: list[float] = field(default_factory=list)
    metrics: list[dict[str, float]] = field(default_factory=list)


class Watched(DPOTrainer):
    """Writes down what each optimizer step is logged with."""

    run: TrlDpoRun

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Called by the trainer after every step."""
        means = {name: sum(values) / len(values) for name, values in self._metrics["train"].items() if values}
        if "loss" in logs:
            self.run.metrics.append({name: means[name] for name in WATCHED if name in means})
        super().log(logs, start_time)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As it is; each micro-batch's loss is its part of the step's."""
        loss = super().training_step(*args, **kwargs)
        if len(self.run.losses) <= self.state.global_step:
            self.run.losses.append(0.0)
        self.run.losses[self.state.global_step] += loss.item()
        return loss


def train_dpo(
    folder: str, output: Path, pairs: Sequence[Pair], *, batch: int, micro_batch: int, **options: Any
) -> TrlDpoRun:
    """Train on all pairs once in their order, ``batch`` of them in a step, with PyTorch's AdamW.

    The result is written to ``output``. ``options`` are DPOConfig's: loss_type, beta, learning_rate, ...
    """
    assert len(pairs) % batch == 0 and batch % micro_batch == 0
    arguments = DPOConfig(
        output_dir=str(output),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=batch // micro_batch,
        num_train_epochs=1,
        optim="adamw_torch",
        lr_scheduler_type="constant",
        max_length=None,
        dataset_num_proc=None,
        **options,
    )
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    dataset = Dataset.from_dict({name: [pair[i] for pair in pairs] for i, name in enumerate(names)})
    models = [
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa") for _ in range(2)
    ]
    Watched._get_train_sampler = lambda self, *_: torch.utils.data.SequentialSampler(dataset)  # type: ignore[method-assign]
    Watched._prepare_dataset = lambda self, dataset, *_: dataset  # type: ignore[method-assign]
    trainer = Watched(
        model=models[0],
        ref_model=models[1],
        args=arguments,
        train_dataset=dataset,
        processing_class=AutoTokenizer.from_pretrained(folder),
    )
    trainer.run = TrlDpoRun()
    trainer.train()
    trainer.save_model(str(output))
    return trainer.run
