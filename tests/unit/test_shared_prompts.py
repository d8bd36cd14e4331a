"""Pairs whose prompt is in a row once: the rows, and what their tokens see, against a dense mask in float64."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megatron_steel.config.check_preference import why_not_shared
from megatron_steel.config.load import from_flat
from megatron_steel.data.batch import Batch
from megatron_steel.data.chat_batches import ChatBatchBuilder
from megatron_steel.data.chat_store import ChatReport, ChatStore
from megatron_steel.data.pair_dataset import PAIR_PLANES, PairDataset, Role, shared_tokens
from megatron_steel.model import packed
from megatron_steel.model.attention_math import capped_attention
from megatron_steel.model.window import causal_attention
from megatron_steel.objective.language import packed_documents
from megatron_steel.text.conversation import IGNORED

SIZES = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=5)
"""Tokens of the prompt and the two answers of each pair."""
LENGTH = 32


def store(sizes: list[tuple[int, int, int]]) -> ChatStore:
    """Pairs of these sizes; every prompt and every answer has ids of its own."""
    ids: list[int] = []
    labels: list[int] = []
    fresh = itertools.count(10)
    lengths = [0]
    for prompt, *answers in sizes:
        shared = list(itertools.islice(fresh, prompt))
        for answer in answers:
            own = list(itertools.islice(fresh, answer))
            ids += shared + own
            labels += [IGNORED] * prompt + own
            lengths.append(prompt + answer)
    return ChatStore(np.array(ids, np.int32), np.array(labels, np.int32), None, np.cumsum(lengths), ChatReport())


def batch_of(pairs: PairDataset, rows: list[int]) -> Batch:
    builder = ChatBatchBuilder(
        seq_length=LENGTH,
        packing=False,
        group=None,
        device=torch.device("cpu"),
        one_shape=False,
        multiple=1,
        planes=len(PAIR_PLANES),
    )
    shape = (1, len(rows))
    host = builder.read(lambda _, row: pairs.read(rows[row], 0), shape)
    return builder.build(host, np.zeros(shape, dtype=np.int64), np.ones(shape, dtype=bool))[0]


def texts_of(batch: Batch) -> list[tuple[int, list[int], list[int], list[int], list[int]]]:
    """(role, ids, positions, labels, numbers of the tokens seen) of each text of a batch that is no padding."""
    assert batch.texts is not None and batch.bounds is not None
    columns = [x.flatten().tolist() for x in (batch.tokens_BS, batch.position_ids_BS, batch.labels_BS)]
    found = []
    for text, (begin, end) in enumerate(itertools.pairwise(batch.bounds)):
        if batch.texts.roles_T[text] != Role.PADDING:
            seen = list(range(begin, end))
            if batch.seen is not None:
                seen = batch.seen.keys[slice(*batch.seen.cu_seqlens[text : text + 2].tolist())].tolist()
            found.append((int(batch.texts.roles_T[text]), *(column[begin:end] for column in columns), seen))
    return found


@given(SIZES, st.booleans())
def test_each_text_sees_its_conversation_and_nothing_else(sizes: list[tuple[int, int, int]], packing: bool) -> None:
    """Every token once, prompts once for both; what a text sees, in order, is its whole conversation."""
    source = store(sizes)
    whole, shared = (PairDataset("p", source, "", LENGTH, packing, share=share) for share in (False, True))
    assert shared.fingerprint == whole.fingerprint and len(shared) == len(whole)
    assert shared.mean_tokens - shared.mean_saved == pytest.approx(
        np.mean([shared.read(row, 0).shape[1] for row in range(len(shared))])
    )
    rows = list(range(len(whole)))
    assert [(tokens, row) for tokens, row in shared.longest(99)] == sorted(
        ((shared.read(row, 0).shape[1], row) for row in rows), key=lambda item: -item[0]
    )
    plain, batch = batch_of(whole, rows), batch_of(shared, rows)
    assert (batch.valid_tokens, batch.weight) == (plain.valid_tokens, plain.weight)
    assert batch.texts is not None and plain.texts is not None
    real = [texts.roles_T != Role.PADDING for texts in (batch.texts, plain.texts)]
    assert batch.texts.counts_T[real[0]].tolist() == plain.texts.counts_T[real[1]].tolist()
    ids = batch.tokens_BS.flatten()
    pairs = [pair for row in rows for pair in shared.rows[row].tolist()]
    for number, (ours, theirs) in enumerate(zip(texts_of(batch), texts_of(plain), strict=True)):
        role, own, positions, labels, seen = ours
        prompt = sizes[pairs[number // 2]][0]
        kept = prompt - 1 if role == Role.REJECTED else 0
        assert role == theirs[0] and ids[seen].tolist() == theirs[1]
        assert (own, positions, labels) == tuple(column[kept:] for column in theirs[1:4])
        assert batch.position_ids_BS.flatten()[seen].tolist() == list(range(len(seen)))
    assert (batch.seen is None) == all(prompt == 1 for prompt, _, _ in sizes)
    saved = sum(prompt - 1 for prompt, _, _ in sizes)
    assert batch.read_tokens is not None and plain.read_tokens == batch.read_tokens + saved


def test_prompts_that_differ_share_what_they_have_in_common() -> None:
    ids, labels = [1, 2, 3, 4, 5, 1, 2, 7, 4, 6], [IGNORED] * 4 + [5] + [IGNORED] * 4 + [6]
    source = ChatStore(np.array(ids, np.int32), np.array(labels, np.int32), None, np.array([0, 5, 10]), ChatReport())
    assert shared_tokens(source).tolist() == [2]
    assert shared_tokens(store([(4, 1, 2), (1, 1, 1)])).tolist() == [3, 0]


def dense(query: Tensor, key: Tensor, value: Tensor, batch: Batch, window: int | None, cap: float | None) -> Tensor:
    """Attention under the whole mask, built token by token from what texts see, in the inputs' precision."""
    assert batch.bounds is not None
    tokens, heads, width = query.shape
    allowed = torch.zeros(tokens, tokens, dtype=torch.bool)
    for text, (begin, end) in enumerate(itertools.pairwise(batch.bounds)):
        assert batch.seen is not None
        seen = batch.seen.keys[slice(*batch.seen.cu_seqlens[text : text + 2].tolist())].tolist()
        for place in range(begin, end):
            until = len(seen) - (end - place) + 1
            allowed[place, seen[max(0, until - window) if window else 0 : until]] = True
    share = heads // key.shape[1]
    key, value = key.repeat_interleave(share, 1), value.repeat_interleave(share, 1)
    scores = torch.einsum("qnd,knd->nqk", query, key) / math.sqrt(width)
    scores = scores if cap is None else cap * torch.tanh(scores / cap)
    return torch.einsum("nqk,knd->qnd", scores.masked_fill(~allowed, -math.inf).softmax(-1), value)


