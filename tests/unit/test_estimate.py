"""Parameter counts against transformers, FLOPs against published anchors, memory against a plain computation."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_steel.checkpoint.modeling.open_llama.configuration_open_llama import OpenLlamaConfig
from megatron_steel.checkpoint.modeling.open_llama.modeling_open_llama import OpenLlamaForCausalLM
from megatron_steel.checkpoint.modeling.steel.configuration_steel import SteelConfig
from megatron_steel.checkpoint.modeling.steel.modeling_steel import SteelForCausalLM
from megatron_steel.config.family import head_width
from megatron_steel.config.presets import PRESETS
from megatron_steel.config.schema import Config, MemoryConfig, ModelConfig, ParallelConfig, TrainingConfig
from megatron_steel.plan import estimate
from megatron_steel.plan.estimate import flops_per_token, max_micro_batch, memory_per_rank, run_time
from megatron_steel.plan.parameters import count_parameters

HF_CLASSES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    "steel": (SteelConfig, SteelForCausalLM),
    "open_llama": (OpenLlamaConfig, OpenLlamaForCausalLM),
}


def hf_parameters(model: ModelConfig, vocab_size: int) -> dict[str, int]:
    """Numbers of parameters by name of the same model in transformers, built without memory."""
    make_config, make_model = HF_CLASSES[model.model_family]
    tied = not model.untie_embeddings_and_output_weights
    own = {
        "steel": {"FFN_type": model.ffn_type, "mlp_type": "senet"},
        "open_llama": {"use_stable_embedding": model.stable_embedding, "shared_input_output_embedding": tied},
    }
    config = make_config(
        vocab_size=vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.ffn_hidden_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.num_query_groups or model.num_attention_heads,
        head_dim=head_width(model),
        tie_word_embeddings=tied,
        **own.get(model.model_family, {}),
        mlp_div_ratio=model.mlp_div_ratio,
    )
    with torch.device("meta"):
        return {name: weight.numel() for name, weight in make_model(config).named_parameters()}


def preset(name: str) -> ModelConfig:
    """The sizes of a preset."""
    return ModelConfig(**PRESETS[name])


SMALL = {"num_layers": 2, "hidden_size": 96, "ffn_hidden_size": 160, "num_attention_heads": 6}
FAMILIES = [
    ModelConfig(model_family="llama", **SMALL),
    ModelConfig(model_family="mistral", num_query_groups=2, **SMALL),
    ModelConfig(model_family="qwen2", num_query_groups=3, add_qkv_bias=True, **SMALL),
    ModelConfig(model_family="qwen3", num_query_groups=2, kv_channels=32, qk_layernorm=True, **SMALL),
]
SIZES = FAMILIES + [replace(model, untie_embeddings_and_output_weights=True) for model in FAMILIES]
# tests/unit/test_expert_parameters.py counts those with experts.
SIZES += [preset(name) for name in PRESETS if preset(name).num_experts is None]


@pytest.mark.parametrize("model", SIZES, ids=lambda m: f"{m.model_family}-{m.num_layers}x{m.hidden_size}")
def test_parameters_equal_transformers(model: ModelConfig) -> None:
    vocab = model.vocab_size or 1000
    theirs, ours = hf_parameters(model, vocab), count_parameters(model, vocab)
    assert ours.total == sum(theirs.values())
    assert ours.embedding == theirs["model.embed_tokens.weight"]
    assert ours.per_layer == sum(n for name, n in theirs.items() if name.startswith("model.layers.1."))
    assert ours.output == theirs.get("lm_head.weight", 0)
    matrices = sum(n for name, n in theirs.items() if "proj.weight" in name or name.endswith("phi"))
    assert ours.matmul == matrices + theirs.get("lm_head.weight", ours.embedding)


def test_known_sizes() -> None:
    assert count_parameters(preset("steel_1b_dense"), 151936).total == 1_122_729_216
    assert count_parameters(preset("steel_1b"), 151936).total == 1_122_922_770
    assert count_parameters(preset("mini_qwen_1b"), 151936).total == 998_810_624
    # Open-Llama's two releases: 32 * 202,383,360 and the last norm's 4096; then one table and a norm, or two tables.
    assert count_parameters(preset("open_llama_7b"), 100_000).total == 6_885_879_808
    assert count_parameters(preset("open_llama_7b_v2"), 68_762).total == 7_039_569_920
    # The published number of unembedded and total parameters of Llama-3.2-1B and Llama-3-8B.
    assert count_parameters(preset("llama3.2_1b"), 128256).total == 1_235_814_400
    assert count_parameters(preset("llama3_8b"), 128256).total == 8_030_261_248


TINY_LLAMA = ModelConfig(
    num_layers=22, hidden_size=2048, ffn_hidden_size=5632, num_attention_heads=32, num_query_groups=4, vocab_size=32000
)
OLMO2_1B = ModelConfig(num_layers=18, hidden_size=2048, ffn_hidden_size=5632, num_attention_heads=16, vocab_size=100352)
QWEN1_5_1_8B = ModelConfig(
    num_layers=24, hidden_size=2048, ffn_hidden_size=5504, num_attention_heads=16, vocab_size=151936
)


@pytest.mark.parametrize(
    ("model", "seq_length", "gigaflops"),
    [
        (preset("qwen2.5_0.5b"), 4096, 4.02),
        (TINY_LLAMA, 2048, 7.31),
        (preset("llama3.2_1b"), 2048, 8.22),
        (preset("llama3.2_1b"), 4096, 9.03),
        (OLMO2_1B, 4096, 8.59),
        (QWEN1_5_1_8B, 2048, 10.36),
        (preset("qwen3_1.7b"), 4096, 13.14),
        (preset("llama3_8b"), 4096, 51.5),
    ],
)
def test_flops_anchors(model: ModelConfig, seq_length: int, gigaflops: float) -> None:
    assert model.vocab_size is not None
    digits = 1 if gigaflops > 50 else 2
    assert round(flops_per_token(model, seq_length, model.vocab_size) / 1e9, digits) == gigaflops


def test_flops_equal_a_counted_forward_pass() -> None:
    """Three times what PyTorch's own counter sees in a forward pass of the same model in transformers."""
    from torch.utils.flop_counter import FlopCounterMode

    model, vocab, length = FAMILIES[2], 512, 64
    make_config, make_model = HF_CLASSES["qwen2"]
    network = make_model(
        make_config(
            vocab_size=vocab,
            hidden_size=96,
            intermediate_size=160,
            num_hidden_layers=2,
            num_attention_heads=6,
            num_key_value_heads=3,
            attn_implementation="eager",
        )
    )
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(2, length, dtype=torch.long))
    rotary = 2 * head_width(model) // 2 * length * 2  # transformers makes its angles with a matrix product
    counted = counter.get_total_flops()
    expected = flops_per_token(model, length, vocab) / 3 * 2 * length
    assert expected <= counted <= expected + rotary * 2


