"""GRPO from a random model on a task that a rule can check: how far and how fast the reward rises, on a CPU.

    python benchmarks/grpo_toy.py

A prompt is three of the letters A to D, and the right answer is the first of them and an end. `--reward choice` sees
the answer alone: to repeat the prompt, or to name several letters, earns nothing. A quarter of the 64 prompts are held
out. The model (two layers) has 12 tokens, and nobody has shown it an answer: it begins at what chance gives.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import random
import tempfile
import time
from pathlib import Path
from typing import Any

from megatron_steel import preference

LETTERS = "ABCD"
CONTROLS = ("<|im_start|>", "<|im_end|>")
WORDS = (*CONTROLS, "<unk>", "user", "assistant", "\n", *LETTERS, " ", ".")


def write_model(folder: Path, seed: int) -> None:
    """A random Llama with a tokenizer of whole words, in a Hugging Face folder."""
    import torch
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("user|assistant|[\\s\\S]"), "isolated")
    core.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        eos_token=CONTROLS[1],
        additional_special_tokens=list(CONTROLS),
        clean_up_tokenization_spaces=False,
    )
    torch.manual_seed(seed)
    sizes = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.05,
    )
    LlamaForCausalLM(sizes).save_pretrained(folder)
    fast.save_pretrained(folder)


def write_prompts(folder: Path, seed: int) -> None:
    """All prompts, three quarters of them to train on."""
    texts = ["".join(letters) for letters in itertools.product(LETTERS, repeat=3)]
    random.Random(seed).shuffle(texts)
    for name, part in (("train", texts[16:]), ("held", texts[:16])):
        rows = [json.dumps({"prompt": text, "answer": text[0]}) + "\n" for text in part]
        (folder / f"{name}.jsonl").write_text("".join(rows), encoding="utf-8")


def train(folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Run megatron_steel.preference; returns the rows of metrics.jsonl."""
    write_model(folder / "model", options.seed)
    write_prompts(folder, options.seed)
    values: dict[str, Any] = {
        "pretrained-checkpoint": folder / "model", "train-data": folder / "train.jsonl",
        "valid-data": f"held={folder / 'held.jsonl'}", "chat-template": "chatml", "save": folder / "run",
        "loss-type": "grpo", "reward": "choice", "beta": 0, "grpo-group-size": options.group_size,
        "max-new-tokens": 3, "seq-length": 32, "micro-batch-size": options.prompts,
        "global-batch-size": options.prompts, "train-iters": options.steps, "lr": options.lr, "log-interval": 1,
        "eval-interval": 20, "eval-iters": 1, "weight-decay": 0, "max-epochs-per-source": 1000,
        "make-vocab-size-divisible-by": 4, "seed": options.seed,
    }  # fmt: skip
    words = [str(word) for key, value in values.items() for word in (f"--{key}", value)]
    with open(folder / "log.txt", "w", encoding="utf-8") as log, contextlib.redirect_stdout(log):
        assert preference.main(words) == 0
    text = (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def main() -> None:
    """Train, and print how the reward went."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--prompts", type=int, default=16, help="prompts of a step")
    parser.add_argument("--group-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        rows = train(Path(folder), options)
    seconds = time.monotonic() - begun
    steps = [row for row in rows if row.get("split") != "valid"]
    print("| step | reward | held-out reward | tokens of an answer | entropy |\n|---|---|---|---|---|")
    for held in (row for row in rows if row.get("split") == "valid"):
        row = steps[held["iteration"] - 1]
        print(
            f"| {row['iteration']} | {row['reward']:.3f} | {held['reward']:.3f} | {row['tokens/answer']:.2f} | "
            f"{row['entropy']:.2f} |"
        )
    result = {
        "first": round(sum(row["reward"] for row in steps[:3]) / 3, 4),
        "last": round(sum(row["reward"] for row in steps[-3:]) / 3, 4),
        "held_out": [row["reward"] for row in rows if row.get("split") == "valid"][-1],
        "seconds": round(seconds, 1),
        "cpu_seconds": round(time.process_time(), 1),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
