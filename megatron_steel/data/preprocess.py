"""Raw text to indexed datasets, in parallel, with the bytes of Megatron-LM's ``tools/preprocess_data.py``.

The input is cut into tasks. Workers read, encode and write a task each into a work folder next to the output; the main
process plans, shows progress and joins what is finished, in input order. So memory does not grow with the corpus, the
bytes do not depend on who did what, and a run that was cut off goes on from its finished tasks.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_steel.data.encode import SURROGATE, Encoded, Encoder
from megatron_steel.data.indexed import IndexedWriter, optimal_dtype
from megatron_steel.data.letters import SCRIPTS, no_letters
from megatron_steel.data.preprocess_options import (
    PreprocessOptions,
    check_options,
    converter,
    rejection_limit,
    settings_fingerprint,
)
from megatron_steel.data.progress import TaskProgress
from megatron_steel.data.readers import Task, expand_inputs, plan_tasks, read_task
from megatron_steel.data.records import COLUMNS
from megatron_steel.data.shards import ShardRecord, ShardWork, WorkFolder
from megatron_steel.data.workers import Aside, run_work
from megatron_steel.text.fast import FastEncoder, IdsDiffer, ReferenceEncoder, fast_encoder
from megatron_steel.text.files import sync
from megatron_steel.text.sentences import CHINESE, Splitter, make_splitter
from megatron_steel.text.tokenizer import Tokenizer, build_tokenizer

MIN_TASK_BYTES = 1 << 20
MAX_TASK_BYTES = 1 << 23
TASKS_PER_WORKER = 8
# What the fast encoder is compared on before the run: some texts of some tasks, and no more of each than this.
SAMPLE_TASKS, SAMPLE_TEXTS, SAMPLE_CHARACTERS = 8, 16, 1000
TRAINING_CHARACTERS = 2_000_000


@dataclass
class Totals:
    """Counts over the tasks joined so far; letters and bytes by key."""

    text_bytes: list[int]
    letters: list[np.ndarray]
    documents: int = 0
    lines: int = 0
    blank_lines: int = 0
    dropped: int = 0
    rejected: int = 0
    first_reject: str | None = None

    def add(self, record: ShardRecord, path: str, lines_before: int) -> None:
        """Add a shard's counts; ``lines_before`` are those of the file before the task."""
        self.documents += record.documents
        self.lines += record.lines
        self.blank_lines += record.blank_lines
        self.dropped += record.dropped
        self.rejected += record.rejected
        if record.first_reject and not self.first_reject:
            line, reason = record.first_reject
            self.first_reject = f"{path}:{lines_before + line}: {reason}"
        for at, key in enumerate(record.keys):
            self.text_bytes[at] += key.text_bytes
            self.letters[at] += np.array(key.letters)


def preprocess(options: PreprocessOptions) -> list[dict[str, Any]]:
    """Encode the input into one dataset per JSON key, ``PREFIX_KEY_document``, and return their sidecars.

    Raises ``ValueError`` in one line, with nothing under a final name, for unusable options, input or tokenizer, and
    ``OSError`` for a full disk.
    """
    check_options(options)
    paths = expand_inputs(options.input)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # --workers alone says how many cores are used
    tokenizer = build_tokenizer(
        options.tokenizer_type, options.tokenizer_model, options.vocab_size, options.include_special_tokens
    )
    dtype = optimal_dtype(tokenizer.vocab_size)
    level = "sentence" if options.split_sentences else "document"
    prefixes = [f"{options.output_prefix}_{key}_{level}" for key in options.json_keys]
    fingerprint = settings_fingerprint(options, tokenizer, paths)
    with full_disk_named(options.output_prefix), ExitStack() as stack:
        # It takes half a second for a large vocabulary, and nobody needs it before the end.
        identity = stack.enter_context(Aside(tokenizer.fingerprint))
        writers = [stack.enter_context(IndexedWriter(prefix, dtype)) for prefix in prefixes]
        folder = WorkFolder(options.output_prefix)
        stack.callback(folder.close)
        run = Run(options, paths, tokenizer, folder, writers, fingerprint)
        try:
            run.encode_and_join()
        except IdsDiffer as error:
            notify(f"{error}; starting over with the tokenizer's own library")
            for writer in writers:
                writer.abort()
            writers[:] = [stack.enter_context(IndexedWriter(prefix, dtype)) for prefix in prefixes]
            run.start("reference")
            run.encode_and_join()
        sidecars = run.commit(identity.result)
        folder.clear()
    return sidecars


