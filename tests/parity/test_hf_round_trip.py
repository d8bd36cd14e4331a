"""Hugging Face -> ours -> Hugging Face: the same names, precision and bits, in one file or in many."""

from __future__ import annotations

import json
from pathlib import Path

import hf_models
import pytest
import torch
from hf_models import NAMES, make_model
from pool import WorkerPool
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_steel.checkpoint.dcp_read import StoredTensors
from megatron_steel.checkpoint.hf import check_tensors, read_hf_config
from megatron_steel.checkpoint.hf_folder import HFWeights
from megatron_steel.runtime import world as runtime

SHARD_BYTES = 40_000
IN_FP32 = "e_score_correction_bias"
"""What a published model in bf16 has in fp32 (DeepSeek-V3)."""
RESAVED = "qwen2-tied"


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder; the index, when there is one, must name exactly what the shards hold."""
    found: dict[str, Tensor] = {}
    places = {}
    for path in sorted(folder.glob("*.safetensors")):
        shard = load_file(path)
        assert not set(shard) & set(found)
        found |= shard
        places |= dict.fromkeys(shard, path.name)
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        values = json.loads(index.read_text())
        assert values["weight_map"] == places
        assert values["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "sharded"])
def test_round_trip_is_exact(pool: WorkerPool, tmp_path: Path, dtype: torch.dtype, sharded: bool) -> None:
    imports, exports = {}, {}
    for name in NAMES:
        model = make_model(name).to(dtype)
        for path, buffer in model.named_buffers():
            if path.endswith(IN_FP32):
                buffer.data = buffer.data.float()
        model.save_pretrained(tmp_path / name, max_shard_size=SHARD_BYTES if sharded else "1GB")
        imports[name] = (str(tmp_path / name), str(tmp_path / f"{name}-ours"))
    checkpoints = pool.run(1, hf_models.work_import, imports, join=False)[0]
    exports = {name: (checkpoints[name], str(tmp_path / f"{name}-back")) for name in NAMES}
    pool.run(1, hf_models.work_export, exports, SHARD_BYTES if sharded else 10**9, join=False)
    for name in NAMES:
        before, after = tensors_of(tmp_path / name), tensors_of(tmp_path / f"{name}-back")
        assert list(sorted(before)) == list(sorted(after))
        for tensor in before:
            kind = torch.float32 if tensor.endswith(IN_FP32) else dtype
            assert before[tensor].dtype == after[tensor].dtype == kind
            assert torch.equal(before[tensor], after[tensor]), tensor
        files = list((tmp_path / f"{name}-back").glob("*.safetensors"))
        assert len(files) > 3 if sharded else [file.name for file in files] == ["model.safetensors"]
        if sharded:
            largest = max(tensor.nbytes for tensor in after.values())
            assert all(file.stat().st_size < max(SHARD_BYTES, largest) + 10_000 for file in files)
        config = json.loads((tmp_path / f"{name}-back" / "config.json").read_text())
        assert config["dtype"] == str(dtype).removeprefix("torch.")
        assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)
        assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def work_resave(checkpoint: str, root: str, first: int | None) -> int:
    """Load a checkpoint on 2 x 2 ranks, ``first`` layers on the first stage, save it; returns this rank's layers."""
    from megatron_steel.checkpoint.state import read_state
    from megatron_steel.checkpoint.store import load_weights, save
    from megatron_steel.config.load import from_flat
    from megatron_steel.model.build import build_model

    world = runtime.start(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    state = read_state(Path(checkpoint))
    state.config |= {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
    state.config |= {"decoder_first_pipeline_num_layers": first}
    model = build_model(from_flat(state.config), state.vocab_size, world, training=False)
    load_weights(Path(checkpoint), model)
    save(Path(root), model, None, state, world, lambda directory: None)
    return len(model.language_models()[0].decoder.layers)


@pytest.mark.parametrize("first", [None, 3], ids=["even", "uneven"])
def test_a_checkpoint_of_four_ranks_exports_the_same(pool: WorkerPool, tmp_path: Path, first: int | None) -> None:
    """Chunks of two tensor-parallel ranks and two stages come together to the bits of one process."""
    make_model(RESAVED).save_pretrained(tmp_path / "hf")
    where = {RESAVED: (str(tmp_path / "hf"), str(tmp_path / "ours"))}
    checkpoint = pool.run(1, hf_models.work_import, where, join=False)[0][RESAVED]
    layers = pool.run(4, work_resave, checkpoint, str(tmp_path / "four"), first, join=False)
    assert layers == ([2, 2, 2, 2] if first is None else [3, 3, 1, 1])
    four = tmp_path / "four" / "iter_0000000"
    gate_up = StoredTensors(four).facts("decoder.layers.mlp.linear_fc1.weight")
    assert len(gate_up.chunks) == 4 * gate_up.size[0]  # each rank has its part of both halves
    pool.run(1, hf_models.work_export, {RESAVED: (str(four), str(tmp_path / "back"))}, SHARD_BYTES, join=False)
    before, after = tensors_of(tmp_path / "hf"), tensors_of(tmp_path / "back")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor.view(torch.uint8), after[name].view(torch.uint8)), name


def test_gpt2_as_it_is_on_the_hub(tmp_path: Path) -> None:
    """Names without the prefix transformers writes today, and masks among the weights."""
    make_model("gpt2").save_pretrained(tmp_path)
    today = load_file(tmp_path / "model.safetensors")
    old = {name.removeprefix("transformer."): tensor for name, tensor in today.items()}
    old |= {f"h.{layer}.attn.bias": torch.ones(1, 1, 8, 8).tril() for layer in range(4)}
    save_file(old, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = read_hf_config(tmp_path)
    source = HFWeights(tmp_path, "transformer.")
    check_tensors(source, config.size)
    for name, tensor in today.items():
        assert torch.equal(source.get(name), tensor)
