"""Parsing, precedence, errors and cross-field rules of the configuration."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_steel.config.check import (
    check,
    check_batch,
    data_parallel_size,
    divisors_near,
    padded_vocab_size,
    virtual_chunks,
)
from megatron_steel.config.load import apply, expand_model, from_flat, parse, read_yaml, to_flat, user_errors
from megatron_steel.config.presets import PRESETS
from megatron_steel.config.schema import Config

ROOT = Path(__file__).parents[2]


def run(*argv: str) -> subprocess.CompletedProcess[str]:
    """``python -m megatron_steel.pretrain`` as a user starts it."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("RANK", None)
    command = [sys.executable, "-m", "megatron_steel.pretrain", *argv]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=60)


def yaml_file(folder: Path, text: str | bytes) -> str:
    """Path of a new YAML file."""
    path = folder / "run.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def build(**values: Any) -> Config:
    """Defaults with some flat options set."""
    config = Config()
    apply(config, values, "test")
    return config


# Precedence and reading


def test_precedence(tmp_path: Path) -> None:
    path = yaml_file(tmp_path, "model: steel_tiny\nnum-layers: 6\nhidden_size: 128\nlr: 1e-3\n")
    config = parse(["--config", path, "--num-layers", "7"])
    assert config.size.num_attention_heads == 4 and config.training.seq_length == 1024  # defaults
    assert (config.size.num_query_groups, config.size.ffn_hidden_size) == (2, 512)  # preset
    assert (config.size.hidden_size, config.optimizer.lr) == (128, 1e-3)  # YAML over preset and default
    assert config.size.num_layers == 7  # command line over YAML over preset
    assert config.model == "steel_tiny" and config.config == path


def test_model_on_the_command_line_wins_over_yaml(tmp_path: Path) -> None:
    path = yaml_file(tmp_path, "model: steel_tiny\n")
    config = parse([f"--config={path}", "--model=qwen3_0.6b"])
    assert (config.model, config.size.model_family, config.size.num_layers) == ("qwen3_0.6b", "qwen3", 28)


def test_the_last_of_a_repeated_flag_wins() -> None:
    assert parse(["--num-layers", "3", "--num-layers=5"]).size.num_layers == 5


def test_dashes_and_underscores(tmp_path: Path) -> None:
    path = yaml_file(tmp_path, "global-batch-size: 8\nmicro_batch_size: 2\nbf16: true\n")
    config = parse(["--config", path, "--train_iters", "9", "--seq-length", "64", "--no-bf16"])
    training = config.training
    assert (training.global_batch_size, training.micro_batch_size, training.bf16) == (8, 2, False)
    assert (training.train_iters, training.seq_length) == (9, 64)


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("lr: 3e-5", "lr", 3e-5),  # PyYAML reads 3e-5 as text
        ("lr: '3E-5'", "lr", 3e-5),
        ("num_layers: 1e1", "num_layers", 10),
        ("num_layers: '8'", "num_layers", 8),
        ("seed: 12345678901234567891", "seed", 12345678901234567891),  # not through a float
        ("clip_grad: 2", "clip_grad", 2.0),
        ("vocab_size: null", "vocab_size", None),
        ("data_path: a b", "data_path", ["a", "b"]),
        ("data_path: [0.3, a, 0.7, b c]", "data_path", ["0.3", "a", "0.7", "b c"]),
        ("split: 100", "split", "100"),
        ("split: 969,30,1", "split", "969,30,1"),
        ("wandb_exp_name: 2024-01-01", "wandb_exp_name", "2024-01-01"),
        ("lr_decay_style: WSD", "lr_decay_style", "WSD"),
    ],
)
def test_yaml_values(tmp_path: Path, text: str, name: str, value: Any) -> None:
    read = to_flat(parse(["--config", yaml_file(tmp_path, text)]))[name]
    assert read == value and type(read) is type(value)


def test_empty_yaml_is_all_defaults(tmp_path: Path) -> None:
    path = yaml_file(tmp_path, "# nothing\n")
    assert to_flat(parse(["--config", path])) == {**to_flat(Config()), "config": path}


