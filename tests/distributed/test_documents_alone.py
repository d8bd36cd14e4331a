"""Documents under a mask are alone: logits, losses and gradients of a packed block against each document by itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import as_flags, run, training_rows
from pool import WorkerPool
from tiny_run import LAYOUTS, Layout, Trace, largest_relative, options, whole_weights, work_train, write_data

from megatron_steel.config.load import from_flat
from megatron_steel.data.batch import Batch
from megatron_steel.data.document_batches import BatchBuilder
from megatron_steel.evaluate.heldout import score_checkpoint
from megatron_steel.metrics.sinks import METRICS_FILE, read_metrics
from megatron_steel.model.build import Model, build_model
from megatron_steel.objective.language import packed_documents, run_micro_batches
from megatron_steel.runtime import world as runtime

ROWS, EOD = 61, 60
LENGTHS = ((5, 12, 7), (9, 3, 12))
"""Documents of two rows of 24, each with its end-of-document token."""
GPT = {"normalization": "LayerNorm", "gated_linear_unit": False, "add_bias_linear": True, "num_query_groups": None}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {"add_qkv_bias": True},
    "qwen3": {"qk_layernorm": True},
    "mixtral": {"num_experts": 4, "window_size": 4},
    "deepseek_v2": {
        "num_query_groups": None,
        "multi_latent_attention": True,
        "kv_lora_rank": 12,
        "qk_head_dim": 6,
        "qk_pos_emb_head_dim": 4,
        "v_head_dim": 8,
        "num_experts": 4,
        "moe_router_pre_softmax": True,
    },
    "llama": {"num_query_groups": 4, "untie_embeddings_and_output_weights": True},
    "smollm3": {"window_size": 4, "full_attention_layers": [1], "no_rope_layers": [0]},
    "gpt_neox": {**GPT, "activation": "gelu", "parallel_residual": True, "rotary_percent": 0.5},
    "gpt2": {**GPT, "activation": "gelu_tanh", "position_embedding_type": "learned_absolute"},
    "steel": {"add_qkv_bias": True, "ffn_type": "softmoe_causal", "mlp_type": "senet", "soft_experts": 4},
}
SIZES = {
    "num_layers": 3,
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "init_method_std": 0.2,
    "max_position_embeddings": 64,
}
TOLERANCE = 1e-6


def windows(changed: bool = False) -> np.ndarray:
    """Two rows of documents and the token after them, [2, 25]; ``changed`` gives the first token another value."""
    rng, rows = np.random.default_rng(0), []
    for lengths in LENGTHS:
        documents = [[*rng.integers(0, EOD, length - 1), EOD] for length in lengths]
        rows.append([*(token for document in documents for token in document), 7])
    tokens = np.array(rows, np.int64)
    tokens[0, 0] = (tokens[0, 0] + changed) % EOD
    return tokens


def build_batch(tokens: np.ndarray, **flags: bool) -> Batch:
    shape = (1, len(tokens))
    builder = BatchBuilder(
        seq_length=tokens.shape[1] - 1,
        tensor_group=None,
        reads_data=True,
        device=torch.device("cpu"),
        eod_id=EOD,
        **flags,
    )
    host = builder.read(lambda _, row: tokens[row], shape)
    return builder.build(host, np.zeros(shape, np.int64), np.ones(shape, dtype=bool))[0]


def alone(tokens: np.ndarray) -> list[Batch]:
    """Each document as a batch of one row, its labels those it has in the block."""
    batches = []
    for row, lengths in zip(tokens, LENGTHS, strict=False):
        ends = np.cumsum(lengths)
        batches += [build_batch(row[None, end - length : end + 1]) for end, length in zip(ends, lengths, strict=True)]
    return batches


def logits_of(model: Model, batch: Batch) -> torch.Tensor:
    """Logits of all tokens of a batch, [B * S, V]."""
    packed = packed_documents(batch)
    inputs = (batch.tokens_BS, batch.position_ids_BS)
    if packed is not None:
        inputs = tuple(tensor.reshape(1, -1) for tensor in inputs)
    with torch.no_grad():
        output = model.language_models()[0](*inputs, None, packed_seq_params=packed)
    return output[..., :ROWS].flatten(0, 1)


def gradients(model: Model, batch: Batch) -> tuple[dict[str, np.ndarray], float]:
    """(gradient of the summed loss by parameter, the summed loss), through the schedule that training uses."""
    for chunk in model.chunks:
        chunk.zero_grad_buffer()
    outputs = run_micro_batches(model, [batch], 1, forward_only=False)
    named = model.language_models()[0].named_parameters()
    loss = float(outputs[0]["loss_by_sample"].sum())
    return {name: weight.main_grad.double().numpy() for name, weight in named}, loss


def work_documents(family: str, rows: int) -> dict[str, float]:
    """Largest differences between a packed block and its documents alone, and what the mask keeps out."""
    world = runtime.start()
    flat: dict[str, Any] = {**SIZES, "model_family": family, **FAMILIES[family], "attention_dropout": 0.0}
    model = build_model(from_flat(flat), ROWS, world)
    tokens, changed = windows()[:rows], windows(changed=True)[:rows]
    found: dict[str, float] = {}
    separate = torch.cat([logits_of(model, batch) for batch in alone(tokens)])
    found["spread"] = float(separate.std())
    for name, flags in (("mask", {}), ("mask, positions", {"reset_position_ids": True})):
        logits = logits_of(model, build_batch(tokens, reset_attention_mask=True, **flags))
        found[f"logits, {name}"] = float((logits - separate).abs().max())
        other = logits_of(model, build_batch(changed, reset_attention_mask=True, **flags))
        own = LENGTHS[0][0]
        found[f"change inside, {name}"] = float((other - logits)[:own].abs().max())
        found[f"change beyond, {name}"] = float((other - logits)[own:].abs().max())
    for name, flags in (("no flag", {}), ("positions", {"reset_position_ids": True})):
        one, other = (logits_of(model, build_batch(ids, **flags)) for ids in (tokens, changed))
        found[f"change beyond, {name}"] = float((other - one)[LENGTHS[0][0] : 24].abs().max())
        found[f"change in row 2, {name}"] = float((other - one)[24:].abs().max()) if rows == 2 else 0.0
    whole, loss = gradients(model, build_batch(tokens, reset_attention_mask=True, reset_position_ids=True))
    parts = [gradients(model, batch) for batch in alone(tokens)]
    found["loss"] = abs(loss - sum(part[1] for part in parts)) / loss
    summed = {name: sum(part[0][name] for part in parts) for name in whole}
    scale = max(float(np.abs(value).max()) for value in summed.values())
    found["gradients"] = max(float(np.abs(whole[name] - summed[name]).max()) for name in whole) / scale
    return found


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_document_under_the_mask_is_alone(pool: WorkerPool, family: str, rows: int) -> None:
    found = pool.run(1, work_documents, family, rows, join=False)[0]
    print({name: f"{value:.1e}" for name, value in found.items()})
    assert found["spread"] > 0.3, "the model must say something"
    for name in ("mask", "mask, positions"):
        # Rotary angles only tell distances; a table of positions knows where in the row a document lies.
        if family != "gpt2" or "positions" in name:
            assert found[f"logits, {name}"] < TOLERANCE * 10
        assert found[f"change inside, {name}"] > 1e-2
        assert found[f"change beyond, {name}"] == 0.0
    for name in ("no flag", "positions"):
        assert found[f"change beyond, {name}"] > 1e-2
        assert found[f"change in row 2, {name}"] == 0.0
    assert found["loss"] < TOLERANCE and found["gradients"] < TOLERANCE


STEPS = 8
MASKED = {"reset_attention_mask": True, "reset_position_ids": True}
# Attention of a model that is near its usual initialisation is nearly uniform, and positions say nothing.
SPREAD = {"init_method_std": 0.15}
# The two stages in the middle have no use for tokens but to know where documents begin.
PP4 = Layout(ranks=4, flags={"pipeline_model_parallel_size": 4})
Train = Callable[..., list[Trace]]


@pytest.fixture(scope="module")
def train(pool: WorkerPool, tmp_path_factory: pytest.TempPathFactory) -> Train:
    """Train on a layout; what was run before is remembered."""
    prefix = write_data(tmp_path_factory.mktemp("data"))
    known: dict[str, list[Trace]] = {}

    def on(layout: str, **changes: Any) -> list[Trace]:
        key = f"{layout} {sorted(changes.items())}"
        if key not in known:
            spread = PP4 if layout == "pp4" else LAYOUTS[layout]
            flat = options(prefix, spread.flags, SPREAD, changes)
            known[key] = pool.run(spread.ranks, work_train, flat, STEPS, join=False)
        return known[key]

    return on


@pytest.mark.parametrize("layout", ["tp2-sp", "pp2", "pp2-interleaved", "dp2", "tp2-pp2", "pp4"])
def test_layouts_agree_with_one_process(train: Train, layout: str) -> None:
    """The loss counts other tokens on every replica, and documents differ in every micro-batch."""
    changes = {**MASKED, "eod_mask_loss": True}
    theirs, ours = train("1", **changes), train(layout, **changes)
    for trace in ours:
        assert trace.losses == ours[0].losses and trace.grad_norms == ours[0].grad_norms
    loss = largest_relative(ours[0].losses, theirs[0].losses)
    norm = largest_relative(ours[0].grad_norms, theirs[0].grad_norms)
    mine, reference = whole_weights(ours), whole_weights(theirs)
    weights = max(float(np.abs(mine[name] - reference[name]).max()) for name in reference)
    print(f"largest difference: loss {loss:.1e}, gradient norm {norm:.1e}, weights {weights:.1e}")
    assert loss < 1e-5 and norm < 1e-5 and weights < 2e-5


@pytest.mark.parametrize("micro_batch_size", [1, 8])
def test_split_into_micro_batches_does_not_matter(train: Train, micro_batch_size: int) -> None:
    theirs, ours = train("1", **MASKED), train("1", **MASKED, micro_batch_size=micro_batch_size)
    assert largest_relative(ours[0].losses, theirs[0].losses) < 1e-5
    assert largest_relative(ours[0].grad_norms, theirs[0].grad_norms) < 1e-5


def test_flags_change_the_run(train: Train) -> None:
    """Rotary embeddings are relative: under the mask the positions' origin is rounding, without it it is not."""
    plain = train("1")[0].losses
    masked = train("1", reset_attention_mask=True)[0].losses
    both = train("1", **MASKED)[0].losses
    positions = train("1", reset_position_ids=True)[0].losses
    print({"rounding": largest_relative(both, masked), "positions": largest_relative(plain, positions)})
    assert largest_relative(both, masked) < 1e-5
    for one, other in ((plain, masked), (plain, positions), (masked, positions)):
        assert largest_relative(one, other) > 1e-3


