"""A larger vocabulary from the tokenizer to a Hugging Face folder: nothing old changes, new rows are the rule's."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import hf_models
import numpy as np
import pytest
import torch
from pool import WorkerPool
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_steel.checkpoint.files import problem_with
from megatron_steel.text.extend import extend_folder
from megatron_steel.text.tokenizer import build_tokenizer

DATA = Path(__file__).parents[2] / "examples" / "data"
OLD, NEW = 4096, 4131
# Tied, untied, and with rows that the old tokenizer has no ids for.
MODELS = {"qwen2-tied": OLD, "llama-untied": OLD, "llama-tied": OLD + 20}
METHODS = {"qwen2-tied": "sub-pieces", "llama-untied": "random", "llama-tied": "mean"}


def work_extend(argv: list[str]) -> tuple[str, str]:
    """(stdout, stderr) of tools/extend_vocabulary.py in a process that has its imports behind it."""
    from tools.extend_vocabulary import work

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        try:
            work(argv)
        except ValueError as error:
            return out.getvalue(), str(error)
    return out.getvalue(), ""


@pytest.fixture(scope="module")
def made(pool: WorkerPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the tokenizer ``larger``, and for every model ``NAME``, ``NAME-ours``, ``NAME-more``, ``NAME-hf``."""
    root = tmp_path_factory.mktemp("vocabulary")
    text = json.loads(next(open(DATA / "valid_zh.jsonl", encoding="utf-8")))["text"]
    assert extend_folder(DATA / "tokenizer", root / "larger", [text], NEW - 1, ["zzyzx"], []) == NEW
    for name, rows in MODELS.items():
        hf_models.make_model(name, vocab_size=rows).save_pretrained(root / name)
        for path in (DATA / "tokenizer").iterdir():
            shutil.copy(path, root / name)
    imports = {name: (str(root / name), str(root / f"{name}-ours")) for name in MODELS}
    pool.run(1, hf_models.work_import, imports, join=False)
    for name, method in METHODS.items():
        where = ["--load", root / f"{name}-ours", "--save", root / f"{name}-more"]
        argv = [*where, "--tokenizer-model", root / "larger", "--method", method, "--tensor-model-parallel-size", 2]
        out, err = pool.run(1, work_extend, [str(item) for item in argv], join=False)[0]
        assert (
            err == "" and out == f"wrote {root / f'{name}-more' / 'iter_0000000'}: {NEW} rows, {MODELS[name]} before\n"
        )
    exports = {name: (str(root / f"{name}-more" / "iter_0000000"), str(root / f"{name}-hf")) for name in MODELS}
    pool.run(1, hf_models.work_export, exports, 10**9, join=False)
    return root


def rows_of(folder: Path) -> dict[str, torch.Tensor]:
    """Embedding and, when it is not tied, output layer of a Hugging Face folder."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    tables = {"embedding": model.get_input_embeddings().weight, "head": model.get_output_embeddings().weight}
    return {name: table.detach() for name, table in tables.items()}


@pytest.mark.parametrize("name", MODELS)
def test_old_rows_stay_and_new_rows_follow_the_rule(made: Path, name: str) -> None:
    before, after = rows_of(made / name), rows_of(made / f"{name}-hf")
    old, new = (build_tokenizer("HuggingFaceTokenizer", str(made / folder)) for folder in (name, f"{name}-hf"))
    assert len(AutoTokenizer.from_pretrained(made / f"{name}-hf")) == NEW == new.vocab_size
    for table, wide in after.items():
        narrow = before[table]
        assert wide.shape == (NEW, 48) and torch.equal(wide[:OLD], narrow[:OLD])
        if METHODS[name] == "mean":
            mean = narrow[:OLD].double().mean(0).float()
            assert torch.equal(wide[OLD:], mean.expand(NEW - OLD, -1))
        if METHODS[name] == "random":
            assert 0.0008 < wide[OLD:].std() < 0.0012 and wide[OLD:].unique(dim=0).shape[0] == NEW - OLD
        if METHODS[name] == "sub-pieces":
            for index in (OLD, NEW - 2):
                whole = new.decode([index])
                assert "\ufffd" not in whole, "choose pieces of whole characters"
                wanted = narrow[old.encode(whole)].double().mean(0).float()
                torch.testing.assert_close(wide[index], wanted, rtol=0, atol=1e-7)
    if name == "llama-untied":
        assert not torch.equal(after["embedding"][OLD:], after["head"][OLD:])


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_old_tokens_have_the_old_logits(made: Path, name: str) -> None:
    ids = hf_models.text_ids(OLD)
    first, second = (AutoModelForCausalLM.from_pretrained(made / folder).eval() for folder in (name, f"{name}-hf"))
    torch.testing.assert_close(second(ids).logits[..., :OLD], first(ids).logits[..., :OLD], rtol=0, atol=1e-6)
    state, wide = first.state_dict(), second.state_dict()
    same = [key for key in state if "embed_tokens" not in key and "lm_head" not in key]
    assert state.keys() == wide.keys() and all(torch.equal(state[key], wide[key]) for key in same)


def test_the_result_loads_on_tensor_parallel_ranks_and_is_whole(pool: WorkerPool, made: Path) -> None:
    checkpoints = {name: str(made / f"{name}-more" / "iter_0000000") for name in MODELS}
    assert all(problem_with(Path(path), hashes=True) is None for path in checkpoints.values())
    found: dict[str, Any] = pool.run(2, hf_models.work_findings, checkpoints, (2, 1), join=False, timeout=120)[0]
    for name in MODELS:
        model = AutoModelForCausalLM.from_pretrained(made / f"{name}-hf").eval()
        with torch.no_grad():
            wanted = model(hf_models.text_ids(NEW)).logits.numpy()
        np.testing.assert_allclose(found[name].logits, wanted, rtol=0, atol=1e-5)


def test_refusals_are_one_line_and_leave_nothing(pool: WorkerPool, made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "larger", tmp_path / "moved")
    state = json.loads((tmp_path / "moved" / "tokenizer.json").read_text("utf-8"))
    vocabulary = state["model"]["vocab"]
    vocabulary["he"], vocabulary["ll"] = vocabulary["ll"], vocabulary["he"]
    (tmp_path / "moved" / "tokenizer.json").write_text(json.dumps(state), "utf-8")
    for load, model, save, message in (
        ("qwen2-tied-ours", DATA / "tokenizer", tmp_path / "out", "has no ids that"),
        ("qwen2-tied-ours", tmp_path / "moved", tmp_path / "out", "id 262 was 'he' and is 'll'"),
        ("qwen2-tied-ours", made / "larger", made / "qwen2-tied-more", "already holds checkpoints"),
        ("absent", made / "larger", tmp_path / "out", "no such directory"),
        ("qwen2-tied-more", made / "larger", tmp_path / "out", "has no ids that"),
    ):
        argv = ["--load", made / load, "--save", save, "--tokenizer-model", model]
        out, err = pool.run(1, work_extend, [str(item) for item in argv], join=False)[0]
        assert out == "" and message in err and "\n" not in err
        assert not (tmp_path / "out").exists()
