"""Which chat data a run is given: files, folders, patterns and names of a registry, with weights, as sources.

A value is FILE, FOLDER (the files right in it), a PATTERN of files with `*`, `?` or `[...]`, or the NAME of an entry of
a dataset_info.json: of the registry that is given, else FOLDER/NAME of the one in that folder. Each is one source.
`:max_samples=N` after it takes N of its rows by lot. A weight stands before each value, or before none of them.
"""

from __future__ import annotations

import difflib
import glob
import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_steel.data.chat_formats import BadRow, RowFormat
from megatron_steel.data.chat_registry import (
    REGISTRY_FILE,
    SUFFIXES,
    Entry,
    directory_files,
    open_entry,
    read_registry,
)
from megatron_steel.data.chat_rows import ChatRow, RowKind, chat_values, count_rows, read_chat, read_row
from megatron_steel.data.duplicates import hash_file
from megatron_steel.data.selection import LIMIT, PATTERN, pair_weights
from megatron_steel.data.shuffle import permute, round_keys
from megatron_steel.data.sources import source_names

# What a fingerprint holds beside the bytes of files: another number when the same bytes give other conversations.
VERSION = "chat 1"


@dataclass(kw_only=True, frozen=True)
class ChatSource:
    """Rows that are one source of a mixture."""

    name: str
    files: tuple[Path, ...]
    weight: float | None
    """As it is written before the value; None if no weights are."""
    fingerprint: str
    """sha256 hex of all that decides the conversations, wherever the files lie: their bytes and how they are read."""
    form: RowFormat
    max_turn_bytes: int
    num_samples: int | None
    """LLaMA-Factory's: so many rows by lot; where there are fewer, all of them and others again."""
    max_samples: int | None
    """At most so many rows, by lot."""
    row_kind: RowKind = "chat"

    def rows(self) -> Iterator[ChatRow | BadRow]:
        """Each row as what it is read for, or a bad row, in the order of the files; the same in every run.

        A row that is drawn several times comes several times. Raises ``ValueError`` for a file that cannot be read.
        """
        if self.num_samples is None and self.max_samples is None:
            yield from read_chat(self.files, self.form, self.max_turn_bytes, self.row_kind)
            return
        copies = draw_rows(count_rows(self.files, self.form), self.num_samples, self.max_samples)
        for row, count in zip(chat_values(self.files, self.form), copies.tolist(), strict=True):
            if count:
                yield from [read_row(row, self.form, self.max_turn_bytes, self.row_kind)] * count


def draw_rows(rows: int, num_samples: int | None, max_samples: int | None) -> np.ndarray:
    """How often each of the rows is taken, int64 (rows,); a function of these numbers alone."""
    if not rows:
        return np.zeros(0, dtype=np.int64)
    taken = np.arange(rows, dtype=np.int64)
    if num_samples is not None:
        order = permute(taken, rows, round_keys("num_samples", num_samples))[:num_samples]
        more = num_samples - len(order)
        # A row can be drawn `more` times again, so which ones are is next to independent.
        again = np.arange(more, dtype=np.int64)
        if more:
            again = permute(again, rows * more, round_keys("num_samples again", num_samples)) % rows
        taken = np.concatenate([order, again])
    if max_samples is not None and max_samples < len(taken):
        chosen = np.arange(max_samples, dtype=np.int64)
        taken = taken[permute(chosen, len(taken), round_keys("max_samples", max_samples))]
    return np.bincount(taken, minlength=rows)


def open_chat(
    specs: Sequence[str],
    registry: Path | None,
    max_turn_bytes: int,
    flag: str = "--train-data",
    row_kind: RowKind = "chat",
) -> list[ChatSource]:
    """The sources that the values of a flag name, in their order; those of weight 0 are left out. Files are hashed.

    Raises ``ValueError`` for what cannot be found or is given twice, and for an entry that finetuning does not take.
    """
    names: list[str] = []
    entries: list[tuple[Entry, float | None, int | None]] = []
    for weight, value in pair_weights(specs, flag, "data"):
        spec, max_samples = split_limit(value.strip(), flag)
        entry, name = resolve(spec, registry, flag, row_kind)
        if weight != 0:
            names.append(name)
            entries.append((entry, weight, max_samples))
    _check_twice([file for entry, _, _ in entries for file in entry.files], flag)
    return [
        ChatSource(
            name=name,
            files=entry.files,
            weight=weight,
            fingerprint=fingerprint(entry, max_turn_bytes, max_samples, row_kind),
            form=entry.form,
            max_turn_bytes=max_turn_bytes,
            num_samples=entry.num_samples,
            max_samples=max_samples,
            row_kind=row_kind,
        )
        for name, (entry, weight, max_samples) in zip(short_names(names), entries, strict=True)
    ]


