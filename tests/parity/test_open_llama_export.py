"""An exported Open-Llama works with nothing but transformers and the code in its folder, generation included."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import hf_models
import numpy as np
import pytest
from hf_models import make_model, prompts, text_ids
from pool import WorkerPool

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


@pytest.mark.parametrize("name", ["open-llama", "open-llama-v2"])
def test_an_export_loads_with_the_code_beside_it(pool: WorkerPool, tmp_path: Path, name: str) -> None:
    model = make_model(name)
    truth = hf_models.findings_of_transformers(model)
    model.save_pretrained(tmp_path / "hf")
    where = {name: (str(tmp_path / "hf"), str(tmp_path / "ours"))}
    checkpoint = pool.run(1, hf_models.work_import, where, join=False)[0][name]
    folder, rows = tmp_path / "back", model.config.vocab_size
    pool.run(1, hf_models.work_export, {name: (checkpoint, str(folder))}, 10**9, join=False)
    assert {"configuration_open_llama.py", "modeling_open_llama.py"} <= {path.name for path in folder.iterdir()}
    values = json.loads((folder / "config.json").read_text())
    wanted = {"model_type": "open-llama", "use_stable_embedding": name == "open-llama", "vocab_size": rows}
    assert {key: values[key] for key in wanted} == wanted
    np.save(f"{folder}.ids.npy", text_ids(rows).numpy())
    command = [sys.executable, "-c", ALONE, str(folder), " ".join(map(str, prompts(rows)[1]))]
    environment = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "PATH": ""}
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=120)
    assert result.returncode == 0, result.stderr
    with np.load(f"{folder}.npz") as found:
        assert np.array_equal(found["logits"], truth.logits)
        assert found["generated"].tolist() == truth.generated[1]
