"""CPU training speed against Hugging Face ``Trainer``: same weights, same batches, same optimizer, side by side.

    python benchmarks/cpu_train.py                       # both sizes, fp32 behind the equality gate, and bf16 rows
    python benchmarks/cpu_train.py --cases steel_tiny --rounds 2

For each case: a model with random weights is written by ``transformers``; we import it with our own tool. Both sides
train on the same windows; their losses must agree at every step before anything is timed. Every timed run is a fresh
process; rounds are ABBA (ours, theirs, theirs, ours), so a slow drift of the machine cancels. The protocol and how to
read the record are in benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

Settings = dict[str, Any]
SIDES = ("ours", "theirs")
MEASURES = {"steady": "steady, median step", "best_step": "steady, fastest step", "end_to_end": "end to end"}
LR, DECAY, BETAS, EPS, CLIP = 3e-4, 0.1, (0.9, 0.95), 1e-8, 1.0
GATE_STEPS, GATE = 15, 1e-5
DISTURBED = 0.1  # cores that others keep busy
THREADS = 2


@dataclass(frozen=True, kw_only=True)
class Case:
    """One model and batch. ``sizes`` are our flags; ``steps`` are timed after ``warmup``."""

    sizes: dict[str, Any]
    batch: int
    seq_length: int
    warmup: int
    steps: int
    bf16: bool = False

    @property
    def tokens(self) -> int:
        """Tokens per optimizer step."""
        return self.batch * self.seq_length


TINY = {"model": "steel_tiny", "vocab_size": 4096}
FIFTY = {
    "model_family": "qwen2",
    "add_qkv_bias": True,
    "num_layers": 12,
    "hidden_size": 512,
    "ffn_hidden_size": 1792,
    "num_attention_heads": 8,
    "num_query_groups": 4,
    "vocab_size": 16384,
}
CASES = {
    "steel_tiny": Case(sizes=TINY, batch=8, seq_length=256, warmup=10, steps=60),
    "50m": Case(sizes=FIFTY, batch=4, seq_length=512, warmup=3, steps=8),
    "50m_bf16": Case(sizes=FIFTY, batch=4, seq_length=512, warmup=3, steps=8, bf16=True),
}

# What a user of Trainer on a CPU can set; the first is its default (fused AdamW, scaled_dot_product_attention).
THEIRS: dict[str, Settings] = {
    "default": {},
    "adamw_torch": {"optim": "adamw_torch"},
    "torch_compile": {"torch_compile": True},
    "one loader worker": {"dataloader_num_workers": 1, "dataloader_persistent_workers": True},
}
THEIRS_BF16: dict[str, Settings] = {
    "autocast": {"bf16": True},
    "bf16 weights": {"dtype": "bfloat16"},
    "autocast, torch_compile": {"bf16": True, "torch_compile": True},
}


def our_flags(case: Case, folder: Path, steps: int, clip: float) -> list[str]:
    """The command line of our side, as for ``python -m megatron_steel.pretrain``."""
    flags = ["--model", str(folder / "hf"), "--load", str(folder / "ours"), "--finetune"]
    flags += ["--train-data-path", str(folder / "data"), "--tokenizer-model", str(folder / "tokenizer")]
    flags += ["--seq-length", str(case.seq_length), "--micro-batch-size", str(case.batch), "--train-iters", str(steps)]
    flags += ["--lr", str(LR), "--lr-decay-style", "constant", "--weight-decay", str(DECAY), "--clip-grad", str(clip)]
    flags += ["--adam-beta1", str(BETAS[0]), "--adam-beta2", str(BETAS[1]), "--adam-eps", str(EPS)]
    flags += ["--transformer-impl", "torch", "--log-interval", "1000000", "--max-epochs-per-source", "1"]
    return flags + (["--bf16"] if case.bf16 else [])


def make(case: Case, folder: Path) -> None:
    """Write the model (Hugging Face folder and our checkpoint) and the data (indexed file and its windows in order)."""
    from megatron_steel.config.load import apply, parse
    from megatron_steel.config.presets import PRESETS
    from megatron_steel.config.schema import Config
    from megatron_steel.runtime import cpu

    cpu.install()
    import numpy as np
    import torch
    import transformers
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    from megatron_steel.checkpoint.hf import import_hf
    from megatron_steel.config.hf_sizes import hf_from_sizes
    from megatron_steel.data.indexed import IndexedWriter
    from megatron_steel.runtime import world as runtime
    from megatron_steel.train.prepare import prepare

    config = Config()
    sizes = dict(case.sizes)
    apply(config, PRESETS.get(sizes.pop("model", ""), {}) | sizes, "benchmark")
    vocab = config.size.vocab_size
    assert vocab is not None
    token_ids = {f"{name}_token_id": None for name in ("bos", "eos", "pad")}
    hf_config = transformers.AutoConfig.for_model(**hf_from_sizes(config.size, vocab, token_ids, "float32"))
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32).save_pretrained(folder / "hf")
    words = {f"w{index}": index for index in range(vocab)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w1").save_pretrained(
        folder / "tokenizer"
    )
    world = runtime.start()
    import_hf(folder / "hf", folder / "ours")

    steps = max(case.warmup + case.steps, GATE_STEPS)
    draws = np.random.default_rng(0).zipf(1.2, size=(steps * case.batch + 1) * case.seq_length)
    with IndexedWriter(str(folder / "data"), np.dtype(np.uint16)) as writer:
        writer.add_document((draws % vocab).astype(np.int64))
        writer.commit()
    prepared = prepare(parse(our_flags(case, folder, steps, CLIP), "cpu_train"))
    (dataset,) = prepared.datasets.values()
    _, _, order = prepared.ledger.samples(0, steps * case.batch)
    np.save(folder / "windows.npy", np.stack([dataset[int(window)] for window in order]))
    runtime.stop(world, failed=False)


def run_ours(case: Case, folder: Path, steps: int, clip: float) -> dict[str, Any]:
    """Train with this engine's own loop; returns the loss and the end time of every step."""
    from megatron_steel.config.load import parse
    from megatron_steel.runtime import cpu

    config = parse(our_flags(case, folder, steps, clip), "cpu_train")
    cpu.install()
    from megatron_steel.runtime import world as runtime
    from megatron_steel.runtime.signals import StopRequest
    from megatron_steel.train.loop import take_step
    from megatron_steel.train.prepare import prepare
    from megatron_steel.train.run import build_session

    prepared = prepare(config)
    world = runtime.start(seed=config.data.seed)
    session = build_session(prepared, world, StopRequest(), time.monotonic())
    ends, sums = [], []
    with session.loader:
        for _ in range(steps):
            take_step(session)
            sums.append(session.loss_sums[0].clone())
            session.loss_sums.zero_()
            ends.append(time.perf_counter())
    runtime.stop(world, failed=False)
    return {"ends": ends, "losses": [loss / weight for loss, weight, _ in (pair.tolist() for pair in sums)]}


