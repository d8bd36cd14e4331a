"""Sharing a pair's prompt changes no training: on every family whose attention has something of its own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hf_models import make_model
from pool import WorkerPool
from tiny_chats import TOKENIZER, chat_options, write_pairs
from tiny_run import LAYOUTS, Trace, keep_weights, largest_relative, start_world, take_steps

from megatron_steel.config.load import from_flat
from megatron_steel.objective.texts import TextLogps

STEPS = 2
# Grouped heads, biases, norms of queries and keys (megatron-core's own attention path), rotation of some channels,
# none in some layers, windows, softcaps, two rotary bases, positions that are learned, norms after blocks, experts.
NAMES = (
    "llama-tied", "llama-yarn", "qwen2-untied", "qwen2-window", "qwen3", "gpt-neox", "olmo2",
    "smollm3-window", "gemma2", "gemma3", "gpt2", "mixtral",
)  # fmt: skip
ROWS = 4096  # of the bundled tokenizer


@dataclass
class Found:
    """What a run found."""

    trace: Trace
    references: np.ndarray
    """Log-probabilities of all conversations before the first step."""
    gradients: dict[str, np.ndarray]
    """Of the first step."""
    tokens: int
    """Computed in the first step, with padding."""


def work_share(options: dict[str, Any]) -> Found:
    """Two steps of a run, and what it knows before."""
    from megatron_steel.objective.language import run_micro_batches
    from megatron_steel.runtime.signals import StopRequest
    from megatron_steel.train.prepare_preference import prepare_preference
    from megatron_steel.train.run import build_session

    prepared = prepare_preference(from_flat(options))
    (dataset,) = prepared.datasets.values()
    world = start_world(options)
    session = build_session(prepared, world, StopRequest(), 0.0)
    trace = Trace()
    with session.loader:
        batches = session.loader.step(0)
        session.objective.begin_step(session.model, batches, world)
        run_micro_batches(session.model, batches, 1.0, forward_only=False, share=session.objective.share)
        gradients = {
            path: parameter.main_grad.float().numpy().copy()
            for path, parameter in session.model.language_models()[0].named_parameters()
            if parameter.requires_grad
        }
        for chunk in session.model.chunks:
            chunk.zero_grad_buffer()
        take_steps(session, STEPS, trace)
        keep_weights(session, trace)
    session.sinks.close()
    tokens = sum(batch.tokens_BS.numel() for batch in batches)
    return Found(trace, dataset.references.copy(), gradients, tokens)


def check_same(ours: Found, wanted: Found) -> None:
    """Everything but how much was computed; fp32 noise of sums over hundreds of tokens."""
    assert ours.tokens < 0.9 * wanted.tokens
    np.testing.assert_allclose(ours.references, wanted.references, rtol=1e-6)
    assert largest_relative(ours.trace.losses, wanted.trace.losses) < 2e-6
    for path, gradient in wanted.gradients.items():
        assert np.abs(ours.gradients[path] - gradient).max() <= 2e-6 * max(np.abs(gradient).max(), 1.0), path
    for row, other in zip(ours.trace.rows, wanted.trace.rows, strict=True):
        for name in (name for name in row if name.startswith(("rewards/", "logps/", "logits/", "tokens/"))):
            assert row[name] == pytest.approx(other[name], rel=1e-5, abs=2e-5), name


def flat(folder: Path, name: str, judged: bool = False) -> dict[str, Any]:
    """A run of a family."""
    from transformers import AutoTokenizer

    data = write_pairs(folder / "pairs.jsonl", 12, judged=judged)
    make_model(name, vocab_size=ROWS).save_pretrained(folder / name)
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(folder / name)
    return chat_options(str(folder / name), data, seq_length=128, global_batch_size=2)


@pytest.mark.parametrize("name", NAMES)
def test_a_family_trains_the_same(pool: WorkerPool, tmp_path: Path, name: str) -> None:
    options = flat(tmp_path, name)
    (shared,) = pool.run(1, work_share, options, join=False)
    (plain,) = pool.run(1, work_share, {**options, "share_prompts": False}, join=False)
    check_same(shared, plain)


@pytest.mark.parametrize(
    ("name", "layout", "changes"),
    [
        ("qwen3", "1", {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}),
        ("qwen3", "tp2-sp", {"packing": False}),
        ("qwen3", "pp2", {"loss_type": "kto"}),
        ("qwen2-untied", "1", {"loss_type": "rm"}),
        ("llama-tied", "dp2-sharded", {"lora_rank": 4, "reference": "lora-base", "global_batch_size": 4}),
    ],
)
def test_a_run_trains_the_same(
    pool: WorkerPool, tmp_path: Path, name: str, layout: str, changes: dict[str, Any]
) -> None:
    options = flat(tmp_path, name, judged=changes.get("loss_type") == "kto") | changes | LAYOUTS[layout].flags
    shared = pool.run(LAYOUTS[layout].ranks, work_share, options, join=False)
    plain = pool.run(LAYOUTS[layout].ranks, work_share, {**options, "share_prompts": False}, join=False)
    for ours, wanted in zip(shared, plain, strict=True):
        check_same(ours, wanted)


def work_strangers(options: dict[str, Any]) -> list[np.ndarray]:
    """Log-probabilities of all conversations: as they are, with another rejected answer, with another prompt."""
    from megatron_steel.model.build import build_model
    from megatron_steel.objective.language import run_micro_batches
    from megatron_steel.train.prepare_preference import prepare_preference
    from megatron_steel.train.references import load_weights
    from megatron_steel.train.run import deal_batches

    prepared = prepare_preference(from_flat(options))
    (dataset,) = prepared.datasets.values()
    world = start_world(options)
    model = build_model(prepared.config, prepared.state.vocab_size, world, training=False)
    assert prepared.reference is not None
    load_weights(prepared.reference, model, prepared.config.size)
    _, builder = deal_batches(prepared, world)
    rows = next(row for row in range(len(dataset)) if len(dataset.rows[row]) > 1)
    dataset.store = store = replace(
        dataset.store, ids_N=dataset.store.ids_N.copy(), labels_N=dataset.store.labels_N.copy()
    )

    def logps() -> np.ndarray:
        host = builder.read(lambda *_: dataset.read(rows, 0), (1, 1))
        batches = builder.build(host, np.zeros((1, 1), dtype=np.int64), np.ones((1, 1), dtype=bool))
        assert batches[0].seen is not None
        share = TextLogps(world.context_group).share
        with torch.no_grad():
            (output,) = run_micro_batches(model, batches, 1.0, forward_only=True, share=share)
        return output["logps"].numpy().copy()

    answers = [logps()]
    first = int(dataset.texts(rows)[0])
    rejected = slice(*store.begins_n[first + 1 : first + 3])
    trained = np.flatnonzero(store.labels_N[rejected] >= 0) + rejected.start
    store.ids_N[trained] = store.labels_N[trained] = 100 + np.arange(len(trained))
    answers.append(logps())
    for number in (first, first + 1):
        store.ids_N[store.begins_n[number]] = 99
    answers.append(logps())
    return answers


def test_answers_and_pairs_are_strangers(pool: WorkerPool, tmp_path: Path) -> None:
    """Bit for bit: what one text becomes, no other one sees."""
    (found,) = pool.run(1, work_strangers, flat(tmp_path, "llama-tied"), join=False)
    plain, other_answer, other_prompt = found
    assert plain[0] == other_answer[0] and plain[1] != other_answer[1]
    assert (plain[2:] == other_answer[2:]).all()
    assert (other_prompt[:2] != other_answer[:2]).all() and (other_prompt[2:] == plain[2:]).all()
    assert len(plain) >= 4
