"""Pairs as rows, and the texts that losses of whole answers see."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_steel.data.chat_batches import ChatBatchBuilder
from megatron_steel.data.chat_store import ChatReport, ChatStore
from megatron_steel.data.pair_dataset import PAIR_PLANES, PairDataset, Role, judged
from megatron_steel.text.conversation import IGNORED


def store(*lengths: int) -> ChatStore:
    """Conversations of these lengths; the last two tokens of each are its answer. Ids count up from 10."""
    ids, labels = [], []
    for length in lengths:
        own = [10 + len(ids) + i for i in range(length)]
        ids += own
        labels += [IGNORED] * (length - 2) + own[-2:]
    begins = np.cumsum([0, *lengths])
    return ChatStore(np.array(ids, np.int32), np.array(labels, np.int32), None, begins, ChatReport())


def dataset(packing: bool = True, desirable: np.ndarray | None = None) -> PairDataset:
    """Three pairs of 7, 6 and 9 tokens."""
    return PairDataset("p", store(4, 3, 3, 3, 5, 4), "content", 16, packing, desirable)


def test_pairs_stay_together() -> None:
    pairs = dataset()
    assert len(pairs) == 2 and sorted(pairs.rows.samples.tolist()) == [0, 1, 2]
    assert pairs.texts(0).tolist() == [4, 5, 0, 1] and pairs.texts(1).tolist() == [2, 3]
    assert pairs.describe() == "of 3 pairs, 68.8% filled" and pairs.mean_tokens == 11.0
    assert pairs.longest(1) == [(16, 0)]
    assert len(dataset(packing=False)) == 3
    assert dataset().fingerprint == pairs.fingerprint != dataset(packing=False).fingerprint


def test_planes_hold_roles_and_references() -> None:
    pairs = dataset()
    pairs.references = np.array([-1, -2, -3, -4, -5, -6], dtype=np.float32)
    planes = pairs.read(0, 0)
    assert planes.shape == (len(PAIR_PLANES), 16)
    assert planes[4].tolist() == [1] * 5 + [2] * 4 + [1] * 4 + [2] * 3
    assert planes[5].view(np.float32).tolist() == [-5] * 5 + [-6] * 4 + [-1] * 4 + [-2] * 3
    assert planes[3].tolist() == [*range(5), *range(4), *range(4), *range(3)]


def test_judged_answers_have_roles() -> None:
    answers = dataset(desirable=np.array([True, False, True]))
    assert answers.roles(0) == (Role.DESIRABLE, Role.MISMATCHED)
    assert answers.roles(1) == (Role.UNDESIRABLE, Role.MISMATCHED)
    assert answers.describe() == "of 3 judged answers, 68.8% filled"


def test_an_empty_source_is_refused() -> None:
    with pytest.raises(ValueError, match="p: holds nothing to train on"):
        PairDataset("p", store(), "content", 16, True)


def batch_of(pairs: PairDataset, **changes: object) -> list:
    options = {"seq_length": 16, "packing": pairs.packing, "group": None, "device": torch.device("cpu")}
    options |= {"one_shape": False, "multiple": 1, "planes": len(PAIR_PLANES), **changes}
    builder = ChatBatchBuilder(**options)  # type: ignore[arg-type]
    host = builder.read(lambda microbatch, row: pairs.read(row, 0), (1, 2))
    return builder.build(host, np.zeros((1, 2), dtype=np.int64), np.ones((1, 2), dtype=bool))


def test_texts_of_a_batch() -> None:
    pairs = dataset()
    pairs.references = np.array([-1, -2, -3, -4, -5, -6], dtype=np.float32)
    (batch,) = batch_of(pairs)
    texts = batch.texts
    assert batch.cu_seqlens.tolist() == [0, 5, 9, 13, 16, 19, 22, 32]
    assert texts.roles_T.tolist() == [1, 2, 1, 2, 1, 2, 0] and texts.rows_T.tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert texts.counts_T.tolist() == [2, 2, 2, 2, 2, 2, 0]
    assert texts.references_T.tolist() == [-5, -6, -1, -2, -3, -4, 0]
    assert texts.is_last_BS.flatten().nonzero().flatten().tolist() == [4, 8, 12, 15, 18, 21, 31]
    assert texts.of_token_BS[1].tolist() == [4] * 3 + [5] * 3 + [6] * 10
    assert (judged(texts), batch.weight, batch.valid_tokens) == (3, 3.0, 12)


def test_mismatched_answers_are_not_trained() -> None:
    (batch,) = batch_of(dataset(desirable=np.array([True, False, True])))
    assert (batch.weight, batch.valid_tokens) == (3.0, 6)
    assert batch.texts.roles_T.tolist() == [3, 5, 3, 5, 4, 5, 0]


def test_single_pairs_are_texts_of_a_short_row() -> None:
    (batch,) = batch_of(dataset(packing=False))
    assert batch.tokens_BS.shape == (2, 7) and batch.cu_seqlens.tolist() == [0, 4, 7, 10, 13, 14]


def test_context_ranks_know_whole_texts() -> None:
    (whole,) = batch_of(dataset())
    halves = [batch_of(dataset(), multiple=4, context_rank=rank, context_size=2)[0] for rank in range(2)]
    for half in halves:
        assert half.texts.counts_T.tolist() == whole.texts.counts_T.tolist() and half.weight == 1.5
    counted = sum(
        torch.zeros(7).index_add(0, half.texts.of_token_BS.flatten(), half.loss_mask_BS.flatten()) for half in halves
    )
    assert counted.tolist() == whole.texts.counts_T.tolist()
