"""Finished pieces of a preprocessing run on disk: a run that was cut off goes on from them.

Next to the output, ``PREFIX.parts`` holds for every task the ids, lengths and sequence counts of each JSON key, the
rejected lines, and last, under its final name only when all that is on the disk, a record of what they are.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from megatron_steel.data.encode import Encoded, Encoder, Reject
from megatron_steel.data.indexed import IndexedWriter, close_synced
from megatron_steel.data.letters import no_letters
from megatron_steel.data.readers import Task, read_task
from megatron_steel.text.fast import IdsDiffer
from megatron_steel.text.files import write_text

PARTS = ("tokens", "lengths", "sequences")
PROGRESS_SECONDS = 0.5
LOCK_SECONDS = 5.0
HASH_BYTES = 1 << 22


@dataclass
class KeyRecord:
    """Counts and sha256 of one key's files in a shard, in the order of ``PARTS``."""

    tokens: int = 0
    text_bytes: int = 0
    letters: list[int] = field(default_factory=lambda: no_letters().tolist())
    sha256: list[str] = field(default_factory=list)


@dataclass
class ShardRecord:
    """What a shard holds. ``error`` is set, and the shard not kept, when the task could not be finished."""

    keys: list[KeyRecord]
    documents: int = 0
    lines: int = 0
    blank_lines: int = 0
    dropped: int = 0
    rejected: int = 0
    first_reject: tuple[int, str] | None = None
    error: str | None = None
    ids_differ: bool = False
    reused: bool = False

    def add(self, encoded: Encoded) -> None:
        """Add a block's counts."""
        self.documents += encoded.documents
        self.lines += encoded.lines
        self.blank_lines += encoded.blank_lines
        self.dropped += encoded.dropped
        self.rejected += len(encoded.rejects)
        if encoded.rejects and self.first_reject is None:
            self.first_reject = (encoded.rejects[0].line, encoded.rejects[0].reason)
        for record, part in zip(self.keys, encoded.by_key.values(), strict=False):
            record.tokens += len(part.tokens)
            record.text_bytes += part.text_bytes
            record.letters = [have + int(more) for have, more in zip(record.letters, part.letters, strict=True)]


