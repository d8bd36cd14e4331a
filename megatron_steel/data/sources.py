"""From --data-path, --split, --train-data-path and --valid-data-path to open data sets and the ledger's sources."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from megatron_steel.config.schema import SequenceMode
from megatron_steel.data.document_windows import open_windows
from megatron_steel.data.identity import Candidate, Known, content_hashes, known_hash
from megatron_steel.data.index_cache import IndexCache
from megatron_steel.data.indexed import IndexedReader
from megatron_steel.data.order import SourceSpec
from megatron_steel.data.phases import Weighting
from megatron_steel.data.selection import Selected, parse_data_path, share_weights
from megatron_steel.data.windows import WindowedDataset, split_documents

# A file without a sidecar is scanned for ids that are out of range: all of it up to this many tokens, else as
# many in blocks from its first to its last token.
FULL_SCAN_TOKENS = 1 << 22
SAMPLED_BLOCKS = 256
OPEN_THREADS = 8
SUFFIX = "_text_document"


@dataclass(frozen=True)
class TokenizerFacts:
    """What the data is checked against; of the tokenizer of the run."""

    fingerprint: str
    vocab_size: int


@dataclass
class DataSources:
    """The data of a run, open. `train` and `datasets` (by fingerprint) are what the ledger and the loader take."""

    train: list[SourceSpec] = field(default_factory=list)
    datasets: dict[str, WindowedDataset] = field(default_factory=dict)
    valid: dict[str, WindowedDataset] = field(default_factory=dict)
    weighting: Weighting = "weights"
    """What the weights of `train` are."""
    notes: list[str] = field(default_factory=list)
    """Lines to print: what was left out, and why."""


def open_sources(
    *,
    data_path: Sequence[str],
    split: str,
    train_data_path: Sequence[str],
    valid_data_path: Sequence[str],
    seq_length: int,
    seed: int,
    tokenizer: TokenizerFacts | None,
    target_epochs: Sequence[float] = (),
    later: Collection[str] = (),
    known: Mapping[str, Known] | None = None,
    read_all: bool = False,
    verify: bool = True,
    sequence_mode: SequenceMode = "concat",
    cache_path: str | None = None,
) -> DataSources:
    """Open the training and validation data that these options name.

    seed orders the documents of the training data; on resume it is the ledger's (`Ledger.seed`), else the fingerprints
    differ. tokenizer None skips the check of token ids (tools that only look at data). later: names of sources that a
    phase draws from, which are opened with weight 0 too. known: the sources of the checkpoint by fingerprint.
    read_all: name every source by all of its tokens; verify: compare them with what preprocessing recorded.
    sequence_mode: how documents of the training data become windows; those of validation are always joined.
    cache_path: folder that remembers what opening found, and indexes (data/index_cache.py); not used with read_all.
    Raises ValueError for options that contradict each other, a missing or damaged file, data of another tokenizer, or a
    source without a single window.
    """
    if bool(data_path) == bool(train_data_path):
        raise ValueError("give the training data as either --data-path (with --split) or --train-data-path")
    selected = parse_data_path(data_path or train_data_path, "--data-path" if data_path else "--train-data-path")
    every = source_names([file.prefix for file in selected])
    result = DataSources(weighting=_weighting(selected, target_epochs))
    # As in Megatron-LM a weight of 0 leaves the source out.
    factors = target_epochs or [1.0 if file.weight is None else file.weight for file in selected]
    used = [i for i, name in enumerate(every) if factors[i] or name in later]
    names, selected, factors = [every[i] for i in used], [selected[i] for i in used], [factors[i] for i in used]
    cache = _open_cache(None if read_all else cache_path, selected, valid_data_path, tokenizer)

    def open_one(i: int) -> tuple[Candidate, tuple[int, int]]:
        """A source and its held-out documents."""
        reader = open_indexed(selected[i].prefix, tokenizer, cache)
        train, held_out, _ = split_documents(split if data_path else "1", reader.num_documents)
        dataset = open_windows(sequence_mode, reader, seq_length, train, seed, selected[i].limit)
        return Candidate(names[i], dataset, known_hash(reader, read_all, verify)), held_out

    # Opening is reading small pieces of many files: on shared storage mostly waiting.
    with ThreadPoolExecutor(OPEN_THREADS) as pool:
        opened = list((map if cache is not None and cache.complete else pool.map)(open_one, range(len(used))))
    if data_path and not valid_data_path:
        for candidate, held_out in opened:
            _add_split_valid(result, candidate.name, candidate.dataset.reader, held_out, seq_length)
    _add_train(result, [candidate for candidate, _ in opened], selected, factors, known or {})
    _add_named_valid(result, valid_data_path, seq_length, tokenizer, bool(data_path), cache)
    if cache is not None:
        _remember(result, cache)
    return result


def _add_train(
    result: DataSources,
    candidates: Sequence[Candidate],
    selected: Sequence[Selected],
    factors: Sequence[float],
    known: Mapping[str, Known],
) -> None:
    """Name the open sources by their content and add them with their weights."""
    hashes = content_hashes(candidates, known)
    weights = share_weights(selected, [len(candidate.dataset) for candidate in candidates])
    for candidate, factor, weight, bin_sha256 in zip(candidates, factors, weights, hashes, strict=True):
        dataset = candidate.dataset
        # Without weights every window counts the same, so all sources finish an epoch at the same sample.
        weight = factor * len(dataset) if weight is None else weight
        dataset.fingerprint = dataset.content_name(bin_sha256)
        result.train.append(SourceSpec(candidate.name, dataset.fingerprint, len(dataset), weight))
        result.datasets[dataset.fingerprint] = dataset


def _open_cache(
    folder: str | None, selected: Sequence[Selected], valid_data_path: Sequence[str], tokenizer: TokenizerFacts | None
) -> IndexCache | None:
    """The cache of these training and validation files, if there is to be one."""
    if folder is None:
        return None
    named = [prefix for _, prefix in parse_valid_data_path(valid_data_path)]
    return IndexCache(Path(folder), [*(file.prefix for file in selected), *named], str(tokenizer))


def _remember(result: DataSources, cache: IndexCache) -> None:
    """Leave what opening found in the cache, and have indexes kept there."""
    datasets = [*result.datasets.values(), *result.valid.values()]
    for dataset in datasets:
        dataset.index_cache = cache
    cache.save([dataset.reader for dataset in datasets])


def _add_named_valid(
    result: DataSources,
    valid_data_path: Sequence[str],
    seq_length: int,
    tokenizer: TokenizerFacts | None,
    replaces_split: bool,
    cache: IndexCache | None,
) -> None:
    """Add the validation sets that --valid-data-path names."""
    if replaces_split and valid_data_path:
        result.notes.append("--valid-data-path replaces the validation share of --split, which is not used at all")
    for name, prefix in parse_valid_data_path(valid_data_path):
        reader = open_indexed(prefix, tokenizer, cache)
        result.valid[name] = WindowedDataset(prefix, seq_length, shuffle_documents=False, reader=reader)


def _weighting(selected: Sequence[Selected], target_epochs: Sequence[float]) -> Weighting:
    """What the weights are; raises ValueError for target epochs beside weights, or of another number."""
    written = any(file.weight is not None for file in selected)
    if not target_epochs:
        return "weights" if written else "windows"
    if written:
        raise ValueError("give weights in the data path or --target-epochs, not both")
    if len(target_epochs) != len(selected):
        raise ValueError(f"--target-epochs has {len(target_epochs)} numbers for {len(selected)} sources; give one each")
    return "epochs"


def _add_split_valid(
    result: DataSources, name: str, reader: IndexedReader, documents: tuple[int, int], seq_length: int
) -> None:
    """Add the held-out documents of a source as the validation set of its name, or a note if they fill no window."""
    first, last = documents
    (tokens,) = reader.count(f"tokens|{first}|{last}", lambda: [_range_tokens(reader, first, last)])
    if first == last or tokens <= seq_length:
        result.notes.append(
            f"no validation set of {name}: --split leaves it {last - first} documents with "
            f"{tokens} tokens, less than one window of seq_length {seq_length} + 1"
        )
        return
    result.valid[name] = WindowedDataset(reader.prefix, seq_length, documents, shuffle_documents=False, reader=reader)


def _range_tokens(reader: IndexedReader, first: int, last: int) -> int:
    """Tokens of documents [first, last)."""
    return int(reader.sequence_lengths[slice(*reader.document_indices[[first, last]])].sum(dtype=np.int64))


def parse_valid_data_path(values: Sequence[str], flag: str = "--valid-data-path") -> list[tuple[str, str]]:
    """Return (name, prefix) of each validation set, given as NAME=PREFIX or PREFIX.

    Raises ValueError for an empty name or prefix and for a name that is given twice.
    """
    named = []
    for value in values:
        name, equals, prefix = value.partition("=")
        # A path may hold "=" itself (hive-style folders); a name holds no "/".
        if not equals or "/" in name:
            name, prefix = "", value
        elif not name or not prefix:
            raise ValueError(f"{flag} {value!r}: give NAME=DATA or DATA")
        named.append((name, prefix))
    unnamed = iter(source_names([prefix for name, prefix in named if not name]))
    result = [(name or next(unnamed), prefix) for name, prefix in named]
    for name, count in Counter(name for name, _ in result).items():
        if count > 1:
            raise ValueError(f"{flag}: {count} sets are named {name!r}; give each its own NAME=DATA")
    return result


def source_names(prefixes: Sequence[str]) -> list[str]:
    """Return a short name per prefix: its last part without _text_document, with as many folders as tell it apart."""
    parts = [Path(prefix.removesuffix(SUFFIX)).parts or (prefix,) for prefix in prefixes]
    names = []
    ends = Counter(own[-depth:] for own in parts for depth in range(1, len(own) + 1))
    for own in parts:
        depth = 1
        while depth < len(own) and ends[own[-depth:]] > 1:
            depth += 1
        names.append("/".join(own[-depth:]).replace("//", "/"))
    return names


def open_indexed(prefix: str, tokenizer: TokenizerFacts | None, cache: IndexCache | None = None) -> IndexedReader:
    """Open the indexed file `prefix` and check that its ids are the tokenizer's, unless `cache` knows it.

    Raises ValueError for a missing file (saying what to do about raw text), a damaged one, or another tokenizer.
    """
    known = None if cache is None else cache.open(prefix)
    if known is not None:
        return known
    _check_exists(prefix)
    reader = IndexedReader(prefix)
    if tokenizer is None:
        return reader
    recorded = (reader.sidecar or {}).get("tokenizer_fingerprint")
    if recorded is None:
        _check_ids(prefix, reader, tokenizer.vocab_size)
    elif recorded != tokenizer.fingerprint:
        raise ValueError(
            f"{prefix} was encoded with another tokenizer (fingerprint {str(recorded)[:12]}, this run's is "
            f"{tokenizer.fingerprint[:12]}): pass the tokenizer it was made with, or preprocess the text again"
        )
    return reader


def _check_exists(prefix: str) -> None:
    """Raise ValueError if prefix.bin or prefix.idx is missing, with the likely reason."""
    missing = [prefix + suffix for suffix in (".bin", ".idx") if not Path(prefix + suffix).is_file()]
    if not missing:
        return
    if prefix.endswith((".bin", ".idx")) and Path(prefix).is_file():
        raise ValueError(f"{prefix}: give the prefix without {prefix[-4:]}: {prefix[:-4]}")
    if prefix.endswith((".jsonl", ".json", ".txt", ".parquet", ".zst", ".gz")) or Path(prefix).is_file():
        raise ValueError(
            f"{prefix} is not an indexed file: make one with python tools/preprocess_data.py --input {prefix} "
            "--output-prefix PREFIX, then give PREFIX_text_document"
        )
    if Path(prefix + SUFFIX + ".bin").is_file():
        raise ValueError(f"{missing[0]} does not exist; did you mean {prefix}{SUFFIX}?")
    raise ValueError(f"{missing[0]} does not exist; a data path is the name of a .bin and .idx file without the ending")


def _check_ids(prefix: str, reader: IndexedReader, vocab_size: int) -> None:
    """Raise ValueError if a token id is outside of [0, vocab_size): all of a small file, blocks of a large one."""
    tokens = np.memmap(reader.bin_path, mode="r", dtype=reader.dtype)
    starts, size = np.zeros(1, dtype=np.int64), len(tokens)
    if len(tokens) > FULL_SCAN_TOKENS:
        size = FULL_SCAN_TOKENS // SAMPLED_BLOCKS
        starts = np.linspace(0, len(tokens) - size, SAMPLED_BLOCKS).astype(np.int64)
    for start in starts.tolist():
        ids = tokens[start : start + size]
        if ids.min() < 0 or ids.max() >= vocab_size:
            place = int(np.argmax((ids < 0) | (ids >= vocab_size)))
            byte = (start + place) * reader.dtype.itemsize
            sequence = int(np.searchsorted(reader.sequence_pointers, byte, side="right")) - 1
            raise ValueError(
                f"{prefix} holds token id {ids[place]} in sequence {sequence}, but the tokenizer has {vocab_size} ids: "
                "it was encoded with another tokenizer; pass that one, or preprocess the text again"
            )
