"""Everything that can be wrong with a user's input, found before a process group or a model exists."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from megatron_steel.checkpoint.converted import tokenizer_facts
from megatron_steel.checkpoint.files import find_checkpoint, problem_with, published
from megatron_steel.checkpoint.state import TrainState, read_state
from megatron_steel.config.check import check
from megatron_steel.config.check_context import check_context_backend
from megatron_steel.config.check_lora import check_same_part
from megatron_steel.config.check_precision import check_same_precision
from megatron_steel.config.check_score import refuse_score
from megatron_steel.config.load import to_flat
from megatron_steel.config.rampup import batch_sizes
from megatron_steel.config.schema import Config, ModelConfig
from megatron_steel.data.batch import Dataset
from megatron_steel.data.identity import Known
from megatron_steel.data.order import Ledger
from megatron_steel.data.phases import Phase, Request, arrange, parse_phases
from megatron_steel.data.sources import DataSources, TokenizerFacts, open_sources
from megatron_steel.evaluate.rewards import Reward
from megatron_steel.metrics.sinks import check_packages
from megatron_steel.model.backends import check_engine_only, choose_backend
from megatron_steel.model.own_layer import load_layer_function
from megatron_steel.optim.schedule import check_same_schedule, schedule_identity
from megatron_steel.runtime import device
from megatron_steel.text.templates import Template
from megatron_steel.text.tokenizer import NullTokenizer, Tokenizer, build_tokenizer
from megatron_steel.train.pretrained import Pretrained

# Model options that may differ between a checkpoint and a run that loads it; all others decide what it computes.
FREE = {
    "vocab_size",  # compared by resolve_vocabulary
    "make_vocab_size_divisible_by",
    "max_position_embeddings",
    "init_method_std",
    "embedding_init",
    "attention_dropout",
    "hidden_dropout",
    "moe_aux_loss_coeff",
    "moe_token_dispatcher_type",
}
MODEL_IDENTITY = tuple(option.name for option in fields(ModelConfig) if option.name not in FREE)
# Options about the end-of-document token.
END_OF_DOCUMENT = ("eod_mask_loss", "reset_attention_mask", "reset_position_ids")


@dataclass(kw_only=True)
class Prepared:
    """Checked input of a training run."""

    config: Config
    tokenizer: Tokenizer
    ledger: Ledger
    datasets: dict[str, Dataset]
    """Training windows by fingerprint."""
    valid_sets: dict[str, Dataset]
    """Validation windows by name."""
    state: TrainState
    """Where the run starts."""
    checkpoint: Path | None = None
    """What is loaded, or None for random weights."""
    weights_only: bool = False
    """Load the weights of ``checkpoint`` and nothing else."""
    warnings: list[str] = field(default_factory=list)
    """Lines for the log."""
    notes: list[str] = field(default_factory=list)
    """More of them, about the data."""
    hf_folder: Path | None = None
    """A Hugging Face folder whose weights the run starts from, if there is no ``checkpoint``."""
    template: Template | None = None
    """How conversations are written; None: the data are documents."""
    preferences: bool = False
    """The data are pairs or judged answers."""
    reference: Pretrained | None = None
    """What answers are compared with under preferences; None: nothing is needed, or --reference none."""
    reward: Reward | None = None
    """What answers earn that the model samples; None: the data hold the answers."""
    tokens_per_sample: float | None = None
    """Tokens of a sample without padding, on average; None: seq_length."""


def find_start(config: Config, warnings: list[str]) -> tuple[Path | None, bool]:
    """(checkpoint to load or None, whether only its weights count)."""
    options = config.checkpoint
    own = Path(options.save) if options.save else None
    if options.auto_resume and own is not None and own.is_dir() and published(own):
        checkpoint, notes = find_checkpoint(own, None, fall_back=True)
        warnings += notes
        return checkpoint, False
    if options.load is None:
        return None, False
    checkpoint, notes = find_checkpoint(Path(options.load), options.ckpt_step)
    warnings += notes
    return checkpoint, options.finetune


def check_bytes(checkpoint: Path) -> None:
    """Verify every byte of a checkpoint; ``ValueError`` names the file that changed.

    Only the first rank reads it all: the others meet it when the run starts, which it never does if this fails.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    problem = problem_with(checkpoint, hashes=True)
    if problem is not None:
        raise ValueError(f"--load: {problem}; restore it, or remove {checkpoint} to go on from an earlier checkpoint")


