"""DPO speed against TRL's ``DPOTrainer``: same model, same pairs, references computed before training, on a CPU.

    python benchmarks/dpo.py                             # both sizes behind the equality gate
    python benchmarks/dpo.py --cases steel_tiny --rounds 1 --patience 0

For each case a Hugging Face folder with random weights and pairs of answers cut from the bundled corpus are written.
The gate: ten steps on pairs in the same order have the same losses. Then each side reads, encodes and batches the pairs
by itself; what counts are pairs per second: of the steps alone, and from the start of the process to its end with the
pass over the references. Every timed run is a fresh process; rounds are ABBA. Both sides' fastest settings are used.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cpu_train import FIFTY, TINY, busy_seconds, wait_until_idle
from sft import CORPUS, ROOT, SIDES, THREADS, facts, make

MEASURES = {"steady": "pairs/s, median step", "best_step": "pairs/s, fastest step", "end_to_end": "pairs/s, end to end"}
LR, BETA, GATE_STEPS = 1e-4, 0.1, 10
# An answer's log-probability is a sum of up to 2,000 nats, of which fp32 keeps 1e-4; beta times that is noise.
GATE = 5e-5
Settings = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One model and batch; ``steps`` are timed after ``warmup``."""

    sizes: dict[str, Any]
    batch: int
    """Pairs of a step, about: ours are rows that whole pairs fill."""
    seq_length: int
    warmup: int
    steps: int
    bf16: bool = False

    @property
    def all_steps(self) -> int:
        """Steps of a timed run."""
        return self.warmup + self.steps


CASES = {
    "steel_tiny": Case(sizes=TINY, batch=8, seq_length=512, warmup=5, steps=25),
    "50m": Case(sizes=FIFTY, batch=8, seq_length=512, warmup=2, steps=6),
}
# A packed row of 512 tokens holds about two pairs.
OURS: dict[str, Settings] = {
    "packed, 1 row": {"packing": True, "micro_batch_size": 1},
    "packed, 2 rows": {"packing": True, "micro_batch_size": 2},
    "1 pair": {"packing": False, "micro_batch_size": 1},
}
THEIRS: dict[str, Settings] = {f"{count} at a time": {"pairs": count} for count in (1, 2, 4, 8)}


def pairs(count: int) -> list[dict[str, Any]]:
    """Prompts with two answers: texts of the corpus, of a few to a few hundred characters."""
    texts = [json.loads(line)["text"] for line in CORPUS.read_text(encoding="utf-8").splitlines()]
    rng, found = random.Random(1), []

    def piece(scale: float) -> str:
        text = rng.choice(texts)
        length = min(max(int(rng.lognormvariate(scale, 0.7)), 3), 250)
        at = rng.randrange(max(len(text) - length, 1))
        return text[at : at + length].strip() or "yes"

    while len(found) < count:
        row = {"prompt": piece(4.0), "chosen": piece(4.6), "rejected": piece(4.6)}
        if row["chosen"] != row["rejected"]:
            turns = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
            found.append({key: [{"role": role, "content": row[key]}] for key, role in turns.items()})
    return found


def run_ours(case: Case, folder: Path, settings: Settings, gate: bool) -> dict[str, Any]:
    """Train with this engine's own loop; for the gate, also write the ids of the steps' pairs."""
    from megatron_steel.config.load import parse
    from megatron_steel.runtime import cpu

    steps = GATE_STEPS if gate else case.all_steps
    rows = case.batch if gate or not settings["packing"] else case.batch // 2
    flags = ["--pretrained-checkpoint", str(folder / "hf"), "--train-data", str(folder / "pairs.jsonl")]
    flags += ["--chat-template", "chatml", "--seq-length", str(case.seq_length), "--train-iters", str(steps)]
    flags += ["--micro-batch-size", str(settings["micro_batch_size"]), "--global-batch-size", str(rows)]
    flags += ["--lr", str(LR), "--lr-decay-style", "constant", "--weight-decay", "0", "--beta", str(BETA)]
    flags += ["--clip-grad", "0" if gate else "1", "--max-epochs-per-source", "100", "--log-interval", "1000000"]
    flags += ["--packing"] if settings["packing"] and not gate else ["--no-packing"]
    flags += [] if settings.get("shared", True) else ["--no-share-prompts"]
    config = parse(flags, "megatron_steel.preference")
    cpu.install()
    from megatron_steel.runtime import world as runtime
    from megatron_steel.runtime.signals import StopRequest
    from megatron_steel.train.loop import take_step
    from megatron_steel.train.prepare_preference import prepare_preference
    from megatron_steel.train.run import build_session

    prepared = prepare_preference(config)
    (dataset,) = prepared.datasets.values()
    _, _, order = prepared.ledger.samples(0, steps * rows)
    if gate:
        store, found = dataset.store, []
        for number in (int(text) for window in order for text in dataset.texts(int(window))[::2]):
            spans = [slice(*store.begins_n[n : n + 2]) for n in (number, number + 1)]
            at = int((store.labels_N[spans[0]] >= 0).argmax())
            good, bad = (store.ids_N[span].tolist() for span in spans)
            found.append((good[:at], good[at:], bad[at:]))
        (folder / "rows.json").write_text(json.dumps(found), encoding="utf-8")
    world = runtime.start(seed=config.data.seed)
    session = build_session(prepared, world, StopRequest(), time.monotonic())
    ends, losses = [], []
    with session.loader:
        for _ in range(steps):
            take_step(session)
            loss, weight, _ = session.loss_sums[0].tolist()
            losses.append(loss / weight)
            session.loss_sums.zero_()
            ends.append(time.perf_counter())
    runtime.stop(world, failed=False)
    counts = [sum(len(dataset.rows[int(w)]) for w in order[i * rows : (i + 1) * rows]) for i in range(steps)]
    return {"ends": ends, "pairs": counts, "losses": losses}


