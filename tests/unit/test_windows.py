"""Windows against numpy's concatenation of the documents, and splits against megatron-core."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from megatron.core.datasets.blended_megatron_dataset_config import (
    convert_split_vector_to_split_matrix,
    parse_and_normalize_split,
)
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_steel.data.windows import WindowedDataset, split_documents


def write(prefix: Path, documents: list[list[list[int]]], dtype: type = np.int32) -> str:
    """Write documents (each a list of sequences) with megatron-core's own builder; returns the prefix."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for sequences in documents:
        builder.add_document(torch.tensor(sum(sequences, [])), [len(sequence) for sequence in sequences])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def numbered(lengths: list[int]) -> list[list[list[int]]]:
    """Documents of these lengths whose tokens count on from 0, so that every token tells where it is from."""
    ends = np.cumsum(lengths).tolist()
    return [[list(range(end - length, end))] for end, length in zip(ends, lengths, strict=True)]


@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=25),
    seq_length=st.integers(1, 20),
    seed=st.integers(0, 3),
    shuffle=st.booleans(),
    data=st.data(),
)
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_windows_are_cut_from_the_concatenated_documents(
    tmp_path: Path, lengths: list[int], seq_length: int, seed: int, shuffle: bool, data: st.DataObject
) -> None:
    prefix = write(tmp_path / "d", numbered(lengths))
    first = data.draw(st.integers(0, len(lengths) - 1))
    last = data.draw(st.integers(first + 1, len(lengths)))
    starts = np.concatenate([[0], np.cumsum(lengths)])
    total = int(starts[last] - starts[first])
    if total <= seq_length:
        with pytest.raises(ValueError, match=f"hold {total} tokens, less than one window of seq_length {seq_length}"):
            WindowedDataset(prefix, seq_length, (first, last), seed, shuffle)
        return
    dataset = WindowedDataset(prefix, seq_length, (first, last), seed, shuffle)
    windows = np.stack([dataset[i] for i in range(len(dataset))])
    assert windows.dtype == np.int64
    assert len(dataset) == (total - 1) // seq_length
    assert dataset.num_tokens == total
    assert dataset.dropped_tokens == total - 1 - len(dataset) * seq_length
    # One token of overlap: the label side of all windows, after the very first token, is the stream itself.
    stream = np.concatenate([windows[0, :1], windows[:, 1:].ravel()])
    assert np.array_equal(windows[1:, 0], windows[:-1, -1])
    documents = [np.arange(starts[d], starts[d + 1]) for d in range(first, last)]
    if not shuffle:
        assert np.array_equal(stream, np.concatenate(documents)[: len(stream)])
        return
    # Every document that starts in the stream runs on to its end (or the stream's), and none comes twice.
    begins = {int(document[0]): document for document in documents}
    rest = stream
    while rest.size:
        document = begins.pop(int(rest[0]))
        assert np.array_equal(rest[: len(document)], document[: len(rest)])
        rest = rest[len(document) :]


def test_sentence_split_documents_are_read_whole(tmp_path: Path) -> None:
    documents = [[[1, 2], [3], [4, 5, 6]], [[7]], [[8, 9], [10, 11]]]
    prefix = write(tmp_path / "d", documents)
    dataset = WindowedDataset(prefix, 4, shuffle_documents=False)
    assert [dataset[i].tolist() for i in range(len(dataset))] == [[1, 2, 3, 4, 5], [5, 6, 7, 8, 9]]
    assert dataset.dropped_tokens == 2
    assert WindowedDataset(prefix, 3, (1, 3), shuffle_documents=False)[0].tolist() == [7, 8, 9, 10]
    shuffled = WindowedDataset(prefix, 1, seed=3)
    stream = np.concatenate([shuffled[0][:1], *(window[1:] for window in shuffled)]).tolist()
    assert any(stream[i : i + 6] == [1, 2, 3, 4, 5, 6] for i in range(len(stream)))


def test_empty_documents_and_uint16(tmp_path: Path) -> None:
    documents = [[[]], [[1, 60000, 3]], [[]], [[]], [[4, 5]], [[]]]
    dataset = WindowedDataset(write(tmp_path / "d", documents, np.uint16), 2, shuffle_documents=False)
    assert [dataset[i].tolist() for i in range(len(dataset))] == [[1, 60000, 3], [3, 4, 5]]


def test_fingerprint_is_content_range_and_order(tmp_path: Path) -> None:
    """Not the path and not the seq_length; what changes the content of windows changes the fingerprint."""
    (tmp_path / "moved").mkdir()
    prefix = write(tmp_path / "a", numbered([5, 6, 7, 8]))
    moved = write(tmp_path / "moved" / "b", numbered([5, 6, 7, 8]))
    same = {WindowedDataset(p, n, (0, 3), 1).fingerprint for p in (prefix, moved) for n in (3, 4)}
    assert len(same) == 1
    others = [
        WindowedDataset(prefix, 3, (0, 4), 1),
        WindowedDataset(prefix, 3, (1, 3), 1),
        WindowedDataset(prefix, 3, (0, 3), 2),
        WindowedDataset(prefix, 3, (0, 3), 1, shuffle_documents=False),
        WindowedDataset(write(tmp_path / "c", numbered([5, 6, 8, 7])), 3, (0, 3), 1),
    ]
    assert len(same | {dataset.fingerprint for dataset in others}) == 6


def test_document_order_is_stable_and_depends_on_the_seed(tmp_path: Path) -> None:
    prefix = write(tmp_path / "a", numbered([1] * 12))
    orders = [[int(w[0]) for w in WindowedDataset(prefix, 1, seed=seed)] for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]


def test_bad_windows_and_ranges(tmp_path: Path) -> None:
    prefix = write(tmp_path / "a", numbered([5, 5]))
    dataset = WindowedDataset(prefix, 4)
    for window in (-1, len(dataset)):
        with pytest.raises(IndexError, match=f"window {window} is not in"):
            dataset[window]
    with pytest.raises(ValueError, match=r"documents \[1, 3\) are not in a file of 2"):
        WindowedDataset(prefix, 4, (1, 3))


@given(
    st.lists(st.floats(0, 1000, allow_nan=False), min_size=1, max_size=3).filter(lambda shares: sum(shares) > 1e-6),
    st.integers(0, 10**9),
)
def test_splits_are_megatron_cores(shares: list[float], count: int) -> None:
    # Megatron-LM reads digits and dots only, so the shares are written without exponents.
    text = ",".join(f"{share:.6f}" for share in shares)
    if sum(map(float, text.split(","))) == 0:
        return
    matrix = convert_split_vector_to_split_matrix(parse_and_normalize_split(text))
    ranges = split_documents(text, count)
    for bounds, (first, last) in zip(matrix, ranges, strict=True):
        if bounds is None:
            assert first == last
        else:
            assert (first, last) == (int(round(bounds[0] * float(count))), int(round(bounds[1] * float(count))))


@pytest.mark.parametrize("split", ["", "a,b", "1,2,3,4", "-1,2", "0,0,0", "nan", "inf,1"])
def test_bad_splits_are_refused(split: str) -> None:
    with pytest.raises(ValueError, match="not one to three shares"):
        split_documents(split, 10)