def resolved(name: str, values: dict[str, Any]) -> Any:
    """A model option with its default filled in, so that an unset and a spelled-out value compare equal."""
    if name == "num_query_groups":
        return values[name] or values["num_attention_heads"]
    if name == "kv_channels":
        return values[name] or values["hidden_size"] // values["num_attention_heads"]
    if name.startswith("rope_") and not values["use_rope_scaling"]:
        return None
    return values[name]


def check_same_model(saved: dict[str, Any], now: dict[str, Any], origin: Path) -> None:
    """``ValueError`` names the first size that differs from the checkpoint's."""
    saved = {**to_flat(Config()), **saved}  # what an older version did not know had its default then
    # What follows from other options when it is unset comes last: the user changed the others.
    for name in sorted(MODEL_IDENTITY, key=lambda name: name in ("num_query_groups", "kv_channels")):
        before, after = resolved(name, saved), resolved(name, now)
        # The two have the same weights; a run cannot go over from one to the other, but can start from it.
        if now.get("finetune") and (before, after) == ("softmoe_v3", "softmoe_causal"):
            continue
        if before != after:
            flag = name.replace("_", "-")
            raise ValueError(f"{origin} was saved with --{flag} {before}, this run has {after}; use the same sizes")


def resolve_vocabulary(config: Config, tokenizer: Tokenizer, state: TrainState | None) -> None:
    """Fill ``vocab_size``: the checkpoint's rows, or the tokenizer's ids; never fewer than the tokenizer has."""
    size = config.size
    if isinstance(tokenizer, NullTokenizer):
        # Its --vocab-size counts the ids before end of document; the model has a row for that one too.
        size.vocab_size = tokenizer.vocab_size
    if state is not None and state.vocab_size:
        if size.vocab_size not in (None, state.vocab_size):
            raise ValueError(f"--vocab-size {size.vocab_size}: the checkpoint has {state.vocab_size} rows")
        size.vocab_size = state.vocab_size
    size.vocab_size = size.vocab_size or tokenizer.vocab_size
    if size.vocab_size < tokenizer.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} ids, the model only {size.vocab_size} rows (--vocab-size)"
        )


def changed_masks(config: Config, state: TrainState, origin: Path) -> list[str]:
    """A warning for each option that decides which tokens are seen or trained and was another one before."""
    now, notes = to_flat(config), []
    for name in END_OF_DOCUMENT:
        before = bool(state.config.get(name))
        if before != now[name]:
            flag = name.replace("_", "-")
            said = (f"without --{flag}", "with it") if now[name] else (f"with --{flag}", "without it")
            notes.append(f"{origin} was trained {said[0]}; this run goes on {said[1]}")
    return notes


def check_end_of_document(config: Config, tokenizer: Tokenizer) -> None:
    """``ValueError`` when an option is about the end-of-document token and the tokenizer has none."""
    for name in END_OF_DOCUMENT:
        if getattr(config.data, name) and tokenizer.eos_id is None:
            flag = name.replace("_", "-")
            raise ValueError(
                f"--{flag} needs an end-of-document token, and {config.tokenizer.tokenizer_model} has none"
            )


def check_resume(config: Config, state: TrainState, tokenizer: Tokenizer, origin: Path) -> None:
    """What must be unchanged to go on with a run: tokenizer, schedule, kind of optimizer state."""
    if not state.has_optimizer:
        raise ValueError(f"{origin} holds weights only and cannot be resumed; pass --finetune to start from them")
    fingerprint = tokenizer.fingerprint()
    if state.tokenizer and state.tokenizer["fingerprint"] != fingerprint:
        raise ValueError(f"{origin} was trained with another tokenizer than {config.tokenizer.tokenizer_model}")
    mode = state.config.get("sequence_mode", "concat")
    if mode != config.data.sequence_mode:
        raise ValueError(f"{origin} was trained with --sequence-mode {mode}; resume with it, or start with --finetune")
    saved = state.config.get("use_distributed_optimizer")
    if saved != config.parallel.use_distributed_optimizer:
        flag = "--use-distributed-optimizer" if saved else "--no-use-distributed-optimizer"
        raise ValueError(f"{origin} was saved with {flag}; resume with it (on any number of ranks)")
    check_same_precision(state.config, config, str(origin))
    if not config.optimizer.override_opt_param_scheduler:
        check_same_schedule(state.schedule, schedule_identity(config.optimizer, config.training.train_iters))


