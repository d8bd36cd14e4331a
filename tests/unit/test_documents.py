"""Bounds and positions of documents against a plain reference and megatron-core's dense mask; packed attention."""

from __future__ import annotations

import functools
import inspect
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from megatron.core.datasets.gpt_dataset import _get_ltor_masks_and_position_ids
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_steel.config.check import check
from megatron_steel.config.load import from_flat
from megatron_steel.data.batch import Batch
from megatron_steel.data.document_batches import BatchBuilder
from megatron_steel.data.documents import document_bounds, positions_from, row_bounds
from megatron_steel.model import packed
from megatron_steel.train.prepare import check_end_of_document

EOD = 3
ROWS = st.tuples(st.integers(1, 3), st.integers(1, 12)).flatmap(
    lambda shape: arrays(np.int64, shape, elements=st.integers(0, 4))
)


def reference(tokens_BS: np.ndarray) -> tuple[list[int], list[int]]:
    """(bounds, positions) by walking over the tokens."""
    bounds, positions = [], []
    for row in tokens_BS.tolist():
        fresh = True
        for token in row:
            if fresh:
                bounds.append(len(positions))
            positions.append(0 if fresh else positions[-1] + 1)
            fresh = token == EOD
    return [*bounds, tokens_BS.size], positions


@given(ROWS)
def test_bounds_and_positions(tokens_BS: np.ndarray) -> None:
    bounds = document_bounds(tokens_BS, EOD)
    assert bounds.dtype == np.int32
    positions = positions_from(torch.from_numpy(bounds), tokens_BS.size)
    assert positions.dtype == torch.int64
    assert (bounds.tolist(), positions.tolist()) == reference(tokens_BS)


def build(
    tokens: np.ndarray, *, attention: bool, positions: bool, eod_mask_loss: bool = False, reads: bool = True
) -> Batch:
    """The micro-batch of windows [B, S + 1]."""
    builder = BatchBuilder(
        seq_length=tokens.shape[1] - 1,
        tensor_group=None,
        reads_data=reads,
        device=torch.device("cpu"),
        eod_id=EOD,
        eod_mask_loss=eod_mask_loss,
        reset_attention_mask=attention,
        reset_position_ids=positions,
    )
    assert builder.reads
    shape = (1, len(tokens))
    host = builder.read(lambda _, row: tokens[row], shape)
    return builder.build(host, np.zeros(shape, np.int64), np.ones(shape, dtype=bool))[0]


@given(ROWS.filter(lambda rows: rows.shape[1] > 1), st.sampled_from([(1, 0), (0, 1), (1, 1)]), st.booleans())
def test_batches_are_cut_where_megatron_cores_mask_is(
    windows: np.ndarray, flags: tuple[int, int], eod_mask_loss: bool
) -> None:
    """The blocks between the bounds, each a triangle, are the dense mask that megatron-core builds for a row."""
    attention, positions = map(bool, flags)
    batch = build(windows, attention=attention, positions=positions, eod_mask_loss=eod_mask_loss, reads=False)
    assert batch.cu_seqlens is not None and batch.cu_seqlens.dtype == torch.int32
    length = windows.shape[1] - 1
    allowed = torch.zeros(batch.tokens_BS.numel(), batch.tokens_BS.numel(), dtype=torch.bool)
    for begin, end in zip(batch.cu_seqlens[:-1].tolist(), batch.cu_seqlens[1:].tolist(), strict=True):
        allowed[begin:end, begin:end] = torch.ones(end - begin, end - begin, dtype=torch.bool).tril()
    for row, tokens_S in enumerate(batch.tokens_BS):
        hidden, loss_mask, position_ids = _get_ltor_masks_and_position_ids(
            tokens_S, EOD, positions, attention, eod_mask_loss, True
        )
        place = slice(row * length, (row + 1) * length)
        assert torch.equal(allowed[place, place], ~hidden[0])
        assert torch.equal(batch.position_ids_BS[row], position_ids)
        assert torch.equal(batch.loss_mask_BS[row], loss_mask)
    blocks = torch.block_diag(*[torch.ones(length, length)] * len(windows)).bool()
    assert not allowed[~blocks].any(), "rows never see each other"


def test_batches_without_the_flags_are_not_packed() -> None:
    windows = np.array([[1, EOD, 2, 1, 0]])
    assert build(windows, attention=False, positions=False).cu_seqlens is None


@pytest.mark.parametrize("flag", ["reset_attention_mask", "reset_position_ids"])
def test_an_end_of_document_token_is_needed(flag: str) -> None:
    with pytest.raises(ValueError, match=f"--{flag.replace('_', '-')} needs a tokenizer with an end-of-document"):
        BatchBuilder(
            seq_length=4, tensor_group=None, reads_data=True, device=torch.device("cpu"), eod_id=None, **{flag: True}
        )


@pytest.mark.parametrize("flag", ["eod_mask_loss", "reset_attention_mask", "reset_position_ids"])
def test_it_is_missed_before_a_run_begins(flag: str) -> None:
    tokenizer: Any = SimpleNamespace(eos_id=None)
    check_end_of_document(from_flat({"tokenizer_model": "folder"}), tokenizer)
    with pytest.raises(ValueError, match=f"--{flag.replace('_', '-')} needs an end-of-document token, and folder has"):
        check_end_of_document(from_flat({"tokenizer_model": "folder", flag: True}), tokenizer)


@pytest.mark.parametrize("flag", ["reset_attention_mask", "reset_position_ids"])
def test_the_local_backend_is_refused(flag: str) -> None:
    with pytest.raises(ValueError, match=f"--{flag.replace('_', '-')} does not go with --transformer-impl local"):
        check(from_flat({flag: True, "transformer_impl": "local"}))
    check(from_flat({flag: True, "transformer_impl": "torch"}))


