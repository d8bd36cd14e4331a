"""Rules for the rotary embedding, run by config/check.py."""

from __future__ import annotations

from megatron_steel.config.family import head_width
from megatron_steel.config.rope import FROM_LENGTH, SCALINGS
from megatron_steel.config.schema import Config, ModelConfig


def check_rope(config: Config) -> None:
    """Numbers a scaling could not be computed with; raises ``ValueError`` like check.py."""
    size = config.size
    if not size.use_rope_scaling:
        return
    kind = size.rope_scaling_type
    if size.position_embedding_type != "rope":
        raise ValueError(f"--use-rope-scaling needs --position-embedding-type rope, not {size.position_embedding_type}")
    if size.rope_scaling_factor < 1:
        raise ValueError(f"--rope-scaling-factor must be 1 or more, not {size.rope_scaling_factor}")
    for name in ("rope_original_max_position_embeddings", *(ours for ours, _, _ in SCALINGS[kind])):
        value = getattr(size, name)
        if value is not None and not value > 0:
            raise ValueError(f"--{name.replace('_', '-')} must be greater than 0, not {value}")
    for wanted, low, high in (
        ("llama3", "rope_low_freq_factor", "rope_high_freq_factor"),
        ("yarn", "rope_beta_slow", "rope_beta_fast"),
    ):
        if kind == wanted and getattr(size, low) >= getattr(size, high):
            raise ValueError(
                f"--{low.replace('_', '-')} {getattr(size, low)} must be below "
                f"--{high.replace('_', '-')} {getattr(size, high)}"
            )
    if size.rotary_base_local is not None and kind in ("yarn", "dynamic"):
        # A factor of cosine and sine, and a base that follows the length, would act on the layers with a window, too.
        raise ValueError(f"--rotary-base-local does not go with --rope-scaling-type {kind}; linear and llama3 do")
    if kind == "dynamic" and int(head_width(size) * size.rotary_percent) < 4:
        raise ValueError("--rope-scaling-type dynamic needs at least 4 rotated channels of a head")


def rope_without_effect(size: ModelConfig) -> list[str]:
    """One line for each setting that changes nothing: of another kind of scaling, or of none."""
    kinds: dict[str, tuple[str, ...]] = {ours: (kind,) for kind, fields in SCALINGS.items() for ours, _, _ in fields}
    kinds |= {"rope_truncate": ("yarn",), "rope_original_max_position_embeddings": FROM_LENGTH}
    kinds |= {"rope_scaling_factor": tuple(SCALINGS), "rope_scaling_type": tuple(SCALINGS)}
    notes, defaults = [], ModelConfig()
    for name, wanted in kinds.items():
        if getattr(size, name) == getattr(defaults, name):
            continue
        flag = f"--{name.replace('_', '-')}"
        if not size.use_rope_scaling:
            notes.append(f"{flag} has no effect without --use-rope-scaling")
        elif size.rope_scaling_type not in wanted:
            notes.append(f"{flag} has no effect without --rope-scaling-type {' or '.join(wanted)}")
    return notes
