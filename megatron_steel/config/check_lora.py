"""Rules about training a part of a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_steel.config.adapters import WHOLE, identity, projections, short, trains_part
from megatron_steel.config.load import to_flat
from megatron_steel.config.schema import Config

# Options that must have these values beside frozen weights.
ALONE: dict[str, Any] = {"use_torch_fsdp2": False, "num_experts": None, "decoder_layer": None}
# And these beside adapters.
PLAIN: dict[str, Any] = {
    "multi_latent_attention": False,
    "ffn_type": "dense",
    "mlp_type": "swiglu",
    "fp8_format": None,
}


def flag(name: str) -> str:
    """A field as it is typed."""
    return f"--{name.replace('_', '-')}"


def refuse_beside(config: Config, what: str, neutral: Mapping[str, Any]) -> None:
    """``ValueError`` for the first option that is not what it has to be beside ``what``."""
    options = to_flat(config)
    for name, value in neutral.items():
        if options[name] != value:
            shown = "" if options[name] is True else f" {options[name]}"
            raise ValueError(f"{what} does not go with {flag(name)}{shown}; remove one of them")


def check_lora(config: Config) -> None:
    """One way to train a part, of a model that has it."""
    lora, size = config.lora, config.size
    ways = [
        flag(name)
        for name, given in (
            ("lora_rank", lora.lora_rank is not None),
            ("freeze_trainable_layers", lora.freeze_trainable_layers is not None),
            ("train_embeddings_only", lora.train_embeddings_only),
        )
        if given
    ]
    if len(ways) > 1:
        raise ValueError(f"{ways[0]} and {ways[1]} are two ways to train a part of the model; give one of them")
    defaults = type(lora)()
    for name in vars_of(lora):
        needed = "freeze_trainable_layers" if name == "freeze_extra_modules" else "lora_rank"
        dependent = name not in ("lora_rank", "freeze_trainable_layers", "train_embeddings_only")
        if dependent and getattr(lora, name) != getattr(defaults, name) and getattr(lora, needed) is None:
            raise ValueError(f"{flag(name)} needs {flag(needed)}")
    if trains_part(lora):
        refuse_beside(config, ways[0], ALONE)
    if trains_part(lora) and lora.lora_rank is None and config.parallel.pipeline_model_parallel_size > 1:
        # A stage may have nothing to train, and megatron-core cannot save a sharded optimizer without state.
        refuse_beside(config, f"{ways[0]} on pipeline stages", {"use_distributed_optimizer": False})
    layers = lora.freeze_trainable_layers
    if layers is not None and not 0 < abs(layers) <= size.num_layers:
        raise ValueError(
            f"--freeze-trainable-layers {layers}: the model has {size.num_layers} layers; give 1 to {size.num_layers} "
            f"for the last ones, -1 to -{size.num_layers} for the first"
        )
    check_whole(config)
    if lora.lora_rank is not None:
        check_adapters(config)


def vars_of(options: Any) -> list[str]:
    """Names of the fields of a group of options."""
    return list(type(options).__dataclass_fields__)


def check_whole(config: Config) -> None:
    """Modules that are trained whole must be there."""
    lora, size = config.lora, config.size
    for field, known in (
        ("freeze_extra_modules", tuple(WHOLE)),
        ("lora_modules_to_save", ("embed_tokens", "lm_head")),
    ):
        for name in getattr(lora, field):
            if name not in known:
                raise ValueError(f"{flag(field)} {name}: not one of {', '.join(known)}")
            if name == "lm_head" and not size.untie_embeddings_and_output_weights:
                raise ValueError(f"{flag(field)} lm_head: it is the embedding in this model; say embed_tokens")


def check_adapters(config: Config) -> None:
    """Adapters must have something to sit on; decides an open --transformer-impl."""
    lora, size = config.lora, config.size
    assert lora.lora_rank is not None
    if lora.lora_rank < 1:
        raise ValueError(f"--lora-rank must be greater than 0, not {lora.lora_rank}")
    if lora.lora_alpha is not None and not lora.lora_alpha > 0:
        raise ValueError(f"--lora-alpha must be greater than 0, not {lora.lora_alpha}")
    if not 0 <= lora.lora_dropout < 1:
        raise ValueError(f"--lora-dropout must be at least 0 and below 1, not {lora.lora_dropout}")
    if lora.use_dora and lora.lora_dropout:
        raise ValueError("--use-dora does not go with --lora-dropout; remove one of them")
    refuse_beside(config, "--lora-rank", PLAIN)
    known = [short(name) for names in projections(size).values() for name in names]
    if "self_attention.linear_qkv" not in projections(size):
        raise ValueError(f"--lora-rank: no adapters for --model-family {size.model_family}; train it whole")
    wanted = lora.lora_target_modules
    for name in wanted if wanted != ["all-linear"] else []:
        if name not in known:
            raise ValueError(f"--lora-target-modules {name}: not one of {', '.join(known)} (or all-linear alone)")
    if config.parallel.transformer_impl == "transformer_engine":
        raise ValueError("--lora-rank does not go with --transformer-impl transformer_engine; use torch")
    if config.parallel.transformer_impl == "auto":
        config.parallel.transformer_impl = "torch"


def check_same_part(saved: Mapping[str, Any], now: Mapping[str, Any], weights_only: bool, origin: str) -> None:
    """``ValueError`` when a run starts from a checkpoint with other adapters, or goes on with other weights trained.

    A checkpoint without adapters starts any run; one with adapters starts those that have the same ones.
    """
    before, after = identity(saved), identity(now)
    if weights_only and before["lora_rank"] is None:
        return
    for name, value in before.items():
        if weights_only and name not in ("lora_rank", "lora_alpha", "lora_target_modules", "use_rslora", "use_dora"):
            continue
        if value != after[name]:
            way = "use the same, or merge its adapters first (tools/convert_hf.py export, then import)"
            hint = way if before["lora_rank"] is not None else "use the same, or start with --finetune"
            raise ValueError(f"{origin} was saved with {flag(name)} {value}, this run has {after[name]}; {hint}")
