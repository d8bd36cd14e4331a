"""Checkpoints written chunk by chunk are PyTorch's: its own reader and ours find every bit, and hashes are right."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_steel.checkpoint.dcp_read import StoredTensors
from megatron_steel.checkpoint.dcp_write import Chunk, balanced, write_chunks


def chunks_of(tensors: dict[str, torch.Tensor]) -> list[Chunk]:
    """A stack of layers in chunks of one layer each; any other tensor as a whole."""
    found = []
    for key, tensor in tensors.items():
        for layer in range(tensor.shape[0]) if key.startswith("stack") else [None]:
            part = tensor if layer is None else tensor[layer : layer + 1]  # a view: only its own part may be written
            offsets = (layer or 0, *[0] * (tensor.dim() - 1))
            found.append(
                Chunk(key, tuple(tensor.shape), offsets, tuple(part.shape), tensor.dtype, lambda part=part: part)  # type: ignore[misc]
            )
    return found


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_pytorch_reads_it_back(tmp_path: Path, threads: int) -> None:
    torch.manual_seed(0)
    tensors = {"stack.a": torch.randn(5, 4, 3), "b": torch.randn(7).bfloat16(), "stack.c": torch.randn(5, 2)}
    done: list[int] = []
    facts = write_chunks(tmp_path, chunks_of(tensors), threads, done.append)
    assert sum(done) == sum(tensor.nbytes for tensor in tensors.values()) and len(facts) == threads
    for name, fact in facts.items():
        content = (tmp_path / name).read_bytes()
        assert fact == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert sum(fact["bytes"] for fact in facts.values()) < 12 * 2000, "a view is not written with its whole stack"
    read = {key: torch.empty_like(tensor) for key, tensor in tensors.items()}
    dcp.load(read, checkpoint_id=tmp_path, no_dist=True)
    stored = StoredTensors(tmp_path)
    for key, tensor in tensors.items():
        assert torch.equal(read[key], tensor) and torch.equal(stored.read(key), tensor)
    assert torch.equal(stored.read("stack.a", (3,)), tensors["stack.a"][3])


def test_a_chunk_of_another_type_than_announced_is_our_mistake(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        write_chunks(tmp_path, [Chunk("a", (2,), (0,), (2,), torch.float32, lambda: torch.zeros(2).double())], 1, int)


@settings(deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=30), st.integers(1, 6))
def test_files_get_equal_shares_in_order(sizes: list[int], parts: int) -> None:
    chunks = [Chunk(str(i), (n,), (0,), (n,), torch.uint8, lambda: torch.empty(0)) for i, n in enumerate(sizes)]
    shares = balanced(chunks, parts)
    assert [chunk for share in shares for chunk in share] == chunks and all(shares) and len(shares) <= parts
    assert max(sum(c.nbytes for c in share) for share in shares) <= sum(sizes) / parts + max(sizes)
