"""Adapters against PEFT: the same five steps, merged, and as a folder that goes there and back."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pool import WorkerPool
from safetensors.torch import load_file, save_file
from tiny_chats import chat_options, write_chats, write_model, write_pairs
from tiny_run import Trace, open_session, take_steps

from megatron_steel.checkpoint.files import find_checkpoint
from megatron_steel.checkpoint.hf import export_hf
from megatron_steel.checkpoint.peft import export_adapter, import_adapter
from megatron_steel.checkpoint.verify import different_tensors

STEPS, BATCH = 5, 4
WAYS: dict[str, dict[str, Any]] = {
    "lora": {"lora_rank": 4},
    "rslora": {"lora_rank": 4, "lora_alpha": 3.0, "use_rslora": True, "lora_target_modules": ["q_proj", "v_proj"]},
    "dora": {"lora_rank": 4, "use_dora": True},
    "head": {"lora_rank": 2, "lora_modules_to_save": ["lm_head", "embed_tokens"]},
    "tied": {"lora_rank": 2, "lora_modules_to_save": ["embed_tokens"]},
}
ADAMW: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-5, "weight_decay": 0.0}
OURS = {"lr": 1e-2, "lr_decay_style": "constant", "weight_decay": 0.0, "clip_grad": 0.0}
TOOL = Path(__file__).parents[2] / "tools" / "convert_hf.py"


def work_adapt(flat: dict[str, Any], begin: str) -> tuple[list[Any], Trace]:
    """Save the adapters as they begin, train, save again; also the rows of each step as (ids, labels, mask)."""
    from megatron_steel.train.loop import save

    trace, steps = Trace(), []
    with open_session(flat) as session:
        save(session)
        Path(flat["save"]).rename(begin)
        builder = session.loader.builder
        build = builder.build

        def kept(*args: Any) -> Any:
            batches = build(*args)
            steps.append([(b.tokens_BS.numpy(), b.labels_BS.numpy(), b.loss_mask_BS.numpy()) for b in batches])
            return batches

        builder.build = kept  # type: ignore[method-assign]
        take_steps(session, STEPS, trace)
        save(session)
    return steps, trace


def train_theirs(model: Any, steps: list[Any]) -> list[float]:
    """The same rows through PEFT and PyTorch's AdamW; losses of the steps."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], **ADAMW)
    losses = []
    for batches in steps[:STEPS]:
        total = sum(float(mask.sum()) for _, _, mask in batches)
        optimizer.zero_grad()
        step = 0.0
        for tokens, labels, mask in batches:
            logits = model(input_ids=torch.from_numpy(tokens)).logits
            each = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), torch.from_numpy(labels).flatten(), reduction="none"
            )
            loss = (each * torch.from_numpy(mask).flatten()).sum() / total
            loss.backward()
            step += loss.item()
        optimizer.step()
        losses.append(step)
    return losses


def load_adapter(model: str, folder: Path, trained: bool = False) -> Any:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    return PeftModel.from_pretrained(base, folder, is_trainable=trained)


@pytest.mark.parametrize("way", WAYS)
def test_five_steps_are_those_of_peft(pool: WorkerPool, tmp_path: Path, way: str) -> None:
    from transformers import AutoModelForCausalLM

    model = write_model(tmp_path / "model", tie_word_embeddings=way == "tied", initializer_range=0.1)
    data = write_chats(tmp_path / "chats.jsonl", 24)
    flat = chat_options(model, data, packing=False, global_batch_size=BATCH, train_iters=STEPS)
    flat |= OURS | WAYS[way] | {"save": str(tmp_path / "run")}
    steps, trace = pool.run(1, work_adapt, flat, str(tmp_path / "begin"), join=False)[0]
    run = find_checkpoint(tmp_path / "run", None)[0]
    export_adapter(find_checkpoint(tmp_path / "begin", None)[0], tmp_path / "begin-adapter", model)
    export_adapter(run, tmp_path / "run-adapter", model)

    theirs = load_adapter(model, tmp_path / "begin-adapter", trained=True)
    losses = train_theirs(theirs, steps)
    np.testing.assert_allclose(trace.losses, losses, rtol=1e-5)
    assert abs(losses[-1] - losses[0]) > 1e-2
    theirs.save_pretrained(tmp_path / "their-adapter")
    wanted, found = (load_file(tmp_path / f"{who}-adapter/adapter_model.safetensors") for who in ("their", "run"))
    assert wanted.keys() == found.keys()
    for name in wanted:
        assert (wanted[name] - found[name]).abs().max() < 1e-5, name

    export_hf(run, tmp_path / "merged")
    ids = torch.from_numpy(steps[0][0][0])
    with torch.no_grad():
        plain, merged = (
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits
            for folder in (model, tmp_path / "merged")
        )
        apart = load_adapter(model, tmp_path / "run-adapter")(ids).logits
    assert (merged - apart).abs().max() < 1e-5
    assert (merged - plain).abs().max() > 1e-2

    checkpoint = import_adapter(tmp_path / "their-adapter", Path(model), tmp_path / "imported")
    export_adapter(checkpoint, tmp_path / "back", model)
    back = load_file(tmp_path / "back/adapter_model.safetensors")
    assert back.keys() == wanted.keys() and all(torch.equal(back[name], wanted[name]) for name in wanted)
    # The run goes on from what PEFT trained.
    resumed = flat | {"pretrained_checkpoint": str(tmp_path / "imported"), "save": str(tmp_path / "again")}
    again, trace = pool.run(1, work_adapt, resumed, str(tmp_path / "begin2"), join=False)[0]
    np.testing.assert_allclose(trace.losses, train_theirs(theirs, again), rtol=1e-5)


