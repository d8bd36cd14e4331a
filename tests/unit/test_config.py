"""Parsing, precedence and errors of the configuration."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_steel.config.check import check
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
        ('{"model_type": "rwkv"}', "model_type 'rwkv'"),
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
        (["--async-save"], "--async-save is a Megatron-LM flag this engine does not take: not supported yet"),
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
