"""Rules about precision, and the bytes that follow from it."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_steel.config.check import check
from megatron_steel.config.check_precision import check_precision, check_same_precision, compute_type, precision_notes
from megatron_steel.config.load import from_flat
from megatron_steel.config.schema import Config
from megatron_steel.plan.estimate import memory_per_rank


def build(**values: Any) -> Config:
    return from_flat({"model": None, **values})


FP8: dict[str, Any] = {"bf16": True, "fp8_format": "hybrid"}
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"fp16": True, "bf16": True}, "give --bf16 or --fp16, not both"),
    ({"fp16": True, "loss_scale": 0.0}, "--loss-scale must be greater than 0, not 0"),
    ({"fp16": True, "initial_loss_scale": -1.0}, "--initial-loss-scale must be greater than 0"),
    ({"fp16": True, "min_loss_scale": 0.0}, "--min-loss-scale must be greater than 0"),
    ({"fp16": True, "loss_scale_window": 0}, "--loss-scale-window must be greater than 0"),
    ({"fp16": True, "hysteresis": 0}, "--hysteresis must be greater than 0"),
    ({"fp16": True, "min_loss_scale": 8.0, "initial_loss_scale": 4.0}, "--min-loss-scale 8 is above"),
    ({"bf16": True, "loss_scale": 2.0}, "--loss-scale needs --fp16"),
    ({"pure_bf16": True}, "--pure-bf16 needs --bf16"),
    ({"fp8_format": "hybrid"}, "--fp8-format needs --bf16"),
    ({**FP8, "transformer_impl": "torch"}, "--transformer-impl torch has no FP8"),
    ({**FP8, "ffn_hidden_size": 1000}, "--ffn-hidden-size / --tensor-model-parallel-size must be divisible by 16"),
    ({**FP8, "seq_length": 1001}, "--micro-batch-size x --seq-length must be divisible by 16, not 1001"),
    ({**FP8, "fp8_recipe": "mxfp8", "seq_length": 1008}, "must be divisible by 32, not 1008"),
    ({"bf16": True, "pure_bf16": True, "use_distributed_optimizer": True}, "--pure-bf16 does not go with"),
]


@pytest.mark.parametrize(("values", "message"), WRONG, ids=[message for _, message in WRONG])
def test_refusals_name_the_option(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as refused:
        check(build(**values))
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_options_of_a_scale_that_is_not_there() -> None:
    assert check(build(hysteresis=4)) == ["--hysteresis has no effect without --fp16"]
    notes = check(build(fp16=True, loss_scale=8.0, loss_scale_window=5))
    assert notes == ["--loss-scale-window has no effect with --loss-scale, which never changes"]
    assert check(build(fp16=True, hysteresis=4, initial_loss_scale=2.0)) == []
    assert check(build(fp8_recipe="mxfp8")) == ["--fp8-recipe has no effect without --fp8-format"]
    assert check(build(**FP8, fp8_recipe="mxfp8")) == []


def test_compute_type() -> None:
    types = [compute_type(build(**values).training) for values in ({}, {"bf16": True}, {"fp16": True})]
    assert types == ["float32", "bfloat16", "float16"]


def test_fp16_needs_the_memory_of_bf16() -> None:
    half, brain, full = (
        build(vocab_size=1000, fp16=fp16, bf16=bf16) for fp16, bf16 in ((True, False), (False, True), (False, False))
    )
    sizes = [memory_per_rank(config, 1024, 1) for config in (half, brain, full)]
    assert sizes[0] == sizes[1] and sizes[0].weights * 2 == sizes[2].weights
    assert sizes[0].optimizer * 2 == sizes[2].optimizer * 3


def test_pure_bf16_takes_8_bytes_of_18_and_says_what_it_loses() -> None:
    config = build(vocab_size=1000, bf16=True, pure_bf16=True)
    (note,) = check(config)
    assert note.startswith("--pure-bf16: updates below 1/256 of a weight are lost")
    pure, usual = memory_per_rank(config, 1024, 1), memory_per_rank(build(vocab_size=1000, bf16=True), 1024, 1)
    each = [(memory.weights, memory.gradients, memory.optimizer) for memory in (pure, usual)]
    parameters = pure.weights // 2
    assert each == [tuple(n * parameters for n in sizes) for sizes in ((2, 2, 4), (2, 4, 12))]


@pytest.mark.parametrize("sharded", [False, True])
def test_resuming_in_another_precision(sharded: bool) -> None:
    """Sharded state fits every precision, the other one only those with fp32 weights beside the model's."""
    full, half, brain = (
        build(use_distributed_optimizer=sharded, **{name: True}) for name in ("sequence_parallel", "fp16", "bf16")
    )
    check_same_precision({"fp16": True}, brain, "x")
    check_same_precision({"bf16": True}, half, "x")
    check_same_precision({}, full, "x")
    check_same_precision({"bf16": True, "use_torch_fsdp2": True}, full, "x")
    pure = build(bf16=True, pure_bf16=True)
    for saved in ({"bf16": True}, {}):
        with pytest.raises(ValueError, match="as optimizer state, this run has moments of bf16"):
            check_same_precision(saved, pure, "x")
    for saved, config in (({}, half), ({"bf16": True}, full), ({"bf16": False, "fp16": False}, brain)):
        if sharded:
            check_same_precision(saved, config, "x")
        else:
            with pytest.raises(
                ValueError, match="^x holds .* as optimizer state, this run has .*resume with the same precision"
            ):
                check_same_precision(saved, config, "x")


