"""Continue prompts with a checkpoint.

    python tools/generate.py --load CKPT --prompt "Call me" "..." [--max-new-tokens 64] [--temperature 0.8 --top-p 0.9]
    python tools/generate.py --load CKPT            (reads prompts from the terminal, one a line)

Under torchrun with --tensor-model-parallel-size / --pipeline-model-parallel-size the model is split over ranks.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout this file belongs to

from megatron_steel.config.load import user_errors  # noqa: E402
from tools.command_line import add_model_flags, start_model_run  # noqa: E402


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_flags(parser)
    parser.add_argument("--prompt", nargs="*", default=None, help="texts; without any, lines are read")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="tokens added at most")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 takes the most likely token")
    parser.add_argument("--top-k", type=int, default=0, help="choose among this many tokens; 0 for all")
    parser.add_argument("--top-p", type=float, default=1.0, help="choose among tokens with this much probability")
    parser.add_argument("--seed", type=int, default=0, help="seed of the choices")
    return parser


def lines(rank: int) -> Iterator[str | None]:
    """Prompts typed on rank 0, until the end of input."""
    while rank == 0:
        print("> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            break
        yield line.rstrip("\n")
    while rank != 0:
        yield None


def main(argv: list[str] | None = None) -> int:
    """Generate and print; returns the exit code."""
    options = build_parser().parse_args(argv)
    with user_errors():
        checkpoint, world = start_model_run(options)
        from megatron_steel.evaluate.generate import Sampling, TextGenerator
        from megatron_steel.runtime import world as runtime

        generator = TextGenerator(checkpoint, world)
        sampling = Sampling(
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            seed=options.seed,
        )
        if options.prompt:
            texts = generator.complete(options.prompt, sampling)
            if world.rank == 0:
                for prompt, text in zip(options.prompt, texts, strict=True):
                    print(f"{prompt}{text}")
        else:
            for line in lines(world.rank):
                prompt = runtime.broadcast_object(world, line)
                if prompt is None:
                    break
                text = generator.complete([prompt], sampling)[0]
                if world.rank == 0:
                    print(text)
            if world.rank == 0:
                runtime.broadcast_object(world, None)
    runtime.stop(world, failed=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
