"""What a preprocessing run is asked to do: its options, their checks, and which of them decide its bytes."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_steel.data.records import FORMATS
from megatron_steel.text.sentences import CHINESE, PUNKT_FILES
from megatron_steel.text.tokenizer import Tokenizer, digest

LAYOUT = 1  # of the work folder; another one is never gone on from


@dataclass
class PreprocessOptions:
    """What to encode, with which tokenizer, and where to. Names are Megatron-LM's flags where it has them.

    ``max_rejected`` is a number of lines or a share of them such as "0.1%"; ``task_bytes`` None follows from the input.
    """

    input: list[str]
    output_prefix: str
    tokenizer_type: str
    tokenizer_model: str | None = None
    vocab_size: int | None = None
    json_keys: list[str] = field(default_factory=lambda: ["text"])
    input_format: str | None = None
    append_eod: bool = False
    include_special_tokens: bool = True
    fast_tokenizer: bool = True
    split_sentences: bool = False
    keep_newlines: bool = False
    lang: str = "english"
    punkt_model: str | None = None
    max_rejected: str = "0"
    workers: int = 1
    log_interval: int = 1000
    task_bytes: int | None = None


def check_options(options: PreprocessOptions) -> None:
    """Refuse values no run can use."""
    for name in ("workers", "log_interval", "task_bytes"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value}: must be at least 1")
    if len(set(options.json_keys)) != len(options.json_keys):
        raise ValueError(f"--json-keys {' '.join(options.json_keys)}: a key is named twice")
    for name in options.json_keys:
        if not name or "/" in name:
            raise ValueError(f"--json-keys {name!r}: a key becomes part of a file name and cannot be empty or hold '/'")
    if Path(options.output_prefix).is_dir() or options.output_prefix.endswith("/"):
        raise ValueError(f"--output-prefix {options.output_prefix}: is a directory; give a prefix for file names in it")
    if options.input_format is not None and options.input_format not in FORMATS:
        raise ValueError(f"--input-format {options.input_format}: must be one of {', '.join(FORMATS)}")
    if options.input_format is not None and options.json_keys != ["text"]:
        raise ValueError("--json-keys: a source format (--input-format) has the key 'text' only")
    if options.keep_newlines and not options.split_sentences:
        raise ValueError("--keep-newlines: is about --split-sentences; give both or none")
    if options.punkt_model and (not options.split_sentences or options.lang.lower() in CHINESE):
        raise ValueError("--punkt-model: is for --split-sentences with a --lang other than Chinese")
    rejection_limit(options.max_rejected)


def rejection_limit(value: str) -> tuple[int | None, float | None]:
    """(number of lines, None) or (None, share of the lines) of ``--max-rejected``."""
    number, percent = value.removesuffix("%"), value.endswith("%")
    if percent and number.replace(".", "", 1).isdecimal() and float(number) <= 100:
        return None, float(number) / 100
    if not percent and number.isdecimal():
        return int(number), None
    raise ValueError(f"--max-rejected {value}: must be a number of lines (0 or more) or a share such as 0.1%")


def converter(input_format: str | None) -> Callable[[dict[str, Any]], dict[str, Any] | None] | None:
    """From a row of a source format to ``{"text": ...}``, or None for one its rule leaves out."""
    if input_format is None:
        return None
    convert = FORMATS[input_format]

    def text_row(row: dict[str, Any]) -> dict[str, Any] | None:
        record = convert(row)
        return None if record is None else {"text": record.text}

    return text_row


def settings_fingerprint(options: PreprocessOptions, tokenizer: Tokenizer, paths: Sequence[Path]) -> str:
    """sha256 hex of everything that decides the bytes of a run: options, tokenizer, and which input files."""
    inputs = []
    for path in paths:
        state = path.stat()
        inputs.append([str(path.resolve()), state.st_size, state.st_mtime_ns])
    sentences: list[Any] = [options.split_sentences]
    if options.split_sentences:
        sentences += [options.keep_newlines, options.lang.lower()]
    decisive = [
        LAYOUT, tokenizer.quick_key(), options.json_keys, options.input_format, options.append_eod,
        options.include_special_tokens, sentences, inputs,
    ]  # fmt: skip
    model: list[bytes] = []
    if options.punkt_model:
        files = [Path(options.punkt_model) / name for name in PUNKT_FILES]
        model = [path.read_bytes() for path in files if path.is_file()]
    return digest(json.dumps(decisive).encode(), *model)
