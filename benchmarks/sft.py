"""Finetuning speed against TRL's ``SFTTrainer``: same model, same conversations, both packed, side by side on a CPU.

    python benchmarks/sft.py                             # both sizes, fp32 behind the equality gate, and bf16
    python benchmarks/sft.py --cases steel_tiny --rounds 2

For each case ``make`` writes a Hugging Face folder with random weights and conversations cut from the bundled corpus.
The gate: on the rows that we packed, the losses of both sides agree at every step. Then each side reads, encodes and
packs the conversations by itself; what counts are tokens that are no padding, per second. Every timed run is a fresh
process; rounds are ABBA. Settings of TRL are tried first and its fastest are used, and so are ours.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import random
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

from cpu_train import DISTURBED, FIFTY, TINY, busy_seconds, wait_until_idle

ROOT = Path(__file__).resolve().parent.parent
CORPUS, TOKENIZER = ROOT / "examples/data/train.jsonl", ROOT / "examples/data/tokenizer"
Settings = dict[str, Any]
SIDES = ("ours", "theirs")
MEASURES = {
    "steady": "steady, median step",
    "best_step": "steady, fastest step",
    "per_cpu_second": "per CPU second of a step, median",
    "end_to_end": "end to end",
}
LR, DECAY, BETAS, EPS, CLIP = 3e-4, 0.1, (0.9, 0.95), 1e-8, 1.0
GATE_STEPS, GATE = 15, 1e-5
THREADS = "2"
COLUMNS = ("input_ids", "labels")
# What both sides know an answer by: its text and end token are trained, the newline after it is not.
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One model and batch. ``sizes`` are our flags; ``steps`` are timed after ``warmup``."""

    sizes: dict[str, Any]
    batch: int
    """Packed rows of a step."""
    seq_length: int
    warmup: int
    steps: int
    bf16: bool = False

    @property
    def all_steps(self) -> int:
        """Steps of a timed run."""
        return self.warmup + self.steps


CASES = {
    "steel_tiny": Case(sizes=TINY, batch=4, seq_length=512, warmup=10, steps=60),
    "50m": Case(sizes=FIFTY, batch=4, seq_length=512, warmup=2, steps=6),
    "50m_bf16": Case(sizes=FIFTY, batch=4, seq_length=512, warmup=2, steps=6, bf16=True),
}
OURS: dict[str, Settings] = {"1 row": {"micro_batch_size": 1}, "2 rows": {"micro_batch_size": 2}}
# "rows" are those of a micro-batch; the rest are options of SFTConfig.
THEIRS: dict[str, Settings] = {
    "1 row": {"rows": 1},
    "2 rows": {"rows": 2},
    "4 rows": {"rows": 4},
    "1 row, torch_compile": {"rows": 1, "torch_compile": True, "pad_to_multiple_of": 512},
    "1 row, one loader worker": {"rows": 1, "dataloader_num_workers": 1, "dataloader_persistent_workers": True},
    "not packed, by length": {"rows": 1, "packing": False},
}
THEIRS_BF16: dict[str, Settings] = {
    "1 row, autocast": {"rows": 1, "bf16": True},
    "1 row, bf16 weights": {"rows": 1, "dtype": "bfloat16"},
    "2 rows, bf16 weights": {"rows": 2, "dtype": "bfloat16"},
}


def our_flags(case: Case, folder: Path, settings: Settings, steps: int, clip: float) -> list[str]:
    """The command line of our side, as for ``python -m megatron_steel.finetune``."""
    flags = ["--pretrained-checkpoint", str(folder / "hf"), "--train-data", str(folder / "chats.jsonl")]
    flags += ["--chat-template", "chatml", "--seq-length", str(case.seq_length), "--train-iters", str(steps)]
    flags += ["--micro-batch-size", str(settings["micro_batch_size"]), "--global-batch-size", str(case.batch)]
    flags += ["--lr", str(LR), "--lr-decay-style", "constant", "--weight-decay", str(DECAY), "--clip-grad", str(clip)]
    flags += ["--adam-beta1", str(BETAS[0]), "--adam-beta2", str(BETAS[1]), "--adam-eps", str(EPS)]
    flags += ["--transformer-impl", "torch", "--log-interval", "1000000", "--max-epochs-per-source", "100"]
    return flags + (["--bf16"] if case.bf16 else [])


