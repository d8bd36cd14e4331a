"""LLaMA-Factory's ``dataset_info.json``: names of data sets, where they lie, and which column holds what.

Every key of an entry is understood or refused. As there, ``columns`` names all columns that are read, so without
``query`` no input is. An entry that says nothing about its format is read by the keys of each row (chat_formats.py).
Data of a hub is not fetched: an entry counts if its ``file_name`` is here.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_steel.data.chat_formats import Columns, RowFormat
from megatron_steel.data.chat_messages import CALL, Tags, kind
from megatron_steel.data.readers import INPUT_SUFFIXES

REGISTRY_FILE = "dataset_info.json"
SUFFIXES = tuple(suffix for suffix in INPUT_SUFFIXES if not suffix.startswith(".txt"))
HUB_KEYS = ("hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name")
KEYS = (*HUB_KEYS, "file_name", "formatting", "ranking", "subset", "split", "folder", "num_samples", "columns", "tags")
COLUMNS = ("prompt", "query", "response", "history", "messages", "system", "tools")
OTHER_COLUMNS: Mapping[str, str] = {
    "images": "only text is read",
    "videos": "only text is read",
    "audios": "only text is read",
    "chosen": "pairs of answers are for the losses of pairs of megatron_steel.preference",
    "rejected": "pairs of answers are for the losses of pairs of megatron_steel.preference",
    "kto_tag": "judged answers are for --loss-type kto of megatron_steel.preference",
}
# Columns of OTHER_COLUMNS that rows of a kind have.
OF_KIND: Mapping[str, tuple[str, ...]] = {
    "chat": (),
    "pair": ("chosen", "rejected"),
    "judged": ("kto_tag",),
    "prompt": (),
}
ROLE_TAGS = {
    "user_tag": "user",
    "assistant_tag": "assistant",
    "observation_tag": "tool",
    "function_tag": CALL,
    "system_tag": "system",
}
TAGS = ("role_tag", "content_tag", *ROLE_TAGS)
KNOWN_FORMATS = ("alpaca", "sharegpt", "openai")


@dataclass(kw_only=True, frozen=True)
class Entry:
    """What a name stands for."""

    files: tuple[Path, ...]
    form: RowFormat
    num_samples: int | None


def read_registry(path: Path) -> dict[str, Any]:
    """The entries of a registry by name, as they are written. ``ValueError`` for a file that is none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: must be an object of names, not {kind(values)}")
    return values


def open_entry(values: Mapping[str, Any], name: str, path: Path, row_kind: str = "chat") -> Entry:
    """The entry of that name in the registry at ``path``, of which rows are to be of a kind.

    Raises ``ValueError`` for a name that is not there, data that is elsewhere or of another stage, and keys that would
    do nothing.
    """
    where = f"{path}: {name!r}"
    if name not in values:
        near = difflib.get_close_matches(name, list(values), n=1)
        raise ValueError(f"{where} is not in it; " + (f"did you mean {near[0]!r}?" if near else "see the names there"))
    entry = values[name]
    _check_keys(entry, KEYS, where)
    if entry.get("ranking") and row_kind != "pair":
        raise ValueError(f"{where} has ranking: {OTHER_COLUMNS['chosen']}")
    return Entry(
        files=tuple(_files(entry, where, path.parent)),
        form=_form(entry, where, row_kind),
        num_samples=_samples(entry, where),
    )


def directory_files(folder: Path) -> list[Path]:
    """Files of chat data right in a folder, sorted by name."""
    found = [path for path in folder.iterdir() if path.is_file() and path.name.endswith(SUFFIXES)]
    return sorted(path for path in found if path.name != REGISTRY_FILE and not path.name.startswith("."))


def _files(entry: Mapping[str, Any], where: str, home: Path) -> list[Path]:
    """The files of an entry: the named one, or those of a folder, of its subset and split."""
    if entry.get("file_name") is None:
        hub = next((key for key in HUB_KEYS if key in entry), None)
        if hub is None:
            raise ValueError(f"{where} has no file_name")
        raise ValueError(f"{where} is at {hub} {entry[hub]}; download it, and give the place as its file_name")
    for key in ("file_name", "folder", "subset", "split"):
        if entry.get(key) is not None and not isinstance(entry[key], str):
            raise ValueError(f"{where}: {key} must be text, not {kind(entry[key])}")
    path, split = home / entry["file_name"], entry.get("split")
    parts = [entry[key] for key in ("folder", "subset") if entry.get(key)]
    if path.is_file():
        if parts or split not in (None, "train"):
            raise ValueError(f"{where}: {path} is one file; folder, subset and split choose among those of a folder")
        return [path]
    for part in parts:
        path = path / part
    if not path.is_dir():
        raise ValueError(f"{where}: {path} does not exist")
    found = directory_files(path)
    if split is not None:
        found = _of_split(path, found, split)
    if not found:
        of_split = f" of the split {split!r}" if split is not None else ""
        raise ValueError(f"{where}: {path} holds no file{of_split} that ends in {', '.join(SUFFIXES)}")
    return found


