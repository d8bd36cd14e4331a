"""How the next token is chosen: against a numpy reference of the filtered distribution; stop tokens end a row."""

from __future__ import annotations

from pathlib import Path

import hf_models
import numpy as np
import pytest
import torch
from pool import WorkerPool

from megatron_steel.evaluate.generate import Sampling, choose
from megatron_steel.runtime import world as runtime

DRAWS = 40_000


def filtered(logits: np.ndarray, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """The distribution after temperature, then top-k, then top-p over what is left, renormalised (float64)."""
    scaled = logits.astype(np.float64) / temperature
    order = np.argsort(-scaled, kind="stable")
    if top_k:
        order = order[:top_k]
    weights = np.exp(scaled[order] - scaled[order[0]])
    weights /= weights.sum()
    count = int(np.searchsorted(np.cumsum(weights), top_p)) + 1 if top_p < 1.0 else len(order)
    result = np.zeros(len(logits))
    result[order[:count]] = weights[:count] / weights[:count].sum()
    return result


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 1.0), (0.7, 0, 1.0), (1.5, 5, 1.0), (1.0, 0, 0.8), (1.0, 8, 0.6), (2.0, 1, 1.0), (1.0, 0, 0.01)],
)
def test_samples_follow_the_filtered_distribution(temperature: float, top_k: int, top_p: float) -> None:
    logits = np.random.default_rng(0).normal(0, 2, 30).astype(np.float32)
    wanted = filtered(logits, temperature, top_k, top_p)
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    rows = torch.from_numpy(logits).expand(DRAWS, -1)
    drawn = choose(rows, sampling, torch.from_numpy(np.random.default_rng(3).random(DRAWS))).numpy()
    counts = np.bincount(drawn, minlength=30)
    assert set(np.flatnonzero(counts)) <= set(np.flatnonzero(wanted)), "a token outside the filter was drawn"
    # Five standard deviations of a binomial count, for each token.
    spread = 5 * np.sqrt(DRAWS * wanted * (1 - wanted)) + 1
    assert np.all(np.abs(counts - DRAWS * wanted) <= spread)


def test_temperature_zero_takes_the_most_likely() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0], [9.0, -1.0, 2.0]])
    assert choose(logits, Sampling(temperature=0), torch.zeros(2)).tolist() == [1, 0]


def work_stop(checkpoint: str, layout: tuple[int, int]) -> tuple[list[list[int]], list[list[int]], list[list[int]]]:
    """(free, stopped at the sixth token of the second row, sampled) continuations."""
    from megatron_steel.checkpoint.verify import load_for_inference
    from megatron_steel.evaluate.generate import generate

    world = runtime.start(tensor_model_parallel_size=layout[0], pipeline_model_parallel_size=layout[1])
    model, _ = load_for_inference(Path(checkpoint), world)
    prompts, greedy = hf_models.prompts(model.vocab_size), Sampling(max_new_tokens=16, temperature=0)
    free = generate(model, prompts, greedy, [], world)
    stopped = generate(model, prompts, greedy, [free[1][5]], world)
    sampled = generate(model, prompts, Sampling(max_new_tokens=16, top_k=20, top_p=0.9, seed=7), [], world)
    return free, stopped, sampled


def test_stop_tokens_end_a_row_and_layouts_sample_alike(pool: WorkerPool, tmp_path: Path) -> None:
    hf_models.make_model("qwen2-untied").save_pretrained(tmp_path / "hf")
    folders = {"model": (str(tmp_path / "hf"), str(tmp_path / "ours"))}
    checkpoint = pool.run(1, hf_models.work_import, folders, join=False)[0]["model"]
    results = {}
    for layout, (tensor, pipeline) in hf_models.LAYOUTS.items():
        replies = pool.run(tensor * pipeline, work_stop, checkpoint, (tensor, pipeline), join=False)
        assert all(reply == replies[0] for reply in replies), "ranks disagree about the text"
        results[layout] = replies[0]
    free, stopped, sampled = results["1"]
    stop = free[1][5]
    for whole, cut in zip(free, stopped, strict=True):
        assert cut == (whole[: whole.index(stop)] if stop in whole else whole)
    assert len(stopped[1]) <= 5
    assert sampled != free
    assert all(result == results["1"] for result in results.values())
