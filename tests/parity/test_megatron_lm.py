"""Checkpoints that megatron-core's own GPTModel saved as Megatron-LM does: imported, the model computes the same."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hf_models
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pool import WorkerPool
from transformers import AutoModelForCausalLM

from megatron_steel.checkpoint.store import write_sharded
from megatron_steel.runtime import world as runtime
from megatron_steel.runtime.world import World

ROWS, PADDED = 133, 256
SHAPE: dict[str, Any] = {
    "num_layers": 4, "hidden_size": 48, "ffn_hidden_size": 88, "num_attention_heads": 4, "kv_channels": 12,
    "max_position_embeddings": 64, "init_method_std": 0.02, "make_vocab_size_divisible_by": 128,
    "norm_epsilon": 1e-5, "apply_layernorm_1p": False, "rotary_percent": 1.0, "rotary_base": 10000,
    "use_rope_scaling": False, "rope_scaling_factor": 8.0, "num_experts": None, "multi_latent_attention": False,
    "rotary_interleaved": False, "spec": None, "mtp_num_layers": None, "window_size": None,
    "params_dtype": torch.float32, "padded_vocab_size": PADDED, "vocab_size": None,
}  # fmt: skip
LLAMA: dict[str, Any] = {
    **SHAPE, "swiglu": True, "bias_gelu_fusion": False, "normalization": "RMSNorm", "position_embedding_type": "rope",
    "add_bias_linear": False, "add_qkv_bias": False, "qk_layernorm": False, "group_query_attention": True,
    "num_query_groups": 2, "untie_embeddings_and_output_weights": True,
}  # fmt: skip
GPT2: dict[str, Any] = {
    **LLAMA, "swiglu": False, "bias_gelu_fusion": True, "normalization": "LayerNorm", "add_bias_linear": True,
    "position_embedding_type": "learned_absolute", "group_query_attention": False, "num_query_groups": 1,
    "untie_embeddings_and_output_weights": False,
}  # fmt: skip
# Two arguments have megatron-core's names in newer versions. The epsilon is large enough to be missed.
NEWER = {
    **{name: value for name, value in LLAMA.items() if name not in ("norm_epsilon", "apply_layernorm_1p")},
    "layernorm_epsilon": 0.03, "layernorm_zero_centered_gamma": False,
}  # fmt: skip
EXPERTS: dict[str, Any] = {
    **LLAMA, "num_experts": 4, "moe_ffn_hidden_size": 40, "moe_router_topk": 2, "moe_layer_freq": 1,
    "moe_router_score_function": "softmax", "moe_router_pre_softmax": False,
}  # fmt: skip
# Name: arguments, (tensor, pipeline) parallel sizes, one key per layer, the family they make.
CASES: dict[str, tuple[dict[str, Any], tuple[int, int], bool, str]] = {
    "llama": (LLAMA, (1, 1), False, "llama"),
    "llama-new-names": (NEWER, (1, 1), False, "llama"),
    "llama-tp2": (LLAMA, (2, 1), False, "llama"),
    "llama-pp2": (LLAMA, (1, 2), False, "llama"),
    "llama-by-layer": (LLAMA, (1, 1), True, "llama"),
    "qwen2": ({**LLAMA, "add_qkv_bias": True, "untie_embeddings_and_output_weights": False}, (2, 1), False, "qwen2"),
    "qwen3": ({**LLAMA, "qk_layernorm": True, "rotary_base": 1000000}, (1, 1), False, "qwen3"),
    "mixtral-tp2": ({**EXPERTS, "moe_ffn_hidden_size": 88}, (2, 1), False, "mixtral"),
    "qwen3-moe": (
        {**EXPERTS, "qk_layernorm": True, "moe_layer_freq": 2, "moe_router_pre_softmax": True},
        (1, 1),
        False,
        "qwen3_moe",
    ),
    "gpt2": (GPT2, (2, 1), False, "gpt2"),
    "gpt2-exact-gelu": ({**GPT2, "bias_gelu_fusion": False}, (1, 1), False, "gpt2"),
}


class Evil:
    """Unpickled, it would make a directory."""

    def __init__(self, target: str) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (self.target,)


def expert_settings(arguments: dict[str, Any], tensor_size: int) -> dict[str, Any]:
    """What megatron-core needs for a mixture of experts besides the common settings."""
    if not arguments["num_experts"]:
        return {}
    names = [name for name in arguments if name.startswith("moe_")]
    return {
        **{name: arguments[name] for name in names},
        "num_moe_experts": arguments["num_experts"],
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": "alltoall",
        "moe_router_dtype": "fp32",
    }


def build(arguments: dict[str, Any], layout: tuple[int, int], by_layer: bool) -> Any:
    """megatron-core's GPTModel as Megatron-LM builds it from its arguments, with weights of no initialisation."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    gated = arguments["swiglu"]
    names = (
        "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "kv_channels", "normalization",
        "add_bias_linear", "add_qkv_bias", "qk_layernorm",
    )  # fmt: skip
    config = TransformerConfig(
        **{name: arguments[name] for name in names},
        num_query_groups=arguments["num_query_groups"] if arguments["group_query_attention"] else None,
        layernorm_epsilon=arguments.get("norm_epsilon", arguments.get("layernorm_epsilon")),
        gated_linear_unit=gated,
        activation_func=F.silu if gated else F.gelu,
        bias_activation_fusion=arguments["bias_gelu_fusion"],
        tensor_model_parallel_size=layout[0],
        pipeline_model_parallel_size=layout[1],
        pipeline_dtype=torch.float32,
        use_cpu_initialization=True,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        hetereogenous_dist_checkpoint=by_layer,
        **expert_settings(arguments, layout[0]),
    )
    kinds = {"normalization": arguments["normalization"], "qk_layernorm": arguments["qk_layernorm"]}
    spec = get_gpt_layer_local_spec(**kinds)
    if arguments["num_experts"]:
        spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization=kinds["normalization"])
    model = GPTModel(
        config,
        spec,
        vocab_size=PADDED,
        max_sequence_length=arguments["max_position_embeddings"],
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=not arguments["untie_embeddings_and_output_weights"],
        position_embedding_type=arguments["position_embedding_type"],
        rotary_percent=arguments["rotary_percent"],
        rotary_base=arguments["rotary_base"],
    ).eval()
    tensor_rank, stage = (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_pipeline_model_parallel_rank(),
    )
    for name, parameter in model.named_parameters():
        part = tensor_rank if getattr(parameter, "tensor_model_parallel", False) else 0
        seed = int.from_bytes(hashlib.sha256(f"{name}/{part}/{stage}".encode()).digest()[:4], "little")
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
        norm = "norm" in name and name.endswith("weight")
        scale = 0.3 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5
        parameter.data.copy_((1.0 if norm else 0.0) + scale * noise)
    return model


