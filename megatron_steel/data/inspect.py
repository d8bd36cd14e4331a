"""What tools/inspect_data.py says about indexed datasets and data orders: verify, merge, differences of two ledgers."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_steel.data.duplicates import hash_file
from megatron_steel.data.indexed import IndexedReader, IndexedWriter, read_sidecar
from megatron_steel.data.order import Ledger
from megatron_steel.data.progress import ByteProgress
from megatron_steel.data.windows import WindowedDataset
from megatron_steel.text.tokenizer import Tokenizer

SCAN_BYTES = 1 << 22
COMPARE_BLOCK = 1 << 14
# Of the fields of a sidecar, those that decide which ids the tokens are and how documents end.
SAME_IN_MERGE = ("tokenizer_type", "tokenizer_fingerprint", "vocab_size", "eod_id", "append_eod")
KEPT_IN_MERGE = (*SAME_IN_MERGE, "include_special_tokens", "json_key")


@dataclass(frozen=True)
class Expected:
    """What the tokens of a dataset are checked against; None leaves a check out."""

    vocab_size: int | None = None
    eod_id: int | None = None


class Problems:
    """Lines about what is wrong with one dataset: the first ``limit``, then how many there were."""

    def __init__(self, limit: int) -> None:
        self.limit, self.count, self._lines = limit, 0, list[str]()

    def add(self, line: str) -> None:
        """One problem."""
        self.count += 1
        if self.count <= self.limit:
            self._lines.append(line)

    def add_many(self, count: int, lines: Iterator[str]) -> None:
        """``count`` problems; their lines are only made as far as they are kept."""
        room = max(0, self.limit - self.count)
        self._lines += [line for line, _ in zip(lines, range(min(room, count)), strict=False)]
        self.count += count

    def lines(self) -> list[str]:
        """What to print."""
        more = self.count - len(self._lines)
        return [*self._lines, f"... and {more} more problems"] if more else list(self._lines)


def verify(prefix: str, given: Expected, limit: int = 100) -> tuple[list[str], list[str]]:
    """Read all of a dataset; return lines about problems (none: it is sound) and notes about what was not checked.

    Checked: the index against the data, ids in the vocabulary, the end-of-document id at the end of every document,
    and the sidecar with the hashes of both files. ``given`` comes before what the sidecar says.
    """
    try:
        reader = IndexedReader(prefix)
        sidecar = read_sidecar(prefix)
    except ValueError as error:
        return [str(error)], []
    facts = sidecar or {}
    expected = Expected(
        facts.get("vocab_size") if given.vocab_size is None else given.vocab_size,
        facts.get("eod_id") if given.eod_id is None and facts.get("append_eod") else given.eod_id,
    )
    notes = []
    if sidecar is None:
        notes.append(f"{prefix}: no sidecar (.json), so no hash to compare")
    if expected.vocab_size is None:
        notes.append(f"{prefix}: ids were only checked to be 0 or more; give --vocab-size or a tokenizer")
    if expected.eod_id is None:
        notes.append(f"{prefix}: ends of documents were not checked; give --eod-id")
    problems = Problems(limit)
    digest = scan_tokens(reader, expected, problems)
    actual = {
        "documents": reader.num_documents,
        "tokens": reader.num_tokens,
        "dtype": str(reader.dtype),
        "bin_sha256": digest,
    }
    if "idx_sha256" in facts:  # sidecars of earlier versions do not have it
        actual["idx_sha256"] = hash_file(reader.idx_path)
    for key, value in actual.items():
        if sidecar is not None and facts.get(key) != value:
            path = reader.idx_path if key == "idx_sha256" else reader.bin_path
            problems.add(f"{prefix}.json: {key} is {facts.get(key)!r}, {path} has {value!r}")
    return problems.lines(), notes


def scan_tokens(reader: IndexedReader, expected: Expected, problems: Problems) -> str:
    """Check every token in blocks that are read once; return the sha256 (hex) of the data."""
    digest, itemsize = hashlib.sha256(), reader.dtype.itemsize
    progress = ByteProgress(f"verify {reader.bin_path}", reader.num_tokens * itemsize)
    limit = np.iinfo(np.int64).max if expected.vocab_size is None else expected.vocab_size
    first = 0
    with open(reader.bin_path, "rb") as stream:
        while data := stream.read(SCAN_BYTES):
            digest.update(data)
            tokens = np.frombuffer(data, reader.dtype).astype(np.int64)
            wrong = np.flatnonzero((tokens < 0) | (tokens >= limit))
            problems.add_many(len(wrong), describe_ids(reader, first, tokens, wrong, expected))
            if expected.eod_id is not None:
                ends = document_ends(reader, first, first + len(tokens))
                wrong = ends[tokens[ends - first] != expected.eod_id] - first
                problems.add_many(len(wrong), describe_ends(reader, first, tokens, wrong, expected.eod_id))
            first += len(tokens)
            progress.add(len(data))
    return digest.hexdigest()


def document_ends(reader: IndexedReader, start: int, stop: int) -> np.ndarray:
    """Positions in [start, stop) of the last token of a document, int64, rising; empty documents have none."""
    itemsize, pointers, bounds = reader.dtype.itemsize, reader.sequence_pointers, reader.document_indices
    # Documents end where the sequence after them begins; the last one ends with the data.
    low, high = np.searchsorted(pointers, [(start + 1) * itemsize, stop * itemsize + 1])
    near = bounds[np.searchsorted(bounds, low) : np.searchsorted(bounds, high)]
    inner = pointers[near[near < len(pointers)]] // itemsize
    after = np.unique(np.append(inner, [reader.num_tokens])) - 1
    return after[(after >= start) & (after < stop)]


def place_of(reader: IndexedReader, position: int) -> tuple[int, int]:
    """(document, token inside it) of a token of the file."""
    itemsize = reader.dtype.itemsize
    sequence = int(np.searchsorted(reader.sequence_pointers, position * itemsize, side="right")) - 1
    document = int(np.searchsorted(reader.document_indices, sequence, side="right")) - 1
    start = int(reader.sequence_pointers[int(reader.document_indices[document])]) // itemsize
    return document, position - start


def describe_ids(
    reader: IndexedReader, first: int, tokens: np.ndarray, wrong: np.ndarray, expected: Expected
) -> Iterator[str]:
    """A line per id that is not in the vocabulary; ``wrong`` are positions in ``tokens``, which begin at ``first``."""
    for position in wrong.tolist():
        document, token = place_of(reader, first + position)
        allowed = "0 or more" if expected.vocab_size is None else f"in [0, {expected.vocab_size})"
        yield f"{reader.bin_path}: document {document}, token {token}: id {tokens[position]} is not {allowed}"


def describe_ends(
    reader: IndexedReader, first: int, tokens: np.ndarray, wrong: np.ndarray, eod_id: int
) -> Iterator[str]:
    """A line per document that does not end with the end-of-document id; arguments as of :func:`describe_ids`."""
    for position in wrong.tolist():
        document, token = place_of(reader, first + position)
        yield (
            f"{reader.bin_path}: document {document}, token {token}: the document ends with id {tokens[position]}, "
            f"not with the end-of-document id {eod_id}"
        )


def find_prefixes(inputs: Sequence[str]) -> list[str]:
    """Prefixes as given; a directory stands for those of all its .idx files, sorted by name as in Megatron-LM."""
    prefixes: list[str] = []
    for value in inputs:
        if Path(value).is_dir():
            found = sorted(str(path.with_suffix("")) for path in Path(value).glob("*.idx"))
            if not found:
                raise ValueError(f"{value}: the directory holds no .idx file")
            prefixes += found
        else:
            prefixes.append(value.removesuffix(".idx").removesuffix(".bin") if Path(value).is_file() else value)
    return prefixes


def merge(prefixes: Sequence[str], output_prefix: str) -> dict[str, Any]:
    """Put datasets one after the other into a new one, as Megatron-LM's merge_datasets does; return its sidecar.

    Raises ``ValueError``, with nothing written, for another dtype, another tokenizer or document end, or an output
    that is one of the inputs.
    """
    if len({Path(prefix).resolve() for prefix in prefixes}) < len(prefixes):
        raise ValueError("merge: an input is named twice; its documents would be repeated")
    if Path(output_prefix).resolve() in {Path(prefix).resolve() for prefix in prefixes}:
        raise ValueError(f"--output-prefix {output_prefix}: is one of the inputs")
    sidecars = [read_sidecar(prefix) for prefix in prefixes]
    dtypes = [IndexedReader(prefix).dtype for prefix in prefixes]
    for prefix, sidecar, dtype in zip(prefixes[1:], sidecars[1:], dtypes[1:], strict=True):
        if dtype != dtypes[0]:
            raise ValueError(f"{prefix}: its ids are {dtype}, those of {prefixes[0]} are {dtypes[0]}: not merged")
        for key in SAME_IN_MERGE if sidecar and sidecars[0] else ():
            one, other = (sidecars[0] or {}).get(key), (sidecar or {}).get(key)
            if one != other:
                raise ValueError(f"{prefix}: {key} is {other!r}, that of {prefixes[0]} is {one!r}: not merged")
    progress = ByteProgress("merge", sum(Path(f"{prefix}.bin").stat().st_size for prefix in prefixes))
    with IndexedWriter(output_prefix, dtypes[0]) as writer:
        for prefix in prefixes:
            writer.merge(prefix)
            progress.add(Path(f"{prefix}.bin").stat().st_size)
        result = merge_sidecars(prefixes, sidecars, writer)
        writer.commit(result)
    return result


def merge_sidecars(
    prefixes: Sequence[str], sidecars: Sequence[dict[str, Any] | None], writer: IndexedWriter
) -> dict[str, Any]:
    """The sidecar of a merged dataset: what all inputs say, sums, and the inputs' own counts under ``merged_from``."""
    known = [sidecar or {} for sidecar in sidecars]
    result: dict[str, Any] = {"prefix": Path(writer.prefix).name}
    for key in KEPT_IN_MERGE:
        if all(key in sidecar and sidecar[key] == known[0][key] for sidecar in known):
            result[key] = known[0][key]
    result |= {"dtype": str(writer.dtype), "documents": writer.num_documents, "tokens": writer.num_tokens}
    if all("text_bytes" in sidecar for sidecar in known):
        result["text_bytes"] = sum(sidecar["text_bytes"] for sidecar in known)
    rejected: dict[str, int] = {}
    for sidecar in known:
        for reason, count in sidecar.get("rejected_lines", {}).items():
            rejected[reason] = rejected.get(reason, 0) + count
    result["rejected_lines"] = rejected
    parts = ("documents", "tokens", "text_bytes", "language_shares", "bin_sha256")
    result["merged_from"] = [
        {"prefix": Path(prefix).name} | {key: sidecar[key] for key in parts if key in sidecar}
        for prefix, sidecar in zip(prefixes, known, strict=True)
    ]
    result["bin_sha256"] = writer.bin_sha256()
    return result


