"""Steel-LLM's configuration and names: as published, as our code for transformers has them, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_steel.checkpoint.hf_map import pieces, to_ours, to_theirs
from megatron_steel.checkpoint.modeling.steel.configuration_steel import SteelConfig
from megatron_steel.checkpoint.modeling.steel.modeling_steel import SteelForCausalLM
from megatron_steel.config.check import check
from megatron_steel.config.hf_sizes import hf_from_sizes, sizes_from_hf
from megatron_steel.config.load import from_flat, parse, to_flat
from megatron_steel.plan.parameters import count_parameters

# The released config.json, cut to what decides numbers: it calls itself Qwen2.
PUBLISHED: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_qwen2.Qwen2Config", "AutoModelForCausalLM": "modeling_steel.X"},
    "model_type": "qwen2",
    "FFN_type": "softmoe_v3",
    "mlp_type": "senet",
    "n_experts": 6,
    "slots_per_expert": 1,
    "mlp_div_ratio": 4,
    "hidden_size": 1792,
    "intermediate_size": 1792,
    "num_hidden_layers": 18,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "use_sliding_window": False,
    "tie_word_embeddings": False,
    "vocab_size": 151936,
}
KINDS = [(form, kind) for form in ("dense", "softmoe_v1", "softmoe_v2", "softmoe_v3", "softmoe_causal")
         for kind in ("swiglu", "senet")]  # fmt: skip
NO_IDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


def tiny(form: str, kind: str) -> dict[str, Any]:
    """Flags of a small model whose sizes are all different."""
    return {
        "model_family": "steel", "num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 20, "mlp_div_ratio": 4,
        "soft_experts": 3, "slots_per_expert": 2, "ffn_type": form, "mlp_type": kind, "add_qkv_bias": True,
        "untie_embeddings_and_output_weights": True, "vocab_size": 50, "max_position_embeddings": 64, "seq_length": 16,
    }  # fmt: skip


def test_the_published_configuration_is_steel_and_not_qwen2() -> None:
    sizes = sizes_from_hf(PUBLISHED, "x")
    assert (sizes["model_family"], sizes["ffn_type"], sizes["mlp_type"]) == ("steel", "softmoe_v3", "senet")
    size = from_flat(sizes).size
    assert count_parameters(size, 151936).total == 1_122_922_770
    preset = parse(["--model", "steel_1b"]).size
    preset.ffn_type, preset.num_query_groups, preset.kv_channels = "softmoe_v3", 32, 56
    assert size == preset


@pytest.mark.parametrize(("form", "kind"), KINDS)
def test_names_and_shapes_are_those_of_the_code_for_transformers(form: str, kind: str) -> None:
    size = from_flat(tiny(form, kind)).size
    written = hf_from_sizes(size, 50, NO_IDS, "float32")
    assert sizes_from_hf(written, "x")["ffn_type"] == form and sizes_from_hf(written, "x")["mlp_type"] == kind
    model = SteelForCausalLM(SteelConfig(**written))
    state = model.state_dict()
    assert count_parameters(size, 50).total == sum(tensor.numel() for tensor in state.values())
    names = [name for piece in pieces(size) for name in piece.theirs]
    assert len(names) == len(set(names)) and set(names) == set(state)
    keys = [(piece.key, piece.index) for piece in pieces(size)]
    assert len(keys) == len(set(keys))
    for piece in pieces(size):
        tensors = [state[name] for name in piece.theirs]
        assert piece.shapes == tuple(tuple(tensor.shape) for tensor in tensors)
        back = to_theirs(piece.how, to_ours(piece.how, tensors, size, 64), size, 50)
        assert all(torch.equal(a, b) for a, b in zip(back, tensors, strict=True))


def test_gates_come_first() -> None:
    """``up_proj`` is the half without an activation, in both matrices of an expert."""
    size = from_flat(tiny("softmoe_causal", "senet")).size
    first, second = (
        next(piece for piece in pieces(size) if piece.key.endswith(f"experts.{name}.weight"))
        for name in ("linear_fc1", "linear_fc2")
    )
    assert [name.split(".")[-2] for name in first.theirs] == ["gate_up_proj", "up_proj"]
    assert [name.split(".")[-2] for name in second.theirs] == ["gate_down_proj", "down_proj"]
    assert (first.index, first.of) == ((0, 0), (2, 3))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"ffn_type": "softmoe_v2"}, "--ffn-type softmoe_v2 shows every token the later ones"),
        ({"ffn_type": "softmoe_v3"}, "give --allow-non-causal-softmoe"),
        ({"ffn_hidden_size": 22}, "--ffn-hidden-size 22 is not divisible by --mlp-div-ratio 4; use 20"),
        ({"soft_experts": 0}, "--soft-experts must be greater than 0"),
        ({"tensor_model_parallel_size": 2}, "--soft-experts 3 is not divisible by --tensor-model-parallel-size 2"),
        ({"ffn_type": "softmoe_v3", "allow_non_causal_softmoe": True, "reset_attention_mask": True}, "slots mix"),
        ({"ffn_type": "softmoe_v3", "allow_non_causal_softmoe": True, "reset_position_ids": True}, "slots mix"),
        ({"model_family": "qwen2"}, "--model-family qwen2 has dense"),
        (
            {"model_family": "qwen2", "ffn_type": "dense", "mlp_type": "swiglu"},
            "--soft-experts is for --model-family steel, this is qwen2",
        ),
    ],
)
def test_what_cannot_be_is_refused(change: dict[str, Any], words: str) -> None:
    flat = {**tiny("softmoe_causal", "senet"), **change}
    with pytest.raises(ValueError, match="^--") as caught:
        check(from_flat(flat), flat.get("tensor_model_parallel_size", 1))
    assert words in str(caught.value)


def test_what_can_be_passes() -> None:
    for form in ("dense", "softmoe_v1", "softmoe_causal"):
        check(from_flat({**tiny(form, "senet"), "reset_attention_mask": True}))
    assert not check(from_flat({**tiny("softmoe_v3", "senet"), "allow_non_causal_softmoe": True}))
    (note,) = check(from_flat({**tiny("softmoe_v1", "senet"), "allow_non_causal_softmoe": True}))
    assert "--allow-non-causal-softmoe has no effect" in note


def test_unknown_kinds_are_named() -> None:
    with pytest.raises(ValueError, match="x: FFN_type 'softmoe_v4' with mlp_type 'senet' is not supported"):
        sizes_from_hf({**PUBLISHED, "FFN_type": "softmoe_v4"}, "x")


def test_training_refuses_before_it_imports_anything_heavy() -> None:
    code = (
        "import atexit, sys; atexit.register(lambda: print('torch' in sys.modules)); "
        "from megatron_steel.pretrain import main; main(['--model', 'steel_1b', '--ffn-type', 'softmoe_v3'])"
    )
    root = Path(__file__).parents[2]
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert result.returncode == 2 and result.stdout == "False\n", result.stderr
    assert result.stderr.startswith("error: --ffn-type softmoe_v3 shows") and result.stderr.count("\n") == 1


@pytest.mark.parametrize("finetune", [True, False])
def test_a_causal_run_may_start_from_released_weights(finetune: bool) -> None:
    from megatron_steel.train.prepare import check_same_model

    saved, now = ({**tiny(form, "senet"), "finetune": finetune} for form in ("softmoe_v3", "softmoe_causal"))
    flat = [to_flat(from_flat(options)) for options in (saved, now)]
    if finetune:
        check_same_model(*flat, Path("x"))
        return
    with pytest.raises(ValueError, match="x was saved with --ffn-type softmoe_v3, this run has softmoe_causal"):
        check_same_model(*flat, Path("x"))
