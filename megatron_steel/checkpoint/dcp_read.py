"""Reading a ``torch_dist`` directory part by part, in one process, without running code that it holds.

Such a directory (PyTorch's distributed checkpoints, which megatron-core writes) has a pickled index, ``.metadata``,
and files of chunks that ``torch.save`` wrote one behind the other. The index of somebody else's checkpoint is read by
an unpickler that knows its few classes only.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.utils import _create_file_view

INDEX_FILE = ".metadata"
# Modules and names an index is made of; values of torch like torch.float32 are named one by one.
INDEX_CLASSES = {
    "torch.distributed.checkpoint.metadata": (
        "Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata",
        "TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.planner": ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData"),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo", "_StoragePrefix"),
    "torch.serialization": ("_get_layout",),
    "collections": ("OrderedDict",),
    "pathlib": ("Path", "PosixPath", "PurePosixPath"),
}  # fmt: skip


class IndexUnpickler(pickle.Unpickler):
    """Builds the classes of an index and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        """The class; ``UnpicklingError`` for one that has no place in an index."""
        is_value = module == "torch" and (name == "Size" or isinstance(getattr(torch, name, None), torch.dtype))
        if is_value or name in INDEX_CLASSES.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs")


class StoredTensors:
    """The tensors of a ``torch_dist`` directory by key."""

    def __init__(self, directory: Path) -> None:
        """Raises ``ValueError`` for a directory without a readable index."""
        self.directory = directory
        path = directory / INDEX_FILE
        try:
            with path.open("rb") as stream:
                index = IndexUnpickler(stream).load()
        # A damaged pickle may raise nearly anything.
        except (OSError, EOFError, pickle.PickleError, AttributeError, ValueError, TypeError, IndexError) as error:
            raise ValueError(f"{path}: not a readable index of a torch_dist checkpoint ({error})") from error
        if not isinstance(index, Metadata) or not isinstance(index.storage_data, dict):
            raise ValueError(f"{path}: not the index of a torch_dist checkpoint")
        self.tensors: dict[str, TensorStorageMetadata] = {
            key: facts for key, facts in index.state_dict_metadata.items() if isinstance(facts, TensorStorageMetadata)
        }
        self.places = index.storage_data
        self._by_offsets: dict[str, dict[tuple[int, ...], ChunkStorageMetadata]] = {}

    def facts(self, key: str) -> TensorStorageMetadata:
        """Shape, precision and chunks of a tensor; ``ValueError`` names it when it is not there."""
        if key not in self.tensors:
            raise ValueError(f"{self.directory}: holds no tensor {key}")
        return self.tensors[key]

    def read_chunk(self, key: str, chunk: ChunkStorageMetadata) -> Tensor:
        """One stored chunk of a tensor."""
        place = self.places[MetadataIndex(key, chunk.offsets)]
        path = self.directory / place.relative_path
        try:
            with path.open("rb") as stream:
                tensor = torch.load(
                    _create_file_view(stream, place.offset, place.length), map_location="cpu", weights_only=True
                )
        except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
            raise ValueError(f"{path}: {key} cannot be read ({error})") from error
        if not isinstance(tensor, Tensor) or tensor.shape != chunk.sizes:
            raise ValueError(f"{path}: {key} is not what the index says")
        return tensor

    def _chunks(self, key: str) -> dict[tuple[int, ...], ChunkStorageMetadata]:
        """Chunks of a tensor by where they begin."""
        if key not in self._by_offsets:
            self._by_offsets[key] = {tuple(chunk.offsets): chunk for chunk in self.tensors[key].chunks}
        return self._by_offsets[key]

    def dtype(self, key: str) -> torch.dtype:
        """Stored precision of a tensor."""
        return self.facts(key).properties.dtype

    def read(self, key: str, index: Sequence[int] = ()) -> Tensor:
        """A tensor, or its part at ``index`` along the first axes; only the chunks that hold it are read."""
        facts, depth = self.facts(key), len(index)
        first = (*index, *[0] * (len(facts.size) - depth))
        if (only := self._chunks(key).get(first)) and only.sizes == (*[1] * depth, *facts.size[depth:]):
            return self.read_chunk(key, only).view(facts.size[depth:])
        whole = torch.empty(facts.size[depth:], dtype=facts.properties.dtype)
        filled = 0
        for chunk in facts.chunks:
            inside = [at - start for at, start in zip(index, chunk.offsets, strict=False)]
            if not all(0 <= at < length for at, length in zip(inside, chunk.sizes, strict=False)):
                continue
            part = self.read_chunk(key, chunk)[tuple(inside)]
            starts = chunk.offsets[depth:]
            box = tuple(slice(start, start + length) for start, length in zip(starts, part.shape, strict=True))
            whole[box] = part
            filled += part.numel()
        if filled != whole.numel():
            raise ValueError(f"{self.directory}: {key} has gaps or is stored twice")
        return whole
