"""--decoder-layer: the documented example trains the same on every layout, resumes to the bit, and is not exported."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import as_flags, run
from pool import WorkerPool
from tiny_run import LAYOUTS, Trace, largest_relative, options, whole_weights, work_train, write_data

ROOT = Path(__file__).resolve().parents[2]
OWN = {"decoder_layer": "own_layer:scaled_layer"}
STEPS = 4


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_data(tmp_path_factory.mktemp("data"))


def work_own(flat: dict[str, Any], steps: int, save_it: bool = False) -> Trace:
    """:func:`work_train` with the example's folder on the path, as PYTHONPATH has it."""
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        return work_train(flat, steps, save_it)
    finally:
        sys.path.remove(str(ROOT / "examples"))


@pytest.fixture(scope="module")
def alone(pool: WorkerPool, prefix: str) -> Trace:
    return pool.run(1, work_own, options(prefix, OWN), STEPS, join=False)[0]


def test_factors_are_there_and_learn(pool: WorkerPool, prefix: str, alone: Trace) -> None:
    names = [f"decoder.layers.{layer}.mlp.factors" for layer in range(4)]
    factors = [alone.weights[name] for name in names]
    assert all(not np.allclose(row, 0.1, atol=1e-4) and abs(row.mean() - 0.1) < 0.02 for row in factors)
    plain = pool.run(1, work_train, options(prefix), 1, join=False)[0]
    assert abs(plain.losses[0] - alone.losses[0]) > 1e-4, "the layer must change what the model computes"


@pytest.mark.parametrize("name", ["tp2-sp", "pp2-interleaved", "tp2-pp2", "dp2-sharded"])
def test_layouts_agree(pool: WorkerPool, prefix: str, alone: Trace, name: str) -> None:
    layout = LAYOUTS[name]
    traces = pool.run(layout.ranks, work_own, options(prefix, OWN, layout.flags), STEPS, join=False, timeout=120)
    assert largest_relative(traces[0].losses, alone.losses) < 1e-6
    whole = whole_weights(traces)
    assert whole.keys() == alone.weights.keys()
    for key, weights in whole_weights([alone]).items():
        np.testing.assert_allclose(whole[key], weights, rtol=0, atol=2e-5)


def test_a_resumed_run_is_the_same_to_the_bit(pool: WorkerPool, prefix: str, tmp_path: Path) -> None:
    layout = LAYOUTS["tp2-pp2"].flags
    whole = pool.run(4, work_own, options(prefix, OWN, layout), STEPS, join=False, timeout=120)
    saved = options(prefix, OWN, layout, save=str(tmp_path))
    pool.run(4, work_own, saved, 2, True, join=False, timeout=120)
    load = options(prefix, OWN, layout, load=str(tmp_path))
    rest = pool.run(4, work_own, load, STEPS - 2, join=False, timeout=120)
    assert rest[0].losses == whole[0].losses[2:]
    for mine, theirs in zip(rest, whole, strict=True):
        assert all(np.array_equal(mine.weights[key], theirs.weights[key]) for key in theirs.weights)
    other = options(prefix, load=str(tmp_path))
    with pytest.raises(ValueError, match="saved with --decoder-layer own_layer:scaled_layer, this run has None"):
        pool.run(1, work_train, other, 1, join=False)


def work_export(checkpoint: str, folder: str) -> None:
    from megatron_steel.checkpoint.hf import export_hf
    from megatron_steel.runtime import world

    world.start()
    export_hf(Path(checkpoint), Path(folder))


def test_there_is_nothing_to_export_to(pool: WorkerPool, prefix: str, tmp_path: Path) -> None:
    pool.run(1, work_own, options(prefix, OWN, save=str(tmp_path / "run")), 1, True, join=False)
    with pytest.raises(ValueError, match="own_layer:scaled_layer: your own layer has no names in Hugging Face's"):
        pool.run(1, work_export, str(tmp_path / "run" / "iter_0000001"), str(tmp_path / "hf"), join=False)
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("own_layer", "write it as package.module:function"),
        ("nowhere.own_layer:scaled_layer", "cannot import nowhere.own_layer"),
        ("own_layer:scaled_lair", "own_layer has no function scaled_lair"),
        ("own_layer:annotations", "own_layer has no function annotations"),
    ],
)
def test_wrong_paths_are_one_line(tmp_path: Path, prefix: str, path: str, message: str) -> None:
    flags = as_flags(options(prefix, decoder_layer=path))
    program = ("-c", f"import sys; sys.path.insert(0, {str(ROOT / 'examples')!r})\n"
               "from megatron_steel.pretrain import main; sys.exit(main())")  # fmt: skip
    assert run(tmp_path, flags, program=program) == [2]
    error = (tmp_path / "err0").read_text()
    assert error.startswith(f"error: --decoder-layer {path}: ") and message in error and error.count("\n") == 1


def test_the_documentation_shows_the_example() -> None:
    example = (ROOT / "examples" / "own_layer.py").read_text(encoding="utf-8")
    assert example.count("\n") < 60
    assert f"```python\n{example}```" in (ROOT / "docs" / "own_layer.md").read_text(encoding="utf-8")