def conversations(case: Case, count: int) -> list[dict[str, Any]]:
    """Conversations of one or two rounds, of text that goes on from turn to turn, a few tokens to a whole row long."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(TOKENIZER / "tokenizer.json"))
    texts = [json.loads(line)["text"] for line in CORPUS.read_text(encoding="utf-8").splitlines()]
    rng, found = random.Random(0), []
    while len(found) < count:
        text, turns = rng.choice(texts), []
        at = rng.randrange(len(text))
        for role in ("user", "assistant") * rng.choice((1, 1, 2)):
            length = max(int(rng.lognormvariate(4.0 if role == "user" else 5.0, 0.8)), 2)
            turns.append({"role": role, "content": text[at : at + length].strip()})
            at += length
        written = sum(len(tokenizer.encode(turn["content"]).ids) + 8 for turn in turns)
        if written < case.seq_length and all(turn["content"] for turn in turns):
            found.append({"messages": turns})
    return found


def make(case: Case, folder: Path) -> None:
    """Write the model and the conversations."""
    from megatron_steel.config.load import apply
    from megatron_steel.config.presets import PRESETS
    from megatron_steel.config.schema import Config
    from megatron_steel.runtime import cpu

    cpu.install()
    import torch
    import transformers

    from megatron_steel.config.hf_sizes import hf_from_sizes

    config = Config()
    sizes = dict(case.sizes)
    apply(config, PRESETS.get(sizes.pop("model", ""), {}) | sizes, "benchmark")
    assert config.size.vocab_size is not None
    token_ids = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}
    values = hf_from_sizes(config.size, config.size.vocab_size, token_ids, "float32")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**values))
    model.float().save_pretrained(folder / "hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(TOKENIZER)
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder / "hf")
    # Enough for every step to be of other conversations; about three fill a row.
    rows = conversations(case, 4 * case.batch * max(case.all_steps, GATE_STEPS))
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def run_ours(case: Case, folder: Path, settings: Settings, gate: bool) -> dict[str, Any]:
    """Finetune with this engine's own loop; for the gate, also write the rows of the steps."""
    from megatron_steel.config.load import parse
    from megatron_steel.runtime import cpu

    steps = GATE_STEPS if gate else case.all_steps
    config = parse(our_flags(case, folder, settings, steps, 0.0 if gate else CLIP), "megatron_steel.finetune")
    cpu.install()
    from megatron_steel.runtime import world as runtime
    from megatron_steel.runtime.signals import StopRequest
    from megatron_steel.train.loop import take_step
    from megatron_steel.train.prepare_chat import prepare_chat
    from megatron_steel.train.run import build_session

    prepared = prepare_chat(config)
    if gate:
        (dataset,) = prepared.datasets.values()
        _, _, order = prepared.ledger.samples(0, steps * case.batch)
        store = dataset.store
        spans = [[slice(*store.begins_n[n : n + 2]) for n in dataset.rows[int(window)]] for window in order]
        rows = [[(store.ids_N[span].tolist(), store.labels_N[span].tolist()) for span in row] for row in spans]
        (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    world = runtime.start(seed=config.data.seed)
    session = build_session(prepared, world, StopRequest(), time.monotonic())
    step, tokens = session.loader.step, []

    def counted(first_sample: int) -> Any:
        batches = step(first_sample)
        tokens.append(sum(batch.read_tokens or 0 for batch in batches))
        return batches

    session.loader.step = counted  # type: ignore[method-assign]
    ends, sums = [], []
    with session.loader:
        for _ in range(steps):
            take_step(session)
            sums.append(session.loss_sums[0].clone())
            session.loss_sums.zero_()
            ends.append((time.perf_counter(), time.process_time()))
    runtime.stop(world, failed=False)
    return {
        "ends": ends,
        "tokens": tokens,
        "losses": [loss / weight for loss, weight, _ in (row.tolist() for row in sums)],
    }


def real_tokens(inputs: Any) -> int:
    """Tokens of a micro-batch of TRL's that are no padding: in a joined row each padding token is a text of its own."""
    if "attention_mask" in inputs:
        return int(inputs["attention_mask"].sum())
    lengths = inputs["cu_seq_lens_q"].diff()
    return int(lengths[lengths > 1].sum())


def run_theirs(case: Case, folder: Path, settings: Settings, gate: bool) -> dict[str, Any]:
    """Finetune with TRL; for the gate on our rows, else on what it makes of the conversations."""
    import torch
    import transformers
    import trl
    from datasets import Dataset

    settings = dict(settings)
    dtype, micro_batch = getattr(torch, settings.pop("dtype", "float32")), settings.pop("rows")
    packing = settings.setdefault("packing", True)
    chats = Dataset.from_json(str(folder / "chats.jsonl"))
    if gate:
        rows = json.loads((folder / "rows.json").read_text(encoding="utf-8"))
        columns = {name: [[x for part in row for x in part[i]] for row in rows] for i, name in enumerate(COLUMNS)}
        chats = Dataset.from_dict({**columns, "seq_lengths": [[len(part[0]) for part in row] for row in rows]})
        settings["dataset_kwargs"] = {"skip_prepare_dataset": True}
    if not packing:
        # As many conversations in a step as three to a row, of like length beside each other.
        micro_batch *= 3
    ends: list[tuple[float, float]] = []
    tokens: list[int] = [0]
    losses: list[float] = [0.0]

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append((time.perf_counter(), time.process_time()))
            tokens.append(0)
            losses.append(0.0)

    class Counted(trl.SFTTrainer):
        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            tokens[-1] += real_tokens(inputs)
            loss = super().training_step(model, inputs, *args, **kwargs)
            if gate:
                losses[-1] += loss.item()
            return loss

    arguments = trl.SFTConfig(
        output_dir=str(folder / "trl"),
        use_cpu=True,
        assistant_only_loss=not gate,
        max_length=case.seq_length,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=case.batch * (1 if packing else 3) // micro_batch,
        max_steps=GATE_STEPS if gate else case.all_steps,
        train_sampling_strategy="sequential" if gate else "random" if packing else "group_by_length",
        learning_rate=LR,
        lr_scheduler_type="constant",
        weight_decay=DECAY,
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        adam_epsilon=EPS,
        max_grad_norm=0.0 if gate else CLIP,
        gradient_checkpointing=False,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataset_num_proc=None,
        **{"bf16": False, **settings},
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=dtype, attn_implementation="sdpa")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "hf")
    trainer = Counted(model=model, args=arguments, train_dataset=chats, processing_class=tokenizer, callbacks=[Clock()])
    trainer.train()
    return {"ends": ends, "tokens": tokens[: len(ends)], "losses": losses[: len(ends)]}


