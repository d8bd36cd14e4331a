"""Meta's Llama files: imported, they compute what Meta's own formulas say in float64, and export to Hugging Face."""

from __future__ import annotations

import contextlib
import io
import json
import math
from pathlib import Path
from typing import Any

import hf_models
import numpy as np
import pytest
import torch
from pool import WorkerPool
from torch import Tensor
from transformers import AutoModelForCausalLM

LLAMA_2 = {"dim": 64, "n_layers": 3, "n_heads": 4, "multiple_of": 16, "norm_eps": 1e-5, "vocab_size": -1}
LLAMA_3 = {
    "dim": 64, "n_layers": 3, "n_heads": 8, "n_kv_heads": 4, "vocab_size": 120, "multiple_of": 16,
    "ffn_dim_multiplier": 1.3, "norm_eps": 1e-5, "rope_theta": 500000.0, "use_scaled_rope": True,
}  # fmt: skip
# Name: params.json, model-parallel ranks, axis the embedding is cut along, rows.
CASES: dict[str, tuple[dict[str, Any], int, int, int]] = {
    "llama-2-one-rank": (LLAMA_2, 1, 1, 108),
    "llama-2-two-ranks": (LLAMA_2, 2, 1, 108),
    "llama-3-four-ranks": (LLAMA_3, 4, 0, 120),
    "llama-3.2-tied": ({**LLAMA_3, "n_kv_heads": 8}, 1, 0, 120),
}
ROPE_FACTORS = {"llama-3-four-ranks": 8.0, "llama-3.2-tied": 32.0}
AXES = {"wq": 0, "wk": 0, "wv": 0, "wo": 1, "w1": 0, "w2": 1, "w3": 0, "output": 0}


def make_tensors(name: str) -> dict[str, Tensor]:
    """Whole tensors under Meta's names."""
    values, _, _, rows = CASES[name]
    dim, width = values["dim"], values["dim"] // values["n_heads"]
    groups = values.get("n_kv_heads", values["n_heads"]) * width
    ffn = int(values.get("ffn_dim_multiplier", 1) * int(8 * dim / 3))
    ffn = values["multiple_of"] * math.ceil(ffn / values["multiple_of"])
    shapes = {"tok_embeddings.weight": (rows, dim), "norm.weight": (dim,), "output.weight": (rows, dim)}
    for layer in range(values["n_layers"]):
        parts = {
            "attention.wq": (dim, dim), "attention.wk": (groups, dim), "attention.wv": (groups, dim),
            "attention.wo": (dim, dim), "feed_forward.w1": (ffn, dim), "feed_forward.w2": (dim, ffn),
            "feed_forward.w3": (ffn, dim), "attention_norm": (dim,), "ffn_norm": (dim,),
        }  # fmt: skip
        shapes |= {f"layers.{layer}.{part}.weight": shape for part, shape in parts.items()}
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for key, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        tensors[key] = 1 + 0.3 * noise if len(shape) == 1 else noise * shape[-1] ** -0.5
    if name.endswith("tied"):
        tensors["output.weight"] = tensors["tok_embeddings.weight"].clone()
    return tensors


def write_folder(name: str, folder: Path) -> None:
    """``params.json`` and one file per rank."""
    values, ranks, embedding_axis, _ = CASES[name]
    folder.mkdir()
    (folder / "params.json").write_text(json.dumps(values))
    whole = make_tensors(name)
    for rank in range(ranks):
        parts = {"rope.freqs": torch.zeros(4)}
        for key, tensor in whole.items():
            axis = embedding_axis if key.startswith("tok_") else AXES.get(key.split(".")[-2])
            parts[key] = tensor if axis is None else tensor.chunk(ranks, axis)[rank].clone()
        torch.save(parts, folder / f"consolidated.{rank:02d}.pth")


