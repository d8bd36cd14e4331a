"""From the command line and YAML to a :class:`Config`.

Order of precedence: defaults, then the preset (``--model``), then YAML (``--config``), then the command line.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import difflib
import io
import math
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from megatron_steel.config import hf_sizes
from megatron_steel.config.megatron_flags import KNOWN_FLAGS
from megatron_steel.config.presets import PRESETS
from megatron_steel.config.schema import Config


def groups(config: Config) -> Iterator[Any]:
    """The nested dataclasses of a configuration, in order."""
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            yield value


def flag_names() -> list[str]:
    """Every option name, in declaration order, with ``_``."""
    names = ["config", "model"]
    for group in groups(Config()):
        names += [item.name for item in dataclasses.fields(group)]
    return names


def to_flat(config: Config) -> dict[str, Any]:
    """The configuration as one flat dictionary with the flags' names."""
    flat: dict[str, Any] = {"config": config.config, "model": config.model}
    for group in groups(config):
        flat.update(dataclasses.asdict(group))
    return flat


def from_flat(values: dict[str, Any], origin: str = "checkpoint") -> Config:
    """A configuration from flat keys; unknown keys raise ``ValueError`` naming the nearest known one."""
    config = Config()
    apply(config, values, origin)
    return config


def apply(config: Config, values: dict[str, Any], origin: str) -> None:
    """Set flat keys on a configuration in place, checking names and kinds of values."""
    owners: dict[str, Any] = {item.name: group for group in groups(config) for item in dataclasses.fields(group)}
    owners |= {"config": config, "model": config}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in owners:
            raise ValueError(unknown_option(name, origin))
        setattr(owners[name], name, coerce(owners[name], name, value, origin))


def coerce(group: Any, name: str, value: Any, origin: str) -> Any:
    """Turn a YAML value into the field's kind, or raise ``ValueError`` naming the key."""
    kind = get_type_hints(type(group))[name]
    # A literal or None is typing's own kind of union.
    if get_origin(kind) in (Union, UnionType):
        if value is None:
            return None
        kind = get_args(kind)[0]
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise ValueError(f"{origin}: {name} must be one of {', '.join(get_args(kind))}, not {value!r}")
        return value
    if kind is bool:
        if not isinstance(value, bool):
            raise ValueError(f"{origin}: {name} must be true or false, not {value!r}")
        return value
    if kind in (int, float):
        return number(kind, value, f"{origin}: {name}")
    if get_origin(kind) is list:
        items = str(value).split() if is_scalar(value) else value
        if not isinstance(items, list) or not all(is_scalar(item) for item in items):
            raise ValueError(f"{origin}: {name} must be a list of words, not {value!r}")
        if get_args(kind)[0] in (int, float):
            return [number(get_args(kind)[0], item, f"{origin}: {name}") for item in items]
        return [str(item) for item in items]
    if not is_scalar(value):
        raise ValueError(f"{origin}: {name} must be text, not {value!r}")
    return str(value)


def is_scalar(value: Any) -> bool:
    """Whether a YAML value can be read as one word: text, a number or a date."""
    return isinstance(value, str | int | float | datetime.date) and not isinstance(value, bool)


def number(kind: type[int] | type[float], value: Any, where: str) -> int | float:
    """A whole or finite number; also from text, because YAML reads ``3e-4`` as text."""
    if kind is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    try:
        read = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        read = math.nan
    if not math.isfinite(read) or (kind is int and read != int(read)):
        raise ValueError(f"{where} must be a {'whole' if kind is int else 'finite'} number, not {value!r}")
    return kind(read)


def unknown_option(name: str, origin: str) -> str:
    """The one-line error for a name nobody declared."""
    flag = name.replace("_", "-")
    if flag in KNOWN_FLAGS:
        return f"{origin}: --{flag} is a Megatron-LM flag this engine does not take: {KNOWN_FLAGS[flag]}"
    near = difflib.get_close_matches(name, flag_names(), n=1, cutoff=0.6)
    hint = f"; did you mean --{near[0].replace('_', '-')}?" if near else "; --help lists all"
    return f"{origin}: unknown option --{flag}{hint}"


