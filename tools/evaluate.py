"""Score a checkpoint on named validation sets: loss, perplexity, bits per byte.

    python tools/evaluate.py --load CKPT --valid-data-path zh=PREFIX en=PREFIX [--seq-length N] [--micro-batch-size N]

Under torchrun every rank is a data-parallel replica, or part of one with --tensor-model-parallel-size.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from megatron_steel.config.load import user_errors


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load", type=Path, required=True, help="checkpoint directory")
    parser.add_argument("--ckpt-step", type=int, default=None, help="iteration; the newest when left out")
    parser.add_argument("--valid-data-path", nargs="+", required=True, help="NAME=PREFIX or PREFIX of indexed data")
    parser.add_argument("--seq-length", type=int, default=None, help="tokens per sample; the training's when left out")
    parser.add_argument("--micro-batch-size", type=int, default=4, help="samples per forward pass")
    parser.add_argument("--max-samples", type=int, default=None, help="samples per set; all when left out")
    parser.add_argument("--tensor-model-parallel-size", type=int, default=1, help="ranks that share each layer")
    parser.add_argument("--pipeline-model-parallel-size", type=int, default=1, help="pipeline stages")
    parser.add_argument("--output", type=Path, default=None, help="also write the scores to this JSON file")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Evaluate and print; returns the exit code."""
    options = build_parser().parse_args(argv)
    with user_errors():
        from megatron_steel.runtime import cpu

        cpu.install()
        from megatron_steel.checkpoint.files import find_checkpoint, write_json
        from megatron_steel.evaluate.heldout import score_checkpoint
        from megatron_steel.runtime import world as runtime

        checkpoint, warnings = find_checkpoint(options.load, options.ckpt_step)
        world = runtime.start(
            tensor_model_parallel_size=options.tensor_model_parallel_size,
            pipeline_model_parallel_size=options.pipeline_model_parallel_size,
        )
        results = score_checkpoint(
            checkpoint,
            options.valid_data_path,
            world,
            seq_length=options.seq_length,
            micro_batch_size=options.micro_batch_size,
            max_samples=options.max_samples,
        )
    if world.rank == 0:
        for line in warnings:
            print(f"warning: {line}", file=sys.stderr)
        rows = {name: scores.as_row() for name, scores in results.items()}
        for name, row in rows.items():
            print(f"{name}: {json.dumps(row)}")
        if options.output is not None:
            write_json(options.output, {"checkpoint": checkpoint.name, "sets": rows})
    runtime.stop(world, failed=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
