"""Options about preferences: how two answers, or one judged answer, become a loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

PreferenceLoss = Literal["sigmoid", "robust", "hinge", "ipo", "orpo", "simpo", "kto", "reward"]
Reference = Literal["precomputed", "live", "adapters_off"]


@dataclass(kw_only=True)
class PreferenceConfig:
    """Preferences, for megatron_steel.preference."""

    preference_loss: PreferenceLoss = "sigmoid"
    """DPO (sigmoid, robust, hinge, ipo), without a reference (orpo, simpo), of single answers (kto), or reward."""
    beta: float = 0.1
    """How far answers may move from the reference; the weight of the odds ratio in orpo, the scale of simpo."""
    label_smoothing: float = 0.0
    """Share of pairs whose answers are believed to be the wrong way round (sigmoid, robust)."""
    simpo_gamma: float = 0.5
    """Margin that simpo asks for, in units of the reward."""
    sft_weight: float = 0.0
    """Weight of the mean negative log-likelihood of chosen answers, added to the loss (RPO's alpha, pref_ftx)."""
    desirable_weight: float = 1.0
    """Weight of good answers in kto."""
    undesirable_weight: float = 1.0
    """Weight of bad answers in kto."""
    reference: Reference = "precomputed"
    """Where the reference's log-probabilities come from: computed once before training, by a second model, or by the
    model without its adapters."""
    reference_checkpoint: str | None = None
    """What the reference is, a checkpoint directory or a Hugging Face folder; what the run starts from when unset."""
    reference_free: bool = False
    """Take the reference's log-probabilities to be 0."""
