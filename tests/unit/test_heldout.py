"""Scores of several validation sets as one."""

from __future__ import annotations

import math

import pytest

from megatron_steel.evaluate.heldout import HeldOutResult, combine


def test_every_token_counts_the_same() -> None:
    short, long = HeldOutResult(loss=4.0, tokens=100, bytes=300), HeldOutResult(loss=2.0, tokens=300, bytes=500)
    both = combine([short, long])
    assert (both.loss, both.tokens, both.bytes) == (2.5, 400, 800)
    assert both.perplexity == math.exp(2.5)
    assert both.bits_per_byte == pytest.approx(2.5 * 400 / math.log(2) / 800, rel=1e-15)
    assert combine([short]) == short


def test_sets_without_a_scored_token_have_no_loss() -> None:
    assert combine([HeldOutResult(loss=0.0, tokens=0, bytes=0)] * 2).loss == 0.0
