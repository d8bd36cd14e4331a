"""Conversion of a model with weights of a gigabyte: ours against copying its files and against transformers.

    python benchmarks/convert.py --tokenizer FOLDER
    python benchmarks/convert.py --hf FOLDER --rounds 5 --record benchmarks/records/convert_DATE

Without ``--hf`` the model is a Qwen2 with random weights, bias in its projections and 151,936 rows, written by
transformers beside the tokenizer's files. Every run is a fresh process; files are in the page cache before it and those
of the run before are on the disk. import: folder to checkpoint; export: back; transformers: ``from_pretrained`` and
``save_pretrained``, which is a conversion's least; copy: the folder's files, without and with bringing them to the disk
(both of ours do that, and hash what they write). Seconds are those of the work; "process" has the start of Python and
all imports besides. Memory is the largest resident set. The gate before any time is read: all tensors that come back,
from us and from transformers, are equal to the bit.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SIDES = ("copy", "copy-sync", "import", "export", "transformers")
SIZES = {
    "vocab_size": 151_936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
    "num_attention_heads": 14, "num_key_value_heads": 2, "max_position_embeddings": 32_768, "rope_theta": 1e6,
    "tie_word_embeddings": False,
}  # fmt: skip


def make_model(folder: Path, tokenizer: Path | None) -> None:
    """A model with random weights in bf16, biases included, and a tokenizer's files."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Qwen2Config(**SIZES), dtype=torch.bfloat16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    model.save_pretrained(folder)
    for path in tokenizer.iterdir() if tokenizer else ():
        shutil.copyfile(path, folder / path.name)


def copy_files(source: Path, target: Path, sync: bool) -> None:
    """Copy a folder's files."""
    target.mkdir()
    for path in source.iterdir():
        shutil.copyfile(path, target / path.name)
        if sync:
            with open(target / path.name, "rb") as stream:
                os.fsync(stream.fileno())


def inner(side: str, source: Path, target: Path) -> None:
    """One run in this process; prints its seconds and peak memory as JSON."""
    began = time.perf_counter()
    if side in ("copy", "copy-sync"):
        copy_files(source, target, side == "copy-sync")
    elif side == "transformers":
        from transformers import AutoModelForCausalLM
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        began = time.perf_counter()
        AutoModelForCausalLM.from_pretrained(source, dtype="auto", local_files_only=True).save_pretrained(target)
    else:
        from megatron_steel.checkpoint import hf

        began = time.perf_counter()
        if side == "import":
            hf.import_hf(source, target)
        else:
            hf.export_hf(source, target)
    seconds = time.perf_counter() - began
    print(json.dumps({"seconds": seconds, "peak_mb": peak_bytes() / 1e6}))


