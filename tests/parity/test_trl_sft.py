"""A finetune against TRL's ``SFTTrainer``: the same masks from the same conversations, and the same ten steps.

TRL reads the messages, writes them by a template and masks them by itself; from us it takes only which conversations
are in which row, and the order of rows.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pool import WorkerPool
from tiny_chats import chat_options, write_chats, write_model
from tiny_run import Trace, keep_weights, largest_relative, open_session, take_steps
from trl_side import IGNORED, Row, prepare_trl, train_trl

STEPS, BATCH, MICRO_BATCH, SEQ_LENGTH = 10, 8, 2, 128
# ChatML with what TRL asks for to know answers; an answer's end token belongs to it, the newline after it does not.
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ADAMW = {"learning_rate": 2e-3, "adam_beta1": 0.9, "adam_beta2": 0.95, "adam_epsilon": 1e-5, "weight_decay": 0.1}
OURS = {"lr": 2e-3, "lr_decay_style": "constant", "adam_beta1": 0.9, "adam_beta2": 0.95, "weight_decay": 0.1}


def write_qwen2(folder: Path) -> str:
    """A random Qwen2, whose biases are not zero, with the bundled tokenizer."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    path = write_model(folder)
    sizes = json.loads((folder / "config.json").read_text())
    kept = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    config = Qwen2Config(
        **{name: sizes[name] for name in kept},
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.1,
        tie_word_embeddings=True,
    )
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    return path


@dataclass(kw_only=True)
class Ours:
    """What we trained, and on what."""

    rows: list[list[int]] = field(default_factory=list)
    """Numbers of the conversations in each row, in the order of training."""
    token_losses: list[np.ndarray] = field(default_factory=list)
    """Of each step, the losses of its trained tokens."""
    trace: Trace = field(default_factory=Trace)


def work_finetune(flat: dict[str, Any]) -> Ours:
    """Ten steps; the objective also keeps the losses of tokens."""
    from megatron_steel.objective.language import NextToken

    ours = Ours()

    class Kept(NextToken):
        def begin_step(self, *_: Any) -> None:
            ours.token_losses.append(np.empty(0, np.float32))

        def share(self, losses_BS: Any, batch: Any, step_weight: float) -> Any:
            kept = losses_BS.detach().reshape(batch.loss_mask_BS.shape)[batch.loss_mask_BS != 0].numpy()
            ours.token_losses[-1] = np.concatenate([ours.token_losses[-1], kept])
            return super().share(losses_BS, batch, step_weight)

    with open_session(flat) as session:
        session.objective = Kept()
        loader = session.loader
        _, _, windows = loader.ledger.samples(0, STEPS * BATCH)
        ours.rows = [loader._datasets[0].rows[int(window)].tolist() for window in windows]
        take_steps(session, STEPS, ours.trace)
        keep_weights(session, ours.trace)
    return ours


def work_read(flat: dict[str, Any]) -> Trace:
    """The weights of a folder under our names."""
    trace = Trace()
    with open_session(flat) as session:
        keep_weights(session, trace)
    return trace


def work_labels(flat: dict[str, Any]) -> list[tuple[list[int], list[int]]]:
    """Ids and labels of every conversation."""
    with open_session(flat) as session:
        store = session.loader._datasets[0].store
        spans = [slice(begin, end) for begin, end in pairwise(store.begins_n)]
        return [(store.ids_N[span].tolist(), store.labels_N[span].tolist()) for span in spans]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_chats(tmp_path_factory.mktemp("data") / "chats.jsonl", 90)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_ten_steps_are_those_of_trl(pool: WorkerPool, data: str, tmp_path: Path, family: str) -> None:
    model = (
        write_model(tmp_path / "model", initializer_range=0.1) if family == "llama" else write_qwen2(tmp_path / "model")
    )
    chats = [json.loads(line) for line in Path(data).read_text().splitlines()]
    encoded = prepare_trl(model, tmp_path / "trl", chats, assistant_only_loss=True, chat_template=CHATML)
    assert len(encoded) == len(chats) and max(len(row["input_ids"]) for row in encoded) <= SEQ_LENGTH
    for packed in (True, False):
        flat = chat_options(
            model,
            data,
            packing=packed,
            seq_length=SEQ_LENGTH,
            micro_batch_size=MICRO_BATCH,
            global_batch_size=BATCH,
            train_iters=STEPS,
        )
        ours = pool.run(1, work_finetune, flat | OURS, join=False)[0]
        assert packed == any(len(row) > 1 for row in ours.rows)
        rows: list[Row] = [
            [(encoded[number]["input_ids"], encoded[number]["labels"]) for number in row] for row in ours.rows
        ]
        output = tmp_path / f"trl-{packed}"
        theirs = train_trl(
            model, output, rows, packed=packed, batch=BATCH, micro_batch=MICRO_BATCH, max_grad_norm=1.0, **ADAMW
        )
        assert largest_relative(ours.trace.losses, theirs.losses) < 1e-6
        assert ours.trace.losses[-1] < 0.9 * ours.trace.losses[0], "something must have been learnt"
        for mine, other in zip(ours.token_losses, theirs.token_losses, strict=True):
            assert mine.shape == other.shape, "other tokens are trained"
            assert np.abs(mine - other).max() < 1e-5
        read = pool.run(1, work_read, flat | {"pretrained_checkpoint": str(output)}, join=False)[0]
        assert read.weights.keys() == ours.trace.weights.keys()
        difference = {name: np.abs(ours.trace.weights[name] - read.weights[name]).max() for name in read.weights}
        assert max(difference.values()) < 2e-6


def test_answers_to_prompts_are_masked_as_by_trl(pool: WorkerPool, data: str, tmp_path: Path) -> None:
    """With its own reading of prompts and completions, and the tokenizer's own template; it trains the last newline."""
    model = write_model(tmp_path / "model")
    chats = [json.loads(line)["messages"] for line in Path(data).read_text().splitlines()]
    pairs = [{"prompt": turns[:-1], "completion": turns[-1:]} for turns in chats]
    encoded = prepare_trl(model, tmp_path / "trl", pairs)
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    flat = chat_options(model, str(tmp_path / "pairs.jsonl"), seq_length=SEQ_LENGTH, train_newline=True)
    found = pool.run(1, work_labels, flat, join=False)[0]
    assert IGNORED in found[0][1]
    assert found == [(row["input_ids"], row["labels"]) for row in encoded]
