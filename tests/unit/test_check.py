"""Cross-field rules: every message, its way out, and that the way out is accepted."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_steel.config.check import check, data_parallel_size, divisors_near, padded_vocab_size, virtual_chunks
from megatron_steel.config.load import apply, parse
from megatron_steel.config.schema import Config


def build(**values: Any) -> Config:
    """Defaults with some flat options set."""
    config = Config()
    apply(config, values, "test")
    return config


GPT_NEOX: dict[str, Any] = {
    "model_family": "gpt_neox",
    "normalization": "LayerNorm",
    "activation": "gelu",
    "gated_linear_unit": False,
    "add_bias_linear": True,
}
SCALED: dict[str, Any] = {"use_rope_scaling": True}
FAULTS: list[tuple[dict[str, Any], str]] = [
    (
        {"hidden_size": 1024, "num_attention_heads": 15},
        "--hidden-size 1024 is not divisible by --num-attention-heads 15; use 16 or 8 heads, or set --kv-channels",
    ),
    ({"hidden_size": 12, "num_attention_heads": 4}, "head width 3 is odd"),
    ({"kv_channels": 5}, "head width 5 is odd"),
    ({**SCALED, "rope_scaling_factor": 0.5}, "--rope-scaling-factor must be 1 or more, not 0.5"),
    ({**SCALED, "rope_low_freq_factor": 4.0}, "--rope-low-freq-factor 4.0 must be below --rope-high-freq-factor 4.0"),
    (
        {**SCALED, "rope_scaling_type": "yarn", "rope_beta_slow": -1.0},
        "--rope-beta-slow must be greater than 0, not -1.0",
    ),
    (
        {**SCALED, "rope_scaling_type": "dynamic", "kv_channels": 2},
        "--rope-scaling-type dynamic needs at least 4 rotated channels of a head",
    ),
    (
        {**SCALED, "rope_scaling_type": "dynamic", "rope_scaling_factor": 1.5, "seq_length": 3073},
        "--seq-length 3073 is longer than --max-position-embeddings 2048 x 1.5; raise the latter",
    ),
    ({"num_query_groups": 3}, "--num-attention-heads 4 is not divisible by --num-query-groups 3; use 2 or 4"),
    (
        {"tensor_model_parallel_size": 3},
        "--num-attention-heads 4 is not divisible by --tensor-model-parallel-size 3; use 2 or 4",
    ),
    (
        {"num_query_groups": 2, "tensor_model_parallel_size": 4},
        "--num-query-groups 2 is not divisible by --tensor-model-parallel-size 4; use 2 or 1",
    ),
    (
        {"ffn_hidden_size": 10, "tensor_model_parallel_size": 4},
        "--ffn-hidden-size 10 is not divisible by --tensor-model-parallel-size 4; use 5 or 2",
    ),
    (
        {"num_layers": 10, "pipeline_model_parallel_size": 4},
        "--num-layers 10 is not divisible by --pipeline-model-parallel-size 4; use 5 or 2 stages",
    ),
    ({"num_layers_per_virtual_pipeline_stage": 1}, "needs --pipeline-model-parallel-size 2 or more"),
    (
        {"num_layers": 8, "pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 3},
        "4 layers per stage are not divisible by --num-layers-per-virtual-pipeline-stage 3; use 2 or 4",
    ),
    ({"model_family": "qwen2"}, "--model-family qwen2 needs --add-qkv-bias"),
    ({"add_qkv_bias": True}, "--model-family llama has no --add-qkv-bias"),
    ({"model_family": "qwen3"}, "--model-family qwen3 needs --qk-layernorm"),
    ({"qk_layernorm": True}, "--model-family llama has no --qk-layernorm"),
    (
        {"seq_length": 4096},
        "--seq-length 4096 is longer than --max-position-embeddings 2048; raise the latter",
    ),
    ({"overlap_param_gather": True}, "needs --use-distributed-optimizer and --overlap-grad-reduce"),
    (
        {"overlap_param_gather": True, "overlap_grad_reduce": True},
        "--overlap-param-gather needs --use-distributed-optimizer",
    ),
    (
        {"overlap_param_gather": True, "use_distributed_optimizer": True},
        "--overlap-param-gather needs --use-distributed-optimizer and --overlap-grad-reduce",
    ),
    ({"sequence_parallel": True}, "--sequence-parallel needs --tensor-model-parallel-size 2 or more"),
    (
        {"sequence_parallel": True, "tensor_model_parallel_size": 2, "transformer_impl": "local"},
        "--transformer-impl local has no --sequence-parallel",
    ),
    ({"model_family": "mistral", "window_size": 0}, "--window-size must be greater than 0, not 0"),
    ({"window_size": 8}, "--window-size is 8, but --model-family llama has None"),
    ({"model_family": "mistral", "window_size": 8, "full_attention_layers": [1]}, "--full-attention-layers is"),
    ({"model_family": "smollm3", "no_rope_layers": [1, 4]}, "--no-rope-layers 4: layers count from 0 to 3"),
    ({**GPT_NEOX, "num_query_groups": 2}, "--model-family gpt_neox has one key head per query head"),
    ({**GPT_NEOX, "kv_channels": 32}, "--model-family gpt_neox has one key head per query head"),
    ({**GPT_NEOX, "rotary_percent": 0.02}, "head width 64, of which --rotary-percent 0.02 is odd"),
    ({**GPT_NEOX, "gated_linear_unit": True}, "--model-family gpt_neox has no --gated-linear-unit"),
    ({**GPT_NEOX, "add_bias_linear": False}, "--model-family gpt_neox needs --add-bias-linear"),
    ({"min_lr": 1e-2}, "--min-lr 0.01 is above --lr 0.0003"),
    ({"lr_warmup_iters": 100}, "--lr-warmup-iters 100 must be below the 100 iterations of the decay"),
    ({"lr_warmup_iters": 50, "lr_decay_iters": 40}, "--lr-warmup-iters 50 must be below the 40 iterations"),
    ({"lr_warmup_iters": 5, "lr_warmup_fraction": 0.1}, "give --lr-warmup-fraction or --lr-warmup-iters, not both"),
    ({"lr_warmup_fraction": 1.0}, "--lr-warmup-fraction 1.0 must be at least 0 and below 1"),
    ({"lr_warmup_fraction": -0.1}, "--lr-warmup-fraction -0.1 must be at least 0 and below 1"),
    ({"lr_decay_style": "WSD"}, "--lr-decay-style WSD needs --lr-wsd-decay-iters between 1 and 100"),
    ({"lr_decay_style": "WSD", "lr_wsd_decay_iters": 101}, "needs --lr-wsd-decay-iters between 1 and 100"),
    ({"save_interval": 5}, "--save-interval needs --save DIRECTORY"),
    ({"save_total_limit": 5}, "--save-total-limit needs --save DIRECTORY"),
    ({"auto_resume": True}, "--auto-resume needs --save DIRECTORY"),
    ({"ckpt_step": 5}, "--ckpt-step needs --load DIRECTORY"),
    ({"finetune": True}, "--finetune needs --load DIRECTORY"),
    ({"data_path": ["a"], "train_data_path": ["b"]}, "give --data-path with --split, or --train-data-path"),
    ({"attn_logit_softcapping": 0.0}, "--attn-logit-softcapping must be greater than 0, not 0.0"),
    ({"final_logit_softcapping": -1.0}, "--final-logit-softcapping must be greater than 0, not -1.0"),
    ({"num_layers": 0}, "--num-layers must be greater than 0, not 0"),
    ({"tensor_model_parallel_size": -1}, "--tensor-model-parallel-size must be greater than 0, not -1"),
    ({"num_query_groups": 0}, "--num-query-groups must be greater than 0, not 0"),
    ({"train_iters": 0}, "--train-iters must be greater than 0, not 0"),
    ({"lr": 0.0}, "--lr must be greater than 0, not 0.0"),
    ({"save_interval": 0, "save": "x"}, "--save-interval must be greater than 0, not 0"),
    ({"eval_iters": 0}, "--eval-iters must be greater than 0, not 0"),
    ({"lr_decay_iters": 0}, "--lr-decay-iters must be greater than 0, not 0"),
    ({"weight_decay": -0.1}, "--weight-decay must be 0 or more, not -0.1"),
    ({"clip_grad": -1}, "--clip-grad must be 0 or more, not -1.0"),
    ({"lr_warmup_iters": -1}, "--lr-warmup-iters must be 0 or more, not -1"),
    ({"adam_beta2": 1.0}, "--adam-beta2 must be below 1, not 1.0"),
    ({"manual_gc_interval": -1}, "--manual-gc-interval must be 0 or more, not -1"),
    ({"hidden_dropout": 1.0}, "--hidden-dropout must be below 1, not 1.0"),
    ({"seed": -1}, "--seed must be 0 or more, not -1"),
]


@pytest.mark.parametrize(("values", "message"), FAULTS, ids=[message[:60] for _, message in FAULTS])
def test_rules(values: dict[str, Any], message: str) -> None:
    ranks = values.get("tensor_model_parallel_size", 1) * values.get("pipeline_model_parallel_size", 1)
    with pytest.raises(ValueError) as caught:
        check(build(**values), max(1, ranks))
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("number", [float("inf"), float("nan")])
def test_numbers_from_the_command_line_are_finite(number: float) -> None:
    config = parse(["--weight-decay", str(number)])
    with pytest.raises(ValueError, match="--weight-decay must be a finite number"):
        check(config)


def test_kv_channels_frees_the_head_count() -> None:
    assert check(build(hidden_size=1024, num_attention_heads=15, kv_channels=64)) == []


def test_rules_leave_good_layouts_alone() -> None:
    values = {"num_layers": 8, "tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
    values |= {"num_layers_per_virtual_pipeline_stage": 2, "sequence_parallel": True, "use_distributed_optimizer": True}
    values |= {"overlap_grad_reduce": True, "overlap_param_gather": True, "global_batch_size": 16}
    config = build(**values, micro_batch_size=2)
    assert check(config, 8) == []
    assert (data_parallel_size(config, 8), virtual_chunks(config)) == (2, 2)


@pytest.mark.parametrize(
    ("vocab", "divisible", "tensor", "padded"),
    [
        (151936, 128, 1, 151936),  # Qwen2.5, already a multiple
        (151936, 128, 4, 152064),
        (151665, 128, 1, 151680),
        (50257, 128, 1, 50304),  # GPT-2, the example of Megatron-LM's documentation
        (50257, 128, 8, 51200),
        (128256, 128, 8, 129024),
        (1, 128, 1, 128),
        (7, 1, 1, 7),
    ],
)
def test_padded_vocab_values(vocab: int, divisible: int, tensor: int, padded: int) -> None:
    assert padded_vocab_size(vocab, divisible, tensor) == padded


@given(st.integers(1, 10**6), st.integers(1, 512), st.integers(1, 64))
def test_padded_vocab_properties(vocab: int, divisible: int, tensor: int) -> None:
    padded = padded_vocab_size(vocab, divisible, tensor)
    assert vocab <= padded < vocab + divisible * tensor
    assert padded % (divisible * tensor) == 0
    assert padded_vocab_size(padded, divisible, tensor) == padded


@given(st.integers(1, 5000), st.integers(1, 6000))
def test_divisors_near_divide_and_are_nearest(number: int, wish: int) -> None:
    near = divisors_near(number, wish)
    assert 1 <= len(near) <= 2 and all(number % d == 0 for d in near)
    distance = min(abs(d - wish) for d in range(1, number + 1) if number % d == 0)
    assert abs(near[0] - wish) == distance


def test_interleaving_needs_whole_rounds_of_stages() -> None:
    values = {"num_layers": 8, "pipeline_model_parallel_size": 4, "num_layers_per_virtual_pipeline_stage": 1}
    with pytest.raises(ValueError, match="6 micro-batches per step .* use --global-batch-size 16$"):
        check(build(**values, micro_batch_size=2, global_batch_size=12), 4)
    config = build(**values, micro_batch_size=2, global_batch_size=16)
    assert check(config, 4) == [] and virtual_chunks(config) == 2


@pytest.mark.parametrize(("length", "way_out"), [(1023, 1022), (1, 2)])
def test_sequence_parallel_needs_a_divisible_length(length: int, way_out: int) -> None:
    with pytest.raises(ValueError, match=f"--sequence-parallel needs; use {way_out}$"):
        check(build(sequence_parallel=True, tensor_model_parallel_size=2, seq_length=length), 2)


def test_processes_must_fill_replicas() -> None:
    config = build(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    with pytest.raises(ValueError, match="6 processes are not divisible .* = 4; start a multiple of 4"):
        check(config, 6)
    assert data_parallel_size(config, 12) == 3


NO_EFFECT: list[tuple[dict[str, Any], str]] = [
    ({"model_family": "qwen2", "add_qkv_bias": True, "full_attention_layers": [1]}, "--full-attention-layers has no"),
    ({"lr_wsd_decay_iters": 5}, "--lr-wsd-decay-iters has no effect with --lr-decay-style cosine"),
    ({"lr_decay_style": "constant", "min_lr": 1e-5}, "--min-lr has no effect with --lr-decay-style constant"),
    ({"manual_gc_interval": 100}, "--manual-gc-interval has no effect without --manual-gc"),
    ({"wandb_exp_name": "a"}, "--wandb-exp-name has no effect without --wandb-project"),
    ({"wandb_save_dir": "a"}, "--wandb-save-dir has no effect without --wandb-project"),
    ({"use_distributed_optimizer": True}, "--use-distributed-optimizer shards nothing on one data-parallel rank"),
    ({"rope_scaling_factor": 32}, "--rope-scaling-factor has no effect without --use-rope-scaling"),
    ({"rope_truncate": False}, "--rope-truncate has no effect without --use-rope-scaling"),
    (
        {"use_rope_scaling": True, "rope_beta_fast": 8.0},
        "--rope-beta-fast has no effect without --rope-scaling-type yarn",
    ),
    (
        {"use_rope_scaling": True, "rope_scaling_type": "linear", "rope_original_max_position_embeddings": 4096},
        "--rope-original-max-position-embeddings has no effect without --rope-scaling-type llama3 or yarn",
    ),
    ({"override_opt_param_scheduler": True}, "--override-opt-param-scheduler has no effect unless a run is resumed"),
    ({"append_data": True}, "--append-data has no effect unless a run is resumed"),
    ({"append_data": True, "load": "x", "finetune": True}, "--append-data has no effect unless a run is resumed"),
    (
        {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 2},
        "--num-layers-per-virtual-pipeline-stage has no effect",
    ),
]


@pytest.mark.parametrize(("values", "message"), NO_EFFECT, ids=[message[:60] for _, message in NO_EFFECT])
def test_settings_without_effect(values: dict[str, Any], message: str) -> None:
    notes = check(build(**values), values.get("pipeline_model_parallel_size", 1))
    assert len(notes) == 1 and notes[0].startswith(message)


def test_settings_with_effect_are_not_reported() -> None:
    values = {"override_opt_param_scheduler": True, "append_data": True, "load": "x", "wandb_exp_name": "a"}
    values |= {"wandb_project": "p", "use_distributed_optimizer": True, "use_rope_scaling": True}
    assert check(build(**values, rope_scaling_factor=32.0, lr_decay_style="WSD", lr_wsd_decay_iters=10), 2) == []


def test_check_completes_nothing_but_the_batch() -> None:
    config = build(micro_batch_size=3)
    before = copy.deepcopy(config)
    check(config, 2)
    before.training.global_batch_size = 6
    assert config == before