def read_yaml(path: str) -> dict[str, Any]:
    """A flat YAML mapping with ``_`` in its keys.

    ``ValueError`` names the file when it is missing, not a mapping, gives a key twice or names another file.
    """
    import yaml

    try:
        text = Path(path).read_text(encoding="utf-8")
        values = yaml.safe_load(text)
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except OSError as error:
        raise ValueError(f"--config {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"--config {path}: not UTF-8 text: {error}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"--config {path}: not valid YAML: {' '.join(str(error).split())}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"--config {path}: must be a mapping of option: value")
    assert root is not None
    names = [str(key.value).replace("-", "_") for key, _ in root.value]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"--config {path}: {name} is given twice; remove one")
    values = {str(key).replace("-", "_"): value for key, value in values.items()}
    if values.get("config") is not None:
        raise ValueError(f"--config {path}: a configuration file cannot name another; remove config")
    return values


def preset(model: str) -> dict[str, Any]:
    """Flags of a named preset or of a Hugging Face folder's config.json."""
    if model in PRESETS:
        return PRESETS[model]
    folder = Path(model)
    if (folder / "config.json").is_file():
        return hf_sizes.read_sizes(folder / "config.json")
    near = difflib.get_close_matches(model, PRESETS, n=1)
    hint = f"did you mean {near[0]}?" if near else f"presets: {', '.join(PRESETS)}"
    raise ValueError(f"--model {model}: no such preset and no folder with a config.json; {hint}")


def early_value(argv: Sequence[str], name: str) -> str | None:
    """The last value of ``--name VALUE`` or ``--name=VALUE``, read before the full parse."""
    found = None
    for position, item in enumerate(argv):
        if item == f"--{name}" and position + 1 < len(argv):
            found = argv[position + 1]
        elif item.startswith(f"--{name}="):
            found = item.split("=", 1)[1]
    return found


def check_names(argv: Sequence[str]) -> None:
    """Refuse unknown flags before the parser does, so that the message is one line with a way out."""
    known = set(flag_names()) | {"help"}
    for item in argv:
        if not item.startswith("--"):
            continue
        name = item[2:].split("=", 1)[0].replace("-", "_")
        if name not in known and name.removeprefix("no_") not in known:
            raise ValueError(unknown_option(name, "command line"))


def parse(argv: Sequence[str], program: str = "megatron_steel") -> Config:
    """Parse a command line into a configuration.

    Raises ``ValueError`` with one line for every user error; ``--help`` prints and exits with 0.
    """
    argv = list(argv)
    check_names(argv)
    path, model = early_value(argv, "config"), early_value(argv, "model")
    values = read_yaml(path) if path else {}
    model = model or values.get("model")
    config = Config()
    if model:
        apply(config, preset(str(model)), f"--model {model}")
        config.model = str(model)
    apply(config, values, f"--config {path}")
    return run_parser(config, argv, program)


def run_parser(default: Config, argv: list[str], program: str) -> Config:
    """Run tyro over ``argv``; its boxed error becomes one ``ValueError`` line."""
    import tyro

    style = (tyro.conf.OmitArgPrefixes,)
    if "--help" in argv or "-h" in argv:
        return tyro.cli(Config, default=default, args=argv, prog=program, config=style, description="")
    captured = io.StringIO()
    try:
        with contextlib.redirect_stderr(captured), contextlib.redirect_stdout(captured):
            return tyro.cli(Config, default=default, args=argv, prog=program, config=style, description="")
    except SystemExit as stop:
        text = re.sub(r"[\u2500-\u257f]|\x1b\[[0-9;]*m", " ", captured.getvalue())
        lines = [" ".join(line.split()) for line in text.splitlines()]
        lines = [line for line in lines if line.strip("- ") and "For full helptext" not in line]
        message = " ".join(line.strip("- ") for line in lines)
        raise ValueError("command line: " + message.split("Argument helptext")[0].strip()) from stop


def expand_model(config: Config) -> list[str]:
    """The flags a preset stood for, for printing."""
    if not config.model:
        return []
    return [f"--{key.replace('_', '-')} {value}" for key, value in preset(config.model).items()]


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Turn a ``ValueError`` into one line on stderr and exit code 2; for the work before a model is built.

    Ranks other than 0 wait a moment before they exit: the launcher stops all ranks at the first exit, and rank 0's
    line must be out by then.
    """
    try:
        yield
    except ValueError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        else:
            time.sleep(3)
        raise SystemExit(2) from None
