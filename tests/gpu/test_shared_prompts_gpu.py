"""Shared prompts on a GPU: PyTorch's kernel for documents of many lengths takes queries for the last of their keys."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_steel.data.batch import Seen
from megatron_steel.data.chat_batches import seen_keys
from megatron_steel.model.packed import PackedDocuments, packed_attention, varlen_kernel
from megatron_steel.runtime import device

pytestmark = pytest.mark.gpu


def documents(where: torch.device) -> PackedDocuments:
    """A pair whose prompt is short, one whose prompt is long, a text alone."""
    bounds, before = np.array([0, 90, 170, 500, 520, 600], dtype=np.int32), np.array([0, 7, 0, 300, 0])
    keys, cu_seqlens = seen_keys(bounds, before)
    seen = Seen(
        before=before.tolist(),
        keys=torch.from_numpy(keys).to(where),
        cu_seqlens=torch.from_numpy(cu_seqlens).to(where),
    )
    edges = torch.from_numpy(bounds).to(where)
    return PackedDocuments("thd", edges, edges, max_seqlen_q=600, max_seqlen_kv=600, bounds=bounds.tolist(), seen=seen)


@pytest.mark.parametrize("window", [None, 40])
def test_attention_is_that_of_a_cpu(window: int | None) -> None:
    """Values and gradients in bf16 against fp32 on the CPU; queries taken for the first keys would be far off."""
    assert varlen_kernel() is not None
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(600, heads, 64, generator=generator).bfloat16() for heads in (4, 2, 2)]
    up = torch.randn(600, 4, 64, generator=generator)
    exact = [tensor.float().requires_grad_() for tensor in inputs]
    wanted = packed_attention(*exact, documents(torch.device("cpu")), 0.0, None, window)
    (wanted * up).sum().backward()
    ours = [tensor.to(device.device()).requires_grad_() for tensor in inputs]
    found = packed_attention(*ours, documents(device.device()), 0.0, None, window)
    (found.float() * up.to(found.device)).sum().backward()
    torch.testing.assert_close(found.float().cpu(), wanted, rtol=2e-2, atol=2e-2)
    for mine, their in zip(ours, exact, strict=True):
        assert mine.grad is not None and their.grad is not None
        torch.testing.assert_close(mine.grad.float().cpu(), their.grad, rtol=5e-2, atol=5e-2)