def worker(options: argparse.Namespace) -> None:
    """One fresh process: does ``options.work`` and writes what it measured as JSON."""
    case, folder = CASES[options.cases[0]], Path(options.folder)
    if options.work == "make":
        make(case, folder)
        return
    run = run_ours if options.work == "ours" else run_theirs
    result = run(case, folder, json.loads(options.settings), options.gate)
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")


def spawn(name: str, folder: Path, work: str, settings: Settings | None = None, gate: bool = False) -> dict[str, Any]:
    """Run a worker; returns its losses and tokens/s: median step, fastest step, process start to end.

    ``others`` are the cores other processes kept busy meanwhile.
    """
    case = CASES[name]
    command = [sys.executable, __file__, "--work", work, "--cases", name, "--folder", str(folder)]
    command += ["--settings", json.dumps(settings or {})] + (["--gate"] if gate else [])
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", THREADS),
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
    }
    # Nothing that a library kept from an earlier run may save a later one work.
    environment["HF_DATASETS_CACHE"] = tempfile.mkdtemp(dir=folder)
    started, busy, used = time.perf_counter(), busy_seconds(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    own = after.ru_utime + after.ru_stime - used.ru_utime - used.ru_stime
    if done.returncode:
        raise RuntimeError(f"{name} {work} {settings}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}")
    if work == "make":
        return {}
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    ends, tokens = result["ends"], result["tokens"]
    wall_speeds, cpu_speeds = (
        [
            count / (end[clock] - begin[clock])
            for count, (begin, end) in zip(
                tokens[case.warmup :], itertools.pairwise(ends[case.warmup - 1 :]), strict=True
            )
        ]
        for clock in (0, 1)
    )
    return {
        "losses": result["losses"],
        "steady": statistics.median(wall_speeds),
        "best_step": max(wall_speeds),
        "per_cpu_second": statistics.median(cpu_speeds),
        "end_to_end": sum(tokens) / wall,
        "tokens": sum(tokens),
        "others": max(busy_seconds() - busy - own, 0.0) / wall,
    }


def timed(name: str, folder: Path, side: str, settings: Settings, patience: float) -> dict[str, Any]:
    """One timed run in quiet: waits for it and repeats a disturbed run (three times at most; the quietest counts)."""
    tries: list[dict[str, Any]] = []
    while not tries or (tries[-1]["others"] > DISTURBED and len(tries) < 4 and patience):
        wait_until_idle(patience)
        tries.append(spawn(name, folder, side, settings))
        tries[-1].pop("losses")
    return min(tries, key=lambda run: run["others"]) | {"tries": len(tries)}


def check_gate(name: str, folder: Path) -> float:
    """Largest difference of the two sides' losses over the first steps; raises ``RuntimeError`` above the gate.

    Clipping is off here: PyTorch's fp32 norm on a CPU is inexact for large tensors (see cpu_train.py).
    """
    ours = spawn(name, folder, "ours", OURS["1 row"], gate=True)["losses"]
    theirs = spawn(name, folder, "theirs", THEIRS["1 row"], gate=True)["losses"]
    assert len(ours) == len(theirs) == GATE_STEPS
    worst = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    if worst > GATE:
        raise RuntimeError(f"{name}: losses differ by {worst:.2e} > {GATE}: this is not the same training, no timing")
    return worst


def compare(name: str, rounds: int, wished: Sequence[str], patience: float) -> dict[str, Any]:
    """Gate, choice of each side's best settings, then the timed rounds of one case."""
    case = CASES[name]
    options = {"ours": OURS, "theirs": THEIRS_BF16 if case.bf16 else THEIRS}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        spawn(name, folder, "make")
        worst = None if case.bf16 else check_gate(name, folder)
        print(f"{name}: gate {worst}", flush=True)
        sweep: dict[str, dict[str, Any]] = {side: {} for side in SIDES}
        for side in SIDES:
            for label in (label for label in options[side] if side == "ours" or label in wished):
                sweep[side][label] = timed(name, folder, side, options[side][label], patience)
                print(f"{name}: {side}, {label}: {sweep[side][label]}", flush=True)
        best = {side: max(sweep[side], key=lambda label: sweep[side][label]["best_step"]) for side in SIDES}
        runs: list[dict[str, Any]] = []
        for number in range(rounds):
            for side in ("ours", "theirs", "theirs", "ours"):
                run = timed(name, folder, side, options[side][best[side]], patience)
                runs.append({"round": number, "side": side, **run})
                print(f"{name}: {runs[-1]}", flush=True)
    ratios = {}
    for measure in MEASURES:
        by_round = []
        for number in range(rounds):
            speed = {s: [r[measure] for r in runs if r["round"] == number and r["side"] == s] for s in SIDES}
            by_round.append(statistics.mean(speed["ours"]) / statistics.mean(speed["theirs"]))
        ratios[measure] = {"min": min(by_round), "median": statistics.median(by_round), "max": max(by_round)}
    return {"case": asdict(case), "gate": worst, "sweep": sweep, "best": best, "runs": runs, "ratios": ratios}


def facts(argv: Sequence[str]) -> dict[str, str]:
    """What a reader needs to repeat the run; no names or paths of the machine."""
    packages = ("torch", "transformers", "trl", "accelerate", "datasets", "megatron-core")
    threads = os.environ.get("OMP_NUM_THREADS", THREADS)
    versions = [f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in packages)]
    return {
        "hardware": f"{os.cpu_count()}-core {platform.machine()} CPU, {threads} thread(s) per process",
        "versions": ", ".join(versions),
        "date": time.strftime("%Y-%m-%d"),
        "command": "python benchmarks/sft.py " + " ".join(argv),
    }


