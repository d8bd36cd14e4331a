"""The YAML file of ``clean_data.py`` as dataclasses: filters in order, exact and MinHash deduplication.

text_key: text
filters: [whitespace, length: {min: 10, max: 100000}]
exact_dedup: {}
minhash_dedup: {n: 5}
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from megatron_steel.data import clean_filters as filters
from megatron_steel.data.clean_filters import Result
from megatron_steel.data.clean_text import Text
from megatron_steel.data.contamination import Contamination


class Filter(Protocol):
    """What every filter is."""

    def apply(self, text: Text) -> Result:
        """Judge or change one text."""
        ...


FILTERS: dict[str, type] = {
    "length": filters.Length,
    "words": filters.Words,
    "average_line_length": filters.AverageLineLength,
    "maximum_line_length": filters.MaximumLineLength,
    "alphanumeric_share": filters.AlphanumericShare,
    "special_character_share": filters.SpecialCharacterShare,
    "character_repetition": filters.CharacterRepetition,
    "word_repetition": filters.WordRepetition,
    "language_share": filters.LanguageShare,
    "field": filters.Field,
    "nfkc": filters.Nfkc,
    "whitespace": filters.Whitespace,
    "control_characters": filters.ControlCharacters,
    "remove_characters": filters.RemoveCharacters,
    "links": filters.Links,
    "emails": filters.Emails,
    "ips": filters.Ips,
    "repeated_lines": filters.RepeatedLines,
    "repeated_sentences": filters.RepeatedSentences,
    "contamination": Contamination,
}


@dataclass(frozen=True)
class ExactDedup:
    """Keep the first of equal texts; with ``ignore_case_and_punctuation`` of texts with equal tokens."""

    ignore_case_and_punctuation: bool = False


@dataclass(frozen=True)
class MinhashDedup:
    """Keep the first of texts whose token n-grams overlap. A pair with Jaccard similarity s is found with probability
    1 - (1 - s**hashes_per_bucket)**buckets (Broder, 1997; Lee et al., 2022): 0.92 at s = 0.8, 0.56 at s = 0.7 here."""

    n: int = 5
    buckets: int = 14
    hashes_per_bucket: int = 8
    seed: int = 1

    def __post_init__(self) -> None:
        for name in ("n", "buckets", "hashes_per_bucket"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1")


@dataclass(frozen=True)
class SlurmOptions:
    """What datatrove's SlurmPipelineExecutor is given; memory in GB, ``workers`` at once."""

    partition: str = ""
    time: str = "24:00:00"
    qos: str = "normal"
    cpus_per_task: int = 1
    mem_per_cpu_gb: int = 4
    env_command: str | None = None
    sbatch_args: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class Settings:
    """A parsed YAML file; ``filters`` are (name, filter) in their order."""

    filters: tuple[tuple[str, Filter], ...] = ()
    text_key: str = "text"
    exact_dedup: ExactDedup | None = None
    minhash_dedup: MinhashDedup | None = None


def load_settings(path: Path) -> Settings:
    """Read and check a YAML file; ``ValueError`` in one line with the nearest name for an unknown one."""
    import yaml

    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    return parse_settings({} if tree is None else tree, str(path))


def parse_settings(tree: Any, where: str) -> Settings:
    """A YAML tree as :class:`Settings`; ``where`` starts every message."""
    if not isinstance(tree, dict):
        raise ValueError(f"{where}: expected keys with values, not {type(tree).__name__}")
    known = [field.name for field in dataclasses.fields(Settings)]
    for key in tree:
        if key not in known:
            raise ValueError(f"{where}: unknown key {key!r}{nearest(key, known)}")
    text_key = tree.get("text_key", "text")
    if not isinstance(text_key, str):
        raise ValueError(f"{where}: text_key must be text, not {type(text_key).__name__}")
    listed = tree.get("filters") or []
    if not isinstance(listed, list):
        raise ValueError(f"{where}: filters must be a list, because their order counts; write '- name: {{options}}'")
    return Settings(
        filters=tuple(parse_filter(item, f"{where}: filters[{number}]") for number, item in enumerate(listed)),
        text_key=text_key,
        exact_dedup=optional(ExactDedup, tree, "exact_dedup", where),
        minhash_dedup=optional(MinhashDedup, tree, "minhash_dedup", where),
    )


def describe(settings: Settings) -> dict[str, Any]:
    """The settings as JSON can hold them: limits that are not set are left out."""
    described: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(settings)), parse_constant=lambda _: None)
    for _, options in described["filters"]:
        for limit in ("min", "max"):
            if options.get(limit, 0) is None:
                del options[limit]
    return described


def parse_filter(item: Any, where: str) -> tuple[str, Filter]:
    """``name`` or ``{name: options}`` as (name, filter)."""
    name, options = item, None
    if isinstance(item, dict) and len(item) == 1:
        ((name, options),) = item.items()
    if not isinstance(name, str):
        raise ValueError(f"{where}: expected a filter name, alone or with its options as 'name: {{min: 1}}'")
    if name not in FILTERS:
        raise ValueError(f"{where}: unknown filter {name!r}{nearest(name, list(FILTERS))}")
    return name, build(FILTERS[name], options, f"{where}: {name}")


def optional(kind: type, tree: dict[str, Any], key: str, where: str) -> Any:
    """The section under a key; off when the key is not there or false."""
    return None if tree.get(key, False) is False else build(kind, tree[key], f"{where}: {key}")


def build(kind: type, options: Any, where: str) -> Any:
    """An instance of a dataclass from YAML options, names and types checked."""
    options = {} if options is None or options is True else options
    if not isinstance(options, dict):
        raise ValueError(f"{where}: expected options as 'name: value', not {options!r}")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    hints = typing.get_type_hints(kind)
    values = {}
    for name, value in options.items():
        if name not in fields:
            raise ValueError(f"{where}: unknown option {name!r}{nearest(name, list(fields))}")
        values[name] = convert(value, hints[name], f"{where}: {name}")
    for name, field in fields.items():
        if field.default is dataclasses.MISSING and name not in values:
            raise ValueError(f"{where}: {name} is missing")
    if "min" in fields and values.get("min", fields["min"].default) > values.get("max", fields["max"].default):
        raise ValueError(f"{where}: min {values['min']} is above max {values['max']}")
    if "n" in values and values["n"] < 1:
        raise ValueError(f"{where}: n must be at least 1")
    try:
        return kind(**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def convert(value: Any, hint: Any, where: str) -> Any:
    """A YAML value as the type of its field; ``ValueError`` when it is another."""
    if hint == tuple[str, ...]:
        items = [value] if isinstance(value, str) else value
        if isinstance(items, list) and items and all(isinstance(item, str) for item in items):
            return tuple(items)
        raise ValueError(f"{where} must be a list of texts, not {value!r}")
    number = isinstance(value, int | float) and not isinstance(value, bool)
    fits = number if hint is float else isinstance(value, hint) and (hint is bool or not isinstance(value, bool))
    if not fits:
        kind = {float: "a number", int: "a whole number", str: "text", bool: "true or false"}[hint]
        raise ValueError(f"{where} must be {kind}, not {value!r}")
    return value


def nearest(name: Any, known: list[str]) -> str:
    """The end of a message about an unknown name."""
    near = difflib.get_close_matches(str(name), known, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(known)}"
