"""Convert between checkpoints and Hugging Face folders, in one CPU process for any TP x PP of the source.

    python tools/convert_hf.py import --hf DIR --save CKPT [--tensor-model-parallel-size N]
    python tools/convert_hf.py export --load CKPT --hf DIR [--ckpt-step N]
    python tools/convert_hf.py verify --load CKPT --hf DIR [--ckpt-step N]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_steel.config.load import user_errors

# A float32 model agrees to a few units in the last place of its logits; bfloat16 rounds at 2^-8.
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.25, "float16": 0.05}


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (("import", "Hugging Face folder -> checkpoint"), ("export", "checkpoint -> folder")):
        command = commands.add_parser(name, help=text)
        command.add_argument("--hf", type=Path, required=True, help="Hugging Face folder")
        if name == "import":
            command.add_argument("--save", type=Path, required=True, help="directory for the checkpoint")
            command.add_argument("--tensor-model-parallel-size", type=int, default=1, help="pads the vocabulary for it")
        else:
            command.add_argument("--load", type=Path, required=True, help="checkpoint directory")
            command.add_argument("--ckpt-step", type=int, default=None, help="iteration; the newest when left out")
    verify = commands.add_parser("verify", help="compare logits of a checkpoint and a folder")
    verify.add_argument("--load", type=Path, required=True, help="checkpoint directory")
    verify.add_argument("--hf", type=Path, required=True, help="Hugging Face folder")
    verify.add_argument("--ckpt-step", type=int, default=None, help="iteration; the newest when left out")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one conversion; returns the exit code."""
    options = build_parser().parse_args(argv)
    with user_errors():
        from megatron_steel.runtime import cpu

        cpu.install()
        from megatron_steel.checkpoint import hf
        from megatron_steel.checkpoint.files import find_checkpoint
        from megatron_steel.runtime import world as runtime

        world = runtime.start()
        if options.command == "import":
            print(f"wrote {hf.import_hf(options.hf, options.save, options.tensor_model_parallel_size)}")
            runtime.stop(world)
            return 0
        checkpoint, warnings = find_checkpoint(options.load, options.ckpt_step)
        for line in warnings:
            print(f"warning: {line}", file=sys.stderr)
        if options.command == "export":
            hf.export_hf(checkpoint, options.hf)
            print(f"wrote {options.hf}")
            runtime.stop(world)
            return 0
        from megatron_steel.checkpoint.verify import compare_with_hf

        report = compare_with_hf(checkpoint, options.hf, world)
        runtime.stop(world)
    good = report.max_difference <= TOLERANCE[report.dtype]
    print(
        f"{report.tokens} tokens, {report.dtype}: max |logit difference| {report.max_difference:.3g}, "
        f"top-1 agreement {report.top1_agreement:.4f}: {'same model' if good else 'DIFFERENT'}"
    )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
