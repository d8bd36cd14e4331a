"""Rules and sizes of reward models."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from megatron_steel.config.check import check
from megatron_steel.config.check_score import check_score, refuse_score
from megatron_steel.config.families import FAMILIES
from megatron_steel.config.hf_sizes import hf_from_sizes, sizes_from_hf
from megatron_steel.config.load import from_flat
from megatron_steel.config.schema import Config, ModelConfig
from megatron_steel.plan.estimate import stage_parameters
from megatron_steel.plan.parameters import count_parameters

BASE: dict[str, Any] = {"score_head": True, "train_iters": 1, "global_batch_size": 1, "micro_batch_size": 1}


def hf_config(**changes: Any) -> dict[str, Any]:
    written = hf_from_sizes(ModelConfig(score_head=True), 100, {"pad_token_id": 3}, "float32")
    return {key: value for key, value in {**written, **changes}.items() if value is not None}


def test_config_json_in_both_directions() -> None:
    written = hf_config()
    assert written["architectures"] == ["LlamaForSequenceClassification"]
    assert written["num_labels"] == 1 and written["id2label"] == {"0": "LABEL_0"} and written["pad_token_id"] == 3
    assert sizes_from_hf(written, "here")["score_head"] is True
    # What transformers itself writes has the list of labels alone.
    assert sizes_from_hf(hf_config(num_labels=None), "here")["score_head"] is True
    assert sizes_from_hf(hf_config(architectures=["LlamaForCausalLM"]), "here")["score_head"] is False
    assert "num_labels" not in hf_from_sizes(ModelConfig(), 100, {}, "float32")


@pytest.mark.parametrize(
    ("changes", "labels"),
    [
        ({"num_labels": 3}, 3),
        ({"num_labels": None, "id2label": None}, 2),
        ({"num_labels": None, "id2label": {"0": "a", "1": "b", "2": "c"}}, 3),
    ],
)
def test_a_classifier_is_refused(changes: dict[str, Any], labels: int) -> None:
    with pytest.raises(ValueError, match=f"here: a classifier with {labels} labels"):
        sizes_from_hf(hf_config(**changes), "here")


def test_names_of_classes_exist() -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as NAMES

    for family in FAMILIES.values():
        if family.modeling is None:
            assert NAMES[family.model_type] == family.scoring_architecture
        else:
            assert family.scoring_architecture is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"cross_entropy_chunk_size": 64}, "--score-head leaves no logits"),
        ({"use_torch_fsdp2": True, "transformer_impl": "torch", "use_distributed_optimizer": False}, "--score-head"),
        (
            {"freeze_trainable_layers": 1, "freeze_extra_modules": ["lm_head"], "use_distributed_optimizer": False,
             "untie_embeddings_and_output_weights": True},
            "--freeze-extra-modules lm_head: a reward model has none",
        ),
    ],
)  # fmt: skip
def test_rules(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(from_flat({**BASE, **flags}))


@pytest.mark.parametrize("flags", [{"model_family": "steel"}, {"decoder_layer": "mine:layer"}])
def test_models_that_transformers_has_no_class_for(flags: dict[str, Any]) -> None:
    flag = next(iter(flags))
    with pytest.raises(ValueError, match=f"--score-head does not go with --{flag.replace('_', '-')}"):
        check_score(from_flat({**BASE, **flags}))


def test_next_tokens_are_not_trained() -> None:
    check(from_flat(BASE))
    refuse_score(Config(), "here")
    with pytest.raises(ValueError, match="here trains language models"):
        refuse_score(from_flat(BASE), "here")


@pytest.mark.parametrize("untied", [False, True])
def test_parameters(untied: bool) -> None:
    """One embedding and one row, whether or not the language model had two tables."""
    language = ModelConfig(untie_embeddings_and_output_weights=untied)
    size = replace(language, score_head=True)
    tied = replace(language, untie_embeddings_and_output_weights=False)
    assert count_parameters(size, 512).total == count_parameters(tied, 512).total + size.hidden_size
    whole = stage_parameters(Config(size=size), 512, 0).dense
    assert whole == stage_parameters(Config(size=tied), 512, 0).dense + size.hidden_size
