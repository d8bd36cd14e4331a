"""What a run says about a checkpoint it goes on from."""

from __future__ import annotations

from pathlib import Path

from megatron_steel.checkpoint.state import TrainState
from megatron_steel.config.load import to_flat
from megatron_steel.config.schema import Config
from megatron_steel.train.prepare import changed_masks


def test_a_changed_mask_is_a_warning() -> None:
    before, now = Config(), Config()
    before.data.eod_mask_loss = now.data.reset_attention_mask = True
    assert changed_masks(now, TrainState(config=to_flat(before)), Path("ckpt")) == [
        "ckpt was trained with --eod-mask-loss; this run goes on without it",
        "ckpt was trained without --reset-attention-mask; this run goes on with it",
    ]


def test_unchanged_masks_and_older_checkpoints_are_silent() -> None:
    now = Config()
    now.data.reset_position_ids = True
    assert changed_masks(now, TrainState(config=to_flat(now)), Path("ckpt")) == []
    assert changed_masks(Config(), TrainState(config={}), Path("ckpt")) == []
