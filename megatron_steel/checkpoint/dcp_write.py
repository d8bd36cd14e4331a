"""Writing a ``torch_dist`` directory chunk by chunk, in one process: weights larger than memory, on several threads.

megatron-core's own save has all tensors in memory before the first byte is written. The format is PyTorch's
distributed checkpoint: chunks that ``torch.save`` wrote one behind the other, and an index of them, ``.metadata``.
"""

from __future__ import annotations

import hashlib
import pickle
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_steel.checkpoint import files
from megatron_steel.checkpoint.dcp_read import INDEX_FILE

# What megatron-core reads before anything else: how tensors and everything else are stored.
FORMAT = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
FORMAT |= {"common_backend": "torch", "common_backend_version": 1}
SIGNAL_SECONDS = 0.5
FILE_BYTES = 256_000_000


@dataclass(frozen=True)
class Chunk:
    """A part of a stored tensor: its place, and how to get it when its turn has come."""

    key: str
    size: tuple[int, ...]
    """Shape of the whole tensor."""
    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of the chunk."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class HashedStream:
    """What ``torch.save`` writes to: a file, and the sha256 of all that goes into it."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream, self.digest, self.bytes = stream, hashlib.sha256(), 0
        self.failure: OSError | None = None

    def write(self, data: Any) -> int:
        """Write bytes. ``torch.save`` hides an error of the disk behind one of its own, so it is kept."""
        self.digest.update(data)
        try:
            written = self.stream.write(data)
        except OSError as error:
            self.failure = error
            raise
        self.bytes += written
        return written

    def flush(self) -> None:
        """Hand over to the system."""
        self.stream.flush()


def write_chunks(
    directory: Path, chunks: Sequence[Chunk], threads: int, advance: Callable[[int], object]
) -> dict[str, dict[str, Any]]:
    """Write all chunks and their index; returns size and hash of the files with tensors, synced.

    Each of ``threads`` has one chunk in memory at a time. There may be more files, so that some are brought to the disk
    while others are filled. ``advance`` is told the bytes of each chunk that is done, from several threads. When one
    thread fails or this one is interrupted, all stop at the chunk they are at.
    """
    total = sum(chunk.nbytes for chunk in chunks)
    shares = balanced(chunks, max(threads, total // FILE_BYTES))
    names = [f"__0_{number}.distcp" for number in range(len(shares))]
    stop = threading.Event()

    def write(name: str, share: Sequence[Chunk]) -> tuple[dict[MetadataIndex, _StorageInfo], dict[str, Any]]:
        try:
            return write_file(directory, name, share, advance, stop)
        except BaseException:
            stop.set()
            raise

    try:
        # There is a sha256 of every file. Each thread has to be told; before PyTorch 2.13 it was one setting for all.
        with ThreadPoolExecutor(threads, initializer=torch.serialization.set_crc32_options, initargs=(False,)) as pool:
            try:
                pending = [pool.submit(write, *work) for work in zip(names, shares, strict=True)]
                # A signal that another thread was given is only seen when this one wakes up.
                while wait(pending, timeout=SIGNAL_SECONDS).not_done:
                    continue
                written = [done.result() for done in pending]
            finally:
                stop.set()
    finally:
        torch.serialization.set_crc32_options(True)
    places = {index: place for found, _ in written for index, place in found.items()}
    with (directory / INDEX_FILE).open("wb") as stream:
        pickle.dump(Metadata(state_dict_metadata=described(chunks), storage_data=places), stream)
    torch.save({}, directory / "common.pt")
    files.write_json(directory / "metadata.json", FORMAT)
    return dict(zip(names, (facts for _, facts in written), strict=True))


def write_file(
    directory: Path, name: str, chunks: Sequence[Chunk], advance: Callable[[int], object], stop: threading.Event
) -> tuple[dict[MetadataIndex, _StorageInfo], dict[str, Any]]:
    """Write one file; returns where its chunks lie, and its size and hash. Once told to stop it returns what it has."""
    places = {}
    with (directory / name).open("wb") as raw:
        stream = HashedStream(raw)
        for chunk in chunks:
            if stop.is_set():
                break
            tensor = chunk.load().view(chunk.shape)
            assert tensor.dtype == chunk.dtype, chunk.key
            if tensor.untyped_storage().nbytes() != tensor.nbytes:
                tensor = tensor.clone()  # a view would be written with all that it is a view of
            begin = stream.bytes
            try:
                torch.save(tensor, stream)  # type: ignore[arg-type]
            except RuntimeError:
                if stream.failure is not None:
                    raise stream.failure from None
                raise
            place = _StorageInfo(name, begin, stream.bytes - begin)
            places[MetadataIndex(chunk.key, torch.Size(chunk.offsets))] = place
            advance(tensor.nbytes)
    files.sync(directory / name)
    return places, {"bytes": stream.bytes, "sha256": stream.digest.hexdigest()}


def balanced(chunks: Sequence[Chunk], parts: int) -> list[list[Chunk]]:
    """Up to ``parts`` runs of neighbouring chunks with about the same number of bytes."""
    total = sum(chunk.nbytes for chunk in chunks)
    shares: list[list[Chunk]] = [[]]
    done = 0
    for chunk in chunks:
        if shares[-1] and done * parts >= total * len(shares):
            shares.append([])
        shares[-1].append(chunk)
        done += chunk.nbytes
    return shares


def described(chunks: Sequence[Chunk]) -> dict[str, TensorStorageMetadata]:
    """The index of tensors by key."""
    found: dict[str, TensorStorageMetadata] = {}
    for chunk in chunks:
        properties = TensorProperties(dtype=chunk.dtype)
        entry = found.setdefault(chunk.key, TensorStorageMetadata(properties, torch.Size(chunk.size), []))
        assert (entry.size, entry.properties.dtype) == (torch.Size(chunk.size), chunk.dtype), chunk.key
        entry.chunks.append(ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.shape)))
    return found
