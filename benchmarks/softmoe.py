"""Training speed of the causal soft mixture against a dense SwiGLU with equal FLOPs per token, on a CPU.

    python benchmarks/softmoe.py --rounds 5 --output benchmarks/records/softmoe

First the gate: the layer and its gradient against loops over tokens, experts and slots in float64, and the two layers'
FLOPs. Then each round times both sides next to each other in both orders; a ratio is taken within a round, and what is
reported is the median over rounds. Cases: one layer of steel_1b, one of a small model, and training steps of that small
model as a whole. Exits with 1 when the layer of steel_1b is below --target.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from megatron_steel.config.load import from_flat
from megatron_steel.config.schema import Config
from megatron_steel.plan.parameters import feed_forward
from megatron_steel.runtime import cpu, device, world
from megatron_steel.runtime.world import World

SMALL = {"num_layers": 4, "hidden_size": 512, "num_attention_heads": 8, "vocab_size": 8192}
LARGE = {"num_layers": 1, "hidden_size": 1792, "num_attention_heads": 32, "vocab_size": 1024}


@dataclasses.dataclass(frozen=True)
class Case:
    """What is timed: a feed-forward layer, or optimizer steps of a model."""

    name: str
    sizes: dict[str, int]
    batch: int
    seq_length: int
    whole: bool
    repeats: int


CASES = (
    Case("layer of steel_1b", LARGE, 1, 1024, False, 2),
    Case("layer of the small model", SMALL, 4, 512, False, 5),
    Case("small model", SMALL, 4, 512, True, 3),
)


def configure(case: Case, soft: bool) -> Config:
    """Options of one side: six experts and one slot each as Steel-LLM has them, or the dense layer of equal size."""
    hidden = case.sizes["hidden_size"]
    flat: dict[str, Any] = {
        **case.sizes, "model_family": "steel" if soft else "qwen2", "ffn_hidden_size": hidden if soft else 2 * hidden,
        "add_qkv_bias": True, "seq_length": case.seq_length, "micro_batch_size": case.batch,
        "max_position_embeddings": 4096,
    }  # fmt: skip
    if soft:
        flat |= {"ffn_type": "softmoe_causal", "mlp_type": "senet", "soft_experts": 6, "mlp_div_ratio": 4}
    return from_flat(flat)


def build(config: Config, here: World) -> Any:
    """The model of one side, for training."""
    from megatron_steel.model.build import build_model

    assert config.size.vocab_size is not None
    return build_model(config, config.size.vocab_size, here)


def by_hand(x: np.ndarray, weights: dict[str, np.ndarray]) -> np.ndarray:
    """The causal form of one sample [L, d] in float64, token by token, expert by expert; one slot each."""

    def gate(v: np.ndarray) -> np.ndarray:
        left, right = np.split(v, 2)
        return left / (1 + np.exp(-left)) * right

    phi = weights["phi"][..., 0]
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    z = unit @ (weights["scale"] * phi / np.linalg.norm(phi, axis=0))
    y = np.zeros_like(x)
    for t in range(len(x)):
        combine = np.exp(z[t]) / np.exp(z[t]).sum()
        for j in range(phi.shape[1]):
            dispatch = np.exp(z[: t + 1, j]) / np.exp(z[: t + 1, j]).sum()
            inner = gate(weights["experts.linear_fc1.weight"][j] @ (dispatch @ unit[: t + 1]))
            y[t] += combine[j] * gate(weights["experts.linear_fc2.weight"][j] @ inner)
    return y


def gate(here: World) -> str:
    """Values and the slope along a random direction against :func:`by_hand`; ``SystemExit`` when they differ."""
    case = Case("gate", {**SMALL, "num_layers": 1, "hidden_size": 64}, 1, 80, False, 1)
    layer = build(configure(case, True), here).language_models()[0].decoder.layers[0].mlp.double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    x, push = (torch.randn(80, 1, 64, generator=generator, dtype=torch.float64) for _ in range(2))
    weights = {name: parameter.detach().numpy() for name, parameter in layer.named_parameters()}
    x.requires_grad_()
    y = layer(x)[0]
    (grad,) = torch.autograd.grad(y.square().sum(), x)
    step = 1e-6 * push
    ends = [(by_hand((x + sign * step).detach()[:, 0].numpy(), weights) ** 2).sum() for sign in (1, -1)]
    slope, wanted = float((grad * push).sum()), (ends[0] - ends[1]) / 2e-6
    truth = by_hand(x.detach()[:, 0].numpy(), weights)
    value = float(np.abs(y.detach()[:, 0].numpy() - truth).max() / np.abs(truth).max())
    if not (value < 1e-12 and abs(slope / wanted - 1) < 1e-5):
        raise SystemExit(f"error: the layer is off by {value:.1e}, its slope by {slope / wanted - 1:.1e}")
    return f"largest difference {value:.1e} of the largest value, slope {abs(slope / wanted - 1):.1e}"


def layer_pass(case: Case, soft: bool, here: World) -> Callable[[], None]:
    """Forward and backward of one feed-forward."""
    layer = build(configure(case, soft), here).language_models()[0].decoder.layers[0].mlp
    x = torch.randn(case.seq_length, case.batch, case.sizes["hidden_size"], requires_grad=True)
    # Of the size a loss has: denormal numbers are slow.
    grad = torch.randn_like(x)

    def run() -> None:
        x.grad = None
        for parameter in layer.parameters():
            parameter.grad = None
        layer(F.rms_norm(x, x.shape[-1:]))[0].backward(grad)

    return run


def model_step(case: Case, soft: bool, here: World) -> Callable[[], None]:
    """One optimizer step on random tokens."""
    from megatron_steel.data.batch import Batch
    from megatron_steel.objective.language import NextToken
    from megatron_steel.optim.optimizer import build_optimizer
    from megatron_steel.train.step import train_step

    config = configure(case, soft)
    model = build(config, here)
    optimizer = build_optimizer(config, model)
    tokens = torch.randint(0, case.sizes["vocab_size"], (case.batch, case.seq_length + 1))
    batch = Batch(
        tokens_BS=tokens[:, :-1].contiguous(),
        labels_BS=tokens[:, 1:].contiguous(),
        loss_mask_BS=torch.ones(case.batch, case.seq_length),
        position_ids_BS=torch.arange(case.seq_length).expand(case.batch, -1).contiguous(),
        sources_B=np.zeros(case.batch, dtype=np.int64),
        valid_tokens=case.batch * case.seq_length,
    )
    return lambda: (
        None
        if train_step(model, optimizer, [batch], NextToken(), batch.valid_tokens, here, 1e-4, 0.1, 1.0, 1)
        else None
    )


def seconds(run: Callable[[], None], repeats: int) -> float:
    """Median of some runs in a row."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def measure(case: Case, rounds: int, here: World) -> dict[str, Any]:
    """Tokens per second of both sides in every round, and medians."""
    make = model_step if case.whole else layer_pass
    soft, dense = make(case, True, here), make(case, False, here)
    tokens = case.batch * case.seq_length
    rows = []
    for side in (soft, dense):
        side()
    for number in range(rounds):
        order = [(soft, "soft"), (dense, "dense")]
        took: dict[str, list[float]] = {"soft": [], "dense": []}
        for side, name in order + order[::-1] if number % 2 == 0 else order[::-1] + order:
            took[name].append(seconds(side, case.repeats))
        speeds = {name: tokens / statistics.mean(times) for name, times in took.items()}
        rows.append({**speeds, "ratio": speeds["soft"] / speeds["dense"]})
        print(f"{case.name}, round {number}: {speeds['soft']:,.0f} / {speeds['dense']:,.0f}", flush=True)
    medians = {name: statistics.median(row[name] for row in rows) for name in ("soft", "dense", "ratio")}
    return {"case": case.name, "sizes": case.sizes, "batch": case.batch, "seq_length": case.seq_length,
            "rounds": rows, "median": medians}  # fmt: skip


