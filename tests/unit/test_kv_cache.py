"""Rows of different lengths in one cache, and attention that does not see what is before a row: against numpy."""

from __future__ import annotations

import functools
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megatron_steel.evaluate.generate import Continuation, Sampling, Text, choose, make_draws
from megatron_steel.model.attention_math import capped_attention
from megatron_steel.model.kv_cache import KeyValueCache
from megatron_steel.model.window import causal_attention, seen_keys

CAP = 1.5


def by_hand(query: Tensor, key: Tensor, value: Tensor, window: int | None, padding: list[int], cap: float | None):  # noqa: ANN201
    """Attention of the last queries [B, N, Q, D] in float64, a query and its keys at a time; NaN for padding."""
    batch, heads, queries, width = query.shape
    per_group, columns = heads // key.shape[1], key.shape[2]
    out = np.full(query.shape, np.nan)
    for b, n, q in itertools.product(range(batch), range(heads), range(queries)):
        at = columns - queries + q
        first = max(padding[b], 0 if window is None else at - window + 1)
        if at < padding[b]:
            continue
        k, v = (x[b, n // per_group, first : at + 1].double().numpy() for x in (key, value))
        scores = k @ query[b, n, q].double().numpy() / math.sqrt(width)
        scores = scores if cap is None else cap * np.tanh(scores / cap)
        weights = np.exp(scores - scores.max())
        out[b, n, q] = weights @ v / weights.sum()
    return out


@pytest.mark.parametrize("cap", [None, CAP])
@pytest.mark.parametrize("window", [None, 3, 7])
@pytest.mark.parametrize("queries", [1, 6])
def test_nobody_sees_padding(queries: int, window: int | None, cap: float | None) -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(3, 4, queries, 8, generator=generator)
    key, value = torch.randn(2, 3, 2, 6, 8, generator=generator)
    lengths = [0, 4, 1]
    padding = torch.arange(6) < torch.tensor(lengths).unsqueeze(1)
    attend = causal_attention if cap is None else functools.partial(capped_attention, cap=cap)
    out = attend(query, key, value, window, 0.0, None, padding)
    assert out.isfinite().all(), "padding has to stay a number: other rows of the batch read its keys as 0 * key"
    wanted = by_hand(query, key, value, window, lengths, cap)
    real = ~np.isnan(wanted)
    assert real[0].all()
    np.testing.assert_allclose(out.numpy()[real], wanted[real], rtol=0, atol=1e-6)


def test_seen_keys_of_a_block() -> None:
    padding = torch.tensor([[True, True, False, False, False, False]])
    seen = seen_keys(range(1, 4), range(1, 4), 2, padding, torch.device("cpu"))
    assert seen[0, 0].tolist() == [[True, False, False], [False, True, False], [False, True, True]]


def test_rows_end_in_the_same_column() -> None:
    cache = KeyValueCache([2, 4], 7, torch.device("cpu"))
    assert cache.positions(4).tolist() == [[0, 0, 0, 1], [0, 1, 2, 3]]
    assert cache.padding(4).tolist() == [[True, True, False, False], [False] * 4]
    cache.sequence_len_offset = 4
    assert cache.positions(1).tolist() == [[2], [4]]
    assert cache.padding(1).tolist() == [[True, True, False, False, False], [False] * 5]
    assert KeyValueCache([3, 3], 7, torch.device("cpu")).padding(3) is None


def test_keys_stay_with_their_rows() -> None:
    cache = KeyValueCache([1, 3], 5, torch.device("cpu"))
    fed = torch.randn(2, 4, 2, 2, 3)  # keys and values, columns, rows
    for begin, end in ((0, 3), (3, 4)):
        keys, values = cache.extend(2, fed[0, begin:end], fed[1, begin:end])
        cache.sequence_len_offset = end
    assert torch.equal(keys, fed[0]) and torch.equal(values, fed[1])
    state = torch.tensor([[1.0], [2.0]])
    cache.key_value_memory_dict["mean", 1] = (state,)
    cache.choose_rows(torch.tensor([1, 0, 1]))
    new = torch.randn(2, 1, 3, 2, 3)
    keys, values = cache.extend(2, new[0], new[1])
    order = [1, 0, 1]
    assert torch.equal(keys, torch.cat([fed[0][:, order], new[0]]))
    assert torch.equal(values, torch.cat([fed[1][:, order], new[1]]))
    assert cache.key_value_memory_dict["mean", 1][0].tolist() == [[2.0], [1.0], [2.0]]
    assert cache.positions(1).tolist() == [[4], [2], [4]]


@given(st.integers(0, 2**32 - 1), st.floats(0, 1, exclude_max=True))
def test_a_draw_chooses_where_the_sum_of_probabilities_passes_it(seed: int, draw: float) -> None:
    generator = np.random.default_rng(seed)
    logits = generator.normal(0, 3, (2, 17)).astype(np.float32)
    logits[:, generator.integers(0, 17, 5)] = -np.inf
    chosen = choose(torch.from_numpy(logits), Sampling(), torch.full((2,), draw, dtype=torch.float64))
    weights = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
    sums = np.cumsum(weights, 1) / weights.sum(1, keepdims=True)
    for row, token in enumerate(chosen.tolist()):
        assert weights[row, token] > 0
        assert sums[row, token] >= draw - 1e-6
        assert (sums[row, token - 1] if token else 0.0) <= draw + 1e-6


def test_extreme_draws_choose_possible_tokens() -> None:
    logits = torch.tensor([[-torch.inf, 1.0, 2.0, -torch.inf]] * 2)
    draws = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert choose(logits, Sampling(), draws).tolist() == [1, 2]


def test_draws_belong_to_a_seed_and_a_stream() -> None:
    sampling = Sampling(seed=5, max_new_tokens=6)
    draws = make_draws(sampling, [(0, 0), (0, 1), (3, 0)])
    assert draws.shape == (3, 6) and draws.dtype == torch.float64
    assert len({tuple(row) for row in draws.tolist()}) == 3
    assert torch.equal(draws[2], make_draws(sampling, [(3, 0)])[0])
    assert not torch.equal(draws[2], make_draws(Sampling(seed=6, max_new_tokens=6), [(3, 0)])[0])


def test_a_text_ends_at_a_stop_or_when_it_is_full() -> None:
    text = Text(3, torch.zeros(3), [])
    assert text.take(4, frozenset({9})) and not text.take(9, frozenset({9}))
    assert (text.tokens, text.stop) == ([4], 9)
    text = Text(2, torch.zeros(2), [])
    assert text.take(4, frozenset()) and not text.take(5, frozenset())
    assert (text.tokens, text.stop) == ([4, 5], None)
    assert Continuation(tokens=[4], stop=9).with_stop == [4, 9]
    assert Continuation(tokens=[4], stop=None).with_stop == [4]