@contextmanager
def full_disk_named(output_prefix: str) -> Iterator[None]:
    """Say which folder is full and what to do: the error of a write names no file."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise OSError(
            f"{Path(output_prefix).absolute().parent}: {error.strerror}; make room there (until the end it holds the "
            "tokens twice), and the same command goes on from the pieces it finished"
        ) from error


class Run:
    """One preprocessing run over planned tasks."""

    def __init__(
        self,
        options: PreprocessOptions,
        paths: Sequence[Path],
        tokenizer: Tokenizer,
        folder: WorkFolder,
        writers: list[IndexedWriter],
        fingerprint: str,
    ) -> None:
        self.options, self.paths, self.tokenizer = options, paths, tokenizer
        self.folder, self.writers, self.fingerprint = folder, writers, fingerprint
        self.columns = COLUMNS[options.input_format] if options.input_format else options.json_keys
        self.limit, self.share = rejection_limit(options.max_rejected)
        reference = ReferenceEncoder(tokenizer)
        eod = tokenizer.eod_id if options.append_eod else None
        self.encoder = Encoder(reference, options.json_keys, eod, writers[0].dtype, converter(options.input_format))
        manifest = folder.manifest()
        unfinished = manifest if manifest and manifest["fingerprint"] == fingerprint else None
        # The cut of an unfinished run stays, whatever the number of workers is now.
        self.task_bytes: int = unfinished["task_bytes"] if unfinished else task_bytes(options, paths)
        self.tasks = plan_tasks(paths, self.task_bytes)
        fast = None if unfinished and unfinished["encoder"] == "reference" else self._fast_encoder()
        self.encoder.text_encoder = fast or reference
        self.encoder.split = self._splitter() if options.split_sentences else None
        kind, found = "fast" if fast else "reference", len(folder.finished())
        if unfinished and unfinished["encoder"] == kind:
            if found:
                notify(f"going on from {found} of {len(self.tasks)} finished pieces in {folder.path}")
            self.totals = self._no_totals()
            return
        if found:
            notify(f"{folder.path} is of other settings or another input; starting over")
        self.start(kind)

    def start(self, kind: str) -> None:
        """Begin with no shards, with the fast encoder (``kind`` "fast") or with the tokenizer's own library."""
        self.folder.start({"fingerprint": self.fingerprint, "task_bytes": self.task_bytes, "encoder": kind})
        if kind == "reference":
            self.encoder.text_encoder = ReferenceEncoder(self.tokenizer)
        self.totals = self._no_totals()

    def _no_totals(self) -> Totals:
        keys = self.options.json_keys
        return Totals([0] * len(keys), [no_letters() for _ in keys])

    def _splitter(self) -> Splitter:
        options = self.options
        if options.punkt_model is None and options.lang.lower() not in CHINESE:
            notify(f"no --punkt-model; learning where sentences of --lang {options.lang} end from the input")
        return make_splitter(options.lang, options.keep_newlines, options.punkt_model, self._training_texts)

    def _training_texts(self) -> list[str]:
        """Texts from the beginning of the input, for Punkt."""
        texts, characters = [], 0
        for text in itertools.chain.from_iterable(map(self._texts, self.tasks)):
            texts.append(text)
            characters += len(text)
            if characters >= TRAINING_CHARACTERS:
                break
        return texts

    def _texts(self, task: Task) -> Iterator[str]:
        """The texts of a task, up to where it cannot be read."""
        plain = Encoder(
            self.encoder.text_encoder, self.encoder.json_keys, None, self.encoder.dtype, self.encoder.convert
        )
        try:
            for block in read_task(task, self.columns):
                for row in plain.rows(block, Encoded()):
                    texts = itertools.chain.from_iterable(row.texts)
                    yield from (text for text in texts if not SURROGATE.search(text))
        except ValueError:
            return  # the run itself reports it, with its place

    def _fast_encoder(self) -> FastEncoder | None:
        if not self.options.fast_tokenizer or self.tokenizer.name == "NullTokenizer":
            return None
        step = max(1, len(self.tasks) // SAMPLE_TASKS)
        sample = [
            text[:SAMPLE_CHARACTERS]
            for task in self.tasks[::step]
            for text in itertools.islice(self._texts(task), SAMPLE_TEXTS)
        ]
        found = fast_encoder(self.tokenizer, sample)
        if isinstance(found, str):
            notify(f"encoding with the tokenizer's own library: {found}")
            return None
        return found

    def encode_and_join(self) -> None:
        """Make the shards that are missing and append all of them to the datasets, in input order.

        Raises ``ValueError`` for the first fault in input order, and :class:`IdsDiffer`.
        """
        work = ShardWork(self.tasks, self.encoder, self.columns, self.folder, self.limit)
        loaded = ((number, self.folder.load(number, len(self.writers))) for number in self.folder.finished())
        ready = {number: record for number, record in loaded if record}
        missing = [number for number in range(len(self.tasks)) if number not in ready]
        progress = TaskProgress("preprocess", task_sizes(self.tasks), self.options.log_interval)
        for number in ready:
            progress.skip(number)
        following, lines_before = 0, 0
        worn = self.encoder.text_encoder.worn
        with closing(run_work(work, missing, self.options.workers, progress.update, worn)) as results:
            while following < len(self.tasks):
                if following not in ready:
                    number, record = next(results)
                    if record.ids_differ:
                        raise IdsDiffer(record.error)
                    ready[number] = record
                    progress.finish(number, record.documents, sum(key.tokens for key in record.keys))
                    continue
                if following and self.tasks[following - 1].path != self.tasks[following].path:
                    lines_before = 0
                record = ready.pop(following)
                self._join(following, record, lines_before)
                lines_before += record.lines
                following += 1
        self._check_share()

    def _join(self, number: int, record: ShardRecord, lines_before: int) -> None:
        """Account for one shard and append its documents."""
        path = self.tasks[number].path
        self.totals.add(record, path, lines_before)
        if self.limit is not None and self.totals.rejected > self.limit:
            place = str(self.totals.first_reject)
            if self.limit == 0:
                raise ValueError(place)
            raise ValueError(f"more lines than --max-rejected {self.limit} cannot be used; the first: {place}")
        if record.error:
            raise ValueError(record.error)
        if record.rejected:
            with open(
                self.folder.all_rejected_path, "ab" if self.totals.rejected > record.rejected else "wb"
            ) as stream:
                for reject in self.folder.rejects(number):
                    line = {"file": path, "line": lines_before + reject.line, "reason": reject.reason}
                    stream.write(json.dumps(line | {"text": reject.text}, ensure_ascii=False).encode() + b"\n")
        self.folder.append(number, self.writers)

    def _check_share(self) -> None:
        """``ValueError`` if more than the allowed share of lines was rejected."""
        totals = self.totals
        used = totals.documents + totals.dropped + totals.rejected
        if self.share is not None and totals.rejected > self.share * used:
            raise ValueError(
                f"{totals.rejected} of {used} lines cannot be used, more than --max-rejected "
                f"{self.options.max_rejected}; the first: {totals.first_reject}"
            )

    def commit(self, tokenizer_fingerprint: str) -> list[dict[str, Any]]:
        """Check that there is something, and give everything its final name."""
        self._check_written()
        rejected = Path(f"{self.options.output_prefix}.rejected.jsonl")
        if self.totals.rejected:
            sync(self.folder.all_rejected_path)
            os.replace(self.folder.all_rejected_path, rejected)
        else:
            rejected.unlink(missing_ok=True)  # it would be an earlier run's
        sidecars = [self._describe(at, tokenizer_fingerprint) for at in range(len(self.writers))]
        for writer, sidecar in zip(self.writers, sidecars, strict=True):
            writer.commit(sidecar)
        return sidecars

    def _check_written(self) -> None:
        """``ValueError`` when the input gave no documents, or a key nothing but empty texts."""
        names = ", ".join(map(str, self.paths[:3])) + (" ..." if len(self.paths) > 3 else "")
        if self.totals.documents == 0 or not all(writer.num_tokens for writer in self.writers):
            self.folder.clear()  # to go on would end here again
        if self.totals.documents == 0:
            raise ValueError(f"{names}: holds no documents")
        for key, writer in zip(self.options.json_keys, self.writers, strict=True):
            if writer.num_tokens == 0:
                raise ValueError(f"{names}: {key!r} is empty text in all {self.totals.documents} documents")

    def _describe(self, at: int, tokenizer_fingerprint: str) -> dict[str, Any]:
        """The sidecar of one dataset."""
        options, tokenizer, totals, writer = self.options, self.tokenizer, self.totals, self.writers[at]
        letters = totals.letters[at][1:]
        shares = [round(int(count) / max(int(letters.sum()), 1), 6) for count in letters]
        rejected = {"blank": totals.blank_lines}
        if totals.rejected:
            rejected["bad"] = totals.rejected
        if totals.dropped:
            rejected["dropped_by_format"] = totals.dropped
        return {
            "prefix": Path(writer.prefix).name,
            "json_key": options.json_keys[at],
            "tokenizer_type": tokenizer.name,
            "tokenizer_fingerprint": tokenizer_fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "eod_id": tokenizer.eos_id,
            "append_eod": options.append_eod,
            "include_special_tokens": options.include_special_tokens,
            "dtype": str(writer.dtype),
            "documents": writer.num_documents,
            "tokens": writer.num_tokens,
            "text_bytes": totals.text_bytes[at],
            "language_shares": dict(zip(SCRIPTS, shares, strict=True)),
            "rejected_lines": rejected,
            "bin_sha256": writer.bin_sha256(),
        }


def task_bytes(options: PreprocessOptions, paths: Sequence[Path]) -> int:
    """The size of tasks: several for each worker, but neither tiny nor so large that much is lost with one."""
    if options.task_bytes is not None:
        return options.task_bytes
    total = sum(path.stat().st_size for path in paths)
    return max(MIN_TASK_BYTES, min(MAX_TASK_BYTES, total // (options.workers * TASKS_PER_WORKER) + 1))


def task_sizes(tasks: Sequence[Task]) -> list[int]:
    """Bytes of the file each task stands for: its own, or of a file cut in other units an equal part."""
    pieces: dict[str, list[Task]] = {}
    for task in tasks:
        pieces.setdefault(task.path, []).append(task)
    sizes = {path: Path(path).stat().st_size for path in pieces}
    in_bytes = {path: sum(task.stop - task.start for task in pieces[path]) == sizes[path] for path in pieces}
    return [
        task.stop - task.start if in_bytes[task.path] else sizes[task.path] // len(pieces[task.path]) for task in tasks
    ]


def notify(message: str) -> None:
    """Tell the user one thing about the run."""
    print(f"preprocess: {message}", file=sys.stderr, flush=True)
