"""LITPKDS, the packed format of lit-gpt that TinyLlama and Steel-LLM train on, to an indexed dataset.

A chunk is a 24-byte little-endian header (magic ``LITPKDS``, version uint64 = 1, dtype code uint8, tokens uint64) and
that many token ids (lit-gpt, ``packed_dataset.py``). The chunks of one writing process, ``NAME_0000000000.bin``,
``NAME_0000000001.bin`` and so on, are one stream: documents run across their borders. Nothing but an id marks where a
document ends (Steel-LLM) or begins (TinyLlama), and the tail of the last chunk is filled up with a pad id.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_steel.data.indexed import IndexedWriter, optimal_dtype
from megatron_steel.data.progress import ByteProgress

MAGIC = b"LITPKDS"
VERSION = 1
HEADER = struct.Struct("<7sQBQ")
CODES: dict[int, np.dtype[Any]] = {
    code: np.dtype(name).newbyteorder("<")
    for code, name in {1: "u1", 2: "i1", 3: "i2", 4: "i4", 5: "i8", 6: "f4", 7: "f8", 8: "u2"}.items()
}
COUNTER = re.compile(r"_(\d{10})\.bin$")
BLOCK_TOKENS = 1 << 20
MAX_DOCUMENT = int(np.iinfo(np.int32).max)


@dataclass(frozen=True)
class Chunk:
    """One file: its tokens are of ``dtype``; ``counter`` is its place in ``stream``, None when the name has none."""

    path: Path
    dtype: np.dtype[Any]
    tokens: int
    stream: str
    counter: int | None

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) as stored."""
        with open(self.path, "rb") as stream:
            stream.seek(HEADER.size + start * self.dtype.itemsize)
            return np.fromfile(stream, self.dtype, stop - start)


@dataclass(frozen=True)
class ImportOptions:
    """How to read the streams. Exactly one of ``eod_id`` (ends a document) and ``bos_id`` (begins one) is given.

    Ids must be below ``vocab_size``. ``pad_id`` fills the tail of the last chunk of a stream; it may be the boundary.
    """

    vocab_size: int
    pad_id: int
    eod_id: int | None = None
    bos_id: int | None = None


@dataclass
class ImportReport:
    """What came out, and lines about what was left out or looks wrong."""

    documents: int = 0
    tokens: int = 0
    chunks: int = 0
    pad_tokens: int = 0
    unfinished_documents: int = 0
    notes: list[str] = field(default_factory=list)