def run_theirs(case: Case, folder: Path, steps: int, settings: Settings, gate: bool) -> dict[str, Any]:
    """Train with Hugging Face ``Trainer``; losses are only collected for the gate (they are not for timed runs)."""
    import numpy as np
    import torch
    import transformers

    settings = dict(settings)
    dtype = getattr(torch, settings.pop("dtype", "float32"))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=dtype, attn_implementation="sdpa")
    model.config.use_cache = False
    data = torch.from_numpy(np.load(folder / "windows.npy"))
    rows = [{"input_ids": row[:-1], "labels": row[1:], "shift_labels": row[1:]} for row in data]
    ends: list[float] = []
    losses: list[float] = []

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *_: Any) -> torch.utils.data.Sampler[int]:
            return torch.utils.data.SequentialSampler(rows)  # type: ignore[arg-type]

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            if gate:
                losses.append(loss.item())
            return loss

    arguments = transformers.TrainingArguments(
        output_dir=str(folder / "trainer"),
        use_cpu=True,
        per_device_train_batch_size=case.batch,
        max_steps=steps,
        learning_rate=LR,
        lr_scheduler_type="constant",
        weight_decay=DECAY,
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        adam_epsilon=EPS,
        max_grad_norm=0.0 if gate else CLIP,
        logging_strategy="no",
        save_strategy="no",
        eval_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        **settings,
    )
    InOrder(model=model, args=arguments, train_dataset=rows, callbacks=[Clock()]).train()  # type: ignore[arg-type]
    return {"ends": ends, "losses": losses}


