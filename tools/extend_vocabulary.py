"""Give a checkpoint the rows that an extended tokenizer needs; all other weights stay as they are, to the bit.

    python tools/train_tokenizer.py --extend OLD --input zh.jsonl --vocab-size 6000 --output LARGER
    python tools/extend_vocabulary.py --load CKPT --tokenizer-model LARGER --save NEW [--method sub-pieces]

New rows of the embedding and of an output layer of its own: the mean of all rows, the mean of the rows the old
tokenizer spells the new piece with, or small random ones. Starting from a Hugging Face folder, or going back to one:
tools/convert_hf.py. Exit codes: 0 done, 2 user error; nothing half-written is left.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout this file belongs to

from megatron_steel.text.tokenizer import TOKENIZER_TYPES
from tools.command_line import Parser, run_tool

METHODS = ("mean", "sub-pieces", "random")


def build_parser() -> Parser:
    """The command line."""
    parser = Parser(__doc__)
    parser.add_argument("--load", type=Path, required=True, help="checkpoint directory")
    parser.add_argument("--ckpt-step", type=int, default=None, help="iteration; the newest when left out")
    parser.add_argument("--tokenizer-type", choices=TOKENIZER_TYPES, help="kind of the new one; the checkpoint's kind")
    parser.add_argument("--tokenizer-model", required=True, help="the extended tokenizer: its folder or file")
    parser.add_argument("--save", type=Path, required=True, help="new directory for the checkpoint")
    parser.add_argument("--method", choices=METHODS, default="mean", help="how new rows are made")
    parser.add_argument("--std", type=float, default=0.001, help="standard deviation of random rows")
    parser.add_argument("--seed", type=int, default=1234, help="of random rows")
    parser.add_argument("--tensor-model-parallel-size", type=int, default=1, help="pads the vocabulary for it")
    return parser


def work(argv: list[str]) -> None:
    """Write the new checkpoint."""
    options = build_parser().parse(argv)
    from megatron_steel.checkpoint.files import find_checkpoint

    checkpoint, warnings = find_checkpoint(options.load, options.ckpt_step)
    for line in warnings:
        print(f"warning: {line}", file=sys.stderr)
    # Heavy imports come after the cheap checks, so that most errors answer at once.
    from megatron_steel.runtime import cpu

    cpu.install()
    from megatron_steel.checkpoint.state import read_state
    from megatron_steel.checkpoint.vocabulary import extend_vocabulary
    from megatron_steel.text.tokenizer import build_tokenizer

    kind = options.tokenizer_type or read_state(checkpoint).tokenizer.get("type", "HuggingFaceTokenizer")
    tokenizer = build_tokenizer(kind, options.tokenizer_model)
    made = extend_vocabulary(
        checkpoint,
        tokenizer,
        options.save,
        options.method,
        std=options.std,
        seed=options.seed,
        tensor_parallel_size=options.tensor_model_parallel_size,
    )
    print(f"wrote {made}: {read_state(made).vocab_size} rows, {read_state(checkpoint).vocab_size} before")


if __name__ == "__main__":
    run_tool(work, "the checkpoint that was loaded is as it was")
