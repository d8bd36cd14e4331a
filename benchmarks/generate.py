"""Speed of generating text on a CPU: our cache against feeding the whole text for every token, and transformers.

    python benchmarks/generate.py                                      # both sizes
    python benchmarks/generate.py --cases tiny --rounds 3 --record benchmarks/records/generate_DATE

Models are Llamas with random weights in fp32, written by transformers and imported by our own tool. A case is a batch
of prompts of one length, or of all lengths up to it ("mixed": transformers pads them on the left), continued by some
tokens without a stop. The gate before any time is read: all sides choose the same tokens, greedily. Sides take turns in
one process; the first round is not counted. There is one thread, and what counts are its CPU seconds: other work on the
machine disturbs them less than seconds on the clock. Tokens are new ones.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout this file belongs to

from megatron_steel.runtime import cpu  # noqa: E402

cpu.install()

import torch  # noqa: E402

from megatron_steel.checkpoint.hf import import_hf  # noqa: E402
from megatron_steel.checkpoint.verify import load_for_inference  # noqa: E402
from megatron_steel.evaluate.generate import Sampling, generate  # noqa: E402
from megatron_steel.model.build import Model  # noqa: E402
from megatron_steel.runtime import world as runtime  # noqa: E402
from megatron_steel.runtime.world import World  # noqa: E402

POSITIONS = 1024
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 6, "num_attention_heads": 8,
        "num_key_value_heads": 4, "vocab_size": 4096,
    },
    "135m": {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True,
    },
}  # fmt: skip
# Size, prompts, longest prompt, new tokens, whether prompts have all lengths.
CASES: dict[str, tuple[str, int, int, int, bool]] = {
    "tiny": ("tiny", 8, 64, 64, False),
    "tiny mixed": ("tiny", 8, 64, 64, True),
    "135m": ("135m", 8, 64, 24, False),
    "135m mixed": ("135m", 8, 64, 24, True),
}
Side = Callable[[], list[list[int]]]


def load_both(size: str, world: World, folder: Path) -> tuple[Model, Any]:
    """A model of random weights in both libraries."""
    from transformers import AutoModelForCausalLM, LlamaConfig
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(LlamaConfig(max_position_embeddings=POSITIONS, **SIZES[size])).eval()
    theirs.save_pretrained(folder / "hf")
    ours, _ = load_for_inference(import_hf(folder / "hf", folder / "ours"), world)
    return ours, theirs


def make_prompts(case: tuple[str, int, int, int, bool], vocab_size: int) -> list[list[int]]:
    """Random tokens; mixed lengths go in equal steps from a few to the longest."""
    _, count, longest, _, mixed = case
    ids = torch.randint(3, vocab_size, (count, longest), generator=torch.Generator().manual_seed(0)).tolist()
    return [row[: longest * (number + 1) // count] if mixed else row for number, row in enumerate(ids)]


@torch.no_grad()
def without_cache(model: Model, prompts: list[list[int]], new: int) -> list[list[int]]:
    """Feed whole texts for every token; those of different lengths have padding behind them."""
    tokens = torch.zeros(len(prompts), max(map(len, prompts)) + new, dtype=torch.int64)
    ends, rows = torch.tensor([len(prompt) for prompt in prompts]), torch.arange(len(prompts))
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = torch.tensor(prompt)
    for _ in range(new):
        fed = tokens[:, : int(ends.max())]
        logits = model.language_models()[0](fed, torch.arange(fed.shape[1]).expand_as(fed), None)
        tokens[rows, ends] = logits[rows, ends - 1, : model.vocab_size].argmax(-1)
        ends += 1
    return [row[len(prompt) : len(prompt) + new].tolist() for row, prompt in zip(tokens, prompts, strict=True)]


@torch.no_grad()
def of_transformers(model: Any, prompts: list[list[int]], new: int) -> list[list[int]]:
    """``generate`` with its default cache."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    seen = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    model.generation_config.eos_token_id = None
    rows = model.generate(ids, attention_mask=seen, max_new_tokens=new, do_sample=False, pad_token_id=0)
    return rows[:, longest:].tolist()


def measure(name: str, rounds: int, loaded: tuple[Model, Any], world: World) -> dict[str, Any]:
    """CPU seconds of each side by round."""
    case, (ours, theirs) = CASES[name], loaded
    new, prompts = case[3], make_prompts(case, ours.vocab_size)
    sides: dict[str, Side] = {
        "cache": lambda: generate(ours, prompts, Sampling(max_new_tokens=new, temperature=0), [], world),
        "no cache": lambda: without_cache(ours, prompts, new),
        "transformers": lambda: of_transformers(theirs, prompts, new),
    }
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(rounds + 1):
        texts = {}
        for side in sides if number % 2 else reversed(sides):
            began = time.process_time()
            texts[side] = sides[side]()
            if number:
                seconds[side].append(time.process_time() - began)
        if any(text != texts["cache"] for text in texts.values()):
            raise SystemExit(f"{name}: the sides do not choose the same tokens; nothing is timed")
    return {"case": name, "tokens": new * len(prompts), "seconds": seconds}


def table(results: list[dict[str, Any]]) -> list[str]:
    """Median and fastest tokens/s of each side, and the median of the ratios by round."""
    lines = ["| case | side | tokens/s, median | tokens/s, fastest | cache is faster by |", "|---|---|---|---|---|"]
    for result in results:
        ours = result["seconds"]["cache"]
        for side, seconds in result["seconds"].items():
            ratios = [theirs / mine for theirs, mine in zip(seconds, ours, strict=True)]
            median, best = (result["tokens"] / pick(seconds) for pick in (statistics.median, min))
            spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            lines.append(f"| {result['case']} | {side} | {median:.0f} | {best:.0f} | {spread} |")
    return lines


def main() -> int:
    """Measure the cases and print, or record, the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES), help="what to measure")
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds")
    parser.add_argument("--record", type=Path, default=None, help="write this file with .md and .json")
    options = parser.parse_args()
    world = runtime.start()
    torch.set_num_threads(1)
    load, results = [os.getloadavg()[0]], []
    for size in dict.fromkeys(CASES[name][0] for name in options.cases):
        with tempfile.TemporaryDirectory() as folder:
            loaded = load_both(size, world, Path(folder))
        for name in (name for name in options.cases if CASES[name][0] == size):
            results.append(measure(name, options.rounds, loaded, world))
            print("\n".join(table(results[-1:])), flush=True)
    load.append(os.getloadavg()[0])
    facts = {
        "cores": os.cpu_count(),
        "load_before_and_after": [round(value, 2) for value in load],
        "versions": {name: version(name) for name in ("torch", "megatron-core", "transformers")},
    }
    lines = ["# Generating text on a CPU", "", *table(results), "", json.dumps(facts)]
    if options.record is None:
        print("\n".join(lines))
        return 0
    options.record.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    text = json.dumps({"facts": facts, "results": results}, indent=1)
    options.record.with_suffix(".json").write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
