"""Cleaning as datatrove pipeline steps: read, filter, store with signatures, decide on duplicates.

Every task works on consecutive pieces of the input, so the order of documents is (rank of the task, number within it).
A place is (piece, line within the piece) until the last step, which knows how many lines the pieces before hold.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_steel.data.clean_datatrove import Document, PipelineStep
from megatron_steel.data.clean_filters import Outcome
from megatron_steel.data.clean_settings import ExactDedup, Settings
from megatron_steel.data.clean_text import Text
from megatron_steel.data.encode import parse_leniently
from megatron_steel.data.readers import Task, place, read_task
from megatron_steel.text.files import write_text

Documents = Iterator[Document]
EXCERPT_CHARACTERS = 160
HASH_BYTES = 16


@dataclass
class StepCounts:
    """What one filter did: documents in = kept + changed + dropped, characters, seconds, examples."""

    name: str
    kept: int = 0
    changed: int = 0
    dropped: int = 0
    noted: int = 0
    characters_in: int = 0
    characters_out: int = 0
    seconds: float = 0.0
    examples: dict[str, list[dict[str, Any]]] = field(
        default_factory=lambda: {"dropped": [], "changed": [], "noted": []}
    )


@dataclass
class TaskCounts:
    """What one task read and what became of it; written as JSON when the task is through."""

    lines: int = 0
    blank: int = 0
    documents: int = 0
    characters: int = 0
    text_bytes: int = 0
    piece_lines: dict[int, int] = field(default_factory=dict)
    bad: int = 0
    bad_lines: list[dict[str, Any]] = field(default_factory=list)
    written: int = 0
    steps: list[StepCounts] = field(default_factory=list)


class Read(PipelineStep):
    """Documents of this task's pieces. Lines that hold none are counted, and end the task above ``max_bad_lines``."""

    type, name = "READER", "input"

    def __init__(self, pieces: list[tuple[int, Task]], settings: Settings, max_bad_lines: int) -> None:
        super().__init__()
        self.pieces, self.key, self.max_bad_lines = pieces, settings.text_key, max_bad_lines

    def run(self, data: Documents | None, rank: int = 0, world_size: int = 1) -> Documents:
        """Yield documents; their metadata hold the place, the raw line and the counts of the task."""
        counts = TaskCounts()
        first, last = shares([size for size, _ in self.pieces], world_size)[rank]
        for number in range(first, last):
            yield from self._piece(number, self.pieces[number][1], counts)
        # The next step writes the counts; a task without documents has to reach it too.
        yield Document(text="", id="", metadata={"counts": counts})

    def _piece(self, number: int, task: Task, counts: TaskCounts) -> Documents:
        lines = 0
        for block in read_task(task, None):
            if block.reason is not None:
                lines = block.first_line
                self._reject(counts, task, number, lines, block.reason)
                continue
            items: list[Any] = block.rows if block.rows is not None else split_lines(block.data)
            lines = block.first_line - 1
            for item in items:
                lines += 1
                if item is None or (isinstance(item, bytes) and not item.strip()):
                    counts.blank += 1
                    continue
                try:
                    row = parse_row(item)
                    text = row_text(row, self.key)
                except ValueError as error:
                    self._reject(counts, task, number, lines, str(error))
                    continue
                counts.documents += 1
                counts.characters += len(text)
                counts.text_bytes += len(text.encode())
                yield Document(
                    text=text, id="", metadata={"place": (number, lines), "row": row, "raw": item, "counts": counts}
                )
        counts.lines += lines
        counts.piece_lines[number] = lines

    def _reject(self, counts: TaskCounts, task: Task, number: int, line: int, reason: str) -> None:
        counts.bad += 1
        counts.bad_lines.append({"place": (number, line), "reason": reason})
        if counts.bad > self.max_bad_lines:
            raise ValueError(f"{place(task, line)}: {reason} (more than --max-bad-lines {self.max_bad_lines})")


class Apply(PipelineStep):
    """The filters of the settings, in their order."""

    type, name = "FILTER", "filters"

    def __init__(self, settings: Settings, examples: int) -> None:
        super().__init__()
        self.settings, self.examples = settings, examples

    def run(self, data: Documents, rank: int = 0, world_size: int = 1) -> Documents:
        """Yield what remains; ``StepCounts`` go into the counts of the task."""
        steps = [StepCounts(name) for name, _ in self.settings.filters]
        for document in data:
            if "place" not in document.metadata:
                document.metadata["counts"].steps = steps
                yield document
            elif self._passes(document, steps):
                yield document

    def _passes(self, document: Document, steps: list[StepCounts]) -> bool:
        """Send one document through the filters; whether it remains, with its new text."""
        text = Text(document.text, document.metadata["row"])
        for counts, (_, step) in zip(steps, self.settings.filters, strict=True):
            start = time.perf_counter()
            counts.characters_in += len(text.text)
            result = step.apply(text)
            if isinstance(result, str) and not result.strip():
                result = Outcome({"value": "nothing remains"})
            if isinstance(result, Outcome):
                kind = "dropped" if result.dropped else "noted"
                self._note(counts, kind, document, {**result.detail, "text": shorten(text.text)})
            elif result is not None:
                self._note(counts, "changed", document, difference(text.text, result))
                text = Text(result, text.row)
            counts.seconds += time.perf_counter() - start
            if isinstance(result, Outcome) and result.dropped:
                counts.dropped += 1
                return False
            counts.characters_out += len(text.text)
            counts.noted += isinstance(result, Outcome)
            counts.changed += isinstance(result, str)
            counts.kept += not isinstance(result, str)
        document.text = text.text
        document.metadata["measured"] = text
        return True

    def _note(self, counts: StepCounts, kind: str, document: Document, detail: dict[str, Any]) -> None:
        # The finds of the contamination check are its product, not examples.
        if counts.name == "contamination" or len(counts.examples[kind]) < self.examples:
            counts.examples[kind].append({"place": document.metadata["place"], **detail})