def show_sample(number: int, ledger: Ledger, datasets: Mapping[str, WindowedDataset], tokenizer: Tokenizer) -> str:
    """Sample ``number`` of a run as text: a line with its source, epoch and window, then its decoded tokens.

    ``datasets`` are open by fingerprint. Raises ``ValueError`` when the source of the sample is not among them.
    """
    place = ledger.sample(number)
    source = ledger.sources[place.source]
    dataset = datasets.get(source.fingerprint)
    if dataset is None:
        raise ValueError(
            f"sample {number} comes from source {source.name!r} ({source.fingerprint[:12]}), which is not in the run's "
            "present data: give all of it with --data-path"
        )
    ids = dataset.read(place.window, place.epoch)
    return (
        f"sample {number}: source {source.name} ({dataset.prefix}), epoch {place.epoch}, window {place.window} of "
        f"{source.windows}, {len(ids)} tokens\n{tokenizer.decode(ids.tolist())}\n"
    )


def compare_ledgers(one: Ledger, other: Ledger) -> list[str]:
    """A line per difference between two data orders: sequence length, segments, their sources and settings."""
    lines = []
    if one.seq_length != other.seq_length:
        lines.append(f"seq_length: {one.seq_length} | {other.seq_length}")
    rows = [[asdict(segment) for segment in ledger.segments] for ledger in (one, other)]
    for number in range(max(map(len, rows))):
        if number >= min(map(len, rows)):
            side = 0 if len(rows[0]) > len(rows[1]) else 1
            segment = rows[side][number]
            lines.append(f"segment {number} from sample {segment['start']} is only in {'AB'[side]}")
            lines += [f"  source {source['name']}: {source_line(source)}" for source in segment["sources"]]
            continue
        lines += [f"segment {number}: {line}" for line in compare_segments(rows[0][number], rows[1][number])]
    return lines


