"""Sample a model's answers to prompts: the file that `build_chat_data.py samples` chooses from (rejection sampling).

    python tools/sample_answers.py --load CKPT --input problems.jsonl --output samples.jsonl --samples 8
    python tools/build_chat_data.py samples --input samples.jsonl --output chats.jsonl --verifier number

Rows have a `prompt` (a text or a list of turns) or `messages` up to a user turn, and an `answer`; each is written as it
is read, as `messages` and with its `samples`. A sample depends on the row's number, not on the batch or the layout.
Under torchrun the model is split with --tensor-model-parallel-size / --pipeline-model-parallel-size, and replicas share
the rows. Exit codes: 0 done, 2 user error, 1 anything else.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout this file belongs to

from megatron_steel.config.load import user_errors  # noqa: E402
from megatron_steel.data.chat_formats import BadRow  # noqa: E402
from megatron_steel.data.chat_sources import open_chat  # noqa: E402
from megatron_steel.text.conversation import Prompt  # noqa: E402
from megatron_steel.text.files import replacement  # noqa: E402
from tools.command_line import add_model_flags, start_model_run  # noqa: E402

if TYPE_CHECKING:
    from megatron_steel.evaluate.generate import Sampling, TextGenerator
    from megatron_steel.text.templates import Template

MAX_TURN_BYTES = 1_000_000


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_flags(parser)
    parser.add_argument("--input", nargs="+", required=True, help="files, folders or patterns of rows with prompts")
    parser.add_argument("--output", type=Path, required=True, help="the new .jsonl file")
    parser.add_argument("--samples", type=int, default=8, help="answers to each prompt")
    parser.add_argument("--chat-template", default=None, help="its name or a .jinja file; what fits the tokenizer")
    parser.add_argument("--batch-size", type=int, default=8, help="prompts at a time, for memory")
    parser.add_argument("--max-new-tokens", type=int, default=512, help="tokens of an answer at most")
    parser.add_argument("--temperature", type=float, default=0.7, help="0 takes the most likely token")
    parser.add_argument("--top-p", type=float, default=0.95, help="choose among the tokens that make up this share")
    parser.add_argument("--seed", type=int, default=0, help="of the choices")
    return parser


def read_prompts(inputs: list[str]) -> list[Prompt]:
    """All rows; ``ValueError`` names the first that is no prompt."""
    found = []
    for source in open_chat(inputs, None, MAX_TURN_BYTES, "--input", "prompt"):
        for row in source.rows():
            if isinstance(row, BadRow):
                raise ValueError(f"{row.place}: {row.reason}")
            assert isinstance(row, Prompt)
            if row.conversation.tools:
                raise ValueError(f"{row.place}: has tools, which a file of samples has no place for")
            found.append(row)
    if not found:
        raise ValueError(f"--input {' '.join(inputs)}: holds no rows")
    return found


def sample(
    generator: TextGenerator, template: Template, rows: list[tuple[int, Prompt]], sampling: Sampling, count: int
) -> list[tuple[int, dict[str, Any]]]:
    """Rows of the output for rows of the input with their numbers."""
    from megatron_steel.evaluate.generate import continue_prompts

    prompts = [template.encode_prompt(row.conversation.messages) for _, row in rows]
    numbers = [number for number, _ in rows]
    drawn = continue_prompts(
        generator.model, prompts, sampling, template.stop_ids, generator.world, samples=count, streams=numbers
    )
    written = []
    for (number, row), answers in zip(rows, drawn, strict=True):
        turns = [{"role": turn.role, "content": turn.content} for turn in row.conversation.messages]
        texts = [generator.tokenizer.decode(answer.tokens) for answer in answers]
        written.append((number, {"messages": turns, "answer": row.answer, "samples": texts}))
    return written


def main(argv: list[str] | None = None) -> int:
    """Sample and write; returns the exit code."""
    options = build_parser().parse_args(argv)
    with user_errors():
        for name in ("samples", "batch_size", "max_new_tokens"):
            if getattr(options, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be 1 or more, not {getattr(options, name)}")
        rows = list(enumerate(read_prompts(options.input)))
        checkpoint, world = start_model_run(options)
        from megatron_steel.evaluate.generate import Sampling, TextGenerator
        from megatron_steel.runtime import world as runtime
        from megatron_steel.text.templates import load_template, suggest_template

        generator = TextGenerator(checkpoint, world)
        template = load_template(options.chat_template or suggest_template(generator.tokenizer), generator.tokenizer)
        sampling = Sampling(
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            top_p=options.top_p,
            seed=options.seed,
        )
        own = rows[world.data_rank :: world.data_size]
        done: list[tuple[int, dict[str, Any]]] = []
        for first in range(0, len(own), options.batch_size):
            part = own[first : first + options.batch_size]
            done += sample(generator, template, part, sampling, options.samples)
            if world.rank == 0:
                print(f"{len(done)} of {len(own)} prompts of this replica", file=sys.stderr, flush=True)
        everything = dict(pair for each in runtime.gather_objects(world, done) for pair in each)
        if world.rank == 0:
            lines = [json.dumps(everything[number], ensure_ascii=False) + "\n" for number in range(len(rows))]
            with replacement(options.output) as temporary:
                temporary.write_text("".join(lines), encoding="utf-8")
            print(f"wrote {options.samples} samples of {len(rows)} prompts to {options.output}")
    runtime.stop(world, failed=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