def test_data_path_takes_several_words() -> None:
    config = parse(["--data-path", "0.3", "a", "0.7", "b", "--split", "9,1,0"])
    assert config.data.data_path == ["0.3", "a", "0.7", "b"] and config.data.split == "9,1,0"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("num_layers: many", "num_layers must be a whole number, not 'many'"),
        ("num_layers: 4.5", "num_layers must be a whole number, not 4.5"),
        ("num_layers: .inf", "num_layers must be a whole number, not inf"),
        ("num_layers: true", "num_layers must be a whole number, not True"),
        ("num_layers: null", "num_layers must be a whole number, not None"),
        ("lr: .nan", "lr must be a finite number, not nan"),
        ("lr: [1]", "lr must be a finite number, not [1]"),
        ("bf16: 1", "bf16 must be true or false, not 1"),
        ("bf16: 'true'", "bf16 must be true or false, not 'true'"),
        ("split: null", "split must be text, not None"),
        ("save: {a: b}", "save must be text, not {'a': 'b'}"),
        ("data_path: null", "data_path must be a list of words, not None"),
        ("data_path: [[a]]", "data_path must be a list of words, not [['a']]"),
        ("data_path: {a: 1}", "data_path must be a list of words, not {'a': 1}"),
        ("lr_decay_style: foo", "lr_decay_style must be one of constant, linear, cosine, "),
        ("num_layers: 1\nnum-layers: 2", "num_layers is given twice"),
        ("lr: 1\nlr: 2", "lr is given twice"),
        ("config: other.yaml", "a configuration file cannot name another"),
        ("nun_layers: 3", "unknown option --nun-layers; did you mean --num-layers?"),
        ("swiglu: true", "--swiglu is a Megatron-LM flag this engine does not take: always on here"),
        ("1: 2", "unknown option --1"),
        ("- a\n- b", "must be a mapping"),
        ("just text", "must be a mapping"),
        ("a: [", "not valid YAML"),
        ("a:\tb", "not valid YAML"),
        ("a: 1\n---\nb: 2", "not valid YAML"),
        (b"\xff\xfe", "not UTF-8"),
    ],
)
def test_bad_yaml(tmp_path: Path, text: str | bytes, message: str) -> None:
    path = yaml_file(tmp_path, text)
    with pytest.raises(ValueError) as caught:
        parse(["--config", path])
    assert str(caught.value).startswith(f"--config {path}: ") and message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_yaml_runs_no_code(tmp_path: Path) -> None:
    witness = tmp_path / "witness"
    path = yaml_file(tmp_path, f"save: !!python/object/apply:os.mkdir ['{witness}']")
    with pytest.raises(ValueError, match="not valid YAML: could not determine a constructor"):
        read_yaml(path)
    assert not witness.exists()


def test_missing_yaml_is_named() -> None:
    with pytest.raises(ValueError, match=r"--config no/such\.yaml: No such file or directory"):
        parse(["--config", "no/such.yaml"])


# Presets and round trips


@pytest.mark.parametrize("name", PRESETS)
def test_round_trip_of_every_preset(name: str) -> None:
    config = parse(["--model", name])
    assert check(config) == []
    flat = to_flat(config)
    assert {key: flat[key] for key in PRESETS[name]} == PRESETS[name]
    assert from_flat(json.loads(json.dumps(flat))) == config
    assert len(expand_model(config)) == len(PRESETS[name])


def test_groups_are_flat_and_unique() -> None:
    config = Config()
    flat = to_flat(config)
    nested = [name for group in vars(config).values() if hasattr(group, "__dict__") for name in vars(group)]
    assert len(nested) == len(set(nested)) and set(nested) | {"config", "model"} == set(flat)


def test_changed_values_round_trip() -> None:
    config = build(data_path=["1", "a"], bf16=True, lr=1e-5, vocab_size=77, save="out", overlap_grad_reduce=True)
    again = from_flat(to_flat(config))
    assert again == config and again.data.data_path == ["1", "a"] and again.training.bf16 is True


def test_unknown_preset_suggests() -> None:
    with pytest.raises(ValueError, match=r"--model steel_tin: .* did you mean steel_tiny\?"):
        parse(["--model", "steel_tin"])
    with pytest.raises(ValueError, match="presets: steel_tiny, steel_1b"):
        parse(["--model", "zzz"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not readable as JSON"),
        ("[1]", "must hold a JSON object"),
        ('{"model_type": "gpt2"}', "model_type 'gpt2'"),
    ],
)
def test_bad_model_folder(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError) as caught:
        parse(["--model", str(tmp_path)])
    assert str(tmp_path / "config.json") in str(caught.value) and message in str(caught.value)


