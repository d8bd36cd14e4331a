"""Reading torch_dist directories: against what PyTorch's own distributed checkpoint wrote, and hostile indexes."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata

from megatron_steel.checkpoint.dcp_read import StoredTensors

STATE = {
    "a": torch.arange(24, dtype=torch.float32).reshape(4, 3, 2),
    "b": torch.randn(5, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16),
    "scalar": torch.tensor(3.0),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    dcp.save({**STATE, "note": "bytes"}, checkpoint_id=str(tmp_path), no_dist=True)
    return tmp_path


def test_tensors_and_parts_are_what_pytorch_wrote(folder: Path) -> None:
    stored = StoredTensors(folder)
    assert set(stored.tensors) == set(STATE)
    for key, tensor in STATE.items():
        read = stored.read(key)
        assert read.dtype == tensor.dtype and torch.equal(read, tensor)
    assert torch.equal(stored.read("a", (2,)), STATE["a"][2]) and torch.equal(
        stored.read("a", (3, 1)), STATE["a"][3, 1]
    )
    with pytest.raises(ValueError, match="holds no tensor c"):
        stored.read("c")


def test_gaps_and_damage_are_named(folder: Path) -> None:
    stored = StoredTensors(folder)
    stored.tensors["a"].size = torch.Size((5, 3, 2))
    with pytest.raises(ValueError, match="a has gaps"):
        stored.read("a")
    place = next(folder.glob("*.distcp"))
    place.write_bytes(place.read_bytes()[:100])
    with pytest.raises(ValueError, match=place.name):
        StoredTensors(folder).read("b")
    (folder / ".metadata").write_bytes(b"no pickle")
    with pytest.raises(ValueError, match="not a readable index"):
        StoredTensors(folder)


class Evil:
    """Unpickled, it would make a directory."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.target),)


def test_an_index_runs_no_code(folder: Path) -> None:
    metadata = Metadata(state_dict_metadata={}, planner_data=Evil(folder / "made"), storage_data={})
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match=r"it names (posix|nt|os)\.mkdir"):
        StoredTensors(folder)
    assert not (folder / "made").exists()
    with open(folder / ".metadata", "rb") as stream:
        pickle.load(stream)
    assert (folder / "made").exists(), "the attack must work on a plain unpickler"
