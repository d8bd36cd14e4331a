"""Dynamic scaling of the rotary embedding beyond the length a model is declared for, against transformers."""

from __future__ import annotations

from pathlib import Path

import hf_models
import numpy as np
import pytest
from hf_models import LAYOUTS, NEW_TOKENS, PLAIN_ROPE, PROMPT_LENGTHS, findings_of_transformers, make_model
from pool import WorkerPool

DECLARED, FACTOR, WIDTH = 24, 3.0, 20


@pytest.mark.parametrize("layout", ["1", "tp2-pp2"])
def test_full_forward_and_decoding_beyond_the_declared_length(pool: WorkerPool, tmp_path: Path, layout: str) -> None:
    """A text has the base of its length; a cached continuation that of the longest it may become, from its beginning.

    The truth of the latter is a model whose plain base is that one: transformers itself changes the base while it
    decodes and leaves the keys of its cache as they were.
    """
    model = make_model("llama-dynamic", max_position_embeddings=DECLARED)
    model.save_pretrained(tmp_path / "theirs")
    roots = {"model": (str(tmp_path / "theirs"), str(tmp_path / "ours"))}
    checkpoints = pool.run(1, hf_models.work_import, roots, join=False)[0]
    ranks = LAYOUTS[layout][0] * LAYOUTS[layout][1]
    ours = pool.run(ranks, hf_models.work_findings, checkpoints, LAYOUTS[layout], join=False, timeout=120)[0]["model"]
    np.testing.assert_allclose(ours.logits, findings_of_transformers(model).logits, rtol=0, atol=1e-5)

    for row, length in enumerate(PROMPT_LENGTHS):
        total = length + NEW_TOKENS
        base = PLAIN_ROPE["rope_theta"] * (FACTOR * total / DECLARED - (FACTOR - 1)) ** (WIDTH / (WIDTH - 2))
        plain = make_model("llama-dynamic", rope_parameters={**PLAIN_ROPE, "rope_theta": base})
        assert ours.generated[row] == findings_of_transformers(plain).generated[row]