@torch.no_grad()
def save(name: str, root: Path, world: World, evil: str | None) -> np.ndarray:
    """Save one case as Megatron-LM would, and return its logits."""

    arguments, layout, by_layer, _ = CASES[name]
    model = build(arguments, layout, by_layer)
    directory = root / "iter_0000007"
    if world.rank == 0:
        directory.mkdir(parents=True)
        (root / "latest_checkpointed_iteration.txt").write_text("7")
    torch.distributed.barrier()
    namespace = argparse.Namespace(**arguments, somewhere=root, attack=Evil(evil) if evil else None)
    state = {
        "args": namespace,
        "checkpoint_version": 3.0,
        "iteration": 7,
        "model": model.sharded_state_dict(),
        "opt_param_scheduler": {"max_lr": 1.0},
    }
    write_sharded(state, directory)
    wrapped = SimpleNamespace(language_models=lambda: [model], options=model.config, vocab_size=ROWS)
    logits = hf_models.pipeline_logits(wrapped, hf_models.text_ids(ROWS), world)
    found = runtime.gather_objects(world, None if logits is None else logits.numpy())
    return found[-1]


def work_save(layout: tuple[int, int], names: list[str], root: str, evil: str | None = None) -> dict[str, np.ndarray]:
    """Save the cases of one layout below ``root``; returns their logits."""
    world = runtime.start(tensor_model_parallel_size=layout[0], pipeline_model_parallel_size=layout[1])
    return {name: save(name, Path(root) / name, world, evil) for name in names}


def work_import(argv: list[str]) -> tuple[str, str]:
    """(stdout, error) of tools/import_checkpoint.py in a process that has its imports behind it."""
    from tools.import_checkpoint import work

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        try:
            work(argv)
        except ValueError as error:
            return out.getvalue(), str(error)
    return out.getvalue(), ""


def flags(load: Path, save: Path, *more: object) -> list[str]:
    """Flags of an import."""
    return [str(item) for item in ("--from", "megatron", "--load", load, "--save", save, *more)]