def report(record: dict[str, Any]) -> str:
    """The record as Markdown."""
    lines = ["# Causal soft mixture against a dense SwiGLU of equal FLOPs, training on a CPU", ""]
    lines += [f"- {name}: {record[name]}" for name in ("hardware", "versions", "date", "command", "gate", "flops")]
    lines += [
        "",
        "Tokens per second, forward and backward (the model: whole optimizer steps); medians of the rounds.",
        "",
    ]
    lines += ["| case | causal soft mixture | dense SwiGLU | ratio | ratios of the rounds |", "|---|---|---|---|---|"]
    for row in record["results"]:
        median, ratios = row["median"], ", ".join(f"{each['ratio']:.2f}" for each in row["rounds"])
        shape = f"{row['case']} (hidden {row['sizes']['hidden_size']}, {row['batch']} x {row['seq_length']} tokens)"
        lines.append(f"| {shape} | {median['soft']:,.0f} | {median['dense']:,.0f} | {median['ratio']:.2f} | {ratios} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Gate, measure, print, and write the record when asked to."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", help="write OUTPUT_DATE.json and .md")
    parser.add_argument("--target", type=float, default=0.7, help="lowest ratio of the layer of steel_1b")
    options = parser.parse_args(argv)
    if not cpu.install():
        raise SystemExit("error: there is a GPU here; this measures a CPU")
    device.keep_freed_memory()
    here = world.start()
    gated = gate(here)
    print(f"gate: {gated}")
    sizes = [configure(CASES[0], soft).size for soft in (True, False)]
    soft, dense = (feed_forward(size, 0).matmul for size in sizes)
    day = time.strftime("%Y-%m-%d")
    record: dict[str, Any] = {
        "hardware": f"{platform.machine()} CPU shared with other work, {torch.get_num_threads()} threads",
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}",
        "date": day,
        "command": " ".join(["python", "benchmarks/softmoe.py", *(sys.argv[1:] if argv is None else argv)]),
        "gate": gated,
        "flops": f"multiply-adds per token of the layer of steel_1b: {soft:,} and {dense:,}",
        "results": [measure(case, options.rounds, here) for case in CASES],
    }
    text = report(record)
    print(text)
    if options.output:
        Path(f"{options.output}_{day}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        Path(f"{options.output}_{day}.md").write_text(text, encoding="utf-8")
    return int(record["results"][0]["median"]["ratio"] < options.target)


if __name__ == "__main__":
    raise SystemExit(main())
