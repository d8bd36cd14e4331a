"""Preference training with the prompts of pairs computed once, and twice: pairs/s on a CPU by the prompt's length.

    python benchmarks/shared_prompts.py
    python benchmarks/shared_prompts.py --shares 0.5 --rounds 1

For each share, pairs are cut from the bundled corpus whose prompt is that share of a conversation's characters (the
template adds to it). Both ways train on the same steps; the gate is that their losses agree at each. Every timed run is
a fresh process, in the order once, twice, twice, once; ratios are those of a round, so that a machine that others use
too tells as much.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpo import GATE, MEASURES, spawn
from sft import CORPUS

CASE, LENGTH = "steel_tiny", 400
SETTINGS: dict[bool, dict[str, Any]] = {
    shared: {"packing": True, "micro_batch_size": 2, "shared": shared} for shared in (True, False)
}


def write_pairs(path: Path, count: int, share: float) -> None:
    """Prompts of this share of ``LENGTH`` characters, and two answers with the rest, all within a third of that."""
    texts = [json.loads(line)["text"] for line in CORPUS.read_text(encoding="utf-8").splitlines()]
    texts = [text for text in texts if len(text) > 2 * LENGTH]
    rng = random.Random(2)

    def piece(characters: float) -> str:
        text, length = rng.choice(texts), int(characters * rng.uniform(2 / 3, 4 / 3))
        at = rng.randrange(len(text) - length)
        return text[at : at + length].strip() or "yes"

    lines = []
    for number in range(count):
        row = {"prompt": f"{number} {piece(share * LENGTH)}", "chosen": piece((1 - share) * LENGTH)}
        row["rejected"] = piece((1 - share) * LENGTH)
        turns = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
        lines.append(json.dumps({key: [{"role": role, "content": row[key]}] for key, role in turns.items()}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def compare(share: float, rounds: int) -> None:
    """Print the rounds of one share, and the ratios."""
    ratios: dict[str, list[float]] = {measure: [] for measure in MEASURES}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        spawn(CASE, folder, "make")
        write_pairs(folder / "pairs.jsonl", 400, share)
        for _ in range(rounds):
            runs = [(shared, spawn(CASE, folder, "ours", SETTINGS[shared])) for shared in (True, False, False, True)]
            worst = max(
                abs(a - b) for _, run in runs[1:] for a, b in zip(run["losses"], runs[0][1]["losses"], strict=True)
            )
            if worst > GATE:
                raise RuntimeError(f"prompts of {share:.0%}: losses differ by {worst:.2e} > {GATE}")
            for measure, label in MEASURES.items():
                once, twice = (statistics.mean(run[measure] for way, run in runs if way == w) for w in (True, False))
                ratios[measure].append(once / twice)
                print(
                    f"prompts of {share:.0%}: {label}: once {once:.2f}, twice {twice:.2f}, gate {worst:.1e}", flush=True
                )
    for measure, label in MEASURES.items():
        print(f"prompts of {share:.0%}: {label}: ratios {', '.join(f'{ratio:.3f}' for ratio in ratios[measure])}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shares", nargs="+", type=float, default=[0.1, 0.5, 0.8])
    parser.add_argument("--rounds", type=int, default=1, help="rounds of once, twice, twice, once")
    options = parser.parse_args(argv)
    for share in options.shares:
        compare(share, options.rounds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
