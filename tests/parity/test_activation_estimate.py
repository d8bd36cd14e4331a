"""The activation formula of plan/estimate.py against the tensors a real model keeps for its backward pass."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from pool import WorkerPool

from megatron_steel.config.schema import Config, ModelConfig, TrainingConfig
from megatron_steel.model.build import build_model
from megatron_steel.plan.estimate import layer_activation_bytes, memory_per_rank
from megatron_steel.runtime import world as runtime
from megatron_steel.runtime.world import World

BATCH, LENGTH, VOCABULARY = 4, 128, 1024


def configuration(layers: int, bf16: bool, **switches: object) -> Config:
    """A small model with a head width and a feed-forward width that no other size equals."""
    sizes: dict[str, object] = {"num_query_groups": 2, **switches}
    size = ModelConfig(
        num_layers=layers,
        hidden_size=192,
        ffn_hidden_size=640,
        num_attention_heads=8,
        vocab_size=VOCABULARY,
        **sizes,
    )
    training = TrainingConfig(seq_length=LENGTH, micro_batch_size=BATCH, global_batch_size=BATCH, bf16=bf16)
    return Config(size=size, training=training)


def kept_bytes(configs: Sequence[Config]) -> list[int]:
    """:func:`kept_by_one` of several models, in a world of one rank."""
    world = runtime.start()
    kept = [kept_by_one(config, world) for config in configs]
    runtime.stop(world, failed=False)
    return kept


def kept_by_one(config: Config, world: World) -> int:
    """Bytes of the distinct storages that a forward pass with loss saves, parameters aside."""
    model = build_model(config, VOCABULARY, world).language_models()[0]
    parameters = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in parameters:
            kept[address] = tensor
        return tensor

    ids = torch.zeros(BATCH, LENGTH, dtype=torch.long)
    positions = torch.arange(LENGTH).repeat(BATCH, 1)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(ids, positions, None, labels=ids)
    assert loss.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(
    "switches",
    [
        {"model_family": "llama"},
        {"model_family": "qwen2", "add_qkv_bias": True},
        {"model_family": "qwen3", "qk_layernorm": True, "kv_channels": 32},
        {"model_family": "steel", "add_qkv_bias": True, "mlp_type": "senet"},
        {"model_family": "steel", "add_qkv_bias": True, "mlp_type": "senet", "ffn_type": "softmoe_causal"},
    ],
)
def test_a_layer_keeps_what_the_formula_says(pool: WorkerPool, bf16: bool, switches: dict[str, object]) -> None:
    configs = [configuration(layers, bf16, **switches) for layers in (2, 4)]
    [(two, four)] = pool.run(1, kept_bytes, configs, join=False)
    config, tokens = configs[1], BATCH * LENGTH
    if config.size.ffn_type == "softmoe_causal":
        # Outputs of the second matrices are kept on a CPU and computed again on a GPU, which the formula is about.
        outputs = tokens * config.size.soft_experts * 2 * config.size.hidden_size * (2 if bf16 else 4)
        two, four = two - 2 * outputs, four - 4 * outputs
    assert (four - two) / 2 == pytest.approx(layer_activation_bytes(config, tokens), rel=0.02)

    memory = memory_per_rank(config, VOCABULARY, 1)
    logits = tokens * VOCABULARY * 4  # their bf16 copy is gone after the forward pass
    assert four - logits == pytest.approx(memory.activations, rel=0.02)


LATENT = {
    "num_query_groups": None,
    "multi_latent_attention": True,
    "q_lora_rank": 96,
    "kv_lora_rank": 64,
    "qk_head_dim": 32,
    "qk_pos_emb_head_dim": 16,
    "v_head_dim": 24,
}


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(
    ("switches", "separate"),
    [
        ({"model_family": "mixtral", "num_experts": 8}, 3 * 2 * 640),
        (
            {
                **LATENT,
                "model_family": "deepseek_v2",
                "num_experts": 8,
                "moe_ffn_hidden_size": 128,
                "moe_shared_expert_intermediate_size": 256,
                "moe_router_pre_softmax": True,
            },
            3 * 2 * 128 + 2 * 256,
        ),
    ],
    ids=["mixtral", "deepseek_v2"],
)
def test_a_layer_with_experts(pool: WorkerPool, bf16: bool, switches: dict[str, object], separate: int) -> None:
    """On a GPU an expert's activation is one kernel; here it is several, which keep ``separate`` elements per token."""
    configs = [configuration(layers, bf16, **switches) for layers in (2, 4)]
    [(two, four)] = pool.run(1, kept_bytes, configs, join=False)
    config, tokens = configs[1], BATCH * LENGTH
    fused = (four - two) / 2 - tokens * separate * (2 if bf16 else 4)
    assert fused == pytest.approx(layer_activation_bytes(config, tokens), rel=0.03)
