"""Everything that can be wrong with a finetune's input, found before a process group or a model exists."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_steel.checkpoint.converted import tokenizer_facts
from megatron_steel.checkpoint.state import TrainState
from megatron_steel.config.check import check_schedule
from megatron_steel.config.check_chat import ENTRY, check_chat
from megatron_steel.config.check_score import refuse_score
from megatron_steel.config.load import to_flat
from megatron_steel.config.rampup import batch_sizes
from megatron_steel.config.schema import Config
from megatron_steel.data.chat_dataset import ChatDataset
from megatron_steel.data.chat_encode import ChatEncoder, encode_source, inspect_source, refuse_bad, worker_count
from megatron_steel.data.chat_length import LengthPolicy
from megatron_steel.data.chat_sources import ChatSource, open_chat
from megatron_steel.data.order import Ledger, SourceSpec
from megatron_steel.data.pair_dataset import PairDataset
from megatron_steel.data.phases import Request, arrange
from megatron_steel.data.prompt_dataset import PromptDataset
from megatron_steel.data.sources import parse_valid_data_path
from megatron_steel.optim.schedule import schedule_identity
from megatron_steel.text.masks import MaskPolicy
from megatron_steel.text.templates import load_template, suggest_template
from megatron_steel.text.tokenizer import Tokenizer
from megatron_steel.train.prepare import (
    FREE,
    Prepared,
    check_bytes,
    check_resume,
    check_run,
    check_same_model,
    check_same_part,
    find_start,
    resolve_vocabulary,
)
from megatron_steel.train.pretrained import Pretrained, adopt_sizes, choose_tokenizer, open_pretrained

Rules = Callable[[Config], None]
OpenRows = Callable[[Sequence[str], Path | None, int, str], list[ChatSource]]
"""`open_chat`, for one kind of rows."""
RowDataset = ChatDataset | PairDataset | PromptDataset
BuildDataset = Callable[[Config, str, ChatSource, ChatEncoder, list[str], bool], RowDataset]
"""From name, source and encoder to what is read; adds lines for the log; the last says whether it is trained on."""
# Stands for the length of the run until the data has told it; every rule about schedules is checked again then.
UNKNOWN_ITERS = 10**9
STORE_FOLDER = "encoded"


@dataclass(kw_only=True)
class Start:
    """Where a finetune begins."""

    origin: Pretrained
    resuming: bool
    tokenizer: Tokenizer

    @property
    def state(self) -> TrainState:
        """Counters, order and random state of the run so far."""
        return self.origin.state if self.resuming and self.origin.state is not None else TrainState()


def open_start(config: Config, warnings: list[str]) -> Start:
    """The checkpoint that a run goes on from, else what it starts from; gives ``config`` the sizes of either."""
    checkpoint, weights_only = find_start(config, warnings)
    assert not weights_only
    if checkpoint is not None:
        check_bytes(checkpoint)
        origin = Pretrained.from_checkpoint(checkpoint)
    elif config.chat.pretrained_checkpoint is None:
        raise ValueError(
            f"--save {config.checkpoint.save} holds no checkpoint to go on from; give --pretrained-checkpoint to start"
        )
    else:
        origin, notes = open_pretrained(config.chat.pretrained_checkpoint, config.checkpoint.ckpt_step)
        warnings += notes
        if origin.checkpoint is not None:
            check_bytes(origin.checkpoint)
    # A reward model starts from a language model.
    adopt_sizes(config, origin, FREE | {"score_head"})
    return Start(origin=origin, resuming=checkpoint is not None, tokenizer=choose_tokenizer(config, origin))


def build_encoder(config: Config, tokenizer: Tokenizer) -> ChatEncoder:
    """How conversations become tokens; ``ValueError`` when the template or the masks do not go with the tokenizer."""
    chat = config.chat
    template = load_template(chat.chat_template or suggest_template(tokenizer), tokenizer)
    policy = MaskPolicy(
        turns=chat.train_turns,
        train_on_prompt=chat.train_on_prompt,
        mask_history=chat.mask_history,
        train_newline=chat.train_newline,
    )
    template.check(policy)
    lengths = LengthPolicy(
        seq_length=config.training.seq_length,
        truncation=chat.truncation,
        min_answer_tokens=chat.min_answer_tokens,
        oldest_first=chat.mask_history,
    )
    return ChatEncoder(
        template=template,
        policy=policy,
        lengths=lengths,
        system_text=chat.system_text,
        system_probability=chat.system_probability,
        seed=config.data.seed,
    )


def store_folder(config: Config) -> Path | None:
    """Where encoded conversations are kept; None: in the memory of each rank."""
    if config.data.data_cache_path is not None:
        return Path(config.data.data_cache_path)
    return Path(config.checkpoint.save) / STORE_FOLDER if config.checkpoint.save else None


def open_registered(
    config: Config, data: list[str], open_rows: OpenRows, flag: str = "--train-data"
) -> list[ChatSource]:
    """The sources that an option names."""
    chat = config.chat
    return open_rows(data, Path(chat.dataset_info) if chat.dataset_info else None, chat.max_turn_bytes, flag)


def valid_sources(config: Config, open_rows: OpenRows) -> list[tuple[str, ChatSource]]:
    """Validation sets by name."""
    found = []
    for name, data in parse_valid_data_path(config.chat.valid_data, "--valid-data"):
        sources = open_registered(config, [data], open_rows, "--valid-data")
        found += [(name if len(sources) == 1 else f"{name}/{source.name}", source) for source in sources]
    return found


def build_dataset(
    config: Config, name: str, source: ChatSource, encoder: ChatEncoder, notes: list[str], training: bool
) -> ChatDataset:
    """Encode a source, or find it encoded, and lay its rows."""
    chat = config.chat
    store = encode_source(source, encoder, store_folder(config), worker_count())
    refuse_bad(name, store.report, chat.max_bad_rows, chat.max_untrained)
    notes += store.report.lines(name)
    return ChatDataset(
        name,
        store,
        encoder.store_name(source),
        config.training.seq_length,
        chat.packing,
        chat.loss_weighting if training else None,
    )


def order_conversations(
    config: Config, sources: list[ChatSource], datasets: Sequence[RowDataset], state: TrainState, warnings: list[str]
) -> Ledger:
    """The ledger of the run: a new one, the checkpoint's, or the checkpoint's with other data from here on."""
    weighted = any(source.weight is not None for source in sources)
    specs = [
        SourceSpec(
            dataset.name,
            dataset.fingerprint,
            len(dataset),
            source.weight if weighted and source.weight is not None else float(len(dataset)),
        )
        for source, dataset in zip(sources, datasets, strict=True)
    ]
    request = Request(specs, "weights" if weighted else "windows", [], config.data.seed, config.training.seq_length)
    saved = Ledger.from_json(state.ledger) if state.ledger else None
    ledger, notes = arrange(request, saved, state.consumed_samples, config.data.append_data)
    warnings += notes
    return ledger


def tokens_per_sample(datasets: Sequence[RowDataset], ledger: Ledger) -> float:
    """Tokens of a sample without padding, on average over what the newest part of the order draws."""
    shares = {source.fingerprint: source.weight for source in ledger.sources_at(ledger.segments[-1].start)}
    return sum(shares.get(dataset.fingerprint, 0.0) * dataset.mean_tokens for dataset in datasets)


def set_length(config: Config, datasets: Sequence[RowDataset], ledger: Ledger) -> None:
    """Turn epochs or tokens into iterations."""
    chat, training = config.chat, config.training
    assert training.global_batch_size is not None
    samples = None
    if chat.num_epochs is not None:
        drawn = {source.fingerprint for source in ledger.sources_at(ledger.segments[-1].start)}
        samples = chat.num_epochs * sum(len(dataset) for dataset in datasets if dataset.fingerprint in drawn)
    elif chat.train_tokens is not None:
        samples = chat.train_tokens / tokens_per_sample(datasets, ledger)
    if samples is not None:
        training.train_iters = max(math.ceil(samples / training.global_batch_size - 1e-9), 1)
    check_schedule(config)


def rules(config: Config) -> None:
    """Those of conversations whose next tokens are trained."""
    refuse_score(config, ENTRY)
    check_chat(config)


def prepare_chat(config: Config) -> Prepared:
    """Check and open everything a finetune needs.

    Raises ``ValueError`` with one line for whatever the user has to change; nothing has been written then but encoded
    conversations.
    """
    return prepare_rows(config, rules, open_chat, build_dataset)


def prepare_rows(config: Config, rules: Rules, open_rows: OpenRows, build: BuildDataset) -> Prepared:
    """Check and open what a run on rows of chat data needs, whatever is made of a row."""
    warnings: list[str] = []
    start = open_start(config, warnings)
    rules(config)
    given_iters = config.training.train_iters
    if config.chat.num_epochs is not None or config.chat.train_tokens is not None:
        config.training.train_iters = UNKNOWN_ITERS
    warnings += check_run(config)
    config.training.train_iters = given_iters
    origin, state, tokenizer = start.origin, start.state, start.tokenizer
    if start.resuming:
        # Saved again: what a run started from is what preferences compare answers with.
        config.chat.pretrained_checkpoint = state.config.get("pretrained_checkpoint")
    resolve_vocabulary(config, tokenizer, origin.state)
    if start.resuming:
        assert origin.checkpoint is not None
        check_same_model(state.config, to_flat(config), origin.checkpoint)
        check_same_part(state.config, to_flat(config), False, str(origin.checkpoint))
    encoder = build_encoder(config, tokenizer)
    sources = open_registered(config, config.chat.train_data, open_rows)
    notes: list[str] = []
    datasets = [build(config, source.name, source, encoder, notes, True) for source in sources]
    valid = {
        name: build(config, name, source, encoder, notes, False) for name, source in valid_sources(config, open_rows)
    }
    ledger = order_conversations(config, sources, datasets, state, warnings)
    set_length(config, datasets, ledger)
    if start.resuming:
        assert origin.checkpoint is not None
        check_resume(config, state, tokenizer, origin.checkpoint)
    check_epochs(config, ledger, state)
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
        datasets={dataset.fingerprint: dataset for dataset in datasets},
        valid_sets=valid,
        state=state,
        checkpoint=origin.checkpoint,
        hf_folder=origin.hf_folder,
        weights_only=not start.resuming,
        template=encoder.template,
        tokens_per_sample=tokens_per_sample(datasets, ledger),
        notes=notes,
        warnings=warnings,
    )


def check_epochs(config: Config, ledger: Ledger, state: TrainState) -> None:
    """Refuse to repeat a source more often than asked for: by --num-epochs, or --max-epochs-per-source."""
    left = max(config.training.train_iters - state.iteration, 0)
    total = batch_sizes(config.training).consumed_after(left, state.consumed_samples)
    most = config.data.max_epochs_per_source
    if config.chat.num_epochs is not None:
        most = max(most, config.chat.num_epochs + 1)
    ledger.check_max_epochs(total, most, state.consumed_samples)


def inspect(config: Config) -> None:
    """Print the first conversations of each source as tokens, with what is trained of them."""
    start = open_start(config, [])
    encoder = build_encoder(config, start.tokenizer)
    for source in open_registered(config, config.chat.train_data, open_chat):
        for text in inspect_source(source, encoder, start.tokenizer, config.chat.inspect, sys.stdout.isatty()):
            print(text, flush=True)
