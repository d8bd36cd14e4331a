"""Continue prompts with a checkpoint.

    python tools/generate.py --load CKPT --prompt "Call me" "..." [--max-new-tokens 64] [--temperature 0.8 --top-p 0.9]
    python tools/generate.py --load CKPT            (reads prompts from the terminal, one a line)
    python tools/generate.py --load CKPT --chat     (a conversation; an empty line begins a new one)

Under torchrun with --tensor-model-parallel-size / --pipeline-model-parallel-size the model is split over ranks.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout this file belongs to

from megatron_steel.config.load import user_errors  # noqa: E402
from megatron_steel.text.conversation import Message  # noqa: E402
from tools.command_line import add_model_flags, start_model_run  # noqa: E402

if TYPE_CHECKING:
    from megatron_steel.evaluate.generate import Sampling, TextGenerator
    from megatron_steel.runtime.world import World
    from megatron_steel.text.templates import Template


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_flags(parser)
    parser.add_argument("--prompt", nargs="*", default=None, help="texts; without any, lines are read")
    parser.add_argument("--chat", action="store_true", help="prompts are turns of a user, in the model's chat template")
    parser.add_argument("--chat-template", default=None, help="another one: its name or a .jinja file; implies --chat")
    parser.add_argument("--system", default=None, help="the system turn of conversations; implies --chat")
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


def complete(generator: TextGenerator, prompts: list[str] | None, sampling: Sampling) -> None:
    """Texts and how they go on."""
    rank = generator.world.rank
    if prompts:
        for prompt, text in zip(prompts, generator.complete(prompts, sampling), strict=True):
            say(rank, f"{prompt}{text}")
        return
    for line in shared_lines(generator.world):
        say(rank, generator.complete([line], sampling)[0])


def converse(
    generator: TextGenerator, template: Template, system: str | None, prompts: list[str] | None, sampling: Sampling
) -> None:
    """Answers to single questions, or a conversation of turns that ends with an empty line."""
    rank = generator.world.rank
    start = [] if system is None else [Message(role="system", content=system)]
    if prompts:
        talks = [[*start, Message(role="user", content=prompt)] for prompt in prompts]
        for answer in generator.reply(talks, template, sampling):
            say(rank, answer)
        return
    turns = list(start)
    for line in shared_lines(generator.world):
        if not line:
            turns = list(start)
            say(rank, "(a new conversation)")
            continue
        turns.append(Message(role="user", content=line))
        answer = generator.reply([turns], template, sampling)[0]
        turns.append(Message(role="assistant", content=answer))
        say(rank, answer)


def shared_lines(world: World) -> Iterator[str]:
    """What is typed on rank 0, on every rank."""
    from megatron_steel.runtime import world as runtime

    for line in lines(world.rank):
        shared = runtime.broadcast_object(world, line)
        if shared is None:
            return
        yield shared
    if world.rank == 0:
        runtime.broadcast_object(world, None)


def say(rank: int, text: str) -> None:
    """Print once."""
    if rank == 0:
        print(text)


def main(argv: list[str] | None = None) -> int:
    """Generate and print; returns the exit code."""
    options = build_parser().parse_args(argv)
    with user_errors():
        checkpoint, world = start_model_run(options)
        from megatron_steel.evaluate.generate import Sampling, TextGenerator
        from megatron_steel.runtime import world as runtime
        from megatron_steel.text.templates import load_template, suggest_template

        generator = TextGenerator(checkpoint, world)
        sampling = Sampling(
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            seed=options.seed,
        )
        if options.chat or options.chat_template or options.system is not None:
            name = options.chat_template or suggest_template(generator.tokenizer)
            template = load_template(name, generator.tokenizer)
            converse(generator, template, options.system, options.prompt, sampling)
        else:
            complete(generator, options.prompt, sampling)
    runtime.stop(world, failed=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
