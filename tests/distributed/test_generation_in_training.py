"""Text generated between training steps: what a model without a cache chooses, on every layout, leaving no trace."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pool import WorkerPool
from tiny_run import LAYOUTS, ROWS, Trace, keep_weights, open_session, options, take_steps, write_data
from torch import Tensor

STEPS, SAMPLES, SEED, TOP_P, STREAMS = 3, 3, 7, 0.9, [4, 0, 9]
PROMPTS = [[7, 14, 21], [5, 12, 19, 26, 33, 40, 47, 54, 61], [80, 87]]
# Most texts end at one of these, at different lengths; some go on to the limit.
STOPS = list(range(60, 180))
Texts = list[list[tuple[list[int], int | None]]]


def generate_texts(session: Any, temperature: float, top_p: float, new: int = 12) -> Texts:
    from megatron_steel.evaluate.generate import Sampling, continue_prompts

    sampling = Sampling(max_new_tokens=new, temperature=temperature, top_p=top_p, seed=SEED)
    samples = SAMPLES if temperature else 1
    rows = continue_prompts(session.model, PROMPTS, sampling, STOPS, session.world, samples, STREAMS)
    return [[(one.tokens, one.stop) for one in row] for row in rows]


def work_alternate(flat: dict[str, Any], generates: bool) -> tuple[Trace, list[Texts]]:
    """Train, and generate after every step."""
    trace, texts = Trace(), []
    with open_session(flat) as session:
        for _ in range(STEPS):
            take_steps(session, 1, trace)
            if generates:
                # Not only the likely ones: between nearly equal tokens, rounding decides about the last of them.
                texts += [generate_texts(session, 1.0, top_p=1.0), generate_texts(session, 0.0, top_p=1.0)]
                assert all(chunk.training for chunk in session.model.chunks)
        keep_weights(session, trace)
    return trace, texts


@torch.no_grad()
def without_cache(model: Any, prompt: list[int], draws_N: Tensor, temperature: float) -> tuple[list[int], int | None]:
    """A continuation, for which the whole text is fed again for every token."""
    from megatron_steel.evaluate.generate import Sampling, choose

    ids = list(prompt)
    for draw in draws_N:
        tokens_BS = torch.tensor([ids])
        positions_BS = torch.arange(len(ids)).unsqueeze(0)
        logits = model.language_models()[0](tokens_BS, positions_BS, None)[:, -1, : model.vocab_size]
        token = int(choose(logits, Sampling(temperature=temperature, top_p=TOP_P), draw.unsqueeze(0)))
        if token in STOPS:
            return ids[len(prompt) :], token
        ids.append(token)
    return ids[len(prompt) :], None


def work_compare(flat: dict[str, Any]) -> list[tuple[Texts, Texts]]:
    """(with a cache, without) after some training: sampled and greedy, of some tokens and of all the model has."""
    from megatron_steel.evaluate.generate import Sampling, make_draws

    found = []
    with open_session(flat) as session:
        take_steps(session, STEPS, Trace())
        limit = session.model.language_models()[0].max_sequence_length
        for temperature, new in ((1.0, 12), (0.0, 12), (1.0, 40)):
            ours = generate_texts(session, temperature, TOP_P, new)
            for chunk in session.model.chunks:
                chunk.eval()
            sampling, wanted = Sampling(max_new_tokens=new, seed=SEED), []
            for prompt, stream in zip(PROMPTS, STREAMS, strict=True):
                draws = make_draws(sampling, [(stream, sample) for sample in range(len(ours[0]))])
                room = min(new, limit - len(prompt))
                wanted.append([without_cache(session.model, prompt, row[:room], temperature) for row in draws])
            found.append((ours, wanted))
    return found


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_data(tmp_path_factory.mktemp("data"))


# A cache of our own attention, with each kind of what may stand around it, and megatron-core's.
MODELS: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "windows and norms of heads": {
        "model_family": "qwen3", "add_qkv_bias": False, "qk_layernorm": True, "window_size": 5
    },
    "learned positions": {
        "model_family": "gpt2", "add_qkv_bias": False, "position_embedding_type": "learned_absolute",
        "normalization": "LayerNorm", "activation": "gelu_tanh", "gated_linear_unit": False,
        "add_bias_linear": True, "num_query_groups": None,
    },
    "experts": {
        "model_family": "qwen3_moe", "add_qkv_bias": False, "qk_layernorm": True, "num_experts": 4,
        "moe_router_topk": 2, "moe_ffn_hidden_size": 24, "moe_router_pre_softmax": True,
    },
    "another backend": {"transformer_impl": "local"},
}  # fmt: skip


@pytest.mark.parametrize("model", MODELS)
def test_a_cache_changes_nothing(pool: WorkerPool, prefix: str, model: str) -> None:
    """Also up to the last position of the model, which prompts of different lengths reach after different numbers."""
    for ours, wanted in pool.run(1, work_compare, options(prefix, MODELS[model]), join=False, timeout=120)[0]:
        assert ours == wanted
        lengths = [len(tokens) for row in ours for tokens, _ in row]
        assert len(set(lengths)) > 1, "texts of one length prove little about those that end early"


@pytest.mark.parametrize("layout", ["1", "tp2-sp", "pp2", "tp2-pp2", "dp2-overlapped"])
def test_training_goes_on_as_if_nothing_had_been(pool: WorkerPool, prefix: str, layout: str) -> None:
    flat = options(prefix, LAYOUTS[layout].flags, hidden_dropout=0.1, attention_dropout=0.1)
    alone = pool.run(LAYOUTS[layout].ranks, work_alternate, flat, False, join=False)
    among = pool.run(LAYOUTS[layout].ranks, work_alternate, flat, True, join=False)
    for (ours, _), (theirs, _) in zip(among, alone, strict=True):
        assert ours.losses == theirs.losses and ours.grad_norms == theirs.grad_norms
        assert ours.weights.keys() == theirs.weights.keys()
        assert all(np.array_equal(ours.weights[name], theirs.weights[name]) for name in ours.weights)


def test_layouts_generate_the_same(pool: WorkerPool, prefix: str) -> None:
    found = {}
    for layout in ("1", "tp2-sp", "pp2", "tp2-pp2", "dp2-overlapped"):
        replies = pool.run(
            LAYOUTS[layout].ranks, work_alternate, options(prefix, LAYOUTS[layout].flags), True, join=False
        )
        assert all(texts == replies[0][1] for _, texts in replies), "ranks disagree"
        found[layout] = replies[0][1]
    assert all(texts == found["1"] for texts in found.values())
    sampled = found["1"][0]
    assert len({tuple(tokens) for row in sampled for tokens, _ in row}) > len(PROMPTS), "samples are all the same"
    stops = [stop for texts in found["1"] for row in texts for _, stop in row]
    assert None in stops and set(stops) - {None} <= set(STOPS) and len(set(stops)) > 2
    assert max(token for row in sampled for tokens, _ in row for token in tokens) < ROWS


@pytest.mark.parametrize(
    ("layout", "wish"), [("cp2", "--context-parallel-size 1"), ("pp2-interleaved", "no virtual pipeline stages")]
)
def test_layouts_that_cannot_generate(pool: WorkerPool, prefix: str, layout: str, wish: str) -> None:
    flat = options(prefix, LAYOUTS[layout].flags)
    with pytest.raises(ValueError, match=f"generating text needs {wish}"):
        pool.run(LAYOUTS[layout].ranks, work_alternate, flat, True, join=False)