class Store(PipelineStep):
    """Write what remains, with the places and the exact hashes, under the work folder."""

    type, name = "WRITER", "kept"

    def __init__(self, work: Path, settings: Settings, dry_run: bool) -> None:
        super().__init__()
        self.work, self.key, self.exact, self.dry_run = work, settings.text_key, settings.exact_dedup, dry_run

    def run(self, data: Documents, rank: int = 0, world_size: int = 1) -> Documents:
        """Yield the documents on; the last item brings the counts, which end the task's files."""
        places: list[tuple[int, int]] = []
        with open(self.work / "kept" / f"{rank:05d}.jsonl", "wb") as lines, self._hashes(rank) as hashes:
            for document in data:
                metadata = document.metadata
                if "place" not in metadata:
                    counts: TaskCounts = metadata["counts"]
                    continue
                places.append(metadata["place"])
                if self.exact is not None:
                    hashes.write(exact_hash(metadata["measured"], self.exact))
                if not self.dry_run:
                    lines.write(output_line(document.text, metadata["row"], metadata["raw"], self.key))
                yield document
        counts.written = len(places)
        np.save(self.work / "places" / f"{rank:05d}.npy", np.array(places, dtype=np.int64).reshape(-1, 2))
        text = json.dumps(counts, default=vars)
        write_text(self.work / "counts" / f"{rank:05d}.json", text)

    def _hashes(self, rank: int) -> Any:
        return open(self.work / "exact" / f"{rank:05d}.hash", "wb")


def shares(sizes: list[int], tasks: int) -> list[tuple[int, int]]:
    """[first, last) piece of every task: consecutive, about equal in bytes; depends on sizes and tasks only."""
    total, position = max(sum(sizes), 1), 0
    owners = []
    for size in sizes:
        owners.append(min((2 * position + size) * tasks // (2 * total), tasks - 1))
        position += size
    edges = np.searchsorted(owners, np.arange(tasks + 1)).tolist()
    return list(zip(edges[:-1], edges[1:], strict=True))


def split_lines(data: bytes) -> list[bytes]:
    """Lines of a block, without their ends."""
    lines = data.split(b"\n")
    if not lines[-1]:
        lines.pop()
    return lines


def parse_row(item: Any) -> dict[str, Any]:
    """A row that is an object; ``ValueError`` without a place for anything else."""
    row = item
    if isinstance(item, bytes):
        row = parse_leniently(item.removeprefix(codecs.BOM_UTF8))
    if not isinstance(row, dict):
        raise ValueError(f"each line must be a JSON object, not {type(row).__name__}")
    return row


def row_text(row: dict[str, Any], key: str) -> str:
    """The text of a row; ``ValueError`` when it is missing, no text, or not encodable."""
    if key not in row:
        raise ValueError(f"no key {key!r}; its keys are {', '.join(map(repr, row)) or 'none'} (choose with text_key)")
    text = row[key]
    if not isinstance(text, str):
        raise ValueError(f"{key!r} must be text, not {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{key!r} holds half of a surrogate pair, which is not text") from error
    return text


def output_line(text: str, row: dict[str, Any], raw: Any, key: str) -> bytes:
    """The input's own bytes when nothing changed, else the row with the new text; with a line end."""
    if isinstance(raw, bytes) and row[key] == text:
        return raw.removesuffix(b"\r").removeprefix(b"\xef\xbb\xbf") + b"\n"
    return json.dumps({**row, key: text}, ensure_ascii=False, default=str).encode() + b"\n"


def exact_hash(text: Text, settings: ExactDedup) -> bytes:
    """16 bytes that equal texts share; of the tokens when case and punctuation do not count."""
    # A text without any token still has its characters.
    tokens = text.tokens[2].tobytes() if settings.ignore_case_and_punctuation else b""
    return hashlib.blake2b(tokens or text.text.encode(), digest_size=HASH_BYTES).digest()


def shorten(text: str) -> str:
    """The start of a text, for a report."""
    return text if len(text) <= EXCERPT_CHARACTERS else text[:EXCERPT_CHARACTERS] + "..."


def difference(before: str, after: str) -> dict[str, str]:
    """The first place where two texts differ, from a little before it on, for a report."""
    low, high = 0, min(len(before), len(after))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if before[:middle] == after[:middle] else (low, middle - 1)
    start = max(0, low - 20)
    return {"before": shorten(before[start:]), "after": shorten(after[start:])}