def _of_split(folder: Path, files: list[Path], split: str) -> list[Path]:
    """The files of a split, named as on the Hub: SPLIT-00000-of-00001, else with it as a word, else in its folder."""
    name = re.escape(split)
    for pattern in (rf"{name}-\d+-of-\d+\.", rf"(?:.*[^a-zA-Z0-9])?{name}[^a-zA-Z0-9]"):
        if found := [file for file in files if re.match(pattern, file.name)]:
            return found
    return directory_files(folder / split) if (folder / split).is_dir() else []


def _form(entry: Mapping[str, Any], where: str, row_kind: str) -> RowFormat:
    """How the rows of an entry are read."""
    own = OF_KIND[row_kind]
    formatting = entry.get("formatting")
    if formatting not in (None, *KNOWN_FORMATS):
        raise ValueError(f"{where}: formatting {formatting!r} is not one of {', '.join(KNOWN_FORMATS)}")
    columns, tags = entry.get("columns"), entry.get("tags")
    for key, reason in OTHER_COLUMNS.items():
        if isinstance(columns, Mapping) and columns.get(key) and key not in own:
            raise ValueError(f"{where} has a column of {key}: {reason}")
    _check_texts({} if columns is None else columns, (*COLUMNS, *OTHER_COLUMNS), f"{where}: columns")
    _check_texts({} if tags is None else tags, TAGS, f"{where}: tags")
    if formatting is None and columns is None and tags is None:
        return RowFormat()
    if formatting in (None, "alpaca"):
        if tags is not None:
            raise ValueError(f"{where} has tags, which alpaca has not; give formatting sharegpt or openai")
        return RowFormat(kind="alpaca", columns=_alpaca_columns(columns, where, own))
    found = {"messages": "conversations"} if columns is None else {key: columns.get(key) for key in COLUMNS}
    if found.get("messages") is None:
        raise ValueError(f"{where}: columns names no messages")
    chosen = Columns(messages=found["messages"], system=found.get("system"), tools=found.get("tools"))
    return RowFormat(kind="messages", columns=_with(chosen, columns, own), tags=_tags(tags or {}))


def _with(columns: Columns, named: Mapping[str, Any] | None, own: Sequence[str]) -> Columns:
    """The columns with those that only this kind of rows has."""
    return dataclasses.replace(columns, **{key: named[key] for key in own if named and named.get(key)})


def _alpaca_columns(columns: Mapping[str, Any] | None, where: str, own: Sequence[str]) -> Columns:
    """Columns of an entry in the format alpaca."""
    if columns is None:
        return Columns(history=None, system=None, tools=None)
    for key in ("prompt", "response"):
        if columns.get(key) is None and not (key == "response" and columns.get("chosen")):
            hint = "; it is text for pretraining" if key == "response" else ""
            raise ValueError(f"{where}: columns names no {key}{hint}")
    if columns.get("messages") is not None:
        raise ValueError(f"{where}: columns names messages, which alpaca has not; give formatting sharegpt or openai")
    chosen: dict[str, Any] = {key: columns.get(key) for key in COLUMNS}
    if chosen["response"] is None:
        del chosen["response"]
    return _with(Columns(**chosen), columns, own)


def _tags(tags: Mapping[str, str]) -> Tags:
    """Tags of an entry, beside the usual names."""
    roles = tuple((tags[key], role) for key, role in ROLE_TAGS.items() if tags.get(key) is not None)
    usual = Tags()
    return Tags(
        role_keys=(tags["role_tag"],) if tags.get("role_tag") else usual.role_keys,
        content_keys=(tags["content_tag"],) if tags.get("content_tag") else usual.content_keys,
        roles=roles,
    )


def _samples(entry: Mapping[str, Any], where: str) -> int | None:
    """How many samples are drawn of an entry."""
    number = entry.get("num_samples")
    if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < 1):
        raise ValueError(f"{where}: num_samples must be a whole number above 0, not {number!r}")
    return number


def _check_keys(values: Any, known: tuple[str, ...], where: str) -> None:
    """Raises ``ValueError`` for what is no object, and for a key that would do nothing."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{where} must be an object, not {kind(values)}")
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
            raise ValueError(f"{where} has the unknown key {key!r}; {hint}")


def _check_texts(values: Any, known: tuple[str, ...], where: str) -> None:
    """Like `_check_keys`, for an object of texts."""
    _check_keys(values, known, where)
    for key, value in values.items():
        if value is not None and (not isinstance(value, str) or not value):
            raise ValueError(f"{where}: {key} must be a name, not {value!r}")