def angles(values: dict[str, Any], length: int, factor: float | None) -> Tensor:
    """Complex rotations [S, D / 2]; with a factor the frequencies of Llama 3.1 (slow ones divided, a ramp between)."""
    width = values["dim"] // values["n_heads"]
    theta = values.get("rope_theta", 10000.0)
    frequencies = 1.0 / theta ** (torch.arange(0, width, 2, dtype=torch.float64) / width)
    if factor is not None:
        turns = 8192 * frequencies / (2 * math.pi)
        ramp = ((turns - 1) / (4 - 1)).clamp(0, 1)
        frequencies = (1 - ramp) * frequencies / factor + ramp * frequencies
    phase = torch.outer(torch.arange(length, dtype=torch.float64), frequencies)
    return torch.polar(torch.ones_like(phase), phase)


def meta_logits(name: str, ids_BS: Tensor) -> Tensor:
    """Logits [B, S, V] in float64 by Meta's formulas: neighbours 2i and 2i + 1 of a head are one complex number."""
    values = CASES[name][0]
    weights = {key: tensor.double() for key, tensor in make_tensors(name).items()}
    heads = values["n_heads"]
    groups = values.get("n_kv_heads", heads)
    batch, length = ids_BS.shape
    rotation = angles(values, length, ROPE_FACTORS.get(name))[None, :, None]

    def norm(x: Tensor, key: str) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + values["norm_eps"]) * weights[f"{key}.weight"]

    def rotate(x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2).contiguous())
        return torch.view_as_real(pairs * rotation).flatten(-2)

    x = weights["tok_embeddings.weight"][ids_BS]
    mask = torch.full((length, length), -math.inf, dtype=torch.float64).triu(1)
    for layer in range(values["n_layers"]):
        key = f"layers.{layer}"
        h = norm(x, f"{key}.attention_norm")
        q, k, v = (
            (h @ weights[f"{key}.attention.w{part}.weight"].T).view(batch, length, count, -1)
            for part, count in (("q", heads), ("k", groups), ("v", groups))
        )
        k, v = (part.repeat_interleave(heads // groups, 2) for part in (rotate(k), v))
        scores = torch.einsum("bqhd,bkhd->bhqk", rotate(q), k) / math.sqrt(q.shape[-1]) + mask
        mixed = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).reshape(batch, length, -1)
        x = x + mixed @ weights[f"{key}.attention.wo.weight"].T
        h = norm(x, f"{key}.ffn_norm")
        gate = torch.nn.functional.silu(h @ weights[f"{key}.feed_forward.w1.weight"].T)
        x = x + (gate * (h @ weights[f"{key}.feed_forward.w3.weight"].T)) @ weights[f"{key}.feed_forward.w2.weight"].T
    return norm(x, "norm") @ weights["output.weight"].T


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


def flags(folder: Path, save: Path, *more: object) -> list[str]:
    """Flags of an import."""
    positions = ("--max-position-embeddings", 128)
    return [str(item) for item in ("--from", "meta", "--load", folder, "--save", save, *positions, *more)]


@pytest.fixture(scope="module")
def made(pool: WorkerPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For every case its folder, ``NAME-ours`` and ``NAME-hf``."""
    root = tmp_path_factory.mktemp("meta")
    for name in CASES:
        write_folder(name, root / name)
        more = ("--rope-scaling-factor", 32) if name == "llama-3.2-tied" else ()
        out, err = pool.run(1, work_import, flags(root / name, root / f"{name}-ours", *more), join=False)[0]
        assert err == "" and "iter_0000000: llama, " in out and "without a tokenizer" in out
    exports = {name: (str(root / f"{name}-ours" / "iter_0000000"), str(root / f"{name}-hf")) for name in CASES}
    pool.run(1, hf_models.work_export, exports, 10**9, join=False)
    return root


@pytest.mark.parametrize("tensor_size", [1, 2])
def test_imported_models_compute_what_metas_formulas_say(pool: WorkerPool, made: Path, tensor_size: int) -> None:
    checkpoints = {name: str(made / f"{name}-ours" / "iter_0000000") for name in CASES}
    layout = (tensor_size, 1)
    found = pool.run(tensor_size, hf_models.work_findings, checkpoints, layout, join=False, timeout=120)[0]
    for name in checkpoints:
        wanted = meta_logits(name, hf_models.text_ids(CASES[name][3])).numpy()
        assert wanted.std() > 0.3
        np.testing.assert_allclose(found[name].logits, wanted, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_exported_folder_is_the_same_model(made: Path, name: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(made / f"{name}-hf").eval()
    ids = hf_models.text_ids(CASES[name][3])
    np.testing.assert_allclose(model(ids).logits.numpy(), meta_logits(name, ids).numpy(), rtol=0, atol=2e-5)
    assert model.config.tie_word_embeddings == name.endswith("tied")
    assert model.config.vocab_size == CASES[name][3]


def test_the_order_of_rows_matters() -> None:
    """Without the permutation of q and k the model is another one by far more than the tolerance above."""
    from megatron_steel.checkpoint.meta_llama import half_split

    rows = torch.arange(8.0).repeat(2).unsqueeze(1)  # two heads of width 8
    assert half_split(rows, 2).flatten().tolist() == [0, 2, 4, 6, 1, 3, 5, 7] * 2
    assert not torch.equal(half_split(rows, 1), half_split(rows, 2))


def test_what_does_not_fit_is_refused_by_name(pool: WorkerPool, tmp_path: Path) -> None:
    name = "llama-2-two-ranks"

    def refused(folder: Path, message: str, *more: object) -> None:
        out, err = pool.run(1, work_import, flags(folder, tmp_path / "out", *more), join=False)[0]
        assert out == "" and message in err and "\n" not in err, err
        assert not (tmp_path / "out").exists()

    write_folder(name, tmp_path / "whole")
    refused(tmp_path / "absent", "no such directory")
    refused(tmp_path / "whole", "use_scaled_rope is not set", "--rope-scaling-factor", 8)
    second = tmp_path / "whole" / "consolidated.01.pth"
    parts = torch.load(second)
    torch.save({**parts, "layers.0.attention.bias": torch.zeros(1)}, tmp_path / "whole" / "consolidated.00.pth")
    refused(tmp_path / "whole", "layers.0.attention.bias")
    del parts["layers.2.attention.wo.weight"]
    torch.save(parts, second)
    refused(tmp_path / "whole", "layers.2.attention.wo.weight")
    second.write_bytes(b"cut")
    refused(tmp_path / "whole", "consolidated.01.pth: not readable")
    second.rename(tmp_path / "whole" / "consolidated.02.pth")
    refused(tmp_path / "whole", "ranks are missing")
    (tmp_path / "whole" / "params.json").write_text("{}")
    refused(tmp_path / "whole", "params.json: dim is missing")


def test_tokenizers_of_llama_2_go_along_and_those_of_llama_3_do_not(pool: WorkerPool, tmp_path: Path) -> None:
    import sentencepiece

    from megatron_steel.checkpoint.state import load_tokenizer

    write_folder("llama-2-one-rank", tmp_path / "two")
    (tmp_path / "text").write_text("it was the whale that the whale was\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(tmp_path / "two" / "tokenizer"), vocab_size=40,
        model_type="bpe", minloglevel=2, num_threads=1, hard_vocab_limit=False,
    )  # fmt: skip
    out, err = pool.run(1, work_import, flags(tmp_path / "two", tmp_path / "two-ours"), join=False)[0]
    assert err == "" and "without" not in out
    tokenizer = load_tokenizer(tmp_path / "two-ours" / "iter_0000000")
    assert tokenizer.name == "SentencePieceTokenizer" and tokenizer.decode(tokenizer.encode("the whale")) == "the whale"
    write_folder("llama-3.2-tied", tmp_path / "three")
    (tmp_path / "three" / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")
    out, err = pool.run(1, work_import, flags(tmp_path / "three", tmp_path / "three-ours"), join=False)[0]
    assert err == "" and "without a tokenizer" in out