def test_causal_is_half_of_the_attention() -> None:
    model = preset("steel_1b_dense")
    full, causal = (flops_per_token(model, 2048, 151936, kind) for kind in ("full", "causal"))
    assert full - causal == 6 * 18 * 1792 * 2048
    assert flops_per_token(model, 0, 151936) == 6 * count_parameters(model, 151936).matmul


def steel(bf16: bool = True, **parallel: object) -> Config:
    """A configuration of steel_1b_dense at 2048 tokens."""
    return Config(
        size=preset("steel_1b_dense"),
        parallel=ParallelConfig(**parallel),
        training=TrainingConfig(seq_length=2048, micro_batch_size=4, bf16=bf16),
    )


def test_bytes_per_parameter() -> None:
    """18 and 16 bytes per parameter; with a distributed optimizer 6 + 12 / d and 8 + 8 / d."""
    total = 1_122_729_216
    for bf16, sharded, expected in (
        (True, False, 18),
        (False, False, 16),
        (True, True, 6 + 12 / 8),
        (False, True, 8 + 8 / 8),
    ):
        memory = memory_per_rank(steel(bf16, use_distributed_optimizer=sharded), 151936, 8)
        assert memory.weights + memory.gradients + memory.optimizer == pytest.approx(total * expected, abs=8)


