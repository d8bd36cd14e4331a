"""Sizes to and from a Hugging Face ``config.json``, as plain dictionaries.

Only what decides the numbers of the model is read; anything this engine would compute differently is refused by name.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_steel.config.families import FAMILIES, detect
from megatron_steel.config.schema import ModelConfig

CLASSIFIER = "ForSequenceClassification"


def read_sizes(path: Path) -> dict[str, Any]:
    """Flags for a ``config.json``; ``ValueError`` names the file when it cannot be read or is not supported."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: must hold a JSON object")
    return sizes_from_hf(values, str(path))


def sizes_from_hf(hf: dict[str, Any], origin: str) -> dict[str, Any]:
    """Flags for a Hugging Face configuration.

    Raises ``ValueError`` naming the key for a family or a setting that is not supported.
    """
    family = detect(hf, origin)
    sizes = {key.ours: key.read(hf, origin) for key in family.keys}
    for name, values in family.accepts.items():
        if name in hf and hf[name] not in values:
            raise ValueError(f"{origin}: {name} {hf[name]!r} is not supported for {family.name}")
    return {"model_family": family.name, **sizes, **family.read(hf, origin), "score_head": read_score(hf, origin)}


def read_score(hf: dict[str, Any], origin: str) -> bool:
    """Whether a configuration is that of a reward model; ``ValueError`` for a classifier into several classes."""
    if not any(str(name).endswith(CLASSIFIER) for name in hf.get("architectures") or ()):
        return False
    # What transformers takes an absent list of labels for.
    labels = hf.get("num_labels", len(hf.get("id2label") or ("no", "yes")))
    if labels != 1:
        raise ValueError(f"{origin}: a classifier with {labels} labels is not supported, only a score (one label)")
    return True


def write_score(size: ModelConfig) -> dict[str, Any]:
    """The keys of a reward model, none for a language model."""
    if not size.score_head:
        return {}
    architecture = FAMILIES[size.model_family].scoring_architecture
    assert architecture is not None
    labels = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    return {"architectures": [architecture], "num_labels": 1, **labels}


def hf_from_sizes(model: ModelConfig, vocab_size: int, token_ids: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The ``config.json`` of a model: everything ``transformers`` needs to build it.

    ``vocab_size`` is the number of rows written (padding trimmed); ``token_ids`` holds bos/eos/pad ids or None.
    """
    family = FAMILIES[model.model_family]
    return {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        **{key.theirs: getattr(model, key.ours) for key in family.keys},
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
        "use_cache": True,
        "dtype": dtype,
        "torch_dtype": dtype,
        **family.write(model),
        **write_score(model),
        "vocab_size": vocab_size,
        **token_ids,
    }
