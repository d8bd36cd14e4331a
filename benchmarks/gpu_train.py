"""Training speed on one GPU: models, backends, precisions, and what each fused part is worth.

    python benchmarks/gpu_train.py --record benchmarks/records/gpu_train_NAME           # within 8 minutes
    python benchmarks/gpu_train.py --stages engine fp8 --minutes 8 --record ...
    python benchmarks/gpu_train.py --smoke --record /some/where                         # on a CPU: does it run

Every measurement is a process of its own that trains with the product's loop (``gpu_leg.py``) and measures square
products of bf16 before and after: a model's FLOP/s are given as a share of the larger of the two, and of the data
sheet. Micro-batch sizes are tried from the largest down until memory suffices; those that did not are rows too. Blocks
of steps are timed without waiting inside them; the median block counts. The gate: the first step of one model and shape
has the same loss on all backends and without any fused part, within bf16's rounding. Rows are written as they come, so
a run that is cut off keeps its own. Peers: plain megatron-core (``plain_megatron.py``).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from megatron_steel.text.files import replacement

LEG = Path(__file__).with_name("gpu_leg.py")
# Of the loss of a first step, about ln(vocabulary): bf16 keeps 8 bits, and the mean over 65,536 tokens more.
GATE = 2e-3
TOKENS = 65_536
PARTS = ("kernels", "cross_entropy", "rms_norm", "swiglu", "rotate", "flash attention", "fused AdamW")
STAGES = ("torch", "engine", "fp8", "plain", "local", "ablation", "large")
FP8 = {"fp8_format": "hybrid"}
PURE = {"pure_bf16": True}
Case = dict[str, Any]


def case(model: str, seq_length: int, backend: str, most: int = 8, **more: Any) -> Case:
    """A measurement; ``most`` is the largest micro-batch that is tried.

    Beyond 8 GiB of bf16 logits (32,768 tokens of 128,256 ids) the product is computed twice, so larger is not faster.
    """
    shape = {"model": model, "seq_length": seq_length, "samples": TOKENS // seq_length, "most": most}
    pace = {"warmup": 3, "steps": 4, "blocks": 3, "matmul_seconds": 2.0}
    return {**shape, **pace, "backend": backend, "bf16": True, **more}


def stage_cases(stage: str) -> list[Case]:
    """The measurements of a stage, the most important first."""
    recipes = [{**FP8, "fp8_recipe": recipe} for recipe in ("tensorwise", "delayed", "blockwise")]
    cases: dict[str, list[Case]] = {
        "torch": [
            case("llama3.2_1b", 4096, "torch"),
            case("olmo2_1b", 4096, "torch"),
            case("llama3.2_1b", 2048, "torch", 16),
            case("steel_1b", 2048, "torch"),
        ],
        "engine": [
            case("llama3.2_1b", 4096, "transformer_engine"),
            case("olmo2_1b", 4096, "transformer_engine"),
        ],
        "fp8": [case("llama3.2_1b", 4096, "transformer_engine", flags=recipe) for recipe in recipes],
        "plain": [case("llama3.2_1b", 4096, "plain", 4)],
        "local": [case("llama3.2_1b", 4096, "local", 4)],
        "ablation": [
            *(case("llama3.2_1b", 4096, "torch", 8, without=part) for part in PARTS),
            case("llama3.2_1b", 4096, "torch", 8, flags={"gradient_accumulation_fusion": False}),
        ],
        # Main weights and moments in fp32 are 18 bytes of each of 8e9 weights: more than one GPU has.
        "large": [case("llama3_8b", 4096, name, 4, flags=PURE) for name in ("torch", "transformer_engine")],
    }
    return cases[stage]


def smoke_cases() -> list[Case]:
    """All paths that a CPU has, in seconds."""
    small: Case = {"warmup": 0, "steps": 1, "blocks": 2, "matmul_seconds": 0.02, "samples": 4, "bf16": False}
    shape: Case = {"model": "smoke", "seq_length": 64, "most": 2, **small}
    return [{**shape, "backend": backend} for backend in ("torch", "plain")] + [
        *({**shape, "backend": "torch", "without": part} for part in ("kernels", "fused AdamW")),
        {**shape, "backend": "transformer_engine"},
    ]


def run_leg(one: Case, seconds: float) -> dict[str, Any]:
    """The result of a measurement: its JSON, or why there is none."""
    command = [sys.executable, str(LEG), json.dumps(one)]
    path = os.pathsep.join([str(LEG.parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, env=environment)
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {seconds:.0f} s"}
    if done.returncode == 0:
        row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return row
    if "OutOfMemoryError" in done.stderr or "out of memory" in done.stderr:
        return {"error": "out of memory"}
    return {"error": " ".join(done.stderr.strip().splitlines()[-1:])[:300] or f"exit code {done.returncode}"}


def measurements(cases: Sequence[Case], deadline: float) -> Iterator[dict[str, Any]]:
    """Rows of all cases while there is time; micro-batches that do not fit give a row each before a smaller one."""
    for one in cases:
        micro_batch = min(one["most"], one["samples"])
        while micro_batch:
            left = deadline - time.monotonic()
            if left < 20 and deadline != math.inf:
                yield {**one, "micro_batch": micro_batch, "error": "no time left"}
                break
            row = run_leg({**one, "micro_batch": micro_batch}, min(left, 240))
            yield {**one, "micro_batch": micro_batch, **row}
            if row.get("error") != "out of memory":
                break
            micro_batch //= 2


def gate(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Rows whose first loss is not that of the same model and shape on the first backend that ran."""
    first: dict[tuple[str, int], float] = {}
    wrong = []
    for row in rows:
        if "loss" not in row or "fp8_format" in row.get("flags", {}):
            continue
        if row["backend"].startswith("plain"):
            # Its weights and tokens are others: what random ones know is nothing.
            if not abs(row["loss"] - math.log(row["vocabulary"])) < 0.5:
                wrong.append(f"{describe(row)}: first loss {row['loss']:.5f}")
            continue
        wanted = first.setdefault((row["model"], row["seq_length"]), row["loss"])
        if abs(row["loss"] / wanted - 1) > GATE:
            wrong.append(f"{describe(row)}: first loss {row['loss']:.5f}, not {wanted:.5f}")
    return wrong