def test_ranks_of_a_sample_divide_activations_but_not_gathered_keys_and_values() -> None:
    alone, shared = steel(), steel(context_parallel_size=2, use_distributed_optimizer=True)
    tokens, size = 4 * 2048, alone.size
    key_width = (size.num_query_groups or size.num_attention_heads) * size.hidden_size // size.num_attention_heads
    alone.memory = shared.memory = MemoryConfig(cross_entropy_chunk_size=0)
    halved = estimate.layer_activation_bytes(alone, tokens) // 2
    assert estimate.layer_activation_bytes(shared, tokens // 2) == halved + 2 * tokens * key_width * 2
    memory, whole = (memory_per_rank(config, 151936, 8) for config in (shared, alone))
    assert (memory.logits, memory.weights) == (whole.logits // 2, whole.weights)
    assert memory.optimizer == -(-whole.optimizer // 8), "two ranks of each of four samples"


def test_parts_of_a_split_model_make_the_whole() -> None:
    config = steel()
    whole = estimate.stage_parameters(config, 151936, 0).dense
    assert whole == 1_122_729_216
    stages = [estimate.stage_parameters(steel(pipeline_model_parallel_size=3), 151936, s).dense for s in range(3)]
    assert sum(stages) == whole and stages[1] == 6 * count_parameters(config.size, 151936).per_layer
    split = estimate.stage_parameters(steel(tensor_model_parallel_size=4), 151936, 0).dense
    norms = 18 * 2 * 1792 + 1792
    assert 4 * (split - norms) + norms == whole
    tied = replace(config.size, untie_embeddings_and_output_weights=False)
    ends = [
        estimate.stage_parameters(replace(steel(pipeline_model_parallel_size=2), size=tied), 151936, s).dense
        for s in (0, 1)
    ]
    assert ends[1] - ends[0] == 1792  # both hold the embedding, the last one also the last norm


def test_pipeline_keeps_as_much_as_the_papers_say() -> None:
    """First stage: L layers of activations with 1F1B, L (1 + (p - 1) / (p v)) interleaved (Korthikanti 4.2.3)."""
    one = steel(pipeline_model_parallel_size=3)
    assert [estimate.layers_in_flight(one, 16, s) for s in range(3)] == [18, 12, 6]
    assert estimate.layers_in_flight(one, 1, 0) == 6
    two = steel(pipeline_model_parallel_size=3, num_layers_per_virtual_pipeline_stage=2)
    assert estimate.layers_in_flight(two, 16, 0) == round(18 * (1 + 2 / 9))


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([1, 2, 4]),
    st.sampled_from([1, 2, 3]),
    st.booleans(),
    st.booleans(),
    st.integers(20, 400).map(lambda gib: gib * 2**28),
    st.sampled_from([0, None, 512, 5000]),
    st.sampled_from([{}, {"recompute_granularity": "full"}, {"recompute_granularity": "selective"}]),
)
def test_max_micro_batch_is_the_largest_that_fits(
    tensor: int, stages: int, bf16: bool, sharded: bool, memory: int, chunk: int | None, recompute: dict[str, Any]
) -> None:
    config = steel(
        bf16,
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=stages,
        sequence_parallel=tensor > 1,
        use_distributed_optimizer=sharded,
    )
    config.memory = MemoryConfig(cross_entropy_chunk_size=chunk, **recompute)
    world = tensor * stages * 2
    best = max_micro_batch(config, 151936, world, memory)

    def needed(size: int) -> int:
        training = replace(config.training, micro_batch_size=size, global_batch_size=size * 2 * 2 * stages)
        return memory_per_rank(replace(config, training=training), 151936, world).total

    assert needed(best + 1) > memory * (1 - estimate.RESERVE)
    if best:
        assert needed(best) <= memory * (1 - estimate.RESERVE)


def test_recomputed_layers_keep_their_input() -> None:
    """18 layers of 1792 in bf16: an input each, and all of the layer or unit that is in its backward pass."""
    config, tokens = steel(), 8192
    layer, entry = estimate.layer_activation_bytes(config, tokens), tokens * 1792 * 2
    assert estimate.activation_bytes(config, 0, 18, tokens) == 18 * layer
    for method, number, expected in (
        ("uniform", 1, 18 * entry + layer),
        ("uniform", 3, 6 * entry + 3 * layer),
        ("block", 5, 5 * entry + 14 * layer),
    ):
        config.memory = MemoryConfig(recompute_granularity="full", recompute_method=method, recompute_num_layers=number)
        assert estimate.activation_bytes(config, 0, 18, tokens) == expected


def test_logits_in_parts_do_not_grow() -> None:
    config = steel()
    table = 4 * 151936 * 1792  # the gradient, summed in fp32
    config.memory.cross_entropy_chunk_size = 512
    for tokens in (1024, 2**20):
        assert estimate.logits_bytes(config, 151936, tokens) == 2 * 512 * 151936 + table
    config.memory.cross_entropy_chunk_size = None
    assert estimate.logits_bytes(config, 151936, 16384) == 2 * 16384 * 151936
    assert estimate.logits_bytes(config, 151936, 32768) == 2 * 4096 * 151936 + table


def test_run_time() -> None:
    # One exaFLOP budget on 8 devices of 500 TFLOP/s at half of the peak: 500 s.
    time = run_time(tokens=1e8, flops_each=1e10, devices=8, peak_flops=5e14, mfu=0.5)
    assert (time.flops, time.seconds, time.device_hours) == (1e18, 500.0, pytest.approx(8 * 500 / 3600))
    with pytest.raises(ValueError, match="mfu"):
        run_time(1e8, 1e10, 8, 5e14, 40)


WITHOUT_TORCH = """
import sys
class Refuse:
    def find_spec(self, name, *_):
        if name.split(".")[0] in ("torch", "megatron", "transformers"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Refuse())
from tools.plan import main
main(sys.argv[1:])
"""


def run_tool(*flags: str) -> subprocess.CompletedProcess[str]:
    """tools/plan.py in an interpreter that has no torch."""
    command = [sys.executable, "-c", WITHOUT_TORCH, *flags]
    return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])


