"""Bad input to pretraining: one line on stderr, exit code 2, no traceback, and no --save directory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from command_line import ROOT, as_flags, run
from pool import WorkerPool
from tiny_run import options, work_train, write_data

TOKENIZER = str(ROOT / "examples" / "data" / "tokenizer")
CORPUS = ROOT / "examples" / "data" / "valid_en.jsonl"


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def checkpoint(pool: WorkerPool, prefix: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The --save directory of a run of two steps."""
    folder = tmp_path_factory.mktemp("checkpoint")
    pool.run(1, work_train, options(prefix, save=str(folder)), 2, True, join=False)
    return folder


def refuse(tmp_path: Path, flags: list[str], *parts: str, ranks: int = 1) -> None:
    """Run the command and check that it refuses with one line that holds ``parts``."""
    codes = run(tmp_path / "logs", [*flags, "--save", str(tmp_path / "save")], ranks)
    error = (tmp_path / "logs" / "err0").read_text()
    assert codes == [2] * ranks, error
    assert error.startswith("error: ") and error.count("\n") == 1, error
    assert (tmp_path / "logs" / "out0").read_text() == ""
    assert not (tmp_path / "save").exists()
    for part in parts:
        assert part in error, error


def damaged_copy(prefix: str, tmp_path: Path, suffix: str) -> str:
    """A copy of a data set whose file ``suffix`` lacks its last 10 bytes."""
    copy = str(tmp_path / "copy")
    for ending in (".bin", ".idx"):
        shutil.copy(prefix + ending, copy + ending)
    with open(copy + suffix, "r+b") as file:
        file.truncate(Path(copy + suffix).stat().st_size - 10)
    return copy


def test_missing_data(tmp_path: Path, prefix: str) -> None:
    missing = str(tmp_path / "nothing")
    refuse(tmp_path, as_flags(options(missing)), f"{missing}.bin does not exist")


def test_raw_text_as_data(tmp_path: Path) -> None:
    refuse(tmp_path, as_flags(options(str(CORPUS))), "valid_en.jsonl is not an indexed file", "preprocess_data.py")


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_truncated_data(tmp_path: Path, prefix: str, suffix: str) -> None:
    copy = damaged_copy(prefix, tmp_path, suffix)
    refuse(tmp_path, as_flags(options(copy)), f"{copy}{suffix}: ", "truncated")


def test_truncated_validation_data(tmp_path: Path, prefix: str) -> None:
    copy = damaged_copy(prefix, tmp_path, ".bin")
    refuse(tmp_path, as_flags(options(prefix, valid_data_path=[f"zh={copy}"])), f"{copy}.bin: ", "truncated")


def test_data_of_another_tokenizer(tmp_path: Path, prefix: str) -> None:
    """Told by the fingerprint where preprocessing left one, and by the ids where not."""
    with_ids = options(prefix, vocab_size=500)
    refuse(tmp_path / "ids", as_flags(with_ids), prefix, "another tokenizer", "the tokenizer has 501 ids")
    made = run(
        tmp_path / "made",
        ["--input", str(CORPUS), "--output-prefix", str(tmp_path / "real"), "--tokenizer-model", TOKENIZER]
        + ["--tokenizer-type", "HuggingFaceTokenizer", "--append-eod"],
        program=[str(ROOT / "tools" / "preprocess_data.py")],
    )
    assert made == [0], (tmp_path / "made" / "err0").read_text()
    data = str(tmp_path / "real_text_document")
    refuse(tmp_path, as_flags(options(data, vocab_size=30000)), data, "another tokenizer (fingerprint")