def as_markdown(record: dict[str, Any]) -> str:
    """The record as a page: facts, one table of ratios, one of the settings that were tried."""
    lines = ["# Finetuning speed against TRL's SFTTrainer on a CPU", ""]
    lines += [f"- {key}: {value}" for key, value in record["facts"].items()]
    lines += ["", "Tokens per second, padding not counted, median over runs; ratios ours / TRL by round of ours, TRL,"]
    lines += ["TRL, ours. End to end: imports, reading, encoding and packing included.", ""]
    lines += ["| case | measure | ours | TRL | ratio min | median | max | gate (largest loss difference) |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for name, case in record["cases"].items():
        gate = "none" if case["gate"] is None else f"{case['gate']:.1e}"
        for measure, label in MEASURES.items():
            speed = [statistics.median(r[measure] for r in case["runs"] if r["side"] == side) for side in SIDES]
            ratio = case["ratios"][measure]
            cells = [name, label, *(f"{value:,.0f}" for value in speed), *(f"{ratio[k]:.3f}" for k in ratio), gate]
            lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "| case | side | settings tried | " + " | ".join(MEASURES.values()) + " | used |"]
    lines += ["|---" * (len(MEASURES) + 4) + "|"]
    for name, case in record["cases"].items():
        for side, label, run in ((which, *pair) for which in SIDES for pair in case["sweep"][which].items()):
            cells = [name, side, label, *(f"{run[measure]:,.0f}" for measure in MEASURES)]
            lines.append("| " + " | ".join(cells) + f" | {'yes' if label == case['best'][side] else ''} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison, or one worker of it; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--rounds", type=int, default=3, help="rounds of ours, theirs, theirs, ours")
    parser.add_argument("--settings-tried", nargs="+", default=[*THEIRS, *THEIRS_BF16], help="settings of TRL")
    parser.add_argument("--patience", type=float, default=120.0, help="seconds to wait for a quiet machine; 0: never")
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
