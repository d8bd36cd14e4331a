"""Cross-entropy against PyTorch in float64: value, gradient, padding, and a vocabulary shared by two ranks."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from pool import WorkerPool

from megatron_steel.model import blocks
from megatron_steel.model.cross_entropy import cross_entropy

SEQUENCE, BATCH = 5, 3


def example(rows: int, valid: int, seed: int = 0, scale: float = 4.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [S, B, rows] and labels [S, B] below ``valid``."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(SEQUENCE, BATCH, rows, generator=generator) * scale
    return logits, torch.randint(valid, (SEQUENCE, BATCH), generator=generator)


def expected(logits: torch.Tensor, labels: torch.Tensor, valid: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses [S, B] and the gradient of sum(loss * (1 + position)) in float64, padding left out."""
    exact = logits[..., :valid].double().requires_grad_()
    losses = F.cross_entropy(exact.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
    (losses * weights()).sum().backward()
    assert exact.grad is not None
    padded = F.pad(exact.grad, (0, logits.shape[-1] - valid))
    return losses.detach(), padded


def weights() -> torch.Tensor:
    """A different incoming gradient for every token."""
    return torch.arange(1.0, 1.0 + SEQUENCE * BATCH).view(SEQUENCE, BATCH)


@settings(max_examples=40, deadline=None)
@given(
    valid=st.integers(2, 40),
    padding=st.integers(0, 9),
    seed=st.integers(0, 9),
    scale=st.sampled_from([0.1, 4, 60]),
    cached=st.sampled_from([1, 150, blocks.CACHED_ELEMENTS]),
)
def test_value_and_gradient(valid: int, padding: int, seed: int, scale: float, cached: int) -> None:
    logits, labels = example(valid + padding, valid, seed, scale)
    losses, gradient = expected(logits, labels, valid)
    leaf = logits.clone().requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "CACHED_ELEMENTS", cached)
        ours = cross_entropy(leaf * 1.0, labels, valid, None)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), losses, rtol=2e-6, atol=2e-5)
    (ours * weights()).sum().backward()
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad.double(), gradient, rtol=1e-5, atol=2e-5)
    assert not leaf.grad[..., valid:].any()


def test_padding_does_not_change_the_loss() -> None:
    logits, labels = example(30, 30)
    plain = cross_entropy(logits.clone(), labels, 30, None)
    padded = F.pad(logits, (0, 34), value=50.0)
    assert torch.equal(cross_entropy(padded, labels, 30, None), plain)


def test_bf16_logits_are_widened() -> None:
    logits, labels = example(30, 25)
    rounded = logits.bfloat16()
    losses, gradient = expected(rounded, labels, 25)
    leaf = rounded.clone().requires_grad_()
    ours = cross_entropy(leaf * 1.0, labels, 25, None)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), losses, rtol=1e-6, atol=1e-5)
    (ours * weights()).sum().backward()
    assert leaf.grad is not None and leaf.grad.dtype == torch.bfloat16
    torch.testing.assert_close(leaf.grad.double(), gradient, rtol=1e-2, atol=1e-6)


def work_shared(rows: int, valid: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses and this rank's gradient with the vocabulary split over all ranks."""
    logits, labels = example(rows, valid)
    group = dist.group.WORLD
    leaf = logits.chunk(dist.get_world_size(), -1)[dist.get_rank()].clone().requires_grad_()
    losses = cross_entropy(leaf * 1.0, labels, valid, group)
    (losses * weights()).sum().backward()
    assert leaf.grad is not None
    return losses.detach(), leaf.grad


@pytest.mark.parametrize(("rows", "valid"), [(32, 32), (32, 29), (32, 16), (32, 11)])
def test_two_ranks_share_the_vocabulary(pool: WorkerPool, rows: int, valid: int) -> None:
    """Also when the padding starts at the second rank's share, or before it: that rank holds no real row at all."""
    logits, labels = example(rows, valid)
    losses, gradient = expected(logits, labels, valid)
    replies = pool.run(2, work_shared, rows, valid)
    assert torch.equal(replies[0][0], replies[1][0])
    torch.testing.assert_close(replies[0][0].double(), losses, rtol=2e-6, atol=2e-5)
    torch.testing.assert_close(torch.cat([reply[1] for reply in replies], -1).double(), gradient, rtol=1e-5, atol=2e-5)
