"""Safetensors files read and written at known places, so that no more than one tensor has to be in memory.

Layout: length of the header (uint64, little-endian), the header (JSON: name to type, shape and offsets, padded with
spaces to a multiple of 8), the tensors back to back. Files are checked by the library when they are opened.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

LENGTH = struct.Struct("<Q")
ALIGNMENT = 8
TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in TYPES.items()}


@dataclass(frozen=True)
class Place:
    """A tensor of a file: what it is, and where its bytes begin."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int

    @property
    def nbytes(self) -> int:
        """Its bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def raw_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


class TensorFile:
    """An open file to read from. Raises ``ValueError`` naming one that the library does not take."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with safe_open(path, framework="pt"):
                pass
            with path.open("rb") as stream:
                (length,) = LENGTH.unpack(stream.read(LENGTH.size))
                header = json.loads(stream.read(length))
        except (SafetensorError, OSError, struct.error, ValueError) as error:
            raise ValueError(f"{path}: not a readable safetensors file ({error})") from error
        header.pop("__metadata__", None)
        start = LENGTH.size + length
        self.places: dict[str, Place] = {}
        for name, facts in header.items():
            if facts["dtype"] not in TYPES:
                raise ValueError(f"{path}: {name} is of type {facts['dtype']}, which no model here has")
            begin = start + facts["data_offsets"][0]
            self.places[name] = Place(TYPES[facts["dtype"]], tuple(facts["shape"]), begin)

    def read(self, name: str) -> Tensor:
        """One tensor. Its memory is the file's until it is written to, and goes with it; the file never changes."""
        place = self.places[name]
        if not place.nbytes:
            return torch.empty(place.shape, dtype=place.dtype)
        skipped = place.begin % mmap.ALLOCATIONGRANULARITY
        with self.path.open("rb") as stream:
            pages = mmap.mmap(
                stream.fileno(), skipped + place.nbytes, access=mmap.ACCESS_COPY, offset=place.begin - skipped
            )
        count = math.prod(place.shape)
        return torch.frombuffer(pages, dtype=place.dtype, count=count, offset=skipped).view(place.shape)


@dataclass(frozen=True)
class Planned:
    """A tensor to write."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Its bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class NewFile:
    """A file whose tensors are known beforehand and written in any order, from any thread."""

    def __init__(self, path: Path, tensors: Sequence[Planned]) -> None:
        """Writes the header and gives the file its length."""
        offsets, header = 0, dict[str, Any](__metadata__={"format": "pt"})
        begins = {}
        for tensor in tensors:
            begins[tensor.name] = offsets
            end = offsets + tensor.nbytes
            header[tensor.name] = {
                "dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offsets, end]
            }  # fmt: skip
            offsets = end
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        text += b" " * (-len(text) % ALIGNMENT)
        start = LENGTH.size + len(text)
        self.path = path
        self.places = {
            tensor.name: Place(tensor.dtype, tensor.shape, start + begins[tensor.name]) for tensor in tensors
        }
        self.stream = path.open("wb", buffering=0)
        self.stream.write(LENGTH.pack(len(text)) + text)
        self.stream.truncate(start + offsets)

    def write(self, name: str, tensor: Tensor) -> None:
        """One tensor, as it was announced."""
        place = self.places[name]
        assert (tensor.dtype, tuple(tensor.shape)) == (place.dtype, place.shape), name
        data, at = raw_bytes(tensor.contiguous()), place.begin
        while data:
            count = os.pwrite(self.stream.fileno(), data, at)
            data, at = data[count:], at + count

    def close(self) -> None:
        """May be called twice."""
        self.stream.close()
