"""Our safetensors files are the library's, and its files are ours."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from megatron_steel.checkpoint.safetensors_file import TYPES, NewFile, Planned, TensorFile

SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)
TENSORS = st.dictionaries(
    st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__"),
    st.tuples(SHAPES, st.sampled_from(list(TYPES.values()))),
    max_size=5,
)


def numbers(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Every element another bit pattern, as far as the type has so many."""
    return (torch.arange(torch.Size(shape).numel()) % 120).to(dtype).reshape(shape)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(TENSORS, st.randoms(use_true_random=False))
def test_the_library_reads_what_we_write_in_any_order(tmp_path: Path, kinds: dict, random: object) -> None:  # type: ignore[type-arg]
    tensors = {name: numbers(*kind) for name, kind in kinds.items()}
    path = tmp_path / "x.safetensors"
    with closing(NewFile(path, [Planned(name, t.dtype, tuple(t.shape)) for name, t in tensors.items()])) as file:
        order = list(tensors)
        random.shuffle(order)  # type: ignore[attr-defined]
        with ThreadPoolExecutor(3) as pool:
            list(pool.map(lambda name: file.write(name, tensors[name]), order))
    for found in (load_file(path), {name: TensorFile(path).read(name) for name in tensors}):
        assert set(found) == set(tensors)
        for name, tensor in tensors.items():
            assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)


def test_what_the_library_writes_is_read_into_memory_of_its_own(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(7, 3), "b": torch.randn(4).bfloat16(), "c": torch.tensor(3)}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    file = TensorFile(tmp_path / "x.safetensors")
    for name, tensor in tensors.items():
        read = file.read(name)
        assert torch.equal(read, tensor) and read.untyped_storage().nbytes() == tensor.nbytes
        assert (file.places[name].dtype, file.places[name].shape) == (tensor.dtype, tuple(tensor.shape))


@pytest.mark.parametrize("keep", [3, 20, -1])
def test_a_file_cut_short_is_named(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(100)}, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="x.safetensors: not a readable safetensors file"):
        TensorFile(path)


def test_another_shape_or_type_than_announced_is_our_mistake(tmp_path: Path) -> None:
    with closing(NewFile(tmp_path / "x", [Planned("a", torch.float32, (2,))])) as file:
        for wrong in (torch.zeros(3), torch.zeros(2).double()):
            with pytest.raises(AssertionError):
                file.write("a", wrong)