def worker(options: argparse.Namespace) -> None:
    """One fresh process: does ``options.work`` and writes what it measured as JSON."""
    case, folder = CASES[options.cases[0]], Path(options.folder)
    settings = json.loads(options.settings)
    steps = GATE_STEPS if options.gate else case.warmup + case.steps
    if options.work == "make":
        make(case, folder)
        return
    if options.work == "ours":
        result = run_ours(case, folder, steps, 0.0 if options.gate else CLIP)
    else:
        result = run_theirs(case, folder, steps, settings, options.gate)
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")


def busy_seconds() -> float:
    """CPU time all processes of the machine have used since it started; 0 where /proc/stat does not say."""
    if not Path("/proc/stat").is_file():
        return 0.0
    user, nice, system, _idle, _wait, irq, soft_irq = Path("/proc/stat").read_text().split()[1:8]
    return sum(map(int, (user, nice, system, irq, soft_irq))) / os.sysconf("SC_CLK_TCK")


def wait_until_idle(limit: float) -> None:
    """Return when nobody else has computed for three seconds, or after ``limit`` seconds."""
    deadline, idle = time.monotonic() + limit, 0
    while idle < 3 and time.monotonic() < deadline:
        before = busy_seconds()
        time.sleep(1.0)
        idle = idle + 1 if busy_seconds() - before < DISTURBED else 0


def spawn(name: str, folder: Path, work: str, settings: Settings | None = None, gate: bool = False) -> dict[str, Any]:
    """Run a worker; returns its losses and tokens/s: median step, fastest step, process start to end.

    ``others`` are the cores other processes kept busy meanwhile.
    """
    case = CASES[name]
    command = [sys.executable, __file__, "--work", work, "--cases", name, "--folder", str(folder)]
    command += ["--settings", json.dumps(settings or {})] + (["--gate"] if gate else [])
    root = str(Path(__file__).resolve().parent.parent)
    environment = {**os.environ, "OMP_NUM_THREADS": str(THREADS), "PYTHONPATH": root, "HF_HUB_OFFLINE": "1"}
    started, busy, used = time.perf_counter(), busy_seconds(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    own = after.ru_utime + after.ru_stime - used.ru_utime - used.ru_stime
    if done.returncode:
        raise RuntimeError(f"{name} {work} {settings}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}")
    if work == "make":
        return {}
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    ends = result["ends"]
    steps = [after - before for before, after in itertools.pairwise(ends[case.warmup :])]
    return {
        "losses": result["losses"],
        "steady": case.tokens / statistics.median(steps) if steps else 0.0,
        "best_step": case.tokens / min(steps) if steps else 0.0,
        "end_to_end": case.tokens * len(ends) / wall,
        "others": max(busy_seconds() - busy - own, 0.0) / wall,
    }


def timed(name: str, folder: Path, side: str, settings: Settings, patience: float) -> dict[str, Any]:
    """One timed run in quiet: waits for it and repeats a disturbed run (three times at most; the quietest counts)."""
    tries: list[dict[str, Any]] = []
    while not tries or (tries[-1]["others"] > DISTURBED and len(tries) < 4):
        wait_until_idle(patience)
        tries.append(spawn(name, folder, side, settings))
        tries[-1].pop("losses")
    return min(tries, key=lambda run: run["others"]) | {"tries": len(tries)}


def check_gate(name: str, folder: Path, settings: Settings) -> float:
    """Largest difference of the two sides' losses over the first steps; raises ``RuntimeError`` above the gate.

    Clipping is off here, on both sides: PyTorch's fp32 norm on a CPU is inexact for large tensors (about 1e-3 at 8
    million elements), so Trainer scales its gradients by another number than the one clipping asks for.
    """
    ours, theirs = spawn(name, folder, "ours", gate=True), spawn(name, folder, "theirs", settings, gate=True)
    assert len(ours["losses"]) == len(theirs["losses"]) == GATE_STEPS
    worst = max(abs(a - b) for a, b in zip(ours["losses"], theirs["losses"], strict=True))
    if worst > GATE:
        raise RuntimeError(f"{name}: losses differ by {worst:.2e} > {GATE}: this is not the same training, no timing")
    return worst


def compare(name: str, rounds: int, wished: Sequence[str], patience: float) -> dict[str, Any]:
    """Gate, choice of the other side's best settings, then the timed rounds of one case."""
    case = CASES[name]
    options = THEIRS_BF16 if case.bf16 else THEIRS
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        spawn(name, folder, "make")
        worst = None if case.bf16 else check_gate(name, folder, options["default"])
        sweep = {k: timed(name, folder, "theirs", options[k], patience) for k in options if k in wished}
        best = max(sweep, key=lambda label: sweep[label]["best_step"])
        print(f"{name}: gate {worst}, settings of Trainer: ", {k: round(v["best_step"]) for k, v in sweep.items()})
        runs: list[dict[str, Any]] = []
        for number in range(rounds):
            for side in ("ours", "theirs", "theirs", "ours"):
                runs.append({"round": number, "side": side, **timed(name, folder, side, options[best], patience)})
                print(f"{name}: {runs[-1]}", flush=True)
    ratios = {}
    for measure in MEASURES:
        by_round = []
        for number in range(rounds):
            speed = {s: [r[measure] for r in runs if r["round"] == number and r["side"] == s] for s in SIDES}
            by_round.append(statistics.mean(speed["ours"]) / statistics.mean(speed["theirs"]))
        ratios[measure] = {"min": min(by_round), "median": statistics.median(by_round), "max": max(by_round)}
    return {"case": asdict(case), "gate": worst, "sweep": sweep, "theirs": best, "runs": runs, "ratios": ratios}


def facts(argv: Sequence[str]) -> dict[str, str]:
    """What a reader needs to repeat the run; no names or paths of the machine."""
    packages = ("torch", "transformers", "accelerate", "megatron-core", "numpy")
    return {
        "hardware": f"{os.cpu_count()}-core {platform.machine()} CPU, {THREADS} threads per process",
        "versions": ", ".join(
            [f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in packages)]
        ),
        "date": time.strftime("%Y-%m-%d"),
        "command": "python benchmarks/cpu_train.py " + " ".join(argv),
    }


