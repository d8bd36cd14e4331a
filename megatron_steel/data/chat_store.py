"""Encoded conversations of a source in flat arrays, made by several processes, kept in files.

Shapes: N tokens of all conversations, n conversations.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from megatron_steel.data.chat_length import LengthPolicy, Lost, fit, trained_tokens
from megatron_steel.data.workers import run_work
from megatron_steel.text.conversation import IGNORED, Conversation, EncodedChat

if sys.platform != "win32":
    import fcntl

# Conversations that are in memory at once as objects, and those a process takes at a time.
WAVE, CHUNK = 20_000, 200
EXAMPLES = 5
REPORT_FILE = "report.json"


@dataclass(kw_only=True)
class ChatReport:
    """What became of the rows of a source."""

    rows: int = 0
    bad: dict[str, int] = field(default_factory=dict)
    """Rows that are no conversation, by reason."""
    examples: list[str] = field(default_factory=list)
    """Places and reasons of the first bad rows."""
    untrained: int = 0
    """Conversations of which nothing would be trained."""
    untrained_examples: list[str] = field(default_factory=list)
    kept: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    longest: int = 0
    """Tokens of the longest conversation before it was cut."""
    lost: Lost = field(default_factory=Lost)

    @property
    def bad_rows(self) -> int:
        """All bad rows."""
        return sum(self.bad.values())

    @staticmethod
    def from_json(values: dict[str, Any]) -> ChatReport:
        """The inverse of ``asdict``."""
        return ChatReport(**{**values, "lost": Lost(**values["lost"])})

    def lines(self, name: str) -> list[str]:
        """For the log."""
        share = self.trained_tokens / max(self.tokens, 1)
        lines = [
            f"{name}: {self.rows:,} rows, {self.kept:,} conversations of {self.tokens:,} tokens, {share:.1%} trained"
        ]
        if self.bad_rows:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(self.bad.items()))
            lines.append(f"{name}: {self.bad_rows:,} bad rows left out ({reasons}); first: {'; '.join(self.examples)}")
        if self.untrained:
            shown = "; ".join(self.untrained_examples)
            lines.append(f"{name}: {self.untrained:,} conversations left out, nothing in them is trained: {shown}")
        if self.lost:
            lost = self.lost
            lines.append(
                f"{name}: {lost.conversations:,} conversations were too long (the longest has {self.longest:,} tokens) "
                f"and lost {lost.prompt_tokens:,} tokens of prompts, {lost.answer_tokens:,} of answers, {lost.ends:,} "
                f"end tokens and {lost.turns:,} turns"
            )
        return lines


@dataclass(frozen=True)
class ChatStore:
    """Encoded conversations one behind the other."""

    ids_N: np.ndarray
    """int32."""
    labels_N: np.ndarray
    """int32: what is to be predicted in place of each token, or `IGNORED`."""
    weights_N: np.ndarray | None
    """float32 weight of each label; None where all are 1."""
    begins_n: np.ndarray
    """int64 (n + 1,): where conversation i begins."""
    report: ChatReport
    desirable: np.ndarray | None = None
    """Of judged answers, whether each is a good one, bool (n / 2,): pair_store.py."""

    def __len__(self) -> int:
        return len(self.begins_n) - 1

    @property
    def lengths_n(self) -> np.ndarray:
        """Tokens of each conversation, int64."""
        return np.diff(self.begins_n)

    def weights(self, sample: int) -> np.ndarray:
        """Weight of each label of a conversation, float32."""
        span = slice(self.begins_n[sample], self.begins_n[sample + 1])
        if self.weights_N is not None:
            return np.asarray(self.weights_N[span])
        return (self.labels_N[span] != IGNORED).astype(np.float32)


Encode = Callable[[Conversation], EncodedChat]
Encoded = tuple[list[EncodedChat], ChatReport]


def encode_chunk(conversations: Sequence[Conversation], encode: Encode, policy: LengthPolicy) -> Encoded:
    """Conversations that can be trained, cut to length, and what became of the others."""
    report, chats = ChatReport(), []
    for conversation in conversations:
        try:
            whole = encode(conversation)
        except ValueError as error:
            note_bad(report, conversation.place, str(error).removeprefix(f"{conversation.place}: "))
            continue
        chat, lost = fit(whole, policy)
        report.longest = max(report.longest, len(whole.ids_T))
        trained = trained_tokens(chat)
        if not trained:
            report.untrained += 1
            report.untrained_examples.append(f"{conversation.place} ({len(whole.ids_T)} tokens)")
            continue
        report.lost.add(lost)
        report.kept += 1
        report.tokens += len(chat.ids_T)
        report.trained_tokens += trained
        chats.append(chat)
    return chats, report


def note_bad(report: ChatReport, place: str, reason: str) -> None:
    """Count a bad row; the part of the reason in front of a colon is its kind."""
    kind = reason.split(":")[0]
    report.bad[kind] = report.bad.get(kind, 0) + 1
    if len(report.examples) < EXAMPLES:
        report.examples.append(f"{place}: {reason}")


def merge(into: ChatReport, part: ChatReport) -> None:
    """Add the counts of a part of the rows."""
    into.bad = dict(Counter(into.bad) + Counter(part.bad))
    into.examples = (into.examples + part.examples)[:EXAMPLES]
    into.untrained_examples = (into.untrained_examples + part.untrained_examples)[:EXAMPLES]
    for name in ("untrained", "kept", "tokens", "trained_tokens"):
        setattr(into, name, getattr(into, name) + getattr(part, name))
    into.longest = max(into.longest, part.longest)
    into.lost.add(part.lost)


def encode_rows(rows: Iterable[Any], encode: Encode, policy: LengthPolicy, workers: int) -> Encoded:
    """All conversations, in their order whatever the number of processes. A bad row has a place and a reason."""
    return encode_in_chunks(rows, lambda part: encode_chunk(part, encode, policy), workers)


def encode_in_chunks(
    rows: Iterable[Any], encode: Callable[[list[Any]], tuple[list[Any], ChatReport]], workers: int
) -> tuple[list[Any], ChatReport]:
    """What ``encode`` makes of pieces of the good rows, joined in their order, and what became of all rows.

    ``rows`` are read in waves, so that not all of them are in memory as objects.
    """
    chats: list[Any] = []
    report, stream = ChatReport(), iter(rows)
    while wave := list(islice(stream, WAVE)):
        report.rows += len(wave)
        good = []
        for row in wave:
            if hasattr(row, "reason"):
                note_bad(report, row.place, row.reason)
            else:
                good.append(row)
        pieces = [good[at : at + CHUNK] for at in range(0, len(good), CHUNK)]
        done: dict[int, tuple[list[Any], ChatReport]] = {}

        def work(item: int, _: Any, pieces: list[list[Any]] = pieces) -> tuple[list[Any], ChatReport]:
            return encode(pieces[item])

        for item, result in run_work(work, range(len(pieces)), workers, lambda *_: None):
            done[item] = result
        for item in sorted(done):
            chats += done[item][0]
            merge(report, done[item][1])
    return chats, report


def join(chats: Sequence[EncodedChat], report: ChatReport) -> ChatStore:
    """The store of encoded conversations."""

    def flat(arrays: list[np.ndarray], kind: type) -> np.ndarray:
        return np.concatenate([np.empty(0, kind), *arrays]).astype(kind)

    labels = flat([chat.labels_T for chat in chats], np.int32)
    weights = flat([chat.weights_T for chat in chats], np.float32)
    plain = bool((weights == (labels != IGNORED)).all())
    begins = np.cumsum([0, *(len(chat.ids_T) for chat in chats)], dtype=np.int64)
    return ChatStore(flat([chat.ids_T for chat in chats], np.int32), labels, None if plain else weights, begins, report)


def write_store(store: ChatStore, folder: Path) -> None:
    """Write the arrays and the report; the folder appears when it is complete."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        arrays = {"ids": store.ids_N, "labels": store.labels_N, "begins": store.begins_n, "weights": store.weights_N}
        arrays["desirable"] = store.desirable
        for name, array in arrays.items():
            if array is not None:
                np.save(temporary / f"{name}.npy", array)
        (temporary / REPORT_FILE).write_text(json.dumps(asdict(store.report)), encoding="utf-8")
        os.replace(temporary, folder)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        if not folder.is_dir():  # else somebody else wrote the same one first
            raise


def read_store(folder: Path) -> ChatStore:
    """A store whose arrays are read from its files when they are looked at."""

    def array(name: str) -> np.ndarray:
        # A mapping of nothing is refused.
        path = folder / f"{name}.npy"
        return np.load(path, mmap_mode="r") if path.stat().st_size > 128 else np.load(path)

    weights, desirable = (
        array(name) if (folder / f"{name}.npy").is_file() else None for name in ("weights", "desirable")
    )
    report = ChatReport.from_json(json.loads((folder / REPORT_FILE).read_text(encoding="utf-8")))
    return ChatStore(array("ids"), array("labels"), weights, array("begins"), report, desirable)


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Let the processes of a run (and of others) in one after the other: one makes the store, the others find it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.parent / f".{folder.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def stored(folder: Path, make: Callable[[], ChatStore]) -> ChatStore:
    """The store in ``folder``, made first where it is not there."""
    with only_one(folder):
        if not folder.is_dir():
            write_store(make(), folder)
    return read_store(folder)