def describe(row: dict[str, Any]) -> str:
    """What was measured, in words."""
    flags = [f"{name}={value}" for name, value in row.get("flags", {}).items()]
    taken = [f"without {row['without']}"] if row.get("without") else []
    kind = "bf16" if row["bf16"] else "fp32"
    return ", ".join([row["model"], str(row["seq_length"]), row["backend"], kind, *flags, *taken])


def facts(command: str) -> dict[str, str]:
    """Hardware and versions."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else f"no GPU ({platform.machine()})"
    found = {"hardware": gpu, "date": date.today().isoformat(), "command": command, "python": platform.python_version()}
    for package in ("torch", "megatron-core", "triton", "transformer-engine"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "-"
    return found


def markdown(record: dict[str, Any]) -> str:
    """The record as text."""
    lines = ["# Training speed on a GPU", ""]
    lines += [f"- {name}: {value}" for name, value in record["facts"].items()]
    lines += [f"- gate: {line}" for line in record["gate"] or ["first losses agree"]]
    lines += ["", "| what | micro-batch | tokens/s | TFLOP/s | of matmul | MFU | step ms | peak GB | first loss |"]
    lines.append("|---|---|---|---|---|---|---|---|---|")
    for row in record["rows"]:
        head = f"| {describe(row)} | {row['micro_batch']} |"
        if "error" in row:
            lines.append(f"{head} {row['error']} |||||||")
            continue
        lines.append(
            f"{head} {row['tokens_per_s']:,.0f} | {row['tflops']:.1f} | {row['share_of_matmul']:.3f} | "
            f"{row['mfu']:.3f} | {row['step_ms']:.1f} | {row['peak_gb']:.1f} | {row['loss']:.4f} |"
        )
    return "\n".join(lines) + "\n"


def write(path: Path, record: dict[str, Any]) -> None:
    """``path``.json and .md, each whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for name, text in ((".json", json.dumps(record, indent=1) + "\n"), (".md", markdown(record))):
        with replacement(path.with_name(path.name + name)) as temporary:
            temporary.write_text(text, encoding="utf-8")


def main() -> None:
    """Measure, and write after every row; exit code 1 when the gate fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="in this order")
    parser.add_argument("--minutes", type=float, default=8.0, help="no measurement begins after them")
    parser.add_argument("--record", type=Path, required=True, help="RECORD.json and RECORD.md are written")
    parser.add_argument("--smoke", action="store_true", help="tiny models, also on a CPU")
    options = parser.parse_args()
    command = " ".join(["python", "benchmarks/gpu_train.py", *sys.argv[1:]])
    record: dict[str, Any] = {"facts": facts(command), "gate": [], "rows": []}
    if record["facts"]["hardware"].startswith("no GPU") and not options.smoke:
        parser.error("no GPU is visible; --smoke tries the program on a CPU")
    cases = smoke_cases() if options.smoke else [one for stage in options.stages for one in stage_cases(stage)]
    deadline = math.inf if options.smoke else time.monotonic() + 60 * options.minutes
    for row in measurements(cases, deadline):
        record["rows"].append(row)
        record["gate"] = gate(record["rows"])
        write(options.record, record)
        print(markdown(record).splitlines()[-1], flush=True)
    for line in record["gate"]:
        print(line, file=sys.stderr)
    raise SystemExit(1 if record["gate"] else 0)


if __name__ == "__main__":
    main()
