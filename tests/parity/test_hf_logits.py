"""Hugging Face -> ours on every layout: logits, loss, greedy generation; and ours -> Hugging Face -> transformers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import hf_models
import numpy as np
import pytest
import torch
from hf_models import LAYOUTS, NAMES, Findings, make_model, text_ids
from pool import WorkerPool
from safetensors.torch import load_file

from megatron_steel.runtime import world as runtime

TOLERANCE = 1e-5
ROWS = 133
# Every model on one rank and on the layout that splits everything; those that split in ways of their own on all four.
EVERYWHERE = ("qwen2-tied", "gpt2", "gemma2", "steel-dense")
CASES = [(name, layout) for name in NAMES for layout in LAYOUTS if name in EVERYWHERE or layout in ("1", "tp2-pp2")]
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"untie_embeddings_and_output_weights": True, "use_rope_scaling": True, "rotary_base": 500000.0},
    "qwen2": {"add_qkv_bias": True},
    "qwen3": {"qk_layernorm": True},
    "mixtral": {"num_experts": 4},
    "qwen3_moe": {
        "qk_layernorm": True,
        "num_experts": 4,
        "moe_ffn_hidden_size": 24,
        "moe_layer_freq": [1, 0, 1],
        "moe_router_pre_softmax": True,
    },
    "deepseek_v3": {
        "num_query_groups": None,
        "kv_channels": None,
        "multi_latent_attention": True,
        "q_lora_rank": 28,
        "kv_lora_rank": 22,
        "qk_head_dim": 14,
        "qk_pos_emb_head_dim": 6,
        "v_head_dim": 10,
        "num_experts": 4,
        "moe_ffn_hidden_size": 24,
        "moe_shared_expert_intermediate_size": 24,
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
    },
    "mistral": {"untie_embeddings_and_output_weights": True},
}
# A program that has nothing but transformers: our packages cannot be imported in it.
ALONE = """
import sys
sys.modules["megatron_steel"] = sys.modules["megatron"] = sys.modules["tools"] = None
import numpy, torch
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.from_numpy(numpy.load(folder + ".ids.npy"))
    with torch.no_grad():
        output = model(ids, labels=ids)
    numpy.savez(folder + ".npz", logits=output.logits.numpy(), loss=output.loss.item())
"""


@pytest.fixture(scope="module")
def truth() -> dict[str, Findings]:
    return {name: hf_models.findings_of_transformers(make_model(name)) for name in NAMES}


@pytest.fixture(scope="module")
def ours(pool: WorkerPool, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Findings]]:
    """Findings of our engine by layout and model."""
    folder = tmp_path_factory.mktemp("models")
    for name in NAMES:
        make_model(name).save_pretrained(folder / name)
    roots = {name: (str(folder / name), str(folder / f"{name}-ours")) for name in NAMES}
    checkpoints = pool.run(1, hf_models.work_import, roots, join=False)[0]
    found = {}
    for layout, sizes in LAYOUTS.items():
        chosen = {name: checkpoints[name] for name, wanted in CASES if wanted == layout}
        found[layout] = pool.run(sizes[0] * sizes[1], hf_models.work_findings, chosen, sizes, join=False, timeout=120)[
            0
        ]
    return found


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_imported_model_computes_what_transformers_computes(
    truth: dict[str, Findings], ours: dict[str, dict[str, Findings]], name: str, layout: str
) -> None:
    found, wanted = ours[layout][name], truth[name]
    assert wanted.logits.std() > 0.3, "the test model must say something"
    np.testing.assert_allclose(found.logits, wanted.logits, rtol=0, atol=TOLERANCE)
    assert found.loss == pytest.approx(wanted.loss, rel=1e-6)
    assert found.generated == wanted.generated
    assert all(len(row) == hf_models.NEW_TOKENS for row in found.generated)


@pytest.mark.parametrize("name", NAMES)
def test_no_token_reaches_an_earlier_one(ours: dict[str, dict[str, Findings]], name: str) -> None:
    """Causality of every family: only its own logits change with the last token."""
    for layout in (layout for wanted, layout in CASES if wanted == name):
        # Experts sort tokens by themselves: products of other shapes round in another way.
        assert ours[layout][name].leak <= 1e-6 < 1e-2 < ours[layout][name].reach


def test_rope_scaling_and_head_norms_are_not_decoration(truth: dict[str, Findings]) -> None:
    """The parity above would see their absence: without them transformers' own logits differ by far more."""
    for name, change in (("llama-rope", "rope"), ("qwen3", "norm"), ("qwen2-tied", "bias")):
        model = make_model(name)
        if change == "rope":
            model = make_model("llama-tied")
            model.load_state_dict(make_model(name).state_dict())
        for path, parameter in model.named_parameters():
            if change == "norm" and "q_norm" in path:
                parameter.data.fill_(1.0)
            if change == "bias" and path.endswith("bias"):
                parameter.data.zero_()
        ids = text_ids(model.config.vocab_size)
        with torch.no_grad():
            changed = model(ids).logits.numpy()
        assert np.abs(changed - truth[name].logits).max() > 1000 * TOLERANCE


