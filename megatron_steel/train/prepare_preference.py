"""Everything that can be wrong with the input of a run on preferences, found before there is a process group."""

from __future__ import annotations

from dataclasses import fields
from functools import partial

from megatron_steel.config.check_chat import check_chat
from megatron_steel.config.check_preference import NO_REFERENCE, check_preference, why_not_shared
from megatron_steel.config.schema import Config, ModelConfig
from megatron_steel.data.chat_encode import ChatEncoder, encode_pair_source, refuse_bad, worker_count
from megatron_steel.data.chat_rows import RowKind
from megatron_steel.data.chat_sources import ChatSource, open_chat
from megatron_steel.data.pair_dataset import PairDataset
from megatron_steel.data.prompt_dataset import PromptDataset, encode_prompts
from megatron_steel.evaluate.rewards import RULES, load_reward
from megatron_steel.model.backends import choose_backend
from megatron_steel.train.prepare import FREE, Prepared
from megatron_steel.train.prepare_chat import prepare_rows, store_folder
from megatron_steel.train.pretrained import Pretrained, open_pretrained


def rules(config: Config) -> None:
    """Those of conversations and of preferences."""
    check_chat(config)
    check_preference(config)


def build_pairs(
    config: Config, name: str, source: ChatSource, encoder: ChatEncoder, notes: list[str], training: bool
) -> PairDataset:
    """Encode a source of pairs or judged answers, or find it encoded, and lay its rows."""
    store = encode_pair_source(source, encoder, store_folder(config), worker_count())
    refuse_bad(name, store.report, config.chat.max_bad_rows, config.chat.max_untrained)
    notes += store.report.lines(name)
    backend, _ = choose_backend(config.parallel.transformer_impl, config.size)
    why = why_not_shared(config, backend)
    share = config.preference.share_prompts and why is None
    if config.preference.share_prompts and why is not None:
        notes.append(f"{name}: prompts are computed once for each answer, not shared: {why}")
    content, length, packing = encoder.store_name(source), config.training.seq_length, config.chat.packing
    return PairDataset(name, store, content, length, packing, store.desirable, share)


def build_prompts(
    config: Config, name: str, source: ChatSource, encoder: ChatEncoder, notes: list[str], training: bool
) -> PromptDataset:
    """Encode a source of prompts."""
    options, length = config.preference, config.training.seq_length
    prompts, report = encode_prompts(source.rows(), encoder, length - options.max_new_tokens, worker_count())
    refuse_bad(name, report, config.chat.max_bad_rows, config.chat.max_untrained)
    notes.append(f"{name}: {report.rows:,} rows, {report.kept:,} prompts of {report.tokens:,} tokens")
    content = encoder.store_name(source)
    return PromptDataset(name, prompts, content, length, options.max_new_tokens, options.grpo_group_size)


def prepare_rewards(config: Config) -> Prepared:
    """The same for a run that samples its answers."""
    reward = load_reward(str(config.preference.reward))
    prepared = prepare_rows(config, rules, partial(open_chat, row_kind="prompt"), build_prompts)
    prepared.reward = reward
    for dataset in [*prepared.datasets.values(), *prepared.valid_sets.values()]:
        assert isinstance(dataset, PromptDataset)
        # An answer that a rule cannot read stops the run here, not when its prompt is drawn.
        for _, answer in dataset.prompts if config.preference.reward in RULES else ():
            reward("", answer)
    if config.preference.beta:
        prepared.reference = open_reference(prepared)
    return prepared


def prepare_preference(config: Config) -> Prepared:
    """Check and open everything a run on preferences needs; raises ``ValueError`` like prepare_chat.py."""
    if config.preference.loss_type == "grpo":
        return prepare_rewards(config)
    if config.preference.loss_type == "rm":
        config.size.score_head = True
    kind: RowKind = "judged" if config.preference.loss_type == "kto" else "pair"
    prepared = prepare_rows(config, rules, partial(open_chat, row_kind=kind), build_pairs)
    prepared.preferences = True
    count_computed(prepared)
    options = config.preference
    if options.loss_type not in NO_REFERENCE and options.reference != "none":
        prepared.reference = open_reference(prepared)
    return prepared


def count_computed(prepared: Prepared) -> None:
    """Take from the tokens of a sample, by which speed is told, those that are not computed twice."""
    assert prepared.tokens_per_sample is not None
    for source in prepared.ledger.sources_at(prepared.ledger.segments[-1].start):
        dataset = prepared.datasets.get(source.fingerprint)
        if isinstance(dataset, PairDataset):
            prepared.tokens_per_sample -= source.weight * dataset.mean_saved


def open_reference(prepared: Prepared) -> Pretrained:
    """What answers are compared with: another model, or what the run starts, or once started, from."""
    config = prepared.config
    path = config.preference.reference_checkpoint or config.chat.pretrained_checkpoint
    if path is None:
        raise ValueError("--reference-checkpoint: give what the run started from, to compare answers with it")
    origin, notes = open_pretrained(path, None)
    prepared.warnings += notes
    theirs = origin.sizes()
    for item in fields(ModelConfig):
        ours, wanted = getattr(config.size, item.name), getattr(theirs, item.name)
        if item.name not in FREE and ours != wanted:
            flag = item.name.replace("_", "-")
            raise ValueError(f"the reference {path} has --{flag} {wanted}, the model {ours}; take one of its sizes")
    return origin
