"""A Hugging Face model folder on disk: its tensors by name, safetensors shards, and replacing it as a whole."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_steel.checkpoint import files

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
# What a folder that may be replaced consists of; anything else in it is somebody's work.
OWN_SUFFIXES = (".json", ".safetensors", ".jinja", ".model", ".tiktoken", ".txt", ".md")


class HFWeights:
    """The tensors of a Hugging Face folder by name, read when asked for."""

    def __init__(self, folder: Path, prefix: str = "") -> None:
        """``prefix`` is put before the names of a file none of whose names begin with it (GPT-2's on the hub).

        Raises ``ValueError`` when the folder holds no readable safetensors or its index names a missing shard.
        """
        self.folder = folder
        self.places: dict[str, str] = {}
        self.open_shards = {}
        for shard in self._shards():
            path = folder / shard
            if not path.is_file():
                raise ValueError(f"{path}: missing; only safetensors weights are read")
            try:
                self.open_shards[shard] = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{path}: not a readable safetensors file ({error})") from error
            for name in self.open_shards[shard].keys():  # noqa: SIM118 - a safetensors file is no mapping
                self.places[name] = shard
        self.missing = "" if any(name.startswith(prefix) for name in self.places) else prefix
        self.places = {self.missing + name: shard for name, shard in self.places.items()}

    def _shards(self) -> list[str]:
        index = self.folder / INDEX
        if not index.is_file():
            return [WEIGHTS]
        try:
            return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index}: not a safetensors index ({error})") from error

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor, without reading it; ``ValueError`` names it when it is not there."""
        return tuple(self._shard(name).get_slice(name.removeprefix(self.missing)).get_shape())

    def get(self, name: str) -> Tensor:
        """One tensor; ``ValueError`` names it when it is not there."""
        return self._shard(name).get_tensor(name.removeprefix(self.missing))

    def _shard(self, name: str) -> Any:
        if name not in self.places:
            raise ValueError(f"{self.folder}: holds no tensor {name}")
        return self.open_shards[self.places[name]]

    def unused(self, used: set[str], ignore: Sequence[str]) -> list[str]:
        """Names nobody asked for, but for those that match a pattern of ``ignore``."""
        rest = (name for name in self.places if name not in used)
        return sorted(name for name in rest if not any(re.fullmatch(pattern, name) for pattern in ignore))


def write_shards(folder: Path, tensors: Iterator[tuple[str, Tensor]], shard_bytes: int) -> int:
    """Write safetensors files of at most ``shard_bytes`` and, for more than one, their index; returns the elements.

    At most one shard is held in memory: files are named when their number is known. A tensor larger than
    ``shard_bytes`` gets a file of its own.
    """
    shards: list[list[str]] = []
    elements = total = filled = 0
    pending: dict[str, Tensor] = {}

    def flush() -> None:
        save_file(pending, folder / f"{len(shards)}.part", metadata={"format": "pt"})
        shards.append(list(pending))
        pending.clear()

    for name, tensor in tensors:
        if pending and filled + tensor.nbytes > shard_bytes:
            flush()
            filled = 0
        pending[name] = tensor
        filled += tensor.nbytes
        total += tensor.nbytes
        elements += tensor.numel()
    flush()
    count = len(shards)
    names = [WEIGHTS] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    for number, file in enumerate(names):
        (folder / f"{number}.part").rename(folder / file)
    if count > 1:
        places = {tensor: file for file, shard in zip(names, shards, strict=True) for tensor in shard}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        files.write_json(folder / INDEX, index)
    return elements


def check_target(folder: Path) -> None:
    """``ValueError`` when a folder is not new, empty, or a Hugging Face folder and nothing else."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"--hf {folder}: exists and is not a folder; give a new name")
    entries = sorted(folder.iterdir())
    if entries and not (folder / "config.json").is_file():
        raise ValueError(f"--hf {folder}: exists and is not a Hugging Face folder; give a new name")
    for path in entries:
        if not path.is_file() or path.suffix not in OWN_SUFFIXES:
            raise ValueError(f"--hf {folder}: holds {path.name}, which an export does not write; give a new name")


@contextmanager
def replaced_when_complete(folder: Path) -> Iterator[Path]:
    """A temporary folder that takes the place of ``folder`` when the block ends, and is removed when it fails."""
    temporary, old = (folder.with_name(f".{folder.name}.{state}") for state in ("exporting", "replaced"))
    shutil.rmtree(temporary, ignore_errors=True)
    made = [parent for parent in folder.absolute().parents if not parent.exists()]
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for path in [*temporary.iterdir(), temporary]:
            files.sync(path)
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
        temporary.rename(folder)
        files.sync(folder.absolute().parent)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        if old.exists() and not folder.exists():
            old.rename(folder)
        remove_empty(made)
        raise


def remove_empty(folders: list[Path]) -> None:
    """Remove folders, innermost first, up to the first that is missing or holds something."""
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            return