def read_header(path: Path) -> Chunk:
    """Check the header and size of a chunk. Raises ``ValueError`` naming the file for anything but a whole chunk."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as stream:
            head = stream.read(HEADER.size)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    if head[: len(MAGIC)] != MAGIC:
        raise ValueError(f"{path}: not a LITPKDS chunk (it does not begin with {MAGIC.decode()})")
    if len(head) < HEADER.size:
        raise ValueError(f"{path}: truncated inside its {HEADER.size}-byte header ({size} bytes)")
    _, version, code, tokens = HEADER.unpack(head)
    if version != VERSION:
        raise ValueError(f"{path}: version {version} of LITPKDS; only version {VERSION} exists")
    if code not in CODES:
        raise ValueError(f"{path}: dtype code {code} is not one of LITPKDS ({sorted(CODES)})")
    expected = HEADER.size + tokens * CODES[code].itemsize
    if size != expected:
        state = "truncated" if size < expected else "too long"
        raise ValueError(
            f"{path}: {size} bytes, its header ({tokens} tokens of {CODES[code]}) needs {expected}: {state}"
        )
    match = COUNTER.search(path.name)
    stream_name = str(path.parent / path.name[: match.start()]) if match else str(path)
    return Chunk(path, CODES[code], tokens, stream_name, int(match.group(1)) if match else None)


def find_chunks(inputs: Sequence[str]) -> list[list[Chunk]]:
    """The streams behind files and directories, each in counter order, in the order they are first named.

    Raises ``ValueError`` for a missing or unusable file, a directory without chunks, and a file named twice.
    """
    paths: list[Path] = []
    for name in inputs:
        found = sorted(Path(name).glob("*.bin")) if Path(name).is_dir() else [Path(name)]
        if not found:
            raise ValueError(f"{name}: the directory holds no .bin file")
        paths += found
    streams: dict[str, list[Chunk]] = {}
    seen: set[Path] = set()
    for path in paths:
        if path.resolve() in seen:
            raise ValueError(f"{path} is named twice; its documents would be repeated")
        seen.add(path.resolve())
        chunk = read_header(path)
        streams.setdefault(chunk.stream, []).append(chunk)
    return [sorted(chunks, key=lambda chunk: chunk.counter or 0) for chunks in streams.values()]


class Splitter:
    """Cuts one stream after another into documents and passes the tokens on as they come, in bounded memory."""

    def __init__(self, options: ImportOptions, writer: IndexedWriter, report: ImportReport) -> None:
        self.options, self.writer, self.report = options, writer, report
        self.borders = 0
        self._open = 0  # tokens of the unfinished document

    def add(self, tokens: np.ndarray) -> None:
        """The next tokens of the stream, int64, already checked."""
        if self.options.eod_id is not None:
            cuts = np.flatnonzero(tokens == self.options.eod_id) + 1
        else:
            cuts = np.flatnonzero(tokens == self.options.bos_id)
        self.borders += len(cuts)
        lengths = np.diff(cuts, prepend=0)
        if len(lengths):
            lengths[0] += self._open
        rest = self._open + len(tokens) if not len(cuts) else len(tokens) - int(cuts[-1])
        if rest > MAX_DOCUMENT or (len(lengths) and int(lengths[0]) > MAX_DOCUMENT):
            raise ValueError(f"a document of more than {MAX_DOCUMENT} tokens: is the id of its border right?")
        lengths = lengths[lengths > 0]  # a beginning at the very start of the stream ends nothing
        self.writer.add_documents(tokens.astype(self.writer.dtype), lengths.tolist(), [1] * len(lengths))
        self._open = rest

    @property
    def is_open(self) -> bool:
        """Whether a document has begun and not ended."""
        return self._open > 0

    def finish(self) -> bool:
        """End the stream: what is open becomes a document. True if it should have had an end and has none."""
        unfinished, self._open = self._open, 0
        if unfinished:
            self.writer.add_documents(np.empty(0, self.writer.dtype), [unfinished], [1])
        cut_off = bool(unfinished) and self.options.eod_id is not None
        self.report.unfinished_documents += cut_off
        return cut_off


def import_litpkds(
    inputs: Sequence[str], output_prefix: str, options: ImportOptions, tokenizer_facts: Mapping[str, Any] | None = None
) -> ImportReport:
    """Write the documents of all streams to ``output_prefix``.bin, .idx and .json; return what was done.

    ``tokenizer_facts`` are added to the sidecar. Memory does not grow with the chunks. Raises
    ``ValueError`` in one line, with nothing written, for damaged chunks, ids outside of the vocabulary, and input in
    which no document border is found.
    """
    check_options(options)
    streams = find_chunks(inputs)
    report = ImportReport()
    progress = ByteProgress("import-litpkds", sum(c.tokens * c.dtype.itemsize for chunks in streams for c in chunks))
    with IndexedWriter(output_prefix, optimal_dtype(options.vocab_size)) as writer:
        splitter = Splitter(options, writer, report)
        for chunks in streams:
            import_stream(chunks, splitter, progress)
        if not splitter.borders:
            flag = f"--eod-id {options.eod_id}" if options.bos_id is None else f"--bos-id {options.bos_id}"
            raise ValueError(f"no token of {', '.join(map(str, inputs))} is {flag}: which id separates the documents?")
        report.documents, report.tokens = writer.num_documents, writer.num_tokens
        writer.commit(describe_import(writer, options, report) | dict(tokenizer_facts or {}))
    return report


def check_options(options: ImportOptions) -> None:
    """Refuse ids that no vocabulary of this size has."""
    if options.vocab_size < 1:
        raise ValueError(f"--vocab-size {options.vocab_size}: must be at least 1")
    if (options.eod_id is None) == (options.bos_id is None):
        raise ValueError("give either --eod-id (the id that ends a document) or --bos-id (the one that begins it)")
    for flag, value in (("--eod-id", options.eod_id), ("--bos-id", options.bos_id), ("--pad-id", options.pad_id)):
        if value is not None and not 0 <= value < options.vocab_size:
            raise ValueError(f"{flag} {value}: not an id of a vocabulary of {options.vocab_size}")


def import_stream(chunks: Sequence[Chunk], splitter: Splitter, progress: ByteProgress) -> None:
    """Pass one stream on: without pad tails and all-pad chunks, and cut where a chunk is missing."""
    report, options = splitter.report, splitter.options
    used = {chunk.path: without_pad_tail(chunk, options.pad_id) for chunk in chunks}
    last = max((place for place, chunk in enumerate(chunks) if used[chunk.path]), default=-1)
    # Where pad is also the border of documents, it is padding only after the last text of the stream.
    border = options.pad_id in (options.eod_id, options.bos_id)
    expected = 0
    for place, chunk in enumerate(chunks):
        stop = chunk.tokens if border and place < last else used[chunk.path]
        report.pad_tokens += chunk.tokens - stop
        progress.add((chunk.tokens - stop) * chunk.dtype.itemsize)
        if not stop:
            report.notes.append(f"{chunk.path}: nothing but pad ({options.pad_id}), left out")
            continue
        if chunk.counter is not None and chunk.counter != expected:
            cut_stream(splitter, f"{chunk.path}: chunk {expected:010d} before it is missing; documents are cut there")
        expected = (chunk.counter or 0) + 1
        report.chunks += 1
        for tokens in checked_blocks(chunk, stop, options.vocab_size):
            splitter.add(tokens)
            progress.add(len(tokens) * chunk.dtype.itemsize)
        if stop < chunk.tokens and place < last:
            cut_stream(splitter, f"{chunk.path}: padded, though a chunk follows it; documents do not run on into that")
    finish_stream(splitter, chunks[last], sum(chunk.tokens for chunk in chunks[last:]) > used[chunks[last].path])


def finish_stream(splitter: Splitter, chunk: Chunk, padded: bool) -> None:
    """End a stream whose last text is in ``chunk``; ``padded`` when pad came after it."""
    options = splitter.options
    if options.pad_id == options.eod_id and padded and splitter.is_open:
        # The first token that looked like padding was the end of the last document.
        splitter.add(np.array([options.eod_id]))
        splitter.report.pad_tokens -= 1
    if splitter.finish():
        splitter.report.notes.append(f"{chunk.path}: the last document of the stream has no end; it is kept as it is")


def cut_stream(splitter: Splitter, note: str) -> None:
    """End the document that is open inside of a stream, for a reason worth a line."""
    splitter.finish()
    splitter.report.notes.append(note)


def without_pad_tail(chunk: Chunk, pad_id: int) -> int:
    """Tokens up to and including the last that is not pad, found from the end."""
    stop = chunk.tokens
    while stop:
        start = max(0, stop - BLOCK_TOKENS)
        text = np.flatnonzero(chunk.read(start, stop) != pad_id)
        if len(text):
            return start + int(text[-1]) + 1
        stop = start
    return 0


def checked_blocks(chunk: Chunk, stop: int, vocab_size: int) -> Iterator[np.ndarray]:
    """Tokens [0, stop) of a chunk as int64 blocks. ``ValueError`` names the place of what is not an id."""
    for start in range(0, stop, BLOCK_TOKENS):
        stored = chunk.read(start, min(start + BLOCK_TOKENS, stop))
        # Comparing before the conversion: a float that is no whole number, or NaN, must not become an id.
        wrong = np.flatnonzero(~((stored >= 0) & (stored < vocab_size)))
        if stored.dtype.kind == "f" and not len(wrong):
            wrong = np.flatnonzero(stored != np.floor(stored))
        if len(wrong):
            raise ValueError(
                f"{chunk.path}: token {start + int(wrong[0])} is {stored[wrong[0]]}, not an id of a vocabulary of "
                f"{vocab_size}: give the tokenizer that the chunks were made with"
            )
        yield stored.astype(np.int64)


def describe_import(writer: IndexedWriter, options: ImportOptions, report: ImportReport) -> dict[str, Any]:
    """The sidecar, with the fields of preprocessing that are known."""
    return {
        "prefix": Path(writer.prefix).name,
        "vocab_size": options.vocab_size,
        "eod_id": options.eod_id,
        "append_eod": options.eod_id is not None and not report.unfinished_documents,
        "dtype": str(writer.dtype),
        "documents": writer.num_documents,
        "tokens": writer.num_tokens,
        "unfinished_documents": report.unfinished_documents,
        "imported_from": "LITPKDS",
        "bin_sha256": writer.bin_sha256(),
    }
