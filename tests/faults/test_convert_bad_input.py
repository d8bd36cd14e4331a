"""tools/convert_hf.py: the commands as a user runs them, and what it says when it cannot."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pool import WorkerPool
from safetensors.torch import load_file, save_file

REPOSITORY = Path(__file__).parents[2]
TOKENIZER = REPOSITORY / "examples" / "data" / "tokenizer"
sys.path.insert(0, str(REPOSITORY / "tests" / "parity"))

import hf_models  # noqa: E402

ROWS = len(json.loads((TOKENIZER / "tokenizer.json").read_text())["model"]["vocab"]) + 105
EMBEDDING = "model.embed_tokens.weight"


def run_tool(*argv: str) -> subprocess.CompletedProcess[str]:
    """The tool in a process of its own."""
    command = [sys.executable, str(REPOSITORY / "tools" / "convert_hf.py"), *argv]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)


def run_quickly(pool: WorkerPool, *argv: object) -> tuple[int, str, str]:
    """The tool in a process that has its imports behind it."""
    return pool.run(1, hf_models.work_convert, [str(item) for item in argv], join=False)[0]


@pytest.fixture(scope="module")
def made(pool: WorkerPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``hf`` (a tiny Qwen2 and the bundled tokenizer) and ``ours``, imported from it."""
    root = tmp_path_factory.mktemp("convert")
    hf_models.make_model("qwen2-tied", vocab_size=ROWS).save_pretrained(root / "hf")
    for path in TOKENIZER.iterdir():
        shutil.copy(path, root / "hf")
    (root / "hf" / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    code, out, err = run_quickly(pool, "import", "--hf", root / "hf", "--save", root / "ours")
    assert (code, err) == (0, ""), err
    assert out.strip() == f"wrote {root / 'ours' / 'iter_0000000'}"
    return root


def files_below(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*")}


def test_commands_as_processes(made: Path, tmp_path: Path) -> None:
    """import, export and verify from a shell; the exported folder has everything a reader needs."""
    imported = run_tool("import", "--hf", str(made / "hf"), "--save", str(tmp_path / "new" / "ours"))
    assert imported.returncode == 0, imported.stderr
    exported = run_tool("export", "--load", str(tmp_path / "new" / "ours"), "--hf", str(tmp_path / "out" / "hf"))
    assert exported.returncode == 0, exported.stderr
    verified = run_tool("verify", "--load", str(tmp_path / "new" / "ours"), "--hf", str(tmp_path / "out" / "hf"))
    assert verified.returncode == 0, verified.stderr
    assert verified.stdout.strip().endswith("all weights equal: same model")
    assert "top-1 agreement 1.0000" in verified.stdout
    tokenizer = {path.name for path in TOKENIZER.iterdir()}
    expected = {"config.json", "generation_config.json", "model.safetensors", "README.md", "chat_template.jinja"}
    assert files_below(tmp_path / "out") == {"hf", *(f"hf/{name}" for name in expected | tokenizer)}
    for name in tokenizer | {"chat_template.jinja", "generation_config.json"}:
        assert (tmp_path / "out" / "hf" / name).read_bytes() == (made / "hf" / name).read_bytes(), name


def test_export_replaces_an_older_export(pool: WorkerPool, made: Path, tmp_path: Path) -> None:
    for _ in range(2):
        code, _, err = run_quickly(pool, "export", "--load", made / "ours", "--hf", tmp_path / "hf")
        assert (code, err) == (0, "")
    assert files_below(tmp_path) == {"hf", *(f"hf/{path.name}" for path in (tmp_path / "hf").iterdir())}


def last_weight(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return tensors["model.layers.3.mlp.down_proj.weight"].view(-1)


@pytest.mark.parametrize("step", [1e-6, 1.0], ids=["one-bit-or-so", "large"])
def test_verify_sees_a_single_changed_weight(pool: WorkerPool, made: Path, tmp_path: Path, step: float) -> None:
    shutil.copytree(made / "hf", tmp_path / "hf")
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    last_weight(tensors)[-1] += step
    save_file(tensors, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    code, out, _ = run_quickly(pool, "verify", "--load", made / "ours", "--hf", tmp_path / "hf")
    assert code == 1
    assert "1 weights differ, the first is model.layers.3.mlp.down_proj.weight: DIFFERENT" in out


def test_verify_sees_a_changed_setting(pool: WorkerPool, made: Path, tmp_path: Path) -> None:
    """Equal weights are not enough: another rope base makes another model of them."""
    shutil.copytree(made / "hf", tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 500.0
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    code, out, _ = run_quickly(pool, "verify", "--load", made / "ours", "--hf", tmp_path / "hf")
    assert code == 1 and "all weights equal: DIFFERENT" in out


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def lose_tensor(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.layers.1.self_attn.k_proj.bias"]


def cut_tensor(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.self_attn.k_proj.weight"] = tensors["model.layers.1.self_attn.k_proj.weight"][:-1].clone()


def add_tensor(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.mlp.router.weight"] = torch.zeros(3)


def quantize(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"].to(torch.int8)


def halve(tensors: dict[str, torch.Tensor]) -> None:
    """One layer in another precision than its like."""
    for part in ("gate", "up"):
        name = f"model.layers.1.mlp.{part}_proj.weight"
        tensors[name] = tensors[name].to(torch.bfloat16)


def cut_rows(folder: Path) -> None:
    """A model with fewer rows than its tokenizer has ids: what adding a token and forgetting the embedding leaves."""
    change_config(folder, vocab_size=100)
    change_tensors(folder, lambda tensors: tensors.update({EMBEDDING: tensors[EMBEDDING][:100].clone()}))


BROKEN: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "no folder": (shutil.rmtree, ("not a Hugging Face folder",)),
    "no config": (lambda folder: (folder / "config.json").unlink(), ("not a Hugging Face folder", "config.json")),
    "config not JSON": (lambda folder: (folder / "config.json").write_text("{"), ("config.json", "JSON")),
    "model_type": (lambda folder: change_config(folder, model_type="t5"), ("model_type 't5'", "llama")),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), ("model.safetensors", "missing")),
    "cut weights": (lambda folder: os.truncate(folder / "model.safetensors", 5000), ("not a readable safetensors",)),
    "no tensor": (lambda folder: change_tensors(folder, lose_tensor), ("model.layers.1.self_attn.k_proj.bias",)),
    "shape": (lambda folder: change_tensors(folder, cut_tensor), ("k_proj.weight is (39, 48)", "(40, 48)")),
    "sizes": (lambda folder: change_config(folder, intermediate_size=96), ("mlp.gate_proj.weight is (88, 48)",)),
    "rows": (lambda folder: change_config(folder, vocab_size=ROWS + 1), (f"embed_tokens.weight is ({ROWS}, 48)",)),
    "extra tensor": (lambda folder: change_tensors(folder, add_tensor), ("model.layers.1.mlp.router.weight",)),
    "integers": (lambda folder: change_tensors(folder, quantize), ("up_proj.weight is torch.int8", "float32")),
    "precisions": (lambda folder: change_tensors(folder, halve), ("layers.1.mlp.gate_proj.weight is", "--dtype")),
    "bad index": (
        lambda folder: (folder / "model.safetensors.index.json").write_text("[]"),
        ("model.safetensors.index.json", "not a safetensors index"),
    ),
    "bad tokenizer": (lambda folder: (folder / "tokenizer.json").write_text("{"), ("Tokenizer", "cannot load")),
    "large tokenizer": (cut_rows, ("only 100 rows", "resize the embedding")),
}


def check_refused(result: tuple[int, str, str], words: tuple[str, ...]) -> None:
    code, out, err = result
    assert (code, out) == (2, ""), err
    assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n"), err
    for word in words:
        assert word in err


@pytest.mark.parametrize("what", BROKEN)
def test_import_refuses(pool: WorkerPool, made: Path, tmp_path: Path, what: str) -> None:
    breaking, words = BROKEN[what]
    shutil.copytree(made / "hf", tmp_path / "hf")
    breaking(tmp_path / "hf")
    check_refused(run_quickly(pool, "import", "--hf", tmp_path / "hf", "--save", tmp_path / "a" / "ours"), words)
    assert not (tmp_path / "a").exists()


def test_import_leaves_other_checkpoints_alone(pool: WorkerPool, made: Path) -> None:
    before = files_below(made / "ours")
    result = run_quickly(pool, "import", "--hf", made / "hf", "--save", made / "ours")
    check_refused(result, ("--save", "already holds checkpoints"))
    assert files_below(made / "ours") == before


@pytest.mark.parametrize("command", ["export", "verify"])
def test_missing_checkpoint_is_refused(pool: WorkerPool, made: Path, tmp_path: Path, command: str) -> None:
    target = tmp_path / "hf" if command == "export" else made / "hf"
    check_refused(
        run_quickly(pool, command, "--load", tmp_path / "no", "--hf", target), ("--load", "no such directory")
    )
    wrong_step = run_quickly(pool, command, "--load", made / "ours", "--ckpt-step", 7, "--hf", target)
    check_refused(wrong_step, ("--ckpt-step 7",))
    assert files_below(tmp_path) == set()


@pytest.mark.parametrize("kind", ["file", "other folder", "more than a model"])
def test_export_leaves_other_files_alone(pool: WorkerPool, made: Path, tmp_path: Path, kind: str) -> None:
    target = tmp_path / "hf"
    if kind == "file":
        target.write_text("mine")
    else:
        target.mkdir()
        (target / "notes.bin").write_text("mine")
        if kind == "more than a model":
            (target / "config.json").write_text("{}")
    before = files_below(tmp_path)
    check_refused(run_quickly(pool, "export", "--load", made / "ours", "--hf", target), (f"--hf {target}", "new name"))
    assert files_below(tmp_path) == before


def test_damaged_checkpoint_is_refused(pool: WorkerPool, made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "ours", tmp_path / "ours")
    (tmp_path / "ours" / "iter_0000000" / "state.json").unlink()
    result = run_quickly(pool, "export", "--load", tmp_path / "ours", "--hf", tmp_path / "hf")
    check_refused(result, ("state.json",))
    assert not (tmp_path / "hf").exists()


def test_interrupted_export_leaves_nothing(made: Path, tmp_path: Path) -> None:
    """SIGTERM while the weights are written; and what a killed one left does not stand in the way."""
    slow = (
        "import os, sys, time\n"
        "from megatron_steel.runtime import cpu\n"
        "cpu.install()\n"
        "from megatron_steel.checkpoint import hf\n"
        "real = hf.write_tokenizer\n"
        "def wait(*args):\n"
        "    print('written', flush=True)\n"
        "    time.sleep(60)\n"
        "hf.write_tokenizer = wait\n"
        "from tools.convert_hf import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    argv = ["export", "--load", str(made / "ours"), "--hf", str(tmp_path / "deep" / "hf")]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", slow, *argv]
    for number in (signal.SIGTERM, signal.SIGKILL):
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment) as process:
            assert process.stdout is not None and process.stdout.readline() == b"written\n"
            os.kill(process.pid, number)
            code = process.wait(60)
        left = files_below(tmp_path)
        if number == signal.SIGTERM:
            assert code == 1 and left == set()
        else:
            assert not (tmp_path / "deep" / "hf").exists() and left
    assert run_tool(*argv).returncode == 0
    assert {path.name for path in (tmp_path / "deep").iterdir()} == {"hf"}