def run_theirs(case: Case, folder: Path, settings: Settings, gate: bool) -> dict[str, Any]:
    """Train with TRL; for the gate on the ids of our pairs in our order, else on what it makes of the rows."""
    import torch
    import transformers
    import trl
    from datasets import Dataset

    steps = GATE_STEPS if gate else case.all_steps
    ends: list[float] = []
    losses: list[float] = [0.0]

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())
            losses.append(0.0)

    class Counted(trl.DPOTrainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().training_step(*args, **kwargs)
            losses[-1] += loss.item() if gate else 0.0
            return loss

    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    if gate:
        rows = json.loads((folder / "rows.json").read_text(encoding="utf-8"))
        data = Dataset.from_dict({name: [row[i] for row in rows] for i, name in enumerate(names)})
        Counted._prepare_dataset = lambda self, dataset, *_: dataset  # type: ignore[method-assign]
        Counted._get_train_sampler = lambda self, *_: torch.utils.data.SequentialSampler(data)  # type: ignore[method-assign]
    else:
        data = Dataset.from_json(str(folder / "pairs.jsonl"))
    arguments = trl.DPOConfig(
        output_dir=str(folder / "trl"),
        use_cpu=True,
        bf16=False,
        beta=BETA,
        precompute_ref_log_probs=not gate,
        precompute_ref_batch_size=settings["pairs"],
        per_device_train_batch_size=settings["pairs"],
        gradient_accumulation_steps=case.batch // settings["pairs"],
        max_steps=steps,
        max_length=case.seq_length,
        learning_rate=LR,
        lr_scheduler_type="constant",
        adam_beta2=0.95,
        max_grad_norm=0.0 if gate else 1.0,
        gradient_checkpointing=False,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataset_num_proc=None,
    )
    load = transformers.AutoModelForCausalLM.from_pretrained
    models = [load(folder / "hf", dtype=torch.float32, attn_implementation="sdpa") for _ in range(2 if gate else 1)]
    trainer = Counted(
        model=models[0],
        ref_model=models[1] if gate else None,
        args=arguments,
        train_dataset=data,
        processing_class=transformers.AutoTokenizer.from_pretrained(folder / "hf"),
        callbacks=[Clock()],
    )
    trainer.train()
    return {"ends": ends, "pairs": [case.batch] * len(ends), "losses": losses[: len(ends)]}


def worker(options: argparse.Namespace) -> None:
    """One fresh process: does ``options.work`` and writes what it measured as JSON."""
    case, folder = CASES[options.cases[0]], Path(options.folder)
    if options.work == "make":
        make(case, folder)
        rows = pairs(3 * case.batch * max(case.all_steps, GATE_STEPS))
        (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return
    run = run_ours if options.work == "ours" else run_theirs
    result = run(case, folder, json.loads(options.settings), options.gate)
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")


def spawn(name: str, folder: Path, work: str, settings: Settings | None = None, gate: bool = False) -> dict[str, Any]:
    """Run a worker; returns its losses and pairs/s."""
    case = CASES[name]
    command = [sys.executable, __file__, "--work", work, "--cases", name, "--folder", str(folder)]
    command += ["--settings", json.dumps(settings or {})] + (["--gate"] if gate else [])
    threads = os.environ.get("OMP_NUM_THREADS", THREADS)
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    environment["HF_DATASETS_CACHE"] = tempfile.mkdtemp(dir=folder)
    started, busy = time.perf_counter(), busy_seconds()
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    wall = time.perf_counter() - started
    if done.returncode:
        raise RuntimeError(f"{name} {work} {settings}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}")
    if work == "make":
        return {}
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    ends, counts = result["ends"], result["pairs"]
    seconds = [end - begin for begin, end in itertools.pairwise(ends[case.warmup - 1 :])]
    speeds = [count / spent for count, spent in zip(counts[case.warmup :], seconds, strict=True)]
    return {
        "losses": result["losses"],
        "steady": statistics.median(speeds) if speeds else 0.0,
        "best_step": max(speeds, default=0.0),
        "end_to_end": sum(counts) / wall,
        "busy_cores": (busy_seconds() - busy) / wall,
    }


def compare(name: str, rounds: int, patience: float) -> dict[str, Any]:
    """Gate, choice of each side's best settings, then the timed rounds of one case."""
    options = {"ours": OURS, "theirs": THEIRS}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        spawn(name, folder, "make")
        ours = spawn(name, folder, "ours", OURS["1 pair"], gate=True)["losses"]
        theirs = spawn(name, folder, "theirs", THEIRS["4 at a time"], gate=True)["losses"]
        worst = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
        print(f"{name}: gate {worst:.2e}", flush=True)
        if worst > GATE:
            raise RuntimeError(
                f"{name}: losses differ by {worst:.2e} > {GATE}: this is not the same training, no timing"
            )

        def timed(side: str, label: str) -> dict[str, Any]:
            wait_until_idle(patience)
            run = spawn(name, folder, side, options[side][label])
            run.pop("losses")
            print(f"{name}: {side}, {label}: {run}", flush=True)
            return run

        sweep = {side: {label: timed(side, label) for label in options[side]} for side in SIDES}
        best = {side: max(sweep[side], key=lambda label: sweep[side][label]["steady"]) for side in SIDES}
        order = ("ours", "theirs", "theirs", "ours")
        runs = [{"round": n, "side": side, **timed(side, best[side])} for n in range(rounds) for side in order]
    ratios = {}
    for measure in MEASURES:
        by_round = []
        for number in range(rounds):
            speed = {s: [r[measure] for r in runs if r["round"] == number and r["side"] == s] for s in SIDES}
            by_round.append(statistics.mean(speed["ours"]) / statistics.mean(speed["theirs"]))
        ratios[measure] = {"min": min(by_round), "median": statistics.median(by_round), "max": max(by_round)}
    return {"case": asdict(CASES[name]), "gate": worst, "sweep": sweep, "best": best, "runs": runs, "ratios": ratios}


def as_markdown(record: dict[str, Any]) -> str:
    """The record as a page: facts, ratios, the settings that were tried."""
    lines = ["# DPO speed against TRL's DPOTrainer on a CPU", ""]
    lines += [f"- {key}: {value}" for key, value in record["facts"].items()]
    lines += [
        "",
        "Medians over runs; ratios ours / TRL by round of ours, TRL, TRL, ours. Both compute references before",
    ]
    lines += ["the first step; end to end has that pass, imports, reading and encoding in it.", ""]
    lines += ["| case | measure | ours | TRL | ratio min | median | max | gate |", "|---|---|---|---|---|---|---|---|"]
    for name, case in record["cases"].items():
        for measure, label in MEASURES.items():
            speed = [statistics.median(r[measure] for r in case["runs"] if r["side"] == side) for side in SIDES]
            cells = [name, label, *(f"{value:.2f}" for value in speed)]
            cells += [*(f"{case['ratios'][measure][k]:.3f}" for k in ("min", "median", "max")), f"{case['gate']:.1e}"]
            lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "| case | side | settings tried | " + " | ".join(MEASURES.values()) + " | used |"]
    lines += ["|---" * (len(MEASURES) + 4) + "|"]
    for name, case in record["cases"].items():
        for side, label, run in ((which, *pair) for which in SIDES for pair in case["sweep"][which].items()):
            cells = [name, side, label, *(f"{run[measure]:.2f}" for measure in MEASURES)]
            lines.append("| " + " | ".join(cells) + f" | {'yes' if label == case['best'][side] else ''} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison, or one worker of it; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--rounds", type=int, default=3, help="rounds of ours, theirs, theirs, ours")
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
    said = facts(sys.argv[1:] if argv is None else argv)
    record: dict[str, Any] = {"facts": {**said, "command": said["command"].replace("sft.py", "dpo.py")}, "cases": {}}
    for name in options.cases:
        record["cases"][name] = compare(name, options.rounds, options.patience)
    print(as_markdown(record))
    if options.record:
        options.record.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        options.record.with_suffix(".md").write_text(as_markdown(record), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
