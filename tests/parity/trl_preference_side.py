"""TRL's trainers of preferences (1.16) in float32 on a CPU, step by step: what ours is compared with.

What they make of a data set are columns of token ids, which are given to them here. A step is one micro-batch: ORPO's,
SimPO's and KTO's trainers take the mean over micro-batches of other things than pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

IGNORED = -100


class Pair(NamedTuple):
    """Token ids of a prompt, of its two answers (judged, and mismatched for KTO), and the judgement."""

    prompt: list[int]
    first: list[int]
    second: list[int]
    good: bool


@dataclass(kw_only=True)
class TrlRun:
    """What TRL trained: of each step the loss and its metrics."""

    losses: list[float] = field(default_factory=list)
    metrics: list[dict[str, float]] = field(default_factory=list)


class Watched(Trainer):
    """Writes down what each optimizer step is logged with."""

    run: TrlRun

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Called by the trainer after every step."""
        super().log(logs, *args, **kwargs)
        if "loss" in logs:
            self.run.metrics.append(self.state.log_history[-1])

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As it is; each micro-batch's loss is its part of the step's."""
        loss = super().training_step(*args, **kwargs)
        if len(self.run.losses) <= self.state.global_step:
            self.run.losses.append(0.0)
        self.run.losses[self.state.global_step] += loss.item()
        return loss

    def _get_train_sampler(self, dataset: Any = None) -> torch.utils.data.Sampler[int]:
        """The rows in their order."""
        return torch.utils.data.SequentialSampler(self.train_dataset)

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        """It is prepared."""
        return dataset

    def tokenize_row(self, feature: dict[str, Any], model: Any = None) -> dict[str, Any]:
        """ORPO's and SimPO's columns."""
        prompt = feature["prompt_ids"]
        row = {"prompt_input_ids": prompt, "prompt_attention_mask": [1] * len(prompt)}
        for name in ("chosen", "rejected"):
            answer = feature[f"{name}_ids"]
            row[f"{name}_input_ids"] = prompt + answer
            row[f"{name}_attention_mask"] = [1] * len(prompt + answer)
            row[f"{name}_labels"] = [IGNORED] * len(prompt) + answer
        return row


class WatchedDPO(Watched, DPOTrainer):
    """DPO and its family: the mean over the pairs of a step."""


class WatchedKTO(Watched, KTOTrainer):
    """KTO; ``KL_completion_ids`` are the mismatched answers."""


class WatchedSimPO(Watched, CPOTrainer):
    """SimPO is a loss of CPO's trainer, without CPO's own term."""


class WatchedORPO(Watched, ORPOTrainer):
    """ORPO with the likelihood of the answer, as in the paper (eq. 2, 6) and LLaMA-Factory.

    TRL's own first term is the mean over all tokens of all prompts and chosen answers of a micro-batch.
    """

    def concatenated_forward(self, model: Any, batch: Any) -> Any:
        """TRL's, but for its first term."""
        chosen, *rest = super().concatenated_forward(model, batch)
        return (chosen, *rest[:3], -chosen.mean(), *rest[4:])


def columns(kind: str, pairs: Sequence[Pair]) -> dict[str, list[Any]]:
    """What a trainer reads."""
    table: dict[str, list[Any]] = {"prompt_ids": [pair.prompt for pair in pairs]}
    if kind == "kto":
        return table | {
            "completion_ids": [pair.first for pair in pairs],
            "KL_completion_ids": [pair.second for pair in pairs],
            "label": [pair.good for pair in pairs],
        }
    table |= {"chosen_ids": [pair.first for pair in pairs], "rejected_ids": [pair.second for pair in pairs]}
    # ORPO's and SimPO's trainers want texts too, before they ask for ids.
    return table if kind == "dpo" else table | {name: [""] * len(pairs) for name in ("prompt", "chosen", "rejected")}


KINDS: dict[str, tuple[type[Watched], type[TrainingArguments], dict[str, Any]]] = {
    "dpo": (WatchedDPO, DPOConfig, {"dataset_num_proc": None}),
    "kto": (WatchedKTO, KTOConfig, {}),
    "orpo": (WatchedORPO, ORPOConfig, {"max_length": 4096}),
    "simpo": (WatchedSimPO, CPOConfig, {"max_length": 4096, "loss_type": "simpo", "cpo_alpha": 0.0}),
}


def train_preferences(
    kind: str, folder: str, output: Path, pairs: Sequence[Pair], *, batch: int, micro_batch: int, **options: Any
) -> TrlRun:
    """Train on all pairs once in their order, ``batch`` of them in a step, with PyTorch's AdamW.

    The result is written to ``output``. ``options`` are those of the trainer: loss_type, beta, learning_rate, ...
    """
    assert len(pairs) % batch == 0 and batch % micro_batch == 0
    trainer_class, arguments_class, special = KINDS[kind]
    limits = {"max_length": None} if kind in ("dpo", "kto") else {}
    arguments = arguments_class(
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
        **{**limits, **special, **options},
    )
    models = [
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa") for _ in range(2)
    ]
    trainer = trainer_class(
        model=models[0],
        args=arguments,
        train_dataset=Dataset.from_dict(columns(kind, pairs)),
        processing_class=AutoTokenizer.from_pretrained(folder),
        **({"ref_model": models[1]} if kind in ("dpo", "kto") else {}),
    )
    trainer.run = TrlRun()
    trainer.train()
    trainer.save_model(str(output))
    return trainer.run