@pytest.mark.parametrize(("window", "cap"), [(None, None), (3, None), (None, 0.8), (2, 0.8)])
@given(sizes=SIZES.filter(lambda sizes: max(sizes)[0] > 1), seed=st.integers(0, 99))
def test_attention_is_that_of_the_dense_mask(
    window: int | None, cap: float | None, sizes: list[tuple[int, int, int]], seed: int
) -> None:
    pairs = PairDataset("p", store(sizes), "", LENGTH, True, share=True)
    batch = batch_of(pairs, list(range(len(pairs))))
    documents = packed_documents(batch)
    assert documents is not None and documents.max_seqlen_kv > int(batch.position_ids_BS.max())
    generator = torch.Generator().manual_seed(seed)
    tokens = batch.tokens_BS.numel()
    inputs = [torch.randn(tokens, heads, 8, generator=generator).requires_grad_() for heads in (4, 2, 2)]
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    if cap is None:
        ours = packed.packed_attention(*inputs, documents, 0.0, None, window)
    else:
        before = packed.seen_before(documents)
        attend: Any = lambda *args: capped_attention(*args, cap=cap)  # noqa: E731
        ours = packed.document_attention(*inputs, batch.bounds or [], 0.0, None, window, attend, before)
    theirs = dense(*exact, batch, window, cap)
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=2e-6)
    up = torch.randn(ours.shape, generator=generator)
    (ours * up).sum().backward()
    (theirs * up.double()).sum().backward()
    for mine, their in zip(inputs, exact, strict=True):
        assert mine.grad is not None and their.grad is not None
        torch.testing.assert_close(mine.grad.double(), their.grad, rtol=1e-4, atol=5e-6)


def test_the_varlen_kernel_gets_the_keys_of_each_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it is given, read as its documentation says (queries are the last of the keys), is our attention."""
    pairs = PairDataset("p", store([(4, 2, 3), (3, 1, 2)]), "", LENGTH, True, share=True)
    documents = packed_documents(batch_of(pairs, [0]))
    assert documents is not None and documents.seen is not None

    def kernel(query: Tensor, key: Tensor, value: Tensor, *bounds: Any, **options: Any) -> Tensor:
        assert options["window_size"] == (-1, 0) and bounds[2] >= int(bounds[0].diff().max())
        assert bounds[3] >= int(bounds[1].diff().max()) and len(key) == int(bounds[1][-1])
        outputs = []
        for text in range(len(bounds[0]) - 1):
            (q, k, v) = (
                x[slice(*edges[text : text + 2].tolist())].float().transpose(0, 1)[None]
                for x, edges in ((query, bounds[0]), (key, bounds[1]), (value, bounds[1]))
            )
            outputs.append(causal_attention(q, k, v, None, 0.0, None)[0].transpose(0, 1))
        return torch.cat(outputs)

    monkeypatch.setattr(packed, "varlen_kernel", lambda: kernel)
    generator = torch.Generator().manual_seed(0)
    tokens = int(documents.cu_seqlens_q[-1])
    inputs = [torch.randn(tokens, heads, 8, generator=generator).bfloat16() for heads in (4, 2, 2)]
    wanted = packed.packed_attention(*(x.float() for x in inputs), documents, 0.0, None)

    class Elsewhere(torch.Tensor):
        is_cpu = False

    ours = packed.packed_attention(inputs[0].as_subclass(Elsewhere), *inputs[1:], documents, 0.0, None)
    torch.testing.assert_close(ours.as_subclass(torch.Tensor), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({}, None),
        ({"window_size": 4, "qk_layernorm": True, "tensor_model_parallel_size": 2}, None),
        ({"context_parallel_size": 2}, "--context-parallel-size"),
        ({"multi_latent_attention": True}, "--multi-latent-attention"),
        ({"position_embedding_type": "alibi"}, "--position-embedding-type alibi"),
        ({"ffn_type": "softmoe_v3"}, "--ffn-type softmoe_v3, which mixes tokens"),
        ({"decoder_layer": "own_layer:scaled_layer"}, "--decoder-layer"),
        ({"use_rope_scaling": True, "rope_scaling_type": "dynamic"}, "--rope-scaling-type dynamic"),
        ({"rope_scaling_type": "yarn", "use_rope_scaling": True}, None),
    ],
)
def test_what_keeps_prompts_from_being_shared(values: dict[str, Any], why: str | None) -> None:
    assert why_not_shared(from_flat(values), "torch") == why
    assert why_not_shared(from_flat(values), "transformer_engine") == "transformer_engine layers"
