"""examples/clean.yaml on the bundled corpus, as docs/cleaning.md shows it, and the document names every filter."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("datatrove")

from megatron_steel.data.clean_settings import FILTERS, load_settings

ROOT = Path(__file__).resolve().parents[2]


def test_the_example_cleans_the_bundled_corpus(tmp_path: Path) -> None:
    inputs = [ROOT / f"examples/data/{name}.jsonl" for name in ("train", "valid_en", "valid_zh")]
    tool = [sys.executable, str(ROOT / "tools" / "clean_data.py"), "--input", *map(str, inputs)]
    config = ["--config", str(ROOT / "examples" / "clean.yaml")]
    flags = ["--output", "clean", "--tasks", "2", "--workers", "2"]
    done = subprocess.run([*tool, *config, *flags], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "clean" / "report.json").read_text())
    given = sum(path.read_bytes().count(b"\n") for path in inputs)
    kept = sum(path.read_bytes().count(b"\n") for path in (tmp_path / "clean").glob("part-*.jsonl"))
    assert report["input"]["documents"] == given == kept + sum(step["dropped"] for step in report["steps"])
    # The bundled corpus is clean: a default that throws more of it away is wrong.
    assert kept >= 0.97 * given


def test_the_example_leaves_nfkc_out() -> None:
    settings = load_settings(ROOT / "examples" / "clean.yaml")
    assert "nfkc" not in dict(settings.filters)
    assert settings.exact_dedup is not None and settings.minhash_dedup is not None


def test_the_document_names_every_filter() -> None:
    text = (ROOT / "docs" / "cleaning.md").read_text(encoding="utf-8")
    assert not [name for name in FILTERS if f"`{name}`" not in text]