def work_reward(flat: dict[str, Any]) -> None:
    """Train a reward model's adapters and score, and save them."""
    from megatron_steel.train.loop import save

    with open_session(flat) as session:
        take_steps(session, STEPS, Trace())
        save(session)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_the_adapter_of_a_reward_model_has_its_score(pool: WorkerPool, tmp_path: Path, tied: bool) -> None:
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    model = write_model(tmp_path / "model", tie_word_embeddings=tied, pad_token_id=0)
    data = write_pairs(tmp_path / "pairs.jsonl", 24)
    flat = chat_options(model, data, preferences=True, loss_type="rm", lora_rank=4, seq_length=128, **OURS)
    pool.run(1, work_reward, flat | {"save": str(tmp_path / "run"), "train_iters": STEPS}, join=False)
    run = find_checkpoint(tmp_path / "run", None)[0]
    export_hf(run, tmp_path / "merged")
    export_adapter(run, tmp_path / "adapter", model)

    def scorer(folder: object) -> Any:
        return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32)

    ids = torch.arange(1, 31).view(3, 10)
    with torch.no_grad():
        merged = scorer(tmp_path / "merged")(ids).logits
        apart = PeftModel.from_pretrained(scorer(model), tmp_path / "adapter")(ids).logits
    assert (merged - apart).abs().max() < 1e-5 and merged.std() > 1e-2

    export_adapter(import_adapter(tmp_path / "adapter", Path(model), tmp_path / "imported"), tmp_path / "back", model)
    wanted, found = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("adapter", "back"))
    assert wanted.keys() == found.keys() and all(torch.equal(wanted[name], found[name]) for name in wanted)
    assert wanted["base_model.model.score.weight"].shape == (1, 32)
    read = json.loads((tmp_path / "back/adapter_config.json").read_text())
    assert (read["task_type"], read["modules_to_save"]) == ("SEQ_CLS", ["score"])


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A model and an adapter of it that PEFT wrote."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    root = tmp_path_factory.mktemp("peft")
    model = write_model(root / "model", tie_word_embeddings=False)
    config = LoraConfig(r=3, lora_alpha=5, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(model), config).save_pretrained(root / "adapter")
    return model, root / "adapter"


def test_the_tool_takes_adapters_there_and_back(adapter: tuple[str, Path], tmp_path: Path) -> None:
    from tools.convert_hf import main

    model, folder = adapter
    ours, back, plain = (str(tmp_path / name) for name in ("ours", "back", "plain"))
    assert main(["import-adapter", "--hf", model, "--adapter", str(folder), "--save", ours]) == 0
    assert main(["export-adapter", "--load", ours, "--adapter", back, "--base", "m"]) == 0
    wanted, found = (load_file(Path(place) / "adapter_model.safetensors") for place in (folder, back))
    assert wanted.keys() == found.keys() and all(torch.equal(wanted[name], found[name]) for name in wanted)
    written = json.loads((Path(back) / "adapter_config.json").read_text())
    assert (written["base_model_name_or_path"], written["r"], written["lora_alpha"]) == ("m", 3, 5)
    assert main(["export", "--load", ours, "--hf", plain]) == 0
    # A process of its own, which begins a process group.
    verify = [sys.executable, str(TOOL), "verify", "--load", ours, "--hf", plain]
    same = subprocess.run(verify, capture_output=True, text=True, timeout=120)
    assert same.returncode == 0 and "same model" in same.stdout, same.stderr
    assert len(different_tensors(Path(ours) / "iter_0000000", Path(model))) == 4 * 7


REFUSED: list[tuple[dict[str, Any], dict[str, str | None], str]] = [
    ({"init_lora_weights": "pissa"}, {}, "init_lora_weights pissa changes the base model"),
    ({"rank_pattern": {"q_proj": 8}}, {}, "rank_pattern is not read"),
    ({"bias": "all"}, {}, "bias all is not read"),
    ({"peft_type": "IA3"}, {}, "not an adapter of PEFT's LoRA"),
    ({"r": 2}, {}, "is (3, 32), the base model makes it (2, 32)"),
    ({}, {"model.layers.2.mlp.up_proj.lora_A.weight": None}, "adapters of some layers only are not read"),
    (
        {},
        {"lm_head.lora_A.weight": "model.layers.0.mlp.up_proj.lora_A.weight"},
        "has no place in this model's adapters",
    ),
]


@pytest.mark.parametrize(("entries", "tensors", "message"), REFUSED)
def test_other_adapters_are_refused(
    adapter: tuple[str, Path], tmp_path: Path, entries: dict[str, Any], tensors: dict[str, str | None], message: str
) -> None:
    model, source = adapter
    config = json.loads((source / "adapter_config.json").read_text()) | entries
    weights = load_file(source / "adapter_model.safetensors")
    for name, like in tensors.items():
        if like is None:
            del weights[f"base_model.model.{name}"]
        else:
            weights[f"base_model.model.{name}"] = weights[f"base_model.model.{like}"].clone()
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(weights, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError) as caught:
        import_adapter(folder, Path(model), tmp_path / "ours")
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "ours").exists()