def test_bfloat16(train: Train) -> None:
    exact, rounded = train("1", **MASKED)[0], train("1", **MASKED, bf16=True)[0]
    assert largest_relative(rounded.losses, exact.losses) < 5e-3


def work_score(checkpoint: str, prefix: str) -> float:
    """Loss of the first 8 windows, as tools/evaluate.py computes it."""
    scored = score_checkpoint(
        Path(checkpoint), [prefix], runtime.start(), seq_length=None, micro_batch_size=4, max_samples=8
    )
    return next(iter(scored.values())).loss


def test_from_the_command_line(pool: WorkerPool, tmp_path: Path) -> None:
    """Train, validate, save; the checkpoint is scored under the mask it was trained with."""
    prefix = write_data(tmp_path)
    flags = options(
        prefix, MASKED, SPREAD, save=str(tmp_path / "run"), train_iters=3, log_interval=1, lr_warmup_iters=0
    )
    flags |= {"valid_data_path": [f"held={prefix}"], "eval_iters": 1}
    assert run(tmp_path / "masked", as_flags(flags)) == [0], (tmp_path / "masked/err0").read_text()
    assert list(training_rows(tmp_path / "run")) == [1, 2, 3]
    valid = [row for row in read_metrics(tmp_path / "run" / METRICS_FILE) if row.get("split") == "valid"]
    scored = pool.run(1, work_score, str(tmp_path / "run/iter_0000003"), prefix, join=False)[0]
    print(f"valid {valid[-1]['loss']}, scored {scored}")
    assert scored == pytest.approx(valid[-1]["loss"], rel=1e-6)
    refused = as_flags({**flags, "save": str(tmp_path / "local"), "transformer_impl": "local"})
    assert run(tmp_path / "refused", refused) == [2]
    assert "--transformer-impl local" in (tmp_path / "refused/err0").read_text()
