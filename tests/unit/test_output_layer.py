"""The loss without all logits: value and gradients against float64, and memory that does not grow with the sequence."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from pool import WorkerPool
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_steel.config.check_memory import (
    CHUNK,
    CHUNK_IN_PLACE,
    LARGE_IN_PLACE,
    LARGE_LOGITS,
    tokens_at_once,
)
from megatron_steel.model.cross_entropy import cross_entropy
from megatron_steel.model.output import ChunkedCrossEntropy, capped

HIDDEN = 8


def example(tokens: int, rows: int, valid: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Hidden states, weight, labels, and another incoming gradient for each token."""
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, HIDDEN, generator=generator).to(dtype)
    weight = torch.randn(rows, HIDDEN, generator=generator).to(dtype)
    labels = torch.randint(valid, (tokens,), generator=generator)
    return [hidden, weight, labels, torch.rand(tokens, generator=generator) * (labels % 3 > 0)]


def exact(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, grad: torch.Tensor, valid: int, cap: float | None
) -> list[torch.Tensor]:
    """Losses and both gradients in float64."""
    leaves = [x.double().requires_grad_() for x in (hidden, weight)]
    logits = capped(leaves[0] @ leaves[1].t(), cap)[:, :valid]
    losses = F.cross_entropy(logits, labels, reduction="none")
    losses.backward(grad.double())
    return [losses.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(2, 20),
    chunk=st.integers(1, 20),
    valid=st.integers(2, 40),
    padding=st.integers(0, 9),
    cap=st.sampled_from([None, 2.0]),
)
def test_value_and_gradients(tokens: int, chunk: int, valid: int, padding: int, cap: float | None) -> None:
    hidden, weight, labels, grad = example(tokens, valid + padding, valid)
    truth = exact(hidden, weight, labels, grad, valid, cap)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    losses = ChunkedCrossEntropy.apply(*leaves, labels, chunk, valid, cap, None)
    losses.backward(grad)
    for ours, theirs in zip((losses.detach(), *(leaf.grad for leaf in leaves)), truth, strict=True):
        assert ours is not None and ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_as_with_all_logits(dtype: torch.dtype, cap: float | None) -> None:
    """The same losses to the bit, and gradients that differ by the order of sums alone."""
    hidden, weight, labels, grad = example(50, 70, 66, dtype)
    results = []
    for chunk in (None, 16):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
        if chunk is None:
            losses = cross_entropy(capped(leaves[0] @ leaves[1].t(), cap), labels, 66, None)
        else:
            losses = ChunkedCrossEntropy.apply(*leaves, labels, chunk, 66, cap, None)
        losses.backward(grad)
        results.append([losses.detach(), *(leaf.grad for leaf in leaves)])
    plain, ours = results
    near = {"rtol": 1e-6, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}
    for a, b in zip(ours, plain, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, **near)
    torch.testing.assert_close(ours[0], plain[0], rtol=1e-6, atol=1e-6)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
        result = func(*args, **(kwargs or {}))
        for part in result if isinstance(result, tuple | list) else [result]:
            if isinstance(part, torch.Tensor):
                self.elements = max(self.elements, part.untyped_storage().nbytes() // part.element_size())
        return result


def test_no_tensor_grows_with_tokens_times_vocabulary() -> None:
    rows, chunk = 300, 16
    for tokens in (64, 512):
        hidden, weight, labels, grad = example(tokens, rows, rows)
        with Largest() as largest:
            losses = ChunkedCrossEntropy.apply(
                hidden.requires_grad_(), weight.requires_grad_(), labels, chunk, rows, None, None
            )
            torch.autograd.backward(losses, grad)
        assert largest.elements == max(chunk * rows, tokens * HIDDEN)
        with Largest() as largest:
            cross_entropy(hidden.detach() @ weight.detach().t(), labels, rows, None)
        assert largest.elements == tokens * rows


def work_share(chunk: int) -> list[torch.Tensor]:
    """Losses and gradients with a vocabulary on two ranks."""
    hidden, weight, labels, grad = example(30, 40, 37)
    group = dist.group.WORLD
    mine = weight.chunk(2)[dist.get_rank()].clone().requires_grad_()
    losses = ChunkedCrossEntropy.apply(hidden.requires_grad_(), mine, labels, chunk, 37, 2.0, group)
    losses.backward(grad)
    assert hidden.grad is not None and mine.grad is not None
    dist.all_reduce(hidden.grad)
    return [losses.detach(), hidden.grad, mine.grad]


def test_vocabulary_on_two_ranks(pool: WorkerPool) -> None:
    truth = exact(*example(30, 40, 37), 37, 2.0)
    first, second = pool.run(2, work_share, 7)
    for index in range(2):
        assert torch.equal(first[index], second[index])
        torch.testing.assert_close(first[index].double(), truth[index], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.cat([first[2], second[2]]).double(), truth[2], rtol=1e-5, atol=1e-5)


def test_tokens_at_once() -> None:
    rows = 151_936
    most = LARGE_LOGITS // (4 * rows)
    assert [tokens_at_once(None, tokens, rows) for tokens in (most, most + 1)] == [most, CHUNK]
    most = LARGE_IN_PLACE // (2 * rows)
    assert most > 16384, "a large micro-batch of 16-bit logits"
    assert [tokens_at_once(None, tokens, rows, 2) for tokens in (most, most + 1)] == [most, CHUNK_IN_PLACE]
    assert tokens_at_once(0, 10**6, rows) == tokens_at_once(0, 10**6, rows, 2) == 10**6
    assert [tokens_at_once(64, tokens, 10) for tokens in (32, 64, 65)] == [32, 64, 64]