# The command line of the program


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--nun-layers", "3"], "unknown option --nun-layers; did you mean --num-layers?"),
        (["--exit-duration", "3"], "unknown option --exit-duration; did you mean --exit-duration-in-mins?"),
        (["--qqqqqq"], "unknown option --qqqqqq; --help lists all"),
        (["--fp16"], "--fp16 is a Megatron-LM flag this engine does not take: use --bf16 or fp32"),
        (["--use-checkpoint-opt_param-scheduler"], "--use-checkpoint-opt-param-scheduler is a Megatron-LM flag"),
        (["--num-layers", "many"], "--num-layers"),
        (["--num-layers"], "Missing value for argument '--num-layers'"),
        (["--lr-decay-style", "foo"], "invalid choice 'foo'"),
        (["stray"], "Unrecognized options: stray"),
        (["--config", "missing.yaml"], "--config missing.yaml: No such file"),
        (["--model", "missing"], "--model missing: no such preset"),
    ],
)
def test_errors_in_process(argv: list[str], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse(argv)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("argv", [["--nun-layers", "3"], ["--num-layers", "many"], ["--model", "missing"]])
def test_errors_end_with_one_line_and_code_2(argv: list[str]) -> None:
    result = run(*argv)
    assert result.returncode == 2 and result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr


def test_help_is_quick_and_complete() -> None:
    walls = []
    for _ in range(3):
        start = time.perf_counter()
        result = run("--help")
        walls.append(time.perf_counter() - start)
        if walls[-1] < 1.0:
            break
    assert result.returncode == 0 and min(walls) < 2.0, walls
    for flag in ("--num-layers", "--overlap-param-gather", "--eval-iters", "--config", "--model"):
        assert flag in result.stdout


def test_help_and_errors_import_no_torch() -> None:
    code = (
        "import sys\n"
        "from megatron_steel.pretrain import main\n"
        "for argv in (['--help'], ['--bogus'], ['--num-layers', 'x']):\n"
        "    try: main(argv)\n"
        "    except SystemExit: pass\n"
        "import megatron_steel.config.check, megatron_steel.checkpoint.files\n"
        "print('HEAVY', [m for m in ('torch', 'numpy', 'megatron.core', 'transformers') if m in sys.modules])\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60)
    assert result.stdout.splitlines()[-1] == "HEAVY []"


def test_ranks_other_than_0_say_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    waits: list[float] = []
    monkeypatch.setattr("megatron_steel.config.load.time.sleep", waits.append)
    for rank, error in (("1", ""), ("0", "error: two lines\n")):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as stop, user_errors():
            raise ValueError("two\nlines")
        assert (stop.value.code, capsys.readouterr()) == (2, ("", error))
    assert waits == [3]


# Cross-field rules

FAULTS: list[tuple[dict[str, Any], str]] = [
    (
        {"hidden_size": 1024, "num_attention_heads": 15},
        "--hidden-size 1024 is not divisible by --num-attention-heads 15; use 16 or 8 heads, or set --kv-channels",
    ),
    ({"hidden_size": 12, "num_attention_heads": 4}, "head width 3 is odd"),
    ({"kv_channels": 5}, "head width 5 is odd"),
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


@pytest.mark.parametrize(
    ("micro", "ranks", "wish", "result"),
    [(2, 4, None, 8), (2, 4, 8, 8), (2, 4, 24, 24), (1, 1, 512, 512)],
)
def test_batch_arithmetic(micro: int, ranks: int, wish: int | None, result: int) -> None:
    config = build(micro_batch_size=micro, global_batch_size=wish)
    check(config, ranks)
    assert config.training.global_batch_size == result


@pytest.mark.parametrize(
    ("wish", "way_out"), [(20, "use 16 or 24"), (9, "use 8 or 16"), (5, "a whole number; use 8"), (1, "number; use 8")]
)
def test_batch_error_names_the_neighbours(wish: int, way_out: str) -> None:
    with pytest.raises(ValueError) as caught:
        check_batch(build(micro_batch_size=2, global_batch_size=wish), 4)
    assert f"--global-batch-size {wish} is not --micro-batch-size 2 x 4 data-parallel ranks" in str(caught.value)
    assert str(caught.value).endswith(way_out)


@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 200))
def test_batch_way_out_is_accepted(micro: int, ranks: int, wish: int) -> None:
    config = build(micro_batch_size=micro, global_batch_size=wish)
    try:
        check_batch(config, ranks)
        assert wish % (micro * ranks) == 0
    except ValueError as error:
        for way_out in str(error).rsplit("use ", 1)[1].split(" or "):
            check_batch(build(micro_batch_size=micro, global_batch_size=int(way_out)), ranks)


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
    ({"lr_wsd_decay_iters": 5}, "--lr-wsd-decay-iters has no effect with --lr-decay-style cosine"),
    ({"lr_decay_style": "constant", "min_lr": 1e-5}, "--min-lr has no effect with --lr-decay-style constant"),
    ({"wandb_exp_name": "a"}, "--wandb-exp-name has no effect without --wandb-project"),
    ({"wandb_save_dir": "a"}, "--wandb-save-dir has no effect without --wandb-project"),
    ({"use_distributed_optimizer": True}, "--use-distributed-optimizer shards nothing on one data-parallel rank"),
    ({"rope_scaling_factor": 32}, "--rope-scaling-factor has no effect without --use-rope-scaling"),
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
