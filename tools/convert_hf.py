"""Convert between checkpoints and Hugging Face folders, in one CPU process for any TP x PP of the source.

    python tools/convert_hf.py import --hf DIR --save CKPT [--tensor-model-parallel-size N]
    python tools/convert_hf.py export --load CKPT --hf DIR [--ckpt-step N]
    python tools/convert_hf.py verify --load CKPT --hf DIR [--ckpt-step N]

Exit codes: 0 done (verify: the same model), 1 verify found a difference, 2 user error; nothing half-written is left.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from types import FrameType

from megatron_steel.checkpoint.files import find_checkpoint
from megatron_steel.config.load import user_errors


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("import", help="Hugging Face folder -> checkpoint")
    command.add_argument("--hf", type=Path, required=True, help="Hugging Face folder")
    command.add_argument("--save", type=Path, required=True, help="new directory for the checkpoint")
    command.add_argument("--tensor-model-parallel-size", type=int, default=1, help="pads the vocabulary for it")
    for name, text in (
        ("export", "checkpoint -> Hugging Face folder"),
        ("verify", "compare the weights and logits of a checkpoint and a Hugging Face folder"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("--load", type=Path, required=True, help="checkpoint directory")
        command.add_argument("--hf", type=Path, required=True, help="Hugging Face folder")
        command.add_argument("--ckpt-step", type=int, default=None, help="iteration; the newest when left out")
    return parser


def stop_cleanly(number: int, frame: FrameType | None) -> None:
    """On SIGTERM leave like on Ctrl-C, so that what was half-written is removed."""
    raise SystemExit(128 + number)


def convert(options: argparse.Namespace, checkpoint: Path | None) -> int:
    """Run one conversion; ``checkpoint`` is the source of export and verify. Returns the exit code."""
    # Heavy imports come after the cheap checks, so that most errors answer at once.
    from megatron_steel.runtime import cpu

    cpu.install()
    from megatron_steel.checkpoint import hf, verify
    from megatron_steel.runtime import world as runtime

    world = runtime.start()
    code = 0
    if checkpoint is None:
        print(f"wrote {hf.import_hf(options.hf, options.save, options.tensor_model_parallel_size)}")
    elif options.command == "export":
        hf.export_hf(checkpoint, options.hf)
        print(f"wrote {options.hf}")
    else:
        report = verify.compare_with_hf(checkpoint, options.hf, world)
        print(report.one_line())
        code = 0 if report.same else 1
    runtime.stop(world, failed=False)
    return code


def main(argv: list[str] | None = None) -> int:
    """Run one conversion; returns the exit code."""
    options = build_parser().parse_args(argv)
    signal.signal(signal.SIGTERM, stop_cleanly)
    with user_errors():
        if options.command != "export" and not (options.hf / "config.json").is_file():
            raise ValueError(f"--hf {options.hf}: not a Hugging Face folder (it holds no config.json)")
        checkpoint = None
        if options.command != "import":
            checkpoint, warnings = find_checkpoint(options.load, options.ckpt_step)
            for line in warnings:
                print(f"warning: {line}", file=sys.stderr)
        return convert(options, checkpoint)


if __name__ == "__main__":
    sys.exit(main())
