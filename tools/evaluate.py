"""Score a checkpoint on named validation sets: loss, perplexity, bits per byte.

    python tools/evaluate.py --load CKPT --valid-data-path zh=PREFIX en=PREFIX [--seq-length N] [--micro-batch-size N]

Under torchrun every rank is a data-parallel replica, or part of one with --tensor-model-parallel-size.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout this file belongs to

from megatron_steel.config.load import user_errors  # noqa: E402
from tools.command_line import add_model_flags, start_model_run  # noqa: E402


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_flags(parser)
    parser.add_argument("--valid-data-path", nargs="+", required=True, help="NAME=PREFIX or PREFIX of indexed data")
    parser.add_argument("--seq-length", type=int, default=None, help="tokens per sample; the training's when left out")
    parser.add_argument("--micro-batch-size", type=int, default=4, help="samples per forward pass")
    parser.add_argument("--max-samples", type=int, default=None, help="samples per set; all when left out")
    parser.add_argument("--output", type=Path, default=None, help="also write the scores to this JSON file")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Evaluate and print; returns the exit code."""
    options = build_parser().parse_args(argv)
    with user_errors():
        checkpoint, world = start_model_run(options)
        from megatron_steel.checkpoint.files import write_json
        from megatron_steel.evaluate.heldout import score_checkpoint
        from megatron_steel.runtime import world as runtime

        results = score_checkpoint(
            checkpoint,
            options.valid_data_path,
            world,
            seq_length=options.seq_length,
            micro_batch_size=options.micro_batch_size,
            max_samples=options.max_samples,
        )
    if world.rank == 0:
        rows = {name: scores.as_row() for name, scores in results.items()}
        for name, row in rows.items():
            print(f"{name}: {json.dumps(row)}")
        if options.output is not None:
            write_json(options.output, {"checkpoint": checkpoint.name, "sets": rows})
    runtime.stop(world, failed=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
