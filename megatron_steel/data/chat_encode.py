"""How a run writes conversations as tokens, and the encoded sources it trains on."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_steel.data.chat_formats import BadRow
from megatron_steel.data.chat_length import LengthPolicy, fit
from megatron_steel.data.chat_sources import ChatSource
from megatron_steel.data.chat_store import ChatReport, ChatStore, encode_rows, join, stored
from megatron_steel.data.pair_store import encode_pairs
from megatron_steel.text.conversation import Conversation, EncodedChat
from megatron_steel.text.masks import MaskPolicy, pick_system
from megatron_steel.text.show_tokens import legend, show
from megatron_steel.text.templates import Template
from megatron_steel.text.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class ChatEncoder:
    """Template, masks and lengths of a run."""

    template: Template
    policy: MaskPolicy
    lengths: LengthPolicy
    system_text: str | None = None
    """Put in front of conversations without a system turn, of which `system_probability` get it."""
    system_probability: float = 1.0
    seed: int = 0

    def encode(self, conversation: Conversation) -> EncodedChat:
        """Ids and labels, of any length; ``ValueError`` names the place of a conversation the template cannot write."""
        if self.system_text is not None:
            conversation = pick_system(conversation, self.system_text, self.system_probability, self.seed)
        return self.template.encode(conversation, self.policy)

    def store_name(self, source: ChatSource) -> str:
        """Hex digest of all that decides the tokens and labels of a source."""
        system = (self.system_text, self.system_probability, self.seed) if self.system_text is not None else ()
        parts = (source.fingerprint, self.template.fingerprint(), asdict(self.policy), asdict(self.lengths), system)
        return hashlib.sha256(repr(parts).encode()).hexdigest()


def encode_source(source: ChatSource, encoder: ChatEncoder, folder: Path | None, workers: int) -> ChatStore:
    """The conversations of a source in tokens; with a folder, from there if a run has made them before."""

    def make() -> ChatStore:
        chats, report = encode_rows(source.rows(), encoder.encode, encoder.lengths, workers)
        return join(chats, report)

    return make() if folder is None else stored(folder / encoder.store_name(source)[:32], make)


def encode_pair_source(source: ChatSource, encoder: ChatEncoder, folder: Path | None, workers: int) -> ChatStore:
    """The pairs or judged answers of a source in tokens, like :func:`encode_source`."""

    def make() -> ChatStore:
        judged = source.row_kind == "judged"
        return encode_pairs(source.rows(), encoder.encode, encoder.lengths, workers, judged)

    return make() if folder is None else stored(folder / encoder.store_name(source)[:32], make)


def worker_count() -> int:
    """Processes that encode: the CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def refuse_bad(name: str, report: ChatReport, max_bad_rows: float, max_untrained: float) -> None:
    """``ValueError`` when more rows are bad, or leave nothing to train, than these shares allow."""
    if report.bad_rows > max_bad_rows * report.rows:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(report.bad.items()))
        raise ValueError(
            f"{name}: {report.bad_rows:,} of {report.rows:,} rows are bad ({reasons}); first: "
            f"{'; '.join(report.examples)}; repair them, or allow a share with --max-bad-rows"
        )
    if report.untrained > max_untrained * report.rows:
        raise ValueError(
            f"{name}: in {report.untrained:,} of {report.rows:,} conversations nothing would be trained, first: "
            f"{'; '.join(report.untrained_examples)}; raise --seq-length or --min-answer-tokens, or allow a share "
            "with --max-untrained"
        )


def inspect_source(
    source: ChatSource, encoder: ChatEncoder, tokenizer: Tokenizer, count: int, color: bool
) -> Iterator[str]:
    """The first rows of a source as tokens, with what is trained of each after cutting; bad rows with their reason."""
    yield f"== {source.name}: template {encoder.template.name}, {legend(color)}"
    for number, row in enumerate(source.rows()):
        if number == count:
            return
        if isinstance(row, BadRow):
            yield f"{row.place}: bad row: {row.reason}"
            continue
        assert isinstance(row, Conversation)
        try:
            whole = encoder.encode(row)
        except ValueError as error:
            yield f"bad row: {error}"
            continue
        cut, lost = fit(whole, encoder.lengths)
        note = f" (cut from {len(whole.ids_T)} tokens)" if lost else ""
        yield show(cut, tokenizer, f"{row.place}{note}", color)
