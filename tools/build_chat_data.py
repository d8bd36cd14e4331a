"""Make chat data for megatron_steel.finetune and .preference of other data; each row is an object in a .jsonl file.

    python tools/build_chat_data.py choices --input FILE ... --output OUT.jsonl [--thought]
    python tools/build_chat_data.py pairs --input FILE ... --output OUT.jsonl [--most N]
    python tools/build_chat_data.py identity --input FILE ... --output OUT.jsonl --name NAME --author AUTHOR
    python tools/build_chat_data.py samples --input FILE ... --output OUT.jsonl --verifier number|letter|text

choices: multiple-choice questions and their answers, with --thought after an explanation where there is one.
pairs: of such questions, the right option preferred to each wrong one.
identity: conversations of any format in which {{name}} and {{author}} are replaced.
samples: rejection sampling; of the samples of each question those that are right become rows.

The formats are in docs/chat_data.md. Rows that cannot be used are printed with their place; the output is written when
there are no more of them than --max-bad-rows. Exit codes: 0 done, 2 user error, 1 anything else.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout this file belongs to

from megatron_steel.data.chat_builders import Row, choice_pairs, choice_row, identity_row, parse_question  # noqa: E402
from megatron_steel.data.chat_formats import BadRow, RowFormat, read_record  # noqa: E402
from megatron_steel.data.chat_messages import BadRecord  # noqa: E402
from megatron_steel.data.chat_rows import BLANK  # noqa: E402
from megatron_steel.data.chat_samples import VERIFIERS, SampleStats, keep_right, parse_sampled  # noqa: E402
from megatron_steel.data.raw_rows import raw_rows  # noqa: E402
from megatron_steel.data.readers import expand_inputs  # noqa: E402
from megatron_steel.text.files import replacement  # noqa: E402
from tools.command_line import run_tool  # noqa: E402

SHOWN = 20
MAX_TURN_BYTES = 1_000_000
# Of a row of the input, at a place, all rows of the output.
Build = Callable[[Any, str], list[Row]]


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True)

    def add(name: str, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        command.add_argument("--input", nargs="+", required=True, help="files, directories of them, or glob patterns")
        command.add_argument("--output", type=Path, required=True, help="the new .jsonl file")
        command.add_argument("--max-bad-rows", type=int, default=0, help="rows that may be left out; they are printed")
        return command

    command = add("choices", "multiple-choice questions to chat rows")
    command.add_argument("--thought", action="store_true", help="explanations, where there are, before the answers")
    command.add_argument("--language", choices=("zh", "en"), help="of what is around a question; its own when left out")
    command = add("pairs", "multiple-choice questions to preference rows")
    command.add_argument("--most", type=int, default=None, help="rows of a question at most; all when left out")
    command = add("identity", "conversations about who the model is, with its name and maker")
    command.add_argument("--name", required=True, help="for {{name}}")
    command.add_argument("--author", required=True, help="for {{author}}")
    command = add("samples", "samples of answers that are right to chat rows")
    command.add_argument("--verifier", choices=tuple(VERIFIERS), required=True, help="what must be that of the answer")
    command.add_argument("--most", type=int, default=None, help="rows of a question at most; all when left out")
    return parser


def main(argv: Sequence[str]) -> None:
    """Build the rows of a command and say what came out."""
    options = build_parser().parse_args(argv)
    files = expand_inputs(options.input)
    if options.output.resolve() in [file.resolve() for file in files]:
        raise ValueError(f"--output {options.output} is one of the input files; give another name")
    if options.max_bad_rows < 0:
        raise ValueError(f"--max-bad-rows must be 0 or more, not {options.max_bad_rows}")
    if getattr(options, "most", None) is not None and options.most < 1:
        raise ValueError(f"--most must be 1 or more, not {options.most}")
    if options.command == "choices":
        counts = write_rows(
            files, options, lambda value, _: [choice_row(parse_question(value), options.thought, options.language)]
        )
        summary = []
    elif options.command == "pairs":
        counts = write_rows(files, options, lambda value, _: choice_pairs(parse_question(value), options.most))
        summary = []
    elif options.command == "identity":
        counts, summary = build_identity(files, options)
    else:
        stats = SampleStats()
        verify = VERIFIERS[options.verifier]

        def build(value: Any, _: str) -> list[Row]:
            return keep_right(parse_sampled(value, MAX_TURN_BYTES), verify, options.most, stats)

        counts = write_rows(files, options, build)
        summary = stats.lines()
    for line in summary:
        print(line)
    print(
        f"{counts['rows']:,} rows read, {counts['bad']:,} left out, {counts['written']:,} written to {options.output}"
    )


def build_identity(files: Sequence[Path], options: argparse.Namespace) -> tuple[Counter[str], list[str]]:
    """Rows with a name and a maker. ``ValueError`` if there was nothing to put them in."""
    values, replaced = {"name": options.name, "author": options.author}, Counter[str]()

    def build(value: Any, place: str) -> list[Row]:
        chat = read_record(value, place, RowFormat(), MAX_TURN_BYTES)
        if isinstance(chat, BadRow):
            raise BadRecord(chat.reason)
        row, count = identity_row(chat, values)
        replaced["all"] += count
        return [row]

    def check() -> None:
        if not replaced["all"]:
            raise ValueError("--input: no row holds {{name}} or {{author}}, so nothing would be said about them")

    counts = write_rows(files, options, build, check)
    return counts, [f"{replaced['all']:,} placeholders replaced"]


def write_rows(
    files: Sequence[Path], options: argparse.Namespace, build: Build, check: Callable[[], None] = lambda: None
) -> Counter[str]:
    """Write what is built of each row of the files; counts of rows read, bad and written.

    ``check`` is called before the file gets its name. Raises ``ValueError``, and writes nothing, for too many bad rows.
    """
    counts: Counter[str] = Counter(rows=0, bad=0, written=0)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with replacement(options.output) as temporary:
        try:
            with open(temporary, "w", encoding="utf-8", newline="\n") as out:
                for row in built(files, build, counts):
                    out.write(json.dumps(row, ensure_ascii=False) + "\n")
                    counts["written"] += 1
            if counts["bad"] > options.max_bad_rows:
                raise ValueError(
                    f"{counts['bad']:,} of {counts['rows']:,} rows cannot be used, nothing was written; see above, and "
                    "allow them with --max-bad-rows"
                )
            check()
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    return counts


def built(files: Sequence[Path], build: Build, counts: Counter[str]) -> Iterator[Row]:
    """The rows that are built, in order; bad ones are printed and counted."""
    for raw in raw_rows(files):
        if raw.error == BLANK:
            continue
        counts["rows"] += 1
        try:
            if raw.error is not None:
                raise BadRecord(raw.error)
            yield from build(raw.value, raw.place)
        except BadRecord as error:
            counts["bad"] += 1
            if counts["bad"] <= SHOWN:
                print(f"{raw.place}: {error}", file=sys.stderr)


if __name__ == "__main__":
    run_tool(main, "nothing was written")