def open_data(config: Config, tokenizer: Tokenizer, ledger: Ledger | None, phases: list[Phase]) -> DataSources:
    """Open training and validation data; the checkpoint's ledger says how documents are ordered and sources named."""
    options = config.data
    known = {source.fingerprint: Known(source.name, source.windows) for source in ledger.sources} if ledger else {}
    return open_sources(
        data_path=options.data_path,
        split=options.split,
        train_data_path=options.train_data_path,
        valid_data_path=options.valid_data_path,
        seq_length=config.training.seq_length,
        seed=ledger.seed if ledger else options.seed,
        tokenizer=TokenizerFacts(tokenizer.fingerprint(), tokenizer.vocab_size),
        target_epochs=options.target_epochs,
        later={name for phase in phases for name, weight in phase.weights.items() if weight},
        known=known,
        read_all=options.data_fingerprint == "full",
        verify=os.environ.get("RANK", "0") == "0",
        sequence_mode=options.sequence_mode,
        cache_path=options.data_cache_path,
    )


def order_data(
    config: Config, sources: DataSources, phases: list[Phase], state: TrainState, warnings: list[str]
) -> Ledger:
    """The ledger of the run: a new one, the checkpoint's, or the checkpoint's with other data from here on."""
    training, options = config.training, config.data
    left = max(training.train_iters - state.iteration, 0)
    total = batch_sizes(training).consumed_after(left, state.consumed_samples)
    request = Request(sources.train, sources.weighting, phases, options.seed, training.seq_length)
    saved = Ledger.from_json(state.ledger) if state.ledger else None
    ledger, notes = arrange(request, saved, state.consumed_samples, options.append_data)
    warnings += notes
    late = [phase.start for phase in phases if phase.start >= total]
    if late:
        warnings.append(f"--data-phases: phases at samples {late} begin after the run's last sample {total - 1}")
    target = sum(source.weight for source in sources.train)
    if options.target_epochs and not phases and abs(total / target - 1) > 0.01:
        warnings.append(
            f"--target-epochs stand for {target:.0f} samples, the run has {total}: "
            f"every source is seen {total / target:.3g} times as often"
        )
    ledger.check_max_epochs(total, options.max_epochs_per_source, state.consumed_samples)
    return ledger


def check_run(config: Config) -> list[str]:
    """The rules of options, and of what is installed for them; returns warnings."""
    warnings = check(config, int(os.environ.get("WORLD_SIZE", "1")))
    backend = choose_backend(config.parallel.transformer_impl, config.size)
    check_engine_only(config, *backend)
    check_context_backend(config, backend[0])
    if config.optimizer.optimizer_cpu_offload and not device.has_gpu():
        warnings.append("--optimizer-cpu-offload has no effect without a GPU: everything is in host memory")
    if config.size.decoder_layer is not None:
        load_layer_function(config.size.decoder_layer)
    check_packages(config)
    return warnings


def prepare(config: Config) -> Prepared:
    """Check and open everything a run needs.

    Raises ``ValueError`` with one line for whatever the user has to change; nothing has been written then.
    """
    refuse_score(config, "megatron_steel.pretrain")
    warnings = check_run(config)
    checkpoint, weights_only = find_start(config, warnings)
    if checkpoint is not None:
        check_bytes(checkpoint)
    loaded = read_state(checkpoint) if checkpoint is not None else None
    options = config.tokenizer
    tokenizer = build_tokenizer(options.tokenizer_type, options.tokenizer_model, config.size.vocab_size)
    if loaded is not None and checkpoint is not None:
        check_same_model(loaded.config, to_flat(config), checkpoint)
        check_same_part(loaded.config, to_flat(config), weights_only, str(checkpoint))
    resolve_vocabulary(config, tokenizer, loaded)
    check_end_of_document(config, tokenizer)
    resuming = loaded is not None and not weights_only
    if resuming and loaded is not None and checkpoint is not None:
        check_resume(config, loaded, tokenizer, checkpoint)
        warnings += changed_masks(config, loaded, checkpoint)
    state = loaded if resuming and loaded is not None else TrainState()
    phases = parse_phases(
        config.data.data_phases, config.training.seq_length, batch_sizes(config.training).consumed_after
    )
    sources = open_data(config, tokenizer, Ledger.from_json(state.ledger) if state.ledger else None, phases)
    warnings += sources.notes
    ledger = order_data(config, sources, phases, state, warnings)
    state.ledger = ledger.to_json()
    state.schedule = schedule_identity(config.optimizer, config.training.train_iters)
    state.config = to_flat(config)
    state.tokenizer = tokenizer_facts(tokenizer)
    assert config.size.vocab_size is not None
    state.vocab_size = config.size.vocab_size
    state.has_optimizer = True
    return Prepared(
        config=config,
        tokenizer=tokenizer,
        ledger=ledger,
        datasets=sources.datasets,
        valid_sets=sources.valid,
        state=state,
        checkpoint=checkpoint,
        weights_only=weights_only,
        warnings=warnings,
    )