@pytest.fixture(scope="module")
def made(pool: WorkerPool, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    """For every case the saved run, ``NAME-ours`` and ``NAME-hf``; and megatron-core's logits."""
    root = tmp_path_factory.mktemp("megatron")
    truth: dict[str, np.ndarray] = {}
    for layout in ((1, 1), (2, 1), (1, 2)):
        names = [name for name, case in CASES.items() if case[1] == layout]
        truth |= pool.run(layout[0] * layout[1], work_save, layout, names, str(root), join=False, timeout=120)[0]
    for name, (_, _, _, family) in CASES.items():
        argv = flags(root / name, root / f"{name}-ours", "--vocab-size", ROWS)
        out, err = pool.run(1, work_import, argv, join=False)[0]
        assert err == "" and f"iter_0000000: {family}, {ROWS} rows, without" in out, err
    exports = {name: (str(root / f"{name}-ours" / "iter_0000000"), str(root / f"{name}-hf")) for name in CASES}
    pool.run(1, hf_models.work_export, exports, 10**9, join=False)
    return root, truth


@pytest.mark.parametrize("layout", [(1, 1), (2, 1), (1, 2)])
def test_imported_models_compute_what_megatron_core_computes(
    pool: WorkerPool, made: tuple[Path, dict[str, np.ndarray]], layout: tuple[int, int]
) -> None:
    root, truth = made
    checkpoints = {name: str(root / f"{name}-ours" / "iter_0000000") for name in CASES}
    ranks = layout[0] * layout[1]
    found = pool.run(ranks, hf_models.work_findings, checkpoints, layout, join=False, timeout=120)[0]
    for name in CASES:
        assert truth[name].std() > 0.3
        np.testing.assert_allclose(found[name].logits, truth[name], rtol=0, atol=1e-5)
    gelus = np.abs(truth["gpt2"] - truth["gpt2-exact-gelu"]).max()
    assert gelus > 1e-4, "both forms of GELU must be told apart"


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_exported_folder_is_the_same_model(made: tuple[Path, dict[str, np.ndarray]], name: str) -> None:
    root, truth = made
    model = AutoModelForCausalLM.from_pretrained(root / f"{name}-hf").eval()
    logits = model(hf_models.text_ids(ROWS)).logits
    assert logits.shape[-1] == ROWS
    np.testing.assert_allclose(logits.numpy(), truth[name], rtol=0, atol=1e-5)


def test_keys_lie_as_the_cases_say(made: tuple[Path, dict[str, np.ndarray]]) -> None:
    from megatron_steel.checkpoint.dcp_read import StoredTensors

    stacked, single = (
        set(StoredTensors(made[0] / name / "iter_0000007").tensors) for name in ("llama", "llama-by-layer")
    )
    assert "decoder.layers.mlp.linear_fc2.weight" in stacked - single
    assert "decoder.layers.3.mlp.linear_fc2.weight" in single - stacked


def test_arguments_run_no_code(pool: WorkerPool, tmp_path: Path) -> None:
    pool.run(1, work_save, (1, 1), ["llama"], str(tmp_path), str(tmp_path / "made"), join=False)
    argv = flags(tmp_path / "llama" / "iter_0000007", tmp_path / "ours")
    out, err = pool.run(1, work_import, argv, join=False)[0]
    assert err == "" and f"{PADDED} rows" in out and not (tmp_path / "made").exists()
    torch.load(tmp_path / "llama" / "iter_0000007" / "common.pt", weights_only=False)
    assert (tmp_path / "made").exists(), "the attack must work on a plain unpickler"


def test_what_does_not_fit_is_refused_by_name(
    pool: WorkerPool, made: tuple[Path, dict[str, np.ndarray]], tmp_path: Path
) -> None:
    root = made[0]

    def refused(load: Path, message: str, *more: object) -> None:
        out, err = pool.run(1, work_import, flags(load, tmp_path / "out", *more), join=False)[0]
        assert out == "" and message in err and "\n" not in err, err
        assert not (tmp_path / "out").exists()

    refused(root / "llama", "--model-family qwen3 has no qk_layernorm False", "--model-family", "qwen3")
    refused(root / "llama", "--model-family qwen9: must be one of", "--model-family", "qwen9")
    refused(root / "llama", f"--vocab-size 300: {root}", "--vocab-size", 300)
    refused(root / "llama", "iter_0000003: holds no torch_dist checkpoint", "--ckpt-step", 3)
    refused(tmp_path, "latest_checkpointed_iteration.txt is missing")
    refused(root / "llama", "not for --from megatron", "--rope-scaling-factor", 8)
    (tmp_path / "legacy" / "iter_0000001" / "mp_rank_00").mkdir(parents=True)
    refused(tmp_path / "legacy", "--ckpt-format torch_dist", "--ckpt-step", 1)
    index = root / "llama" / "iter_0000007" / "metadata.json"
    assert json.loads(index.read_text())["sharded_backend"] == "torch_dist"


def test_arguments_that_change_the_model_are_refused_by_name() -> None:
    from megatron_steel.checkpoint.megatron_lm import choose_family, sizes_from_arguments
    from megatron_steel.config.load import from_flat

    for change in ({"squared_relu": True}, {"rotary_interleaved": True}, {"spec": ["a", "b"]}, {"mtp_num_layers": 1}):
        with pytest.raises(ValueError, match=f"here: {next(iter(change))} .* is not supported"):
            sizes_from_arguments({**LLAMA, **change}, "here")
    with pytest.raises(ValueError, match="here: hidden_size is missing"):
        sizes_from_arguments({**LLAMA, "hidden_size": None}, "here")
    sizes = sizes_from_arguments({**LLAMA, "window_size": (7, 0)}, "here")
    assert sizes["window_size"] == 8 and choose_family(from_flat(sizes).size, None, "here") == "mistral"
    mixed = from_flat(sizes_from_arguments({**LLAMA, "add_bias_linear": True}, "here")).size
    with pytest.raises(ValueError, match="no family has this combination; llama has no add_bias_linear True"):
        choose_family(mixed, None, "here")