def resolve(spec: str, registry: Path | None, flag: str, row_kind: RowKind = "chat") -> tuple[Entry, str]:
    """The files that a value names, and what it is called: a path or the name of an entry."""
    path = Path(spec)
    if registry is not None and spec in (known := read_registry(registry)):
        if path.exists():
            raise ValueError(
                f"{flag} {spec}: there is such a path, and such a name in {registry}; write ./{spec} for one"
            )
        return open_entry(known, spec, registry, row_kind), spec
    if path.is_dir():
        files = directory_files(path)
        if not files:
            raise ValueError(f"{flag} {spec}: the folder holds no file that ends in {', '.join(SUFFIXES)}")
    elif path.exists():
        if ".txt" in path.suffixes[-2:]:
            raise ValueError(f"{flag} {spec}: plain text holds no conversations; give one of {', '.join(SUFFIXES)}")
        files = [path]
    elif PATTERN.search(spec):
        found = [Path(name) for name in sorted(glob.glob(spec))]
        files = [file for file in found if file.is_file() and file.name != REGISTRY_FILE]
        if not files:
            raise ValueError(f"{flag} {spec}: matches no file")
    elif registry is None and not ending(spec) and (beside := path.parent / REGISTRY_FILE).is_file():
        return open_entry(read_registry(beside), path.name, beside, row_kind), spec
    else:
        names = list(read_registry(registry)) if registry is not None else []
        near = difflib.get_close_matches(spec, names, n=1)
        hint = f"; did you mean {near[0]!r} of {registry}?" if near else ""
        raise ValueError(f"{flag} {spec}: no such file, folder or name of a {REGISTRY_FILE}{hint}")
    return Entry(files=tuple(files), form=RowFormat(), num_samples=None), spec


def split_limit(value: str, flag: str) -> tuple[str, int | None]:
    """The value without its limit, and the limit."""
    found = LIMIT.fullmatch(value)
    if found is None or Path(value).exists():
        return value, None
    if found["kind"] != "max_samples":
        raise ValueError(f"{flag} {value}: take a part of the rows with :max_samples=N")
    if not found["value"].isdecimal() or int(found["value"]) < 1:
        raise ValueError(f"{flag} {value}: max_samples is a whole number above 0, not {found['value']!r}")
    return found["path"], int(found["value"])


def short_names(specs: Sequence[str]) -> list[str]:
    """A name per value, told apart by folders where needed: the last part of a path, without endings if none clash."""
    bare = [spec if PATTERN.search(spec) else spec.removesuffix(ending(spec)) for spec in specs]
    return source_names(bare if len(set(bare)) == len(bare) else list(specs))


def ending(name: str) -> str:
    """What of a file's name says how it is read."""
    return max((suffix for suffix in SUFFIXES if name.endswith(suffix)), key=len, default="")


def fingerprint(entry: Entry, max_turn_bytes: int, max_samples: int | None, row_kind: RowKind) -> str:
    """See `ChatSource.fingerprint`."""
    form = "" if entry.form == RowFormat() else repr(entry.form)
    form += "" if row_kind == "chat" else f" {row_kind}"
    parts = [VERSION, form, str(max_turn_bytes), str(entry.num_samples), str(max_samples)]
    parts += [f"{ending(file.name)} {hash_file(file)}" for file in entry.files]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _check_twice(files: Sequence[Path], flag: str) -> None:
    """Raises ``ValueError`` for a file that is given twice."""
    for path, count in Counter(file.resolve() for file in files).items():
        if count > 1:
            raise ValueError(f"{flag}: {path} is given {count} times; give it once, with a higher weight")
