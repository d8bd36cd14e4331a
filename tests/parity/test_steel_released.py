"""The released soft mixtures v2 and v3: the same model as our code for transformers, leak included; and exports."""

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
from hf_models import NEW_TOKENS, STEEL, make_model, prompts, text_ids
from pool import WorkerPool

from megatron_steel.runtime import world as runtime

RELEASED = ("softmoe_v2", "softmoe_v3")
LAYOUTS = {"1": (1, 1), "tp2": (2, 1), "pp2": (1, 2)}
# transformers alone, with the code in the folder; our packages cannot be imported.
ALONE = """
import sys
sys.modules["megatron_steel"] = sys.modules["megatron"] = sys.modules["tools"] = None
import numpy, torch
from transformers import AutoModelForCausalLM
folder, prompt = sys.argv[1], [int(word) for word in sys.argv[2].split()]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
with torch.no_grad():
    logits = model(torch.from_numpy(numpy.load(folder + ".ids.npy"))).logits.numpy()
    row = model.generate(torch.tensor([prompt]), max_new_tokens=32, do_sample=False, eos_token_id=None)[0]
numpy.savez(folder + ".npz", logits=logits, generated=row[len(prompt):].numpy())
"""


def released(form: str) -> Any:
    """A tiny random model written with the published keys, as Steel-LLM's own config.json has them."""
    hf_models.CONFIGS[form] = (hf_models.SteelConfig, {**STEEL, "FFN_type": form})
    try:
        return make_model(form)
    finally:
        del hf_models.CONFIGS[form]


def save_as_published(model: Any, folder: Path) -> None:
    """The released configuration says qwen2."""
    model.save_pretrained(folder)
    path = folder / "config.json"
    values = {**json.loads(path.read_text()), "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
    path.write_text(json.dumps(values))


def work_released(checkpoint: str, layout: tuple[int, int]) -> tuple[np.ndarray, list[list[int]], float]:
    """Logits, greedy continuations of one prompt at a time, and how far the last token reaches back."""
    from megatron_steel.checkpoint.verify import load_for_inference
    from megatron_steel.evaluate.generate import Sampling, generate

    world = runtime.start(tensor_model_parallel_size=layout[0], pipeline_model_parallel_size=layout[1])
    model, _ = load_for_inference(Path(checkpoint), world, bf16=False)
    ids_BS = text_ids(model.vocab_size)
    logits = runtime.gather_objects(world, hf_models.pipeline_logits(model, ids_BS, world))[-1]
    sampling = Sampling(max_new_tokens=NEW_TOKENS, temperature=0)
    generated = [generate(model, [prompt], sampling, [], world)[0] for prompt in prompts(model.vocab_size)]
    ids_BS[:, -1] = (ids_BS[:, -1] + 1) % model.vocab_size
    changed = runtime.gather_objects(world, hf_models.pipeline_logits(model, ids_BS, world))[-1]
    return logits.numpy(), generated, (changed - logits)[:, :-1].abs().max().item()


@pytest.mark.parametrize("form", RELEASED)
def test_released_forms_are_what_they_were(pool: WorkerPool, tmp_path: Path, form: str) -> None:
    """Prefill with the whole prompt, then one token at a time: what such a model generates depends on that."""
    model = released(form)
    truth = hf_models.findings_of_transformers(model)
    save_as_published(model, tmp_path / "hf")
    where = {form: (str(tmp_path / "hf"), str(tmp_path / "ours"))}
    checkpoint = pool.run(1, hf_models.work_import, where, join=False)[0][form]
    for layout in LAYOUTS.values():
        found = pool.run(layout[0] * layout[1], work_released, checkpoint, layout, join=False)[0]
        logits, generated, leak = found
        np.testing.assert_allclose(logits, truth.logits, rtol=0, atol=1e-5)
        assert generated == truth.generated
        assert leak > 1e-3, "these forms are not causal, which is why training refuses them"


@pytest.mark.parametrize("form", ["softmoe_causal", "softmoe_v3", "raw"])
def test_an_export_loads_with_the_code_beside_it(pool: WorkerPool, tmp_path: Path, form: str) -> None:
    model = released(form)
    truth = hf_models.findings_of_transformers(model)
    save_as_published(model, tmp_path / "hf")
    where = {form: (str(tmp_path / "hf"), str(tmp_path / "ours"))}
    checkpoint = pool.run(1, hf_models.work_import, where, join=False)[0][form]
    folder = tmp_path / "back"
    pool.run(1, hf_models.work_export, {form: (checkpoint, str(folder))}, 10**9, join=False)
    assert {"configuration_steel.py", "modeling_steel.py"} <= {path.name for path in folder.iterdir()}
    assert not [path for path in folder.iterdir() if path.name == "__init__.py"]
    np.save(f"{folder}.ids.npy", text_ids(100).numpy())
    prompt = prompts(100)[1]
    command = [sys.executable, "-c", ALONE, str(folder), " ".join(map(str, prompt))]
    environment = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "PATH": ""}
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert result.returncode == 0, result.stderr
    with np.load(f"{folder}.npz") as found:
        assert np.array_equal(found["logits"], truth.logits)
        assert found["generated"].tolist() == truth.generated[1]


@pytest.mark.parametrize("form", ["softmoe_causal", "softmoe_v1", "raw"])
def test_transformers_caches_what_it_computes(form: str) -> None:
    """Our code for transformers: one token at a time gives what all at once give."""
    model, ids = released(form), text_ids(100)
    with torch.no_grad():
        whole, cache, parts = model(ids).logits, None, []
        for part in ids.split(1, dim=1):
            output = model(part, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            parts.append(output.logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-5)