def work_train(family: str, root: str, tensor_size: int) -> tuple[str, np.ndarray, float]:
    """Initialise with our engine, train two steps on tensor-parallel ranks, save: (checkpoint, logits, loss)."""
    from megatron_steel.checkpoint import store
    from megatron_steel.checkpoint.state import TrainState
    from megatron_steel.config.load import from_flat, to_flat
    from megatron_steel.model.build import build_model
    from megatron_steel.optim.optimizer import build_optimizer, set_rates, update

    world = runtime.start(tensor_model_parallel_size=tensor_size)
    sizes = {
        "model_family": family,
        "num_layers": 3,
        "hidden_size": 48,
        "ffn_hidden_size": 88,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "kv_channels": 20,
        "init_method_std": 0.15,
        "max_position_embeddings": 64,
        "tensor_model_parallel_size": tensor_size,
        **FAMILIES[family],
    }
    config = from_flat(sizes)
    model = build_model(config, ROWS, world)
    optimizer = build_optimizer(config, model)
    ids_BS = text_ids(ROWS)
    for _ in range(2):
        model.chunks[0].zero_grad_buffer()
        optimizer.zero_grad()
        positions_BS = torch.arange(ids_BS.shape[1] - 1).expand(2, -1)
        losses_BS = model.chunks[0](ids_BS[:, :-1], positions_BS, None, labels=ids_BS[:, 1:])
        losses_BS.mean().backward()
        model.options.finalize_model_grads_func(model.chunks)
        set_rates(optimizer, 0.05, 0.1)
        assert update(optimizer, 0.0)[1]
    state = TrainState(iteration=2, consumed_tokens=156, config=to_flat(config), vocab_size=ROWS)
    checkpoint = store.save(Path(root), model, optimizer, state, world, lambda folder: None)
    logits = hf_models.pipeline_logits(model, ids_BS, world)
    assert logits is not None
    return str(checkpoint), logits.numpy(), hf_models.engine_loss(model, ids_BS, world)


@pytest.mark.parametrize("tensor_size", [1, 2])
def test_trained_model_loads_with_nothing_but_its_folder(pool: WorkerPool, tmp_path: Path, tensor_size: int) -> None:
    # Experts would need sequence parallelism to train on several tensor-parallel ranks.
    families = [name for name in FAMILIES if tensor_size == 1 or "num_experts" not in FAMILIES[name]]
    trained = {
        family: pool.run(tensor_size, work_train, family, str(tmp_path / f"{family}-ours"), tensor_size, join=False)[0]
        for family in families
    }
    exports = {family: (trained[family][0], str(tmp_path / family)) for family in families}
    pool.run(1, hf_models.work_export, exports, 10**9, join=False)
    folders = [str(tmp_path / family) for family in families]
    for folder in folders:
        np.save(f"{folder}.ids.npy", text_ids(ROWS).numpy())
    subprocess.run([sys.executable, "-c", ALONE, *folders], check=True, cwd=tmp_path, timeout=120)
    for family, folder in zip(families, folders, strict=True):
        theirs, (_, logits, loss) = np.load(f"{folder}.npz"), trained[family]
        np.testing.assert_allclose(theirs["logits"], logits, rtol=0, atol=TOLERANCE)
        assert loss == pytest.approx(float(theirs["loss"]), rel=1e-6)
        tensors = load_file(Path(folder) / "model.safetensors")
        assert tensors["model.embed_tokens.weight"].shape == (ROWS, 48), "padding rows must be trimmed"
        assert json.loads((Path(folder) / "config.json").read_text())["vocab_size"] == ROWS
        assert ("lm_head.weight" in tensors) == ("untie_embeddings_and_output_weights" in FAMILIES[family])
        norms = tensors["model.layers.0.input_layernorm.weight"]
        assert not torch.equal(norms, torch.ones_like(norms)), "training must have moved the weights"
        assert "Trained for 2 steps on 156 tokens" in (Path(folder) / "README.md").read_text()