def as_markdown(record: dict[str, Any]) -> str:
    """The record as a page: facts, one table of ratios, one of the settings that were tried."""
    lines = ["# CPU training speed against Hugging Face Trainer", ""]
    lines += [f"- {key}: {value}" for key, value in record["facts"].items()]
    lines += [
        "",
        "Tokens per second, median over runs; ratios ours / theirs by round of ours, theirs, theirs, ours.",
        "",
    ]
    lines += ["| case | measure | ours | Trainer | ratio min | median | max | gate (largest loss difference) |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for name, case in record["cases"].items():
        gate = "none" if case["gate"] is None else f"{case['gate']:.1e}"
        for measure, label in MEASURES.items():
            speed = [statistics.median(r[measure] for r in case["runs"] if r["side"] == side) for side in SIDES]
            ratio = case["ratios"][measure]
            cells = [name, label, *(f"{value:,.0f}" for value in speed), *(f"{ratio[k]:.3f}" for k in ratio), gate]
            lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        "| case | settings of Trainer | steady tokens/s | fastest step | end to end | used |",
        "|---|---|---|---|---|---|",
    ]
    for name, case in record["cases"].items():
        for label, run in case["sweep"].items():
            cells = [name, label, *(f"{run[measure]:,.0f}" for measure in MEASURES)]
            lines.append("| " + " | ".join(cells) + f" | {'yes' if label == case['theirs'] else ''} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison, or one worker of it; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--rounds", type=int, default=3, help="rounds of ours, theirs, theirs, ours")
    parser.add_argument("--settings-tried", nargs="+", default=[*THEIRS, *THEIRS_BF16], help="settings of Trainer")
    parser.add_argument(
        "--patience", type=float, default=120.0, help="seconds to wait for a quiet machine before a run"
    )
    parser.add_argument("--record", type=Path, help="write RECORD.json and RECORD.md")
    for internal in ("--work", "--folder"):
        parser.add_argument(internal, help=argparse.SUPPRESS)
    parser.add_argument("--settings", default="{}", help=argparse.SUPPRESS)
    parser.add_argument("--gate", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.work:
        worker(options)
        return 0
    record: dict[str, Any] = {"facts": facts(sys.argv[1:] if argv is None else argv), "cases": {}}
    for name in options.cases:
        record["cases"][name] = compare(name, options.rounds, options.settings_tried, options.patience)
    print(as_markdown(record))
    if options.record:
        options.record.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        options.record.with_suffix(".md").write_text(as_markdown(record), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
