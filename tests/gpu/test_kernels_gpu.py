"""The Triton kernels compiled: against float64 at odd sizes, against PyTorch at real ones, and the memory they need."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_steel.model.kernels import choice

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (torch.cuda.is_available() and choice.has_triton()), reason="needs a GPU and Triton"),
]

TYPES = [torch.float32, torch.bfloat16, torch.float16]
MIB = 2**20


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("strided", [False, True])
def test_against_float64(dtype: torch.dtype, strided: bool) -> None:
    from kernel_checks import Draw, check_cross_entropy, check_rms_norm, check_rotate, check_swiglu

    for seed, (rows, width) in enumerate([(1, 1), (5, 37), (1000, 128), (700, 2048), (33, 5000), (40, 16384)]):
        draw = Draw(seed, dtype, "cuda")
        for centred in (False, True):
            check_rms_norm(rows, width, draw, strided, centred)
        check_swiglu(rows, width, draw, strided)
    for sizes in [(1, 1, 1, 1, 2, 2), (33, 3, 8, 4, 64, 64), (17, 2, 4, 1, 128, 32), (9, 1, 2, 7, 80, 60)]:
        check_rotate(*sizes, Draw(0, dtype, "cuda"), strided)
    for rows, width, valid, shares in [(1, 1, 1, 1), (7, 100, 150, 2), (65, 50304, 50257, 1), (9, 5000, 4999, 2)]:
        check_cross_entropy(rows, width, valid, Draw(0, dtype, "cuda"), shares)


def test_more_logits_than_32_bits_count() -> None:
    """14,200 tokens of 151,936 logits: 2.16e9, whose last rows lie beyond 2^31."""
    from megatron_steel.model.cross_entropy import cross_entropy

    rows, width, valid = 14_200, 151_936, 151_900
    assert rows * width > 2**31
    logits = torch.randn(rows, width, device="cuda", dtype=torch.bfloat16)
    labels = torch.randint(valid, (rows,), device="cuda")
    tail = logits[-3:].float()[:, :valid].requires_grad_()
    wanted = F.cross_entropy(tail, labels[-3:], reduction="none")
    wanted.sum().backward()
    losses = cross_entropy(logits.requires_grad_(), labels, valid, None)
    torch.testing.assert_close(losses[-3:], wanted, rtol=1e-5, atol=1e-5)
    losses.sum().backward()
    assert logits.grad is not None and tail.grad is not None
    torch.testing.assert_close(logits.grad[-3:, :valid].float(), tail.grad, rtol=1e-2, atol=1e-6)
    assert not logits.grad[:, valid:].any()


def test_loss_needs_the_logits_and_nothing_like_them() -> None:
    """16,384 tokens: forward and backward pass in the memory of the bf16 logits, and of the gradient of the inputs."""
    from megatron_steel.model.cross_entropy import cross_entropy

    tokens, width, hidden = 16_384, 151_936, 256
    inputs, table = (torch.randn(rows, hidden, device="cuda", dtype=torch.bfloat16) for rows in (tokens, width))
    labels = torch.randint(width, (tokens,), device="cuda")
    inputs.requires_grad_()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    cross_entropy(inputs @ table.t(), labels, width, None).mean().backward()
    peak = torch.cuda.max_memory_allocated() - before
    assert peak < 2 * tokens * width + 128 * MIB, f"{peak / MIB:.0f} MiB, the logits are {2 * tokens * width / MIB:.0f}"


def near(ours: Tensor, theirs: Tensor, share: float = 2e-2) -> None:
    scale = theirs.float().abs().max().item()
    assert (ours.float() - theirs.float()).abs().max().item() <= share * scale


def test_layers_at_real_sizes() -> None:
    """H 2048, F 8192, 16,384 tokens in bf16: the layers' way against fp32 compositions, results and gradients."""
    from megatron_steel.model import mlp, norms

    x, weight = (torch.randn(*shape, 2048, device="cuda", dtype=torch.bfloat16) for shape in ((4096, 4), ()))
    both = torch.randn(4096, 4, 2 * 8192, device="cuda", dtype=torch.bfloat16)

    def swiglu(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        return F.silu(gate) * up

    cases = [
        (lambda a, b: norms.rms_norm(a, b, 1e-6), lambda a, b: F.rms_norm(a, (2048,), b, 1e-6), (x, weight)),
        (mlp.swiglu, swiglu, (both,)),
    ]
    for ours, plain, inputs in cases:
        leaves, wide = ([x.detach().to(kind).requires_grad_() for x in inputs] for kind in (x.dtype, torch.float32))
        out, wanted = ours(*leaves), plain(*wide)
        near(out, wanted)
        grad = torch.randn_like(out)
        found, truth = torch.autograd.grad(out, leaves, grad), torch.autograd.grad(wanted, wide, grad.float())
        for mine, theirs in zip(found, truth, strict=True):
            near(mine, theirs)
        again = torch.autograd.grad(ours(*leaves), leaves, grad)
        assert all(map(torch.equal, found, again)), "the order of sums never changes"


@pytest.mark.parametrize("batch", [1, 3])
def test_rotated_heads_enter_flash_attention_and_the_projection_without_copies(batch: int) -> None:
    from megatron_steel.model.attention import split_and_rotate
    from megatron_steel.model.window import causal_attention

    sequence, groups, width = 256, 4, 64
    mixed = torch.randn(sequence, batch, groups * 4 * width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    angles = torch.randn(sequence, 1, 1, 1, width // 2, device="cuda")
    cos, sin = angles.cos().repeat(1, 1, 1, 1, 2).bfloat16(), angles.sin().bfloat16()
    heads = [x.permute(1, 2, 0, 3) for x in split_and_rotate(mixed, cos, sin, groups, width)]
    fused = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    for backends in ([SDPBackend.FLASH_ATTENTION], fused):
        with sdpa_kernel(backends):
            out = causal_attention(*heads, None, 0.0, None).permute(2, 0, 1, 3)
        assert out.is_contiguous(), "the projection would copy it"
        out.sum().backward(retain_graph=True)
    assert mixed.grad is not None and mixed.grad.isfinite().all()


@pytest.mark.parametrize("groups", [8, 2])
def test_windows_take_flash_attention(groups: int) -> None:
    """A window over [B, N, S, D] in bf16, against the masks that the CPU has, in fp32."""
    from megatron_steel.model import window
    from megatron_steel.model.varlen import varlen_kernel

    assert varlen_kernel() is not None, "PyTorch 2.11 or newer"
    generator = torch.Generator("cuda").manual_seed(0)
    inputs = [torch.randn(2, heads, 200, 64, device="cuda", generator=generator) for heads in (8, groups, groups)]
    narrow = [x.bfloat16().requires_grad_() for x in inputs]
    exact = [x.detach().float().cpu().requires_grad_() for x in narrow]
    out, wanted = (window.causal_attention(*leaves, 50, 0.0, None) for leaves in (narrow, exact))
    near(out.cpu(), wanted)
    grad = torch.randn(out.shape, device="cuda", generator=generator).bfloat16()
    found = torch.autograd.grad(out, narrow, grad)
    for mine, theirs in zip(found, torch.autograd.grad(wanted, exact, grad.float().cpu()), strict=True):
        near(mine.cpu(), theirs)


@pytest.mark.parametrize("groups", [8, 2])
def test_packed_documents_take_flash_attention(groups: int) -> None:
    """Fewer key heads too, for which PyTorch 2.11 documents nothing; against one document after another in fp32."""
    from megatron_steel.model import packed

    bounds = [0, 5, 133, 200]
    edges = torch.tensor(bounds, dtype=torch.int32, device="cuda")
    documents = packed.PackedDocuments(
        qkv_format="thd", cu_seqlens_q=edges, cu_seqlens_kv=edges, max_seqlen_q=128, max_seqlen_kv=128
    )
    narrow = [torch.randn(200, heads, 64, device="cuda").bfloat16().requires_grad_() for heads in (8, groups, groups)]
    exact = [x.detach().float().cpu().requires_grad_() for x in narrow]
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = packed.packed_attention(*narrow, documents, 0.0, None)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    wanted = packed.document_attention(*exact, bounds, 0.0, None)
    near(out.cpu(), wanted)
    grad = torch.randn_like(out)
    found = torch.autograd.grad(out, narrow, grad)
    for mine, theirs in zip(found, torch.autograd.grad(wanted, exact, grad.float().cpu()), strict=True):
        near(mine.cpu(), theirs)


def test_fp32_with_groups_keeps_no_scores() -> None:
    """The memory of causal attention in fp32 grows with the sequence, not with its square."""
    from megatron_steel.model.window import causal_attention

    length = 4096
    inputs = [torch.randn(1, heads, length, 64, device="cuda", requires_grad=True) for heads in (8, 2, 2)]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    causal_attention(*inputs, None, 0.0, None).sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 4 * 8 * length * length