class WorkFolder:
    """``PREFIX.parts``: one run's shards, and the settings they were made with."""

    def __init__(self, output_prefix: str) -> None:
        self.path = Path(f"{output_prefix}.parts")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            # Workers inherit it: it is free only when the last of a killed run's processes has ended.
            self._lock = open(self.path / "lock", "w")  # closed by close()
        except OSError as error:
            raise ValueError(f"{self.path}: cannot be written: {error.strerror}") from error
        self._take_lock()

    def _take_lock(self) -> None:
        deadline = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    self._lock.close()
                    raise ValueError(f"{self.path}: another run is writing there; wait for it or end it") from error
                time.sleep(0.1)

    def manifest(self) -> dict[str, Any] | None:
        """Settings of the run whose shards are here, or None."""
        try:
            value = json.loads((self.path / "manifest.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return value if isinstance(value, dict) else None

    def start(self, manifest: dict[str, Any]) -> None:
        """Forget every shard and begin with these settings."""
        for entry in self.path.iterdir():
            if entry.name != "lock":
                entry.unlink()
        write_text(self.path / "manifest.json", json.dumps(manifest))

    def finished(self) -> list[int]:
        """Numbers of the tasks whose shards are complete."""
        return sorted(int(path.stem) for path in self.path.glob("[0-9]*.json") if path.stem.isdecimal())

    def record_path(self, number: int) -> Path:
        """The record of a shard, which is there when the shard is complete."""
        return self.path / f"{number:07d}.json"

    def part_path(self, number: int, key: int, part: str) -> Path:
        """A file of a shard."""
        return self.path / f"{number:07d}.{key}.{part}"

    def rejected_path(self, number: int) -> Path:
        """Rejected lines of a shard; there only if it has any."""
        return self.path / f"{number:07d}.rejected.jsonl"

    def load(self, number: int, keys: int) -> ShardRecord | None:
        """The record of a shard of an earlier run, or None if its files are not what the record says."""
        try:
            value = json.loads(self.record_path(number).read_text(encoding="utf-8"))
            value["keys"] = [KeyRecord(**key) for key in value["keys"]]
            record = ShardRecord(**value | {"reused": True})
            for key in range(keys):
                paths = [self.part_path(number, key, part) for part in PARTS]
                if [file_sha256(path) for path in paths] != record.keys[key].sha256:
                    return None
            if record.rejected and not self.rejected_path(number).is_file():
                return None
        except (OSError, ValueError, TypeError, KeyError, IndexError):
            return None
        return record

    @property
    def all_rejected_path(self) -> Path:
        """Rejected lines of all shards joined so far."""
        return self.path / "rejected.jsonl"

    def rejects(self, number: int) -> Iterator[Reject]:
        """Rejected lines of a shard."""
        with open(self.rejected_path(number), encoding="utf-8") as stream:
            for line in stream:
                yield Reject(**json.loads(line))

    def append(self, number: int, writers: Sequence[IndexedWriter]) -> None:
        """Add a shard's documents to the datasets."""
        for key, writer in enumerate(writers):
            tokens, lengths, sequences = (self.part_path(number, key, part) for part in PARTS)
            with open(tokens, "rb") as first, open(lengths, "rb") as second, open(sequences, "rb") as third:
                writer.add_parts(first, second, third)

    def clear(self) -> None:
        """Forget the shards: the run is done."""
        self.path.joinpath("manifest.json").unlink()
        for number in self.finished():
            self.record_path(number).unlink()

    def close(self) -> None:
        """Remove the folder, or leave it for the next run if it holds a finished shard."""
        if not self.finished():
            shutil.rmtree(self.path)
        self._lock.close()


@dataclass
class ShardWork:
    """Makes shards of tasks; the work that is spread over processes."""

    tasks: Sequence[Task]
    encoder: Encoder
    columns: Sequence[str] | None
    folder: WorkFolder
    max_rejected: int | None

    def __call__(self, number: int, report: Callable[[tuple[int, int, int]], None]) -> ShardRecord:
        """Read, encode and write one task; ``report`` gets (bytes read, documents, tokens) so far.

        A task with more rejected lines than the whole run may have ends there and then, with no shard.
        """
        record = ShardRecord([KeyRecord() for _ in self.encoder.json_keys])
        with ShardFiles(self.folder, number, len(record.keys)) as files:
            read, next_report = 0, time.monotonic() + PROGRESS_SECONDS
            try:
                for block in read_task(self.tasks[number], self.columns):
                    encoded = self.encoder.encode(block)
                    record.add(encoded)
                    files.write(encoded)
                    if self.max_rejected is not None and record.rejected > self.max_rejected:
                        record.error = "rejected"
                        return record
                    read += len(block.data)
                    if time.monotonic() >= next_report:
                        report((read, record.documents, sum(key.tokens for key in record.keys)))
                        next_report = time.monotonic() + PROGRESS_SECONDS
            except (ValueError, IdsDiffer) as error:  # the file cannot be read on, or the fast encoder is wrong
                record.error, record.ids_differ = str(error), isinstance(error, IdsDiffer)
                return record
            files.finish(record)
        return record


class ShardFiles:
    """The files of a shard while it is written. Leaving without :meth:`finish` leaves nothing that counts."""

    def __init__(self, folder: WorkFolder, number: int, keys: int) -> None:
        self.folder, self.number = folder, number
        self._streams: list[list[BinaryIO]] = []
        self._hashes = [[hashlib.sha256() for _ in PARTS] for _ in range(keys)]
        self._rejected: BinaryIO | None = None
        for key in range(keys):
            self._streams.append([open(folder.part_path(number, key, part), "wb") for part in PARTS])

    def __enter__(self) -> ShardFiles:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        for stream in [stream for streams in self._streams for stream in streams] + [self._rejected]:
            if stream is not None and not stream.closed:
                stream.close()

    def write(self, encoded: Encoded) -> None:
        """Append a block's ids, and its rejected lines."""
        for part, streams, hashes in zip(encoded.by_key.values(), self._streams, self._hashes, strict=False):
            for array, stream, total in zip((part.tokens, part.lengths, part.sequences), streams, hashes, strict=True):
                data = array.tobytes()
                stream.write(data)
                total.update(data)
        if encoded.rejects and self._rejected is None:
            self._rejected = open(self.folder.rejected_path(self.number), "wb")
        for reject in encoded.rejects:
            assert self._rejected is not None
            self._rejected.write(json.dumps(asdict(reject), ensure_ascii=False).encode() + b"\n")

    def finish(self, record: ShardRecord) -> None:
        """Bring everything to the disk, then the record that makes it count."""
        for key, streams, hashes in zip(record.keys, self._streams, self._hashes, strict=True):
            for stream in streams:
                close_synced(stream)
            key.sha256 = [total.hexdigest() for total in hashes]
        if self._rejected is not None:
            close_synced(self._rejected)
        write_text(self.folder.record_path(self.number), json.dumps(asdict(record)))


def file_sha256(path: Path) -> str:
    """sha256 hex of a file, read in pieces."""
    total = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(HASH_BYTES):
            total.update(block)
    return total.hexdigest()
