"""Import other people's checkpoints that are no Hugging Face folder; weights only, in one CPU process.

    python tools/import_checkpoint.py --from meta --load LLAMA --save CKPT --max-position-embeddings 4096
    python tools/import_checkpoint.py --from megatron --load RUN --save CKPT --tokenizer-model FOLDER

meta: Meta's own Llama files, params.json and consolidated.*.pth of any number of model-parallel ranks. megatron:
the model of a Megatron-LM run saved with --ckpt-format torch_dist, on any layout. From CKPT tools/convert_hf.py export
makes a Hugging Face folder. Exit codes: 0 done, 2 user error; nothing half-written is left.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout this file belongs to

from megatron_steel.text.tokenizer import TOKENIZER_TYPES, Tokenizer
from tools.command_line import Parser, run_tool

SOURCES = ("meta", "megatron")
META_ONLY = ("max_position_embeddings", "rope_scaling_factor")
MEGATRON_ONLY = ("ckpt_step", "model_family", "vocab_size")


def build_parser() -> Parser:
    """The command line."""
    parser = Parser(__doc__)
    parser.add_argument("--from", dest="source", choices=SOURCES, required=True, help="what is imported")
    parser.add_argument("--load", type=Path, required=True, help="where it is")
    parser.add_argument("--save", type=Path, required=True, help="new directory for the checkpoint")
    parser.add_argument("--tokenizer-type", choices=TOKENIZER_TYPES, default="HuggingFaceTokenizer")
    parser.add_argument("--tokenizer-model", help="a tokenizer to put into the checkpoint: its folder or file")
    parser.add_argument("--tensor-model-parallel-size", type=int, default=1, help="pads the vocabulary for it")
    parser.add_argument(
        "--max-position-embeddings", type=int,
        help="meta: longest sequence, 2048 for Llama 1, 4096 for 2, 8192 for 3, 131072 for 3.1 to 3.3",
    )  # fmt: skip
    parser.add_argument("--rope-scaling-factor", type=float, help="meta: 32 for Llama 3.2; 8 when scaled otherwise")
    parser.add_argument("--ckpt-step", type=int, help="megatron: iteration; the newest when left out")
    parser.add_argument("--model-family", help="megatron: the family, where several have the same layers")
    parser.add_argument("--vocab-size", type=int, help="megatron: rows without padding; the tokenizer's when left out")
    return parser


def tokenizer_of(options: argparse.Namespace) -> Tokenizer | None:
    """The tokenizer the flags name."""
    from megatron_steel.text.tokenizer import build_tokenizer

    return build_tokenizer(options.tokenizer_type, options.tokenizer_model) if options.tokenizer_model else None


def import_meta(options: argparse.Namespace, tokenizer: Tokenizer | None) -> Path:
    """``--from meta``."""
    from megatron_steel.checkpoint import meta_llama

    return meta_llama.import_meta(
        options.load,
        options.save,
        options.max_position_embeddings,
        options.rope_scaling_factor,
        tokenizer,
        options.tensor_model_parallel_size,
    )


def import_megatron(options: argparse.Namespace, tokenizer: Tokenizer | None) -> Path:
    """``--from megatron``."""
    from megatron_steel.checkpoint import megatron_lm

    return megatron_lm.import_megatron(
        options.load,
        options.save,
        step=options.ckpt_step,
        family=options.model_family,
        vocab_size=options.vocab_size,
        tokenizer=tokenizer,
        tensor_parallel_size=options.tensor_model_parallel_size,
    )


def work(argv: list[str]) -> None:
    """Run one import."""
    options = build_parser().parse(argv)
    if not options.load.is_dir():
        raise ValueError(f"--load {options.load}: no such directory")
    foreign = MEGATRON_ONLY if options.source == "meta" else META_ONLY
    for name in foreign:
        if getattr(options, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')}: not for --from {options.source}")
    if options.source == "meta" and options.max_position_embeddings is None:
        raise ValueError(
            "--from meta: give --max-position-embeddings, Meta's files do not say how long sequences may be"
        )
    tokenizer = tokenizer_of(options)
    # Heavy imports come after the cheap checks, so that most errors answer at once.
    from megatron_steel.runtime import cpu

    cpu.install()
    from megatron_steel.checkpoint.state import TOKENIZER_FOLDER, read_state

    made = (import_meta if options.source == "meta" else import_megatron)(options, tokenizer)
    state = read_state(made)
    without = "" if (made / TOKENIZER_FOLDER).is_dir() else ", without a tokenizer (--tokenizer-model adds one)"
    print(f"wrote {made}: {state.config['model_family']}, {state.vocab_size} rows{without}")


if __name__ == "__main__":
    run_tool(work, "nothing was written")