FSDP: dict[str, Any] = {"use_torch_fsdp2": True, "transformer_impl": "torch"}
WRONG_FSDP: list[tuple[dict[str, Any], str]] = [
    ({"tensor_model_parallel_size": 2}, "does not go with --tensor-model-parallel-size 2; remove one"),
    ({"use_distributed_optimizer": True}, "does not go with --use-distributed-optimizer; remove one"),
    ({"fp16": True}, "does not go with --fp16; remove one"),
    ({"transformer_impl": "auto"}, "--use-torch-fsdp2 needs --transformer-impl torch, not auto"),
    ({"make_vocab_size_divisible_by": 5}, "--make-vocab-size-divisible-by must be divisible by the 4 data-parallel"),
    ({"ffn_hidden_size": 1001}, "--ffn-hidden-size must be divisible by the 4 data-parallel ranks, not 1001"),
]


@pytest.mark.parametrize(("values", "message"), WRONG_FSDP, ids=[message for _, message in WRONG_FSDP])
def test_what_cannot_be_fully_sharded(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as refused:
        check(build(**{**FSDP, **values}), 4)
    assert message in str(refused.value) and "\n" not in str(refused.value)
    assert check(build(**FSDP), 4) == []


def test_full_sharding_divides_everything_but_what_is_gathered() -> None:
    plain, sharded = (build(vocab_size=1000, num_layers=24, bf16=True, **more) for more in ({}, FSDP))
    one, eight = memory_per_rank(plain, 1024, 8), memory_per_rank(sharded, 1024, 8)
    parameters = one.weights // 2
    assert eight.optimizer == parameters
    gathered, reduced = eight.weights - parameters // 2, eight.gradients - parameters // 2
    table = 2 * 1024 * plain.size.hidden_size
    layer = (2 * parameters - table) // 24
    # Two layers and one, beside the table and the last norm.
    assert abs(gathered - table - 2 * layer) < 0.01 * layer and abs(reduced - table - layer) < 0.01 * layer
    assert (eight.activations, eight.logits) == (one.activations, one.logits)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"fp8_margin": -1}, "--fp8-margin must be 0 or more, not -1"),
        ({"fp8_amax_history_len": 0}, "--fp8-amax-history-len must be 1 or more, not 0"),
        (
            {"first_last_layers_bf16": True, "fp8_recipe": "delayed"},
            "--first-last-layers-bf16 does not go with --fp8-rec",
        ),
        (
            {"first_last_layers_bf16": True, "num_layers_at_start_in_bf16": 3},
            "--num-layers-at-start-in-bf16 3 and --num-layers-at-end-in-bf16 1 leave none of the 4 layers to FP8",
        ),
        ({"fp8_recipe": "mxfp8", "seq_length": 1008}, "--micro-batch-size x --seq-length must be divisible by 32"),
        (
            {"fp8_recipe": "blockwise", "tensor_model_parallel_size": 2, "sequence_parallel": True, "seq_length": 1088},
            "--fp8-recipe blockwise: .* must be divisible by 128",
        ),
    ],
)
def test_recipes_of_fp8_are_checked(flags: dict[str, Any], message: str) -> None:
    config = from_flat({"bf16": True, "fp8_format": "hybrid", "transformer_impl": "transformer_engine", **flags})
    with pytest.raises(ValueError, match=message):
        check_precision(config)


def test_options_of_other_recipes_are_said_to_change_nothing() -> None:
    assert precision_notes(from_flat({"fp8_margin": 1, "num_layers_at_end_in_bf16": 2})) == [
        "--fp8-margin has no effect without --fp8-recipe delayed",
        "--num-layers-at-end-in-bf16 has no effect without --first-last-layers-bf16",
    ]
    taken = {"bf16": True, "fp8_format": "e4m3", "fp8_recipe": "delayed", "fp8_amax_history_len": 16}
    assert precision_notes(from_flat(taken)) == []
