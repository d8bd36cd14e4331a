"""JSON lines to indexed datasets, in parallel, with the bytes of Megatron-LM's ``tools/preprocess_data.py``.

The main process reads blocks of lines and writes results in input order; workers parse and encode. A bounded number
of blocks is in flight, so memory does not grow with the corpus. Blank lines are skipped and counted as rejected
(Megatron-LM hangs on one); every other fault ends the run before anything gets its final name.
"""

from __future__ import annotations

import glob
import gzip
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megatron_steel.data.encode import SCRIPTS, Block, Encoded, Encoder, no_letters
from megatron_steel.data.indexed import IndexedWriter, optimal_dtype
from megatron_steel.text.tokenizer import Tokenizer, build_tokenizer

INPUT_SUFFIXES = (".jsonl", ".jsonl.gz")
BLOCK_BYTES = 1 << 18
BLOCKS_PER_WORKER = 4
FIRST_REPORT_SECONDS = 5.0
REPORT_SECONDS = 2.0


@dataclass
class PreprocessOptions:
    """What to encode, with which tokenizer, and where to. Names are Megatron-LM's flags."""

    input: list[str]
    output_prefix: str
    tokenizer_type: str
    tokenizer_model: str | None = None
    vocab_size: int | None = None
    json_keys: list[str] = field(default_factory=lambda: ["text"])
    append_eod: bool = False
    include_special_tokens: bool = True
    workers: int = 1
    log_interval: int = 1000


@dataclass
class KeyTotals:
    """Counts over the texts of one JSON key."""

    text_bytes: int = 0
    letters: np.ndarray = field(default_factory=no_letters)

    def language_shares(self) -> dict[str, float]:
        """Share of letters by script: Chinese characters, ASCII letters, the rest. Digits and signs do not count."""
        letters = max(int(self.letters[1:].sum()), 1)
        return {name: round(int(count) / letters, 6) for name, count in zip(SCRIPTS, self.letters[1:], strict=True)}


@dataclass
class Totals:
    """Counts over the whole input."""

    by_key: dict[str, KeyTotals]
    documents: int = 0
    blank_lines: int = 0

    def add(self, encoded: Encoded) -> None:
        """Add one block's counts."""
        self.documents += encoded.documents
        self.blank_lines += encoded.blank_lines
        for key, part in encoded.by_key.items():
            self.by_key[key].text_bytes += part.text_bytes
            self.by_key[key].letters += part.letters


def preprocess(options: PreprocessOptions) -> list[dict[str, Any]]:
    """Encode the input into one dataset per JSON key, ``PREFIX_KEY_document``, and return their sidecars.

    Raises ``ValueError`` in one line, with nothing written, for unusable options, input or tokenizer.
    """
    check_options(options)
    paths = expand_inputs(options.input)
    tokenizer = build_tokenizer(
        options.tokenizer_type, options.tokenizer_model, options.vocab_size, options.include_special_tokens
    )
    dtype = optimal_dtype(tokenizer.vocab_size)
    encoder = Encoder(tokenizer, options.json_keys, options.append_eod, dtype)
    totals, reader = Totals({key: KeyTotals() for key in options.json_keys}), InputReader(paths)
    progress = Progress(reader, options.log_interval)
    with ExitStack() as stack:
        stack.callback(reader.close)
        writers = {
            key: stack.enter_context(IndexedWriter(f"{options.output_prefix}_{key}_document", dtype))
            for key in options.json_keys
        }
        results = stack.enter_context(closing(encode_blocks(reader.blocks(), encoder, options.workers)))
        for encoded in results:
            if encoded.error:
                raise ValueError(encoded.error)
            totals.add(encoded)
            for key, tokens in encoded.by_key.items():
                writers[key].add_documents(tokens.tokens, tokens.lengths, tokens.sequences)
            progress.update(totals)
        check_written(paths, totals, writers)
        sidecars = [describe(options, tokenizer, key, writer, totals) for key, writer in writers.items()]
        for writer, sidecar in zip(writers.values(), sidecars, strict=True):
            writer.commit(sidecar)
    return sidecars


def check_options(options: PreprocessOptions) -> None:
    """Refuse values no run can use."""
    if options.workers < 1:
        raise ValueError(f"--workers {options.workers}: must be at least 1")
    if options.log_interval < 1:
        raise ValueError(f"--log-interval {options.log_interval}: must be at least 1")
    if len(set(options.json_keys)) != len(options.json_keys):
        raise ValueError(f"--json-keys {' '.join(options.json_keys)}: a key is named twice")
    for name in options.json_keys:
        if not name or "/" in name:
            raise ValueError(f"--json-keys {name!r}: a key becomes part of a file name and cannot be empty or hold '/'")
    if Path(options.output_prefix).is_dir() or options.output_prefix.endswith("/"):
        raise ValueError(f"--output-prefix {options.output_prefix}: is a directory; give a prefix for file names in it")


def expand_inputs(patterns: Sequence[str]) -> list[Path]:
    """Input files in the order given; those of a directory (``*.jsonl``, ``*.jsonl.gz``) or a glob sorted by name."""
    paths: list[Path] = []
    for pattern in patterns:
        if Path(pattern).is_dir():
            found = sorted(path for path in Path(pattern).iterdir() if path.name.endswith(INPUT_SUFFIXES))
            if not found:
                raise ValueError(f"--input {pattern}: the directory holds no {' or '.join(INPUT_SUFFIXES)} file")
        elif Path(pattern).exists():
            found = [Path(pattern)]
        elif glob.has_magic(pattern):
            found = [Path(name) for name in sorted(glob.glob(pattern)) if Path(name).is_file()]
            if not found:
                raise ValueError(f"--input {pattern}: matches no file")
        else:
            raise ValueError(f"--input {pattern}: no such file or directory")
        paths += found
    seen: set[Path] = set()
    for path in paths:
        if path.resolve() in seen:
            raise ValueError(f"--input: {path} is named twice; its documents would be repeated")
        seen.add(path.resolve())
    return paths


