"""Parameters and FLOPs of models with experts: against transformers' models, and the published numbers."""

from __future__ import annotations

import pytest
import torch
from test_hf_experts import PUBLISHED, configured
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_steel.config.check import check
from megatron_steel.config.load import from_flat
from megatron_steel.plan import estimate
from megatron_steel.plan.estimate import flops_per_token
from megatron_steel.plan.parameters import count_parameters, feed_forward


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_equal_transformers(name: str) -> None:
    size = configured(PUBLISHED[name]).size
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**PUBLISHED[name]))
    theirs = {path: weight.numel() for path, weight in model.named_parameters()}
    count = count_parameters(size, size.vocab_size or 0)
    assert count.total == sum(theirs.values())
    last = f".{size.num_layers - 1}."
    assert count.per_layer == sum(n for path, n in theirs.items() if last in path)
    routed = sum(n for path, n in theirs.items() if ".mlp.experts." in path)
    assert size.num_experts is not None
    assert count.active == count.total - routed // size.num_experts * (size.num_experts - size.moe_router_topk)
    norms = sum(n for path, n in theirs.items() if "norm" in path)
    assert count.matmul == count.active - norms - theirs["model.embed_tokens.weight"]


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        # The papers' and model cards' numbers: 46.7B and 12.9B, 30.5B and 3.3B, 15.7B and 2.4B, 236B and 21B, 671B and
        # 37B, the last three without the embedding.
        ("Mixtral-8x7B", 46_702_792_704, 12.9),
        ("Qwen3-30B-A3B", 30_532_122_624, 3.3),
        ("DeepSeek-V2-Lite", 15_706_484_224, 2.4),
        ("DeepSeek-V2", 235_741_434_880, 21.0),
        ("DeepSeek-V3", 671_026_404_352, 37.0),
    ],
)
def test_published_numbers(name: str, total: int, active: float) -> None:
    size = configured(PUBLISHED[name]).size
    count = count_parameters(size, size.vocab_size or 0)
    assert count.total == total
    outside = count.embedding if name.startswith("DeepSeek") else 0
    assert (count.active - outside) / 1e9 == pytest.approx(active, rel=0.025)


def test_scores_of_latent_attention() -> None:
    """Queries are 192 wide and values 128: a key costs a head 192 + 128 multiply-adds."""
    size = configured(PUBLISHED["DeepSeek-V3"]).size
    longer, shorter = (flops_per_token(size, length, size.vocab_size or 0) for length in (4096, 0))
    assert longer - shorter == 6 * 61 * 128 * (192 + 128) * 4096
    assert shorter == 6 * count_parameters(size, size.vocab_size or 0).matmul


def test_tensor_parallel_ranks_share_experts_but_not_the_router() -> None:
    size = configured(PUBLISHED["DeepSeek-V3"]).size
    part = feed_forward(size, 3)
    assert part.whole == 256 * 7168
    assert part.split == 3 * 7168 * 2048 and part.experts == 256 * 3 * 7168 * 2048
    assert part.idle == 248 * 3 * 7168 * 2048
    assert feed_forward(size, 2).split == 3 * 7168 * 18432


def test_spread_experts_take_less_of_each_rank() -> None:
    """8 ranks, two tensor-parallel: experts of 64 over 8, 4 and 2 ranks, with 1, 2 and 4 copies to share a state."""
    layout = {"tensor_model_parallel_size": 2, "sequence_parallel": True, "use_distributed_optimizer": True}
    size = {"model_family": "qwen3_moe", "num_experts": 64, "moe_router_topk": 4, "moe_ffn_hidden_size": 256}
    size |= {"moe_router_pre_softmax": True, "qk_layernorm": True, "num_layers": 2, "vocab_size": 1024}
    experts = 2 * 64 * 3 * 1024 * 256
    held = {}
    for spread, shared in ((8, 1), (2, 2), (2, 1)):
        flags = {"expert_model_parallel_size": spread, "expert_tensor_parallel_size": shared}
        config = from_flat({**layout, **size, **flags, "hidden_size": 1024, "num_attention_heads": 16, "bf16": True})
        check(config, 8)
        ranks = spread * shared
        held[ranks] = estimate.memory_per_rank(config, 1024, 8)
        assert estimate.stage_parameters(config, 1024, 0).experts == experts // ranks
    # bf16 weights; moments and fp32 weights are shared among the copies, so that every rank has as much of them.
    assert held[2].weights - held[8].weights == 2 * (experts // 2 - experts // 8)
    assert held[2].optimizer == held[8].optimizer == held[4].optimizer
    assert held[4].activations - held[8].activations == 2 * config.training.seq_length * 4 * 1024 * 2 // 2