def peak_bytes() -> int:
    """Largest resident set of this program; what ``getrusage`` says would include the process that started it."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024


def run(side: str, source: Path, target: Path) -> dict[str, Any]:
    """One run in a process of its own. Raises ``RuntimeError`` with its last lines when it fails."""
    os.sync()
    command = [sys.executable, str(Path(__file__).resolve()), "--inner", side, str(source), str(target)]
    began = time.perf_counter()
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False
    )
    seconds = time.perf_counter() - began
    if done.returncode:
        raise RuntimeError(f"{side} failed: {done.stderr[-2000:]}")
    found = json.loads(done.stdout.splitlines()[-1]) | {"side": side, "process_seconds": seconds}
    print(json.dumps(found), flush=True)
    return found


def largest_shard(folder: Path) -> int:
    """Bytes of the largest file of weights."""
    return max(path.stat().st_size for path in folder.glob("*.safetensors"))


def differences(one: Path, other: Path) -> list[str]:
    """Names of tensors that are not equal to the bit, read by the safetensors library."""
    import torch
    from safetensors import safe_open

    places: list[dict[str, Any]] = []
    for folder in (one, other):
        opened = [safe_open(path, framework="pt") for path in sorted(folder.glob("*.safetensors"))]
        places.append({name: file for file in opened for name in file.keys()})  # noqa: SIM118 - no mapping
    wrong = set(places[0]) ^ set(places[1])
    for name in set(places[0]) & set(places[1]):
        first, second = (side[name].get_tensor(name) for side in places)
        same = first.dtype == second.dtype and first.shape == second.shape
        if not same or not torch.equal(first.view(torch.uint8), second.view(torch.uint8)):
            wrong.add(name)
    return sorted(wrong)


def one_round(folder: Path, hf: Path, gate: bool) -> list[dict[str, Any]]:
    """All sides once; ``RuntimeError`` when ``gate`` finds a difference."""
    targets = {side: folder / side for side in SIDES}
    found = []
    for side in SIDES:
        source = targets["import"] / "iter_0000000" if side == "export" else hf
        found.append(run(side, source, targets[side]))
        if side.startswith("copy"):
            shutil.rmtree(targets[side])
    if gate:
        for side in ("export", "transformers"):
            if wrong := differences(hf, targets[side]):
                raise RuntimeError(f"{side}: {len(wrong)} tensors differ, the first is {wrong[0]}")
    for side in ("import", "export", "transformers"):
        shutil.rmtree(targets[side])
    return found


def summary(runs: list[dict[str, Any]], hf: Path) -> list[str]:
    """A row per side with medians, and the ratios the targets are about."""
    keys = ("seconds", "process_seconds", "peak_mb")
    middle = {
        side: {key: statistics.median(row[key] for row in runs if row["side"] == side) for key in keys}
        for side in SIDES
    }
    size, shard = sum(path.stat().st_size for path in hf.iterdir()) / 1e6, largest_shard(hf) / 1e6
    lines = ["| side | seconds | MB/s | process seconds | peak MB |", "|---|---|---|---|---|"]
    for side, row in middle.items():
        rate = size / row["seconds"]
        lines.append(
            f"| {side} | {row['seconds']:.2f} | {rate:.0f} | {row['process_seconds']:.2f} | {row['peak_mb']:.0f} |"
        )
    lines += ["", "| ratio | import | export | target |", "|---|---|---|---|"]
    ratios = (
        ("time / copy", "seconds", middle["copy"]["seconds"], "1.5"),
        ("time / copy-sync", "seconds", middle["copy-sync"]["seconds"], ""),
        ("time / transformers", "seconds", middle["transformers"]["seconds"], "below 1"),
        ("process / transformers", "process_seconds", middle["transformers"]["process_seconds"], ""),
        ("peak / largest shard", "peak_mb", shard, "1.3 (or the next)"),
        ("peak / transformers", "peak_mb", middle["transformers"]["peak_mb"], "0.3"),
    )
    for label, key, base, target in ratios:
        ours = " | ".join(f"{middle[side][key] / base:.2f}" for side in ("import", "export"))
        lines.append(f"| {label} | {ours} | {target} |")
    return lines


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--hf", type=Path, help="a Hugging Face folder; without it a model is made")
    add("--tokenizer", type=Path, help="tokenizer files for the model that is made")
    add("--rounds", type=int, default=3)
    add("--folder", type=Path, help="where models are written (a temporary folder)")
    add("--record", type=Path, help="write RECORD.json and RECORD.md")
    add("--inner", nargs=3, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measure and print a table."""
    args = parse()
    if args.inner:
        inner(args.inner[0], Path(args.inner[1]), Path(args.inner[2]))
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        hf = args.hf or Path(name) / "hf"
        if args.hf is None:
            make_model(hf, args.tokenizer)
        load = os.getloadavg()[0]
        runs = [row for number in range(args.rounds) for row in one_round(Path(name), hf, gate=number == 0)]
        lines = summary(runs, hf)
        facts = {
            "bytes": sum(path.stat().st_size for path in hf.iterdir()),
            "largest_shard": largest_shard(hf),
            "rounds": args.rounds,
            "cores": os.cpu_count(),
            "load_before_and_after": [round(load, 2), round(os.getloadavg()[0], 2)],
            "versions": {package: version(package) for package in ("torch", "transformers", "safetensors")},
            "date": time.strftime("%Y-%m-%d"),
        }
    lines += ["", json.dumps(facts)]
    print("\n".join(lines))
    if args.record:
        args.record.with_suffix(".json").write_text(json.dumps({"facts": facts, "runs": runs}, indent=1) + "\n")
        args.record.with_suffix(".md").write_text("# Conversion\n\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