def compare_segments(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """A phrase per difference of two segments, as plain values; sources are matched by content."""
    lines = [
        f"{key}: {one.get(key)} | {other.get(key)}"
        for key in sorted(set(one) | set(other))
        if key != "sources" and one.get(key) != other.get(key)
    ]
    sources = [{source["fingerprint"]: source for source in segment["sources"]} for segment in (one, other)]
    for fingerprint in dict.fromkeys([*sources[0], *sources[1]]):
        first, second = (side.get(fingerprint) for side in sources)
        if first is None or second is None:
            only = first or second
            assert only is not None
            lines.append(f"source {only['name']} is only in {'A' if first else 'B'}: {source_line(only)}")
            continue
        lines += [
            f"source {first['name']}: {key}: {first.get(key)} | {second.get(key)}"
            for key in sorted(set(first) | set(second))
            if first.get(key) != second.get(key)
        ]
    if list(sources[0]) != list(sources[1]) and set(sources[0]) == set(sources[1]):
        lines.append("the same sources in another order, which decides ties between them")
    return lines


def source_line(source: dict[str, Any]) -> str:
    """The facts of a source of a segment."""
    return ", ".join(
        f"{key} {value[:12] if key == 'fingerprint' else value}" for key, value in source.items() if key != "name"
    )


def first_difference(one: Ledger, other: Ledger, limit: int) -> int | None:
    """The first sample below ``limit`` that two orders take from different windows or epochs, None if there is none.

    Sources are matched by content, so other names and another place in the list are no difference.
    """
    common = 0
    for first, second in zip(one.segments, other.segments, strict=False):
        if first != second:
            break
        common += 1
    if common == len(one.segments) == len(other.segments):
        return None
    # Up to where the first differing segment opens, both orders are made of equal segments.
    start = min(ledger.segments[common].start for ledger in (one, other) if common < len(ledger.segments))
    names: dict[str, int] = {}
    for ledger in (one, other):
        for source in ledger.sources:
            names.setdefault(source.fingerprint, len(names))
    index = [np.array([names[source.fingerprint] for source in ledger.sources]) for ledger in (one, other)]
    progress = ByteProgress("diff (samples)", limit - start)
    for low in range(start, limit, COMPARE_BLOCK):
        high = min(low + COMPARE_BLOCK, limit)
        (a, *ours), (b, *theirs) = one.samples(low, high), other.samples(low, high)
        unequal = (index[0][a] != index[1][b]) | (ours[0] != theirs[0]) | (ours[1] != theirs[1])
        if unequal.any():
            return low + int(np.argmax(unequal))
        progress.add(high - low)
    return None
