"""Options about preferences: how two answers, or one judged answer, become a loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

LossType = Literal["sigmoid", "sigmoid_norm", "robust", "hinge", "ipo", "orpo", "simpo", "kto", "rm", "grpo"]
AnswerAverage = Literal["answer", "token", "length"]
Reference = Literal["precomputed", "live", "lora-base", "none"]


@dataclass(kw_only=True)
class PreferenceConfig:
    """Preferences, for megatron_steel.preference."""

    loss_type: LossType = "sigmoid"
    """DPO (sigmoid, sigmoid_norm, robust, hinge, ipo), no reference (orpo, simpo), judged (kto), a reward model (rm),
    or sampled answers and their rewards (grpo)."""
    beta: float = 0.1
    """How far answers may move from the reference; the weight of the odds ratio in orpo, the scale of simpo."""
    label_smoothing: float = 0.0
    """Share of pairs whose answers are believed to be the wrong way round (sigmoid, robust)."""
    simpo_gamma: float = 0.5
    """Margin that simpo asks for, in units of the reward."""
    rpo_alpha: float = 0.0
    """Weight of the mean negative log-likelihood of chosen answers, added to the loss (LLaMA-Factory's pref_ftx)."""
    desirable_weight: float = 1.0
    """Weight of good answers in kto."""
    undesirable_weight: float = 1.0
    """Weight of bad answers in kto."""
    reward_collapse_patience: int | None = None
    """Save and stop after so many reports in a row in which the rewards of good and bad answers fall together."""
    share_prompts: bool = True
    """Compute a prompt once for both answers of a pair, where the layout and model can; the training is the same."""
    reference: Reference = "precomputed"
    """The reference's log-probabilities: computed once, from a second model, of the model without adapters, or 0."""
    reference_checkpoint: str | None = None
    """The reference, a checkpoint directory or a Hugging Face folder; what the run starts from when unset."""
    reward: str | None = None
    """What an answer earns in grpo: math, choice, or your function of response and answer, package.module:function."""
    grpo_group_size: int = 8
    """Answers sampled of each prompt in grpo; a sample of the batch is a prompt."""
    grpo_iterations: int = 1
    """Optimizer steps on each batch of sampled answers."""
    grpo_clamp_eps_lower: float = 0.2
    """How much less probable an answer's token may become in those steps before it is no longer trained."""
    grpo_clamp_eps_upper: float = 0.2
    """How much more probable."""
    rl_default_temperature: float = 1.0
    """Temperature of the sampled answers, and of the probabilities in the loss."""
    max_new_tokens: int = 256
    """Tokens of a sampled answer at most."""
    scale_advantages: bool = True
    """Divide a group's advantages by the standard deviation of its rewards."""
    answer_average: AnswerAverage = "answer"
    """The loss is a mean over answers of their means, over all tokens, or over max_new_tokens of each (length)."""
