"""Rules of training on preferences: an option that means nothing for a loss is refused."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from megatron_steel.config.check_preference import OF_LOSSES, check_preference, refuse_preference
from megatron_steel.config.load import apply
from megatron_steel.config.preference_schema import LossType
from megatron_steel.config.schema import Config


def build(**values: Any) -> Config:
    """Defaults with some flat options set."""
    config = Config()
    apply(config, values, "test")
    return config


FAULTS: list[tuple[dict[str, Any], str]] = [
    ({"beta": 0.0}, "--beta must be greater than 0, not 0.0"),
    ({"label_smoothing": 0.5}, "--label-smoothing must be at least 0 and below 0.5, not 0.5"),
    ({"loss_type": "robust", "label_smoothing": -0.1}, "--label-smoothing must be at least 0 and below 0.5"),
    ({"reward_collapse_patience": 0}, "--reward-collapse-patience must be 1 or more, not 0"),
    ({"rpo_alpha": -1.0}, "--rpo-alpha must be 0 or more, not -1.0"),
    ({"reference": "lora-base"}, "--reference lora-base needs adapters: give --lora-rank"),
    ({"reference": "none", "loss_type": "kto"}, "compares answers with a reference"),
    ({"reference": "none", "reference_checkpoint": "base"}, "leave out --reference-checkpoint"),
    ({"reference": "lora-base", "lora_rank": 4, "reference_checkpoint": "base"}, "leave out --reference-checkpoint"),
    ({"hidden_dropout": 0.1}, "--hidden-dropout must be 0"),
    ({"train_turns": "first"}, "--train-turns is an option of finetuning"),
    ({"loss_type": "grpo"}, "--loss-type grpo needs --reward: math, choice"),
]
GRPO = {"loss_type": "grpo", "reward": "math"}
FAULTS += [
    ({**GRPO, **values}, message)
    for values, message in (
        ({"packing": False}, "--packing has no meaning for --loss-type grpo"),
        ({"truncation": "keep_eos"}, "--truncation has no meaning for --loss-type grpo"),
        ({"grpo_group_size": 1}, "--grpo-group-size must be 2 or more, not 1"),
        ({"grpo_iterations": 0}, "--grpo-iterations must be 1 or more, not 0"),
        ({"max_new_tokens": 64, "seq_length": 64}, "--max-new-tokens 64 leaves a prompt no room in --seq-length 64"),
        ({"beta": -0.1}, "--beta must be 0 or more"),
        ({"rl_default_temperature": 0.0}, "--rl-default-temperature greater than 0"),
        ({"rl_default_temperature": 0.5, "final_logit_softcapping": 30.0}, "must be 1 with --final-logit-softcapping"),
        ({"grpo_iterations": 2, "grpo_clamp_eps_lower": 1.0}, "--grpo-clamp-eps-lower must be at least 0 and below 1"),
        ({"grpo_clamp_eps_upper": 0.3}, "--grpo-clamp-eps-upper has no effect on the first step on a batch"),
        ({"reference": "none"}, "for grpo without a reference give --beta 0"),
        ({"beta": 0.0, "reference_checkpoint": "base"}, "have no effect with --beta 0"),
        ({"context_parallel_size": 2}, "--loss-type grpo needs --context-parallel-size 1"),
        ({"expert_model_parallel_size": 2}, "--loss-type grpo needs --expert-model-parallel-size 1"),
        ({"num_layers_per_virtual_pipeline_stage": 1}, "--loss-type grpo needs no virtual pipeline stages"),
        ({"use_torch_fsdp2": True}, "--loss-type grpo needs no --use-torch-fsdp2"),
    )
]


@pytest.mark.parametrize(("values", "message"), FAULTS, ids=lambda value: str(value)[:60])
def test_faults(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        check_preference(build(**values))
    assert message in str(caught.value) and "\n" not in str(caught.value)


CHANGED: dict[str, Any] = {
    "beta": 0.3,
    "label_smoothing": 0.1,
    "simpo_gamma": 1.0,
    "desirable_weight": 2.0,
    "undesirable_weight": 2.0,
    "rpo_alpha": 0.5,
    "reward_collapse_patience": 3,
    "share_prompts": False,
    "reference": "live",
    "reference_checkpoint": "base",
    "reward": "choice",
    "grpo_group_size": 4,
    "grpo_iterations": 3,
    "grpo_clamp_eps_lower": 0.1,
    "grpo_clamp_eps_upper": 0.3,
    "rl_default_temperature": 0.7,
    "max_new_tokens": 32,
    "scale_advantages": False,
    "answer_average": "token",
}
# What the formulas of tests/unit/test_preference_losses.py have in them.
MEANT: dict[str, set[str]] = {
    "sigmoid": {"label_smoothing", "rpo_alpha", "reference", "reference_checkpoint"},
    "sigmoid_norm": {"rpo_alpha", "reference", "reference_checkpoint"},
    "robust": {"label_smoothing", "rpo_alpha", "reference", "reference_checkpoint"},
    "hinge": {"rpo_alpha", "reference", "reference_checkpoint"},
    "ipo": {"rpo_alpha", "reference", "reference_checkpoint"},
    "orpo": set(),
    "rm": set(),
    "simpo": {"simpo_gamma", "rpo_alpha"},
    "kto": {"desirable_weight", "undesirable_weight", "reference", "reference_checkpoint"},
    "grpo": {name for name in CHANGED if name in ("reward", "max_new_tokens", "scale_advantages", "answer_average")}
    | {name for name in CHANGED if name.startswith(("grpo_", "rl_", "reference"))},
}
for name in ("sigmoid", "sigmoid_norm", "robust", "hinge", "ipo", "orpo", "simpo", "kto"):
    MEANT[name].add("reward_collapse_patience")
for name in set(MEANT) - {"grpo"}:
    MEANT[name].add("share_prompts")
for name in MEANT:
    MEANT[name] |= set() if name == "rm" else {"beta"}


@pytest.mark.parametrize("loss", get_args(LossType))
def test_a_loss_has_its_own_options_only(loss: str) -> None:
    assert set(CHANGED) == set(OF_LOSSES)
    base = {"reward": "math", "grpo_iterations": 2} if loss == "grpo" else {}
    check_preference(build(loss_type=loss, **base))
    for name, value in CHANGED.items():
        config = build(**{"loss_type": loss, **base, name: value})
        if name in MEANT[loss]:
            check_preference(config)
        else:
            with pytest.raises(ValueError, match=f"has no meaning for --loss-type {loss}"):
                check_preference(config)


def test_other_runs_have_no_preferences() -> None:
    refuse_preference(build(), "megatron_steel.finetune")
    with pytest.raises(ValueError, match="--beta is an option of megatron_steel.preference, not of"):
        refuse_preference(build(beta=0.2), "megatron_steel.finetune")