def test_padding_does_not_join_documents() -> None:
    """Short samples end in padding, which may be the end-of-document token: bounds come before it becomes a token."""
    builder = BatchBuilder(
        seq_length=5,
        tensor_group=None,
        reads_data=True,
        device=torch.device("cpu"),
        eod_id=0,
        reset_attention_mask=True,
        reset_position_ids=True,
        padded=True,
    )
    windows = [np.array([4, 0, 5]), np.array([1, 2, 3, 4, 0, 6])]
    host = builder.read(lambda _, row: windows[row], (1, 2))
    batch = builder.build(host, np.zeros((1, 2), np.int64), np.ones((1, 2), dtype=bool))[0]
    assert batch.cu_seqlens is not None and batch.cu_seqlens.tolist() == [0, 2, 5, 10]
    assert batch.position_ids_BS.tolist() == [[0, 1, 0, 1, 2], [0, 1, 2, 3, 4]]
    assert batch.tokens_BS.tolist() == [[4, 0, 5, 0, 0], [1, 2, 3, 4, 0]]


def exact_attention(query: Tensor, key: Tensor, value: Tensor, bounds: list[int]) -> Tensor:
    """softmax(Q K^T / sqrt(d)) V under the dense mask of the documents, in the inputs' precision."""
    tokens, heads, width = query.shape
    document = torch.repeat_interleave(torch.arange(len(bounds) - 1), torch.tensor(bounds).diff())
    allowed = (document[:, None] == document[None]) & torch.ones(tokens, tokens, dtype=torch.bool).tril()
    share = heads // key.shape[1]
    key, value = key.repeat_interleave(share, 1), value.repeat_interleave(share, 1)
    scores = torch.einsum("qnd,knd->nqk", query, key) / math.sqrt(width)
    return torch.einsum("nqk,knd->qnd", scores.masked_fill(~allowed, -math.inf).softmax(-1), value)


def packed_bounds(bounds: list[int]) -> PackedSeqParams:
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    longest = int(cu_seqlens.diff().max())
    return PackedSeqParams("thd", cu_seqlens, cu_seqlens, max_seqlen_q=longest, max_seqlen_kv=longest)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("bounds", [[0, 11], [0, 1, 5, 11], [0, 4, 8, 11], [0, 1, 2, 3, 6, 9, 11], row_bounds(1, 11)])
def test_packed_attention_value_and_gradient(groups: int, bounds: list[int]) -> None:
    bounds = list(map(int, bounds))
    generator = torch.Generator().manual_seed(groups)
    shapes = ((11, 4, 8), (11, groups, 8), (11, groups, 8))
    inputs = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    ours = packed.packed_attention(*inputs, packed_bounds(bounds), 0.0, None)
    theirs = exact_attention(*exact, bounds)
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=2e-6)
    up = torch.randn(ours.shape, generator=generator)
    (ours * up).sum().backward()
    (theirs * up.double()).sum().backward()
    for mine, their in zip(inputs, exact, strict=True):
        assert mine.grad is not None and their.grad is not None
        torch.testing.assert_close(mine.grad.double(), their.grad, rtol=1e-4, atol=5e-6)


def test_neighbours_of_one_length_are_one_call() -> None:
    assert list(packed.equal_runs([0, 4, 8, 11, 12, 13], [0] * 5)) == [(2, 4, 0), (1, 3, 0), (2, 1, 0)]
    assert list(packed.equal_runs([0, 4, 8, 12], [0, 2, 2])) == [(1, 4, 0), (1, 4, 2), (1, 4, 2)]


def test_the_varlen_kernel_gets_what_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Off the CPU, 16 bits go to PyTorch's kernel, with its own names; 32 bits and dropout do not. No GPU is needed."""
    kernel = packed.varlen_kernel()
    assert kernel is not None
    bare = kernel.func if isinstance(kernel, functools.partial) else kernel
    assert bare.__module__ == "torch.nn.attention.varlen"
    if "enable_gqa" in inspect.signature(bare).parameters:  # PyTorch 2.11 has no such option.
        assert isinstance(kernel, functools.partial), "without it PyTorch 2.13 refuses fewer key than query heads"
        assert kernel.keywords == {"enable_gqa": True}
    calls = []

    def record(*args: object, **more: object) -> str:
        calls.append(inspect.signature(kernel).bind(*args, **more).arguments)
        return "kernel"

    monkeypatch.setattr(packed, "varlen_kernel", lambda: record)
    monkeypatch.setattr(packed, "document_attention", lambda *_, **__: "calls")
    bounds = packed_bounds([0, 4, 11])
    query, key = torch.empty(11, 4, 8, dtype=torch.bfloat16, device="meta"), torch.empty(11, 2, 8, device="meta")
    assert packed.packed_attention(query, key, key, bounds, 0.0, 0.5) == "kernel"
    assert calls[0]["cu_seq_q"] is calls[0]["cu_seq_k"] is bounds.cu_seqlens_q
    wanted = {"max_q": 7, "max_k": 7, "scale": 0.5, "window_size": (-1, 0)}
    assert {name: calls[0][name] for name in wanted} == wanted
    assert packed.packed_attention(query, key, key, bounds, 0.1, None) == "calls"
    assert packed.packed_attention(query.float(), key, key, bounds, 0.0, None) == "calls"
    assert packed.packed_attention(torch.empty(11, 4, 8).bfloat16(), key, key, bounds, 0.0, None) == "calls"