def test_tool_runs_without_torch() -> None:
    flags = "--model steel_1b_dense --seq-length 2048 --bf16 --gpus 8 --mfu 0.5 --tokens 1e12 --hour-price 2".split()
    result = run_tool(*flags, "--micro-batch-size", "4", "--use-distributed-optimizer")
    assert result.returncode == 0, result.stderr
    rows = dict(line.split("  ", 1) for line in result.stdout.splitlines() if "  " in line and line[0] != " ")
    rows = {name: value.strip() for name, value in rows.items()}
    assert rows["parameters"] == "1,122,729,216 (vocabulary padded to 151,936)"
    # 6 * (1,122,729,216 - embedding - norms and biases) + 12 * 18 * 1792 * 2048 = 5.8945 GFLOP
    assert rows["FLOPs per token"] == "5.89 GFLOP full attention, 5.50 causal"
    assert rows["tokens per second"].startswith("671,") and rows["time"].startswith("413.9 hours")
    assert rows["cost"] == "6,622 at 2 an hour"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--model steel_1b --mfu 0", "--mfu must be greater than 0"),
        ("--model steel_tiny", "--vocab-size is needed here"),
        ("--model llama3_8b --gpus 7 --tensor-model-parallel-size 4", "7 processes are not divisible"),
    ],
)
def test_tool_explains_errors_in_one_line(flags: str, words: str) -> None:
    result = run_tool(*flags.split())
    assert result.returncode == 2 and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert words in result.stderr


def test_training_defaults_are_enough() -> None:
    """A configuration that was not checked (no global batch) can still be estimated."""
    assert memory_per_rank(Config(training=TrainingConfig()), 1024, 1).total > 0


def test_moments_on_the_host_take_nothing_of_the_device() -> None:
    held = {}
    for offload in (False, True):
        config = steel()
        config.optimizer.optimizer_cpu_offload = offload
        held[offload] = memory_per_rank(config, 151936, 1)
    assert held[False].optimizer - held[True].optimizer == 8 * 1_122_729_216
    assert held[True].optimizer == 4 * 1_122_729_216 and held[True].weights == held[False].weights