class InputReader:
    """Reads the input files one after the other, as blocks of whole lines."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths
        self.total_bytes = sum(path.stat().st_size for path in paths)
        self._finished_bytes = 0
        self._raw: BinaryIO | None = None

    def blocks(self) -> Iterator[Block]:
        """Blocks of about ``BLOCK_BYTES``; a longer line is a block of its own."""
        for path in self.paths:
            try:
                self._raw = open(path, "rb")  # closed below and by close()
                stream = gzip.GzipFile(fileobj=self._raw) if path.suffix == ".gz" else self._raw
                first_line = 1
                while data := stream.read(BLOCK_BYTES):
                    data += stream.readline()
                    yield Block(str(path), first_line, data)
                    first_line += data.count(b"\n")
                self.close()
            except (OSError, EOFError) as error:
                raise ValueError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
            self._finished_bytes += path.stat().st_size

    def consumed_bytes(self) -> int:
        """Bytes of the files on disk that have been read."""
        return self._finished_bytes + (self._raw.tell() if self._raw and not self._raw.closed else 0)

    def close(self) -> None:
        """Close the file being read."""
        if self._raw:
            self._raw.close()


def encode_blocks(blocks: Iterator[Block], encoder: Encoder, workers: int) -> Generator[Encoded, None, None]:
    """Encode blocks with ``workers`` processes (this one when 1), results in the order of the blocks."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # --workers alone says how many cores are used
    if workers == 1:
        yield from map(encoder.encode, blocks)
        return
    # Forked workers share the loaded tokenizer; nothing here has started threads or encoded anything yet.
    context = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(workers, context, initializer=start_worker, initargs=(encoder, os.getpid()))
    pending: deque[Future[Encoded]] = deque()
    try:
        for block in blocks:
            pending.append(pool.submit(encode_in_worker, block))
            if len(pending) >= workers * BLOCKS_PER_WORKER:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise RuntimeError("a worker process died (out of memory?); use fewer --workers") from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class Worker:
    """What a worker process keeps between blocks."""

    encoder: Encoder


def start_worker(encoder: Encoder, parent: int) -> None:
    """Set up a worker process: keep the encoder, and end when the main process is gone."""
    Worker.encoder = encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process decides what an interrupt means
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def encode_in_worker(block: Block) -> Encoded:
    """Encode a block in a worker process."""
    return Worker.encoder.encode(block)


class Progress:
    """Lines on stderr about a run that takes long."""

    def __init__(self, reader: InputReader, log_interval: int) -> None:
        self.reader, self.log_interval = reader, log_interval
        self.start = time.monotonic()
        self.next_time = self.start + FIRST_REPORT_SECONDS
        self.next_documents = log_interval

    def update(self, totals: Totals) -> None:
        """Report when ``log_interval`` documents and some seconds have passed since the last line."""
        now = time.monotonic()
        if now < self.next_time or totals.documents < self.next_documents:
            return
        seconds, done = now - self.start, self.reader.consumed_bytes()
        remaining = seconds * (self.reader.total_bytes - done) / max(done, 1)
        print(
            f"preprocess: {totals.documents} documents, {100 * done / max(self.reader.total_bytes, 1):.1f}% | "
            f"{totals.documents / seconds:.0f} docs/s | {done / seconds / 1e6:.2f} MB/s | "
            f"ETA {time.strftime('%H:%M:%S', time.gmtime(remaining))}",
            file=sys.stderr,
            flush=True,
        )
        self.next_time = now + REPORT_SECONDS
        self.next_documents = totals.documents + self.log_interval


def check_written(paths: Sequence[Path], totals: Totals, writers: dict[str, IndexedWriter]) -> None:
    """``ValueError`` when the input gave no documents, or a key nothing but empty texts."""
    names = ", ".join(str(path) for path in paths[:3]) + (" ..." if len(paths) > 3 else "")
    if totals.documents == 0:
        raise ValueError(f"{names}: holds no documents")
    for key, writer in writers.items():
        if writer.num_tokens == 0:
            raise ValueError(f"{names}: {key!r} is empty text in all {totals.documents} documents")


def describe(
    options: PreprocessOptions, tokenizer: Tokenizer, key: str, writer: IndexedWriter, totals: Totals
) -> dict[str, Any]:
    """The sidecar of one dataset."""
    counts = totals.by_key[key]
    return {
        "prefix": Path(writer.prefix).name,
        "json_key": key,
        "tokenizer_type": tokenizer.name,
        "tokenizer_fingerprint": tokenizer.fingerprint(),
        "vocab_size": tokenizer.vocab_size,
        "eod_id": tokenizer.eos_id,
        "append_eod": options.append_eod,
        "include_special_tokens": options.include_special_tokens,
        "dtype": str(writer.dtype),
        "documents": writer.num_documents,
        "tokens": writer.num_tokens,
        "text_bytes": counts.text_bytes,
        "language_shares": counts.language_shares(),
        "rejected_lines": {"blank": totals.blank_lines},
        "bin_sha256": writer.bin_sha256(),
    }
