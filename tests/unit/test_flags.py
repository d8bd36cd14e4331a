"""The frozen list of flags: a user's command line must not stop working by accident.

After a change on purpose, rewrite the list with ``python tests/unit/test_flags.py`` and commit it with the change.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest

from megatron_steel.config.load import flag_names, parse, unknown_option
from megatron_steel.config.megatron_flags import KNOWN_FLAGS
from megatron_steel.config.schema import Config

FROZEN = Path(__file__).with_name("flags.txt")
MEGATRON_LM = Path(__file__).with_name("megatron_lm_flags.txt")
# Not Megatron-LM's; everything else has the name a Megatron-LM user knows.
OUR_OWN = {
    "loss-type",
    "beta",
    "label-smoothing",
    "simpo-gamma",
    "rpo-alpha",
    "reward-collapse-patience",
    "share-prompts",
    "reward",
    "max-new-tokens",
    "scale-advantages",
    "answer-average",
    "desirable-weight",
    "undesirable-weight",
    "reference",
    "reference-checkpoint",
    "train-data",
    "valid-data",
    "dataset-info",
    "system-text",
    "system-probability",
    "train-turns",
    "train-on-prompt",
    "mask-history",
    "train-newline",
    "num-epochs",
    "train-tokens",
    "packing",
    "loss-weighting",
    "truncation",
    "min-answer-tokens",
    "max-turn-bytes",
    "max-bad-rows",
    "max-untrained",
    "inspect",
    "preflight",
    "allow-non-causal-softmoe",
    "freeze-extra-modules",
    "freeze-trainable-layers",
    "lora-alpha",
    "lora-dropout",
    "lora-modules-to-save",
    "lora-rank",
    "lora-target-modules",
    "train-embeddings-only",
    "use-dora",
    "use-rslora",
    "pure-bf16",
    "cross-entropy-chunk-size",
    "model",
    "model-family",
    "decay-embeddings",
    "append-data",
    "target-epochs",
    "data-phases",
    "data-fingerprint",
    "sequence-mode",
    "max-epochs-per-source",
    "auto-resume",
    "save-total-limit",
    "config",
    "activation",
    "attn-logit-softcapping",
    "decoder-layer",
    "embedding-init",
    "embedding-scale",
    "score-head",
    "ffn-type",
    "final-logit-softcapping",
    "full-attention-layers",
    "gated-linear-unit",
    "mlp-div-ratio",
    "mlp-type",
    "no-rope-layers",
    "norm-placement",
    "parallel-residual",
    "qk-layernorm-full",
    "rope-attention-factor",
    "rope-beta-fast",
    "rope-beta-slow",
    "rope-high-freq-factor",
    "rope-low-freq-factor",
    "rope-mscale",
    "rope-mscale-all-dim",
    "rope-original-max-position-embeddings",
    "rope-scaling-type",
    "rope-truncate",
    "rotary-base-local",
    "slots-per-expert",
    "soft-experts",
    "softmax-scale",
    "stable-embedding",
}
# megatron-core's name in its Python configuration, typed as a flag by people who know that.
CORE_NAMES = {"virtual-pipeline-model-parallel-size"}


def current_flags() -> list[str]:
    """One line per flag: name, type, default."""
    config = Config()
    lines = []
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        fields = dataclasses.fields(value) if dataclasses.is_dataclass(value) else [item]
        owner = value if dataclasses.is_dataclass(value) else config
        for entry in fields:
            name = entry.name.replace("_", "-")
            lines.append(f"--{name}  {entry.type}  {getattr(owner, entry.name)!r}")
    return lines


def megatron_lm_flags() -> set[str]:
    """Names of Megatron-LM's flags."""
    lines = MEGATRON_LM.read_text(encoding="utf-8").splitlines()
    return {line for line in lines if line and not line.startswith("#")}


def test_flags_are_the_frozen_ones() -> None:
    frozen, current = FROZEN.read_text(encoding="utf-8").splitlines(), current_flags()
    gone, new = [f for f in frozen if f not in current], [f for f in current if f not in frozen]
    hint = "if that is on purpose: python tests/unit/test_flags.py, and commit tests/unit/flags.txt"
    assert frozen == current, f"gone or changed: {gone}; new or changed: {new}; {hint}"


def test_every_flag_has_a_help_text(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    missing = [name for name in flag_names() if f"--{name.replace('_', '-')}" not in text]
    assert missing == []


@pytest.mark.parametrize("flag", KNOWN_FLAGS)
def test_known_flags_have_their_named_error(flag: str) -> None:
    expected = f"command line: --{flag} is a Megatron-LM flag this engine does not take: {KNOWN_FLAGS[flag]}"
    for argv in ([f"--{flag}"], [f"--{flag.replace('-', '_')}=1"]):
        with pytest.raises(ValueError) as caught:
            parse(argv)
        assert str(caught.value) == expected


def test_known_flags_are_megatron_lms_and_not_ours() -> None:
    ours = {name.replace("_", "-") for name in flag_names()}
    assert set(KNOWN_FLAGS) & ours == set()
    assert {f for f in KNOWN_FLAGS if f.startswith("no-") and f.removeprefix("no-") in ours} == set()
    assert set(KNOWN_FLAGS) - megatron_lm_flags() == CORE_NAMES


def test_our_flags_are_megatron_lms_but_for_a_short_list() -> None:
    ours, theirs = {name.replace("_", "-") for name in flag_names()}, megatron_lm_flags()
    # What Megatron-LM can only switch off with --no-x is --x and --no-x here.
    assert ours - theirs - {flag.removeprefix("no-") for flag in theirs} == OUR_OWN


def test_advice_names_flags_that_exist() -> None:
    ours = {name.replace("_", "-") for name in flag_names()}
    for flag, advice in KNOWN_FLAGS.items():
        words = [word.strip(",.;()") for word in advice.split()]
        for named in (word[2:] for word in words if word.startswith("--")):
            assert named in ours, f"the advice for --{flag} names --{named}"


def test_table_takes_no_underscores() -> None:
    assert [flag for flag in KNOWN_FLAGS if "_" in flag or flag.startswith("-")] == []
    assert unknown_option("cp_comm_type", "x").startswith("x: --cp-comm-type is a Megatron-LM flag")


if __name__ == "__main__":
    FROZEN.write_text("\n".join(current_flags()) + "\n", encoding="utf-8")
    sys.stdout.write(f"wrote {FROZEN}\n")
