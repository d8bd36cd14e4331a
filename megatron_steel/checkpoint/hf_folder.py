"""A Hugging Face model folder on disk: its tensors by name, safetensors shards, and replacing it as a whole."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import torch
from torch import Tensor

from megatron_steel.checkpoint import files
from megatron_steel.checkpoint.safetensors_file import NewFile, Planned, TensorFile

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
# What a folder that may be replaced consists of; anything else in it is somebody's work.
OWN_SUFFIXES = (".json", ".safetensors", ".py", ".jinja", ".model", ".tiktoken", ".txt", ".md")


class HFWeights:
    """The tensors of a Hugging Face folder by name, read when asked for, from any thread."""

    def __init__(self, folder: Path, prefix: str = "") -> None:
        """``prefix`` is put before the names of a file none of whose names begin with it (GPT-2's on the hub).

        Raises ``ValueError`` when the folder holds no readable safetensors or its index names a missing shard.
        """
        self.folder = folder
        self.places: dict[str, TensorFile] = {}
        for shard in self._shards():
            if not (folder / shard).is_file():
                raise ValueError(f"{folder / shard}: missing; only safetensors weights are read")
            file = TensorFile(folder / shard)
            self.places |= dict.fromkeys(file.places, file)
        self.missing = "" if any(name.startswith(prefix) for name in self.places) else prefix
        self.places = {self.missing + name: file for name, file in self.places.items()}

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
        return self._file(name).places[name.removeprefix(self.missing)].shape

    def dtype(self, name: str) -> torch.dtype:
        """Precision of one tensor, without reading it."""
        return self._file(name).places[name.removeprefix(self.missing)].dtype

    def get(self, name: str) -> Tensor:
        """One tensor; ``ValueError`` names it when it is not there."""
        return self._file(name).read(name.removeprefix(self.missing))

    def _file(self, name: str) -> TensorFile:
        if name not in self.places:
            raise ValueError(f"{self.folder}: holds no tensor {name}")
        return self.places[name]

    def unused(self, used: set[str], ignore: Sequence[str]) -> list[str]:
        """Names nobody asked for, but for those that match a pattern of ``ignore``."""
        rest = (name for name in self.places if name not in used)
        return sorted(name for name in rest if not any(re.fullmatch(pattern, name) for pattern in ignore))


@contextmanager
def new_shards(folder: Path, tensors: Sequence[Planned], shard_bytes: int) -> Iterator[dict[str, NewFile]]:
    """Safetensors files of at most ``shard_bytes`` to write the tensors to, by name, and an index for several files.

    A tensor larger than ``shard_bytes`` gets a file of its own.
    """
    shards: list[list[Planned]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.nbytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.nbytes
    count = len(shards)
    names = [WEIGHTS] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    with ExitStack() as stack:
        opened: dict[str, NewFile] = {}
        for name, shard in zip(names, shards, strict=True):
            file = stack.enter_context(closing(NewFile(folder / name, shard)))
            opened |= {tensor.name: file for tensor in shard}
        yield opened
    if count > 1:
        places = {tensor: file.path.name for tensor, file in sorted(opened.items())}
        total = sum(tensor.nbytes for tensor in tensors)
        files.write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": places})


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