def test_tokenizer_is_missing(tmp_path: Path, prefix: str) -> None:
    changes = {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": str(tmp_path / "none"), "vocab_size": None}
    refuse(tmp_path, as_flags(options(prefix, changes)), "--tokenizer-model", "no such file or folder")


def test_nothing_to_load(tmp_path: Path, prefix: str) -> None:
    missing, empty = tmp_path / "missing", tmp_path / "empty"
    empty.mkdir()
    refuse(tmp_path / "a", as_flags(options(prefix, load=str(missing))), f"--load {missing}: no such directory")
    refuse(tmp_path / "b", as_flags(options(prefix, load=str(empty))), f"--load {empty}: holds no checkpoint")


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"num_attention_heads": 3}, ["--hidden-size 32", "--num-attention-heads 3", "use 2 or 4"]),
        ({"tensor_model_parallel_size": 3}, ["--num-attention-heads 4", "--tensor-model-parallel-size 3"]),
        ({"tensor_model_parallel_size": 2}, ["1 processes", "torchrun"]),
        ({"pipeline_model_parallel_size": 3}, ["--num-layers 4", "--pipeline-model-parallel-size 3"]),
        ({"global_batch_size": 7}, ["--global-batch-size 7", "use 6 or 8"]),
        ({"train_iters": 2000}, ["source 'set' would be seen", "--max-epochs-per-source 4"]),
        ({"seq_length": 64}, ["--seq-length 64", "--max-position-embeddings 32"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_sizes_that_do_not_fit(tmp_path: Path, prefix: str, changes: dict[str, Any], parts: list[str]) -> None:
    refuse(tmp_path, as_flags(options(prefix, changes)), *parts)


def test_every_rank_refuses(tmp_path: Path, prefix: str) -> None:
    """One line in all, from the first rank."""
    refuse(
        tmp_path, as_flags(options(prefix, global_batch_size=6)), "--global-batch-size 6", "2 data-parallel", ranks=2
    )
    assert (tmp_path / "logs" / "err1").read_text() == ""


def test_unknown_flag(tmp_path: Path, prefix: str) -> None:
    refuse(tmp_path / "a", [*as_flags(options(prefix)), "--micro-batchsize", "4"], "did you mean --micro-batch-size?")
    refuse(tmp_path / "b", [*as_flags(options(prefix)), "--seq-length", "many"], "--seq-length", "many")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("lr: [1, 2", ["run.yaml: not valid YAML"]),
        ("- lr\n", ["run.yaml: must be a mapping"]),
        ("learning_rate: 1\n", ["unknown option --learning-rate"]),
        ("seq_length: long\n", ["seq_length must be a whole number, not 'long'"]),
    ],
)
def test_bad_yaml(tmp_path: Path, prefix: str, text: str, parts: list[str]) -> None:
    (tmp_path / "run.yaml").write_text(text)
    refuse(tmp_path, ["--config", str(tmp_path / "run.yaml")], *parts)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"hidden_size": 64}, ["--hidden-size 32, this run has 64"]),
        ({"num_layers": 2}, ["--num-layers 4, this run has 2"]),
        ({"untie_embeddings_and_output_weights": True}, ["--untie-embeddings-and-output-weights False"]),
        ({"seq_length": 16}, ["seq_length 16 differs from 32"]),
        ({"vocab_size": 1200}, ["--vocab-size 1201: the checkpoint has 1000 rows"]),
        ({"use_distributed_optimizer": True}, ["--no-use-distributed-optimizer; resume with it"]),
        ({"ckpt_step": 7}, ["--ckpt-step 7", "holds iterations 2"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_checkpoint_of_another_run(
    tmp_path: Path, prefix: str, checkpoint: Path, changes: dict[str, Any], parts: list[str]
) -> None:
    refuse(tmp_path, as_flags(options(prefix, changes, load=str(checkpoint))), *parts)


def test_weights_only_checkpoint_needs_finetune(tmp_path: Path, prefix: str, checkpoint: Path) -> None:
    """The state says that no optimizer was saved; the manifest is brought in line, as an import would write it."""
    from megatron_steel.checkpoint.files import MANIFEST, describe_files, list_files, write_json

    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)
    folder = copy / "iter_0000002"
    state = json.loads((folder / "state.json").read_text())
    write_json(folder / "state.json", {**state, "has_optimizer": False})
    write_json(folder / MANIFEST, {"files": describe_files(folder, list_files(folder))})
    refuse(tmp_path, as_flags(options(prefix, load=str(copy))), "holds weights only", "--finetune")
