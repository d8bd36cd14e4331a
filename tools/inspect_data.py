"""Look at data: what is in a file, whether it is sound, which sample a run saw. Nothing is changed in place.

    python tools/inspect_data.py verify PREFIX ...                 bounds, ids, document ends, hash
    python tools/inspect_data.py stats PREFIX|FILE ...             lengths, repetitions, tokens per character
    python tools/inspect_data.py check FILE ... [--eval FILE ...]  raw rows: schema, empty texts, roles, contamination
    python tools/inspect_data.py merge --input PREFIX ... --output-prefix P
    python tools/inspect_data.py sample N --load CKPT [--count K]  sample N of a run, decoded, with its source
    python tools/inspect_data.py diff A B                          two checkpoints or ledgers: where the order differs
    python tools/inspect_data.py duplicates PREFIX ...             the same content under two names
    python tools/inspect_data.py import-litpkds FILE|DIR ... --output-prefix P --vocab-size V --eod-id E --pad-id I

Exit codes: 0 done, nothing found; 2 a user error, or problems found (verify, check, duplicates); 1 anything else.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout this file belongs to

from megatron_steel.config.load import from_flat, user_errors  # noqa: E402
from megatron_steel.data import inspect  # noqa: E402
from megatron_steel.data.order import Ledger  # noqa: E402
from megatron_steel.text.tokenizer import TOKENIZER_TYPES, Tokenizer, build_tokenizer  # noqa: E402
from tools.command_line import leave_on_sigterm  # noqa: E402

DIFF_LIMIT = 1 << 22


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True)

    def add(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=text, allow_abbrev=False)

    command = add("verify", "read all of a dataset and name what is wrong with it")
    command.add_argument("prefixes", nargs="+", metavar="PREFIX", help="dataset, or a directory of them")
    command.add_argument("--eod-id", type=int, help="id that ends every document; the sidecar's when left out")
    command.add_argument("--max-problems", type=int, default=100, help="lines per dataset")
    add_tokenizer(command)
    command = add("stats", "count documents, tokens and repetitions of datasets or raw files")
    command.add_argument("inputs", nargs="+", metavar="PREFIX|FILE", help="dataset, raw file, glob or directory")
    command.add_argument("--seq-length", type=int, help="for the share of valid tokens")
    command.add_argument("--decode-documents", type=int, default=2000, help="documents decoded per dataset; 0 for all")
    command.add_argument("--text-key", default="text", help="raw rows: key of the text")
    command.add_argument("--json", action="store_true", help="one JSON object per input instead of a table")
    add_tokenizer(command)
    add_check(add("check", "name raw rows that should not be trained on"))
    command = add("merge", "put datasets one after the other into a new one")
    command.add_argument("--input", nargs="+", required=True, help="prefixes in this order, or a directory of datasets")
    command.add_argument("--output-prefix", required=True, help="the new dataset")
    command = add("sample", "print sample N of a run")
    command.add_argument("number", type=int, metavar="N", help="sample, from 0")
    command.add_argument("--load", type=Path, required=True, help="checkpoint directory of the run")
    command.add_argument("--ckpt-step", type=int, default=None, help="iteration; the newest when left out")
    command.add_argument("--count", type=int, default=1, help="samples from N on")
    command.add_argument("--data-path", nargs="+", help="where the training data lies now, in the run's own form")
    command = add("diff", "compare the data orders of two runs; exits with 0 whatever it finds")
    command.add_argument("a", type=Path, metavar="A", help="checkpoint directory, state.json or a ledger's JSON")
    command.add_argument("b", type=Path, metavar="B", help="the same")
    command.add_argument("--limit", type=int, default=DIFF_LIMIT, help="samples that are compared at most")
    command = add("duplicates", "find datasets of the same content")
    command.add_argument("prefixes", nargs="+", metavar="PREFIX", help="dataset, or a directory of them")
    command.add_argument("--fast", action="store_true", help="do not read the middle of files that agree at both ends")
    command.add_argument("--window", type=int, default=1 << 16, help="bytes at each end of a file in the fast key")
    command.add_argument("--read-all", action="store_true", help="do not take hashes from sidecars")
    add_litpkds(add("import-litpkds", "convert packed chunks of TinyLlama or Steel-LLM to a dataset"))
    return parser


def add_tokenizer(command: argparse.ArgumentParser) -> None:
    """The options that name a tokenizer, or only its size."""
    command.add_argument("--tokenizer-type", choices=TOKENIZER_TYPES, default="HuggingFaceTokenizer", help="its kind")
    command.add_argument("--tokenizer-model", help="folder or file of the tokenizer")
    command.add_argument("--vocab-size", type=int, help="number of ids, instead of a tokenizer")


def add_check(command: argparse.ArgumentParser) -> None:
    """The options of check."""
    command.add_argument("files", nargs="+", metavar="FILE", help="raw files, globs or directories")
    command.add_argument("--eval", nargs="+", default=[], metavar="FILE", help="evaluation sets (.jsonl)")
    command.add_argument("--ngram", type=int, default=13, help="tokens in a row that count as taken from them")
    command.add_argument("--text-key", nargs="+", default=[], help="keys that every row must have text under")
    command.add_argument(
        "--identity-strings", type=Path, help="file with one string per line, instead of the usual ones"
    )


def add_litpkds(command: argparse.ArgumentParser) -> None:
    """The options of import-litpkds."""
    command.add_argument("inputs", nargs="+", metavar="FILE|DIR", help="chunks, or directories of them")
    command.add_argument("--output-prefix", required=True, help="the new dataset")
    command.add_argument("--eod-id", type=int, help="id that ends a document (Steel-LLM: 151645); the tokenizer's")
    command.add_argument("--bos-id", type=int, help="id that begins a document, instead (TinyLlama: 1)")
    command.add_argument("--pad-id", type=int, help="id that fills the last chunk (Steel-LLM: 151643); the tokenizer's")
    add_tokenizer(command)


def given_tokenizer(options: argparse.Namespace) -> Tokenizer | None:
    """The tokenizer that the options name, None when they name none."""
    if options.tokenizer_model is None and options.tokenizer_type != "NullTokenizer":
        return None
    return build_tokenizer(options.tokenizer_type, options.tokenizer_model, options.vocab_size)


def say(lines: Sequence[str]) -> None:
    """Notes that are not the result go to stderr."""
    for line in lines:
        print(f"note: {line}", file=sys.stderr)


def verify(options: argparse.Namespace) -> int:
    """Print a line per problem, or per sound dataset."""
    tokenizer = given_tokenizer(options)
    expected = inspect.Expected(tokenizer.vocab_size if tokenizer else options.vocab_size, options.eod_id)
    failed = False
    for prefix in inspect.find_prefixes(options.prefixes):
        problems, notes = inspect.verify(prefix, expected, options.max_problems)
        say(notes)
        for line in problems or [f"{prefix}: sound"]:
            print(line)
        failed = failed or bool(problems)
    return 2 if failed else 0


def stats(options: argparse.Namespace) -> int:
    """Print a table, or a JSON object, per dataset and one for all raw files together."""
    from megatron_steel.data import statistics

    tokenizer = given_tokenizer(options)
    prefixes = [name for name in options.inputs if is_dataset(name)]
    raw = [name for name in options.inputs if not is_dataset(name)]
    results: list[dict[str, Any]] = [
        statistics.dataset_stats(prefix, options.seq_length, tokenizer, options.decode_documents)
        for prefix in inspect.find_prefixes(prefixes)
    ]
    if raw:
        from megatron_steel.data.raw_rows import raw_rows
        from megatron_steel.data.readers import expand_inputs

        paths = expand_inputs(raw)
        found = statistics.raw_stats(raw_rows(paths, [options.text_key], "stats"), options.text_key)
        results.append({"files": [str(path) for path in paths]} | found)
    for result in results:
        if options.json:
            print(json.dumps(result, ensure_ascii=False))
        else:
            print("\n".join(statistics.table(result)) + "\n")
    return 0


def is_dataset(name: str) -> bool:
    """Whether a name on the command line means indexed data: a prefix, its .bin or .idx, or a directory of them."""
    if Path(name).is_dir():
        return any(Path(name).glob("*.idx"))
    return name.endswith((".bin", ".idx")) or Path(f"{name}.idx").is_file() or Path(f"{name}.bin").is_file()


def check(options: argparse.Namespace) -> int:
    """Print a line per finding."""
    from megatron_steel.data import raw_check
    from megatron_steel.data.raw_rows import raw_rows
    from megatron_steel.data.readers import expand_inputs

    identity = raw_check.IDENTITY_STRINGS
    if options.identity_strings is not None:
        if not options.identity_strings.is_file():
            raise ValueError(f"--identity-strings {options.identity_strings}: no such file")
        lines = options.identity_strings.read_text(encoding="utf-8").splitlines()
        identity = tuple(line for line in lines if line.strip())
    wanted = raw_check.CheckOptions(tuple(options.eval), options.ngram, identity, tuple(options.text_key))
    paths = expand_inputs(options.files)
    findings = 0
    for line in raw_check.check_rows(raw_rows(paths, None, "check"), wanted):
        print(line)
        findings += 1
    print(f"{findings} findings in {len(paths)} files")
    return 2 if findings else 0


def merge(options: argparse.Namespace) -> int:
    """Merge, and say so when two inputs are the same."""
    from megatron_steel.data.duplicates import find_duplicates

    prefixes = inspect.find_prefixes(options.input)
    say([f"{pair.one_line()}; both were kept" for pair in find_duplicates(prefixes) if pair.verdict == "same"])
    sidecar = inspect.merge(prefixes, options.output_prefix)
    print(f"{options.output_prefix}: {sidecar['documents']} documents, {sidecar['tokens']} tokens of {len(prefixes)}")
    return 0


def sample(options: argparse.Namespace) -> int:
    """Print samples of a run with their sources."""
    # megatron-core's window helper is imported by the data room once the CPU is prepared.
    from megatron_steel.runtime import cpu

    cpu.install()
    from megatron_steel.checkpoint.files import find_checkpoint
    from megatron_steel.checkpoint.state import load_tokenizer, read_state
    from megatron_steel.data.identity import Known
    from megatron_steel.data.selection import parse_data_path
    from megatron_steel.data.sources import open_sources

    if options.number < 0 or options.count < 1:
        raise ValueError(f"sample {options.number} --count {options.count}: from 0 on, and at least one")
    checkpoint, warnings = find_checkpoint(options.load, options.ckpt_step)
    say(warnings)
    state = read_state(checkpoint)
    if not state.ledger:
        raise ValueError(f"{checkpoint} holds no data order: it was imported, not trained here")
    ledger, tokenizer = Ledger.from_json(state.ledger), load_tokenizer(checkpoint)
    data = from_flat(state.config, str(checkpoint)).data
    values = options.data_path or data.data_path or data.train_data_path
    # Weights do not matter here: a source of weight 0 may have served earlier samples, or serve later ones.
    prefixes = [file.value for file in parse_data_path(values)]
    sources = open_sources(
        data_path=prefixes if data.data_path else [],
        split=data.split,
        train_data_path=[] if data.data_path else prefixes,
        valid_data_path=[],
        seq_length=ledger.seq_length,
        seed=ledger.seed,
        tokenizer=None,
        known={source.fingerprint: Known(source.name, source.windows) for source in ledger.sources},
        sequence_mode=data.sequence_mode,
    )
    for number in range(options.number, options.number + options.count):
        print(inspect.show_sample(number, ledger, sources.datasets, tokenizer))
    return 0


def diff(options: argparse.Namespace) -> int:
    """Print what differs between two orders, and from which sample on."""
    one, other = read_ledger(options.a), read_ledger(options.b)
    lines = inspect.compare_ledgers(one, other)
    for line in lines:
        print(line)
    if one.seq_length != other.seq_length:
        print("no sample is the same: the windows have another length")
        return 0
    first = inspect.first_difference(one, other, options.limit)
    if first is not None:
        print(f"the first sample that differs is {first}")
    elif one.segments == other.segments:
        print("the same order")
    else:
        print(f"no difference in the first {options.limit} samples")
    return 0


def read_ledger(path: Path) -> Ledger:
    """The ledger of a checkpoint directory (of a run or of one iteration), of a state.json, or of its own JSON."""
    if path.is_dir():
        from megatron_steel.checkpoint.files import find_checkpoint
        from megatron_steel.checkpoint.state import STATE_FILE

        checkpoint = path
        if not (path / STATE_FILE).is_file():
            checkpoint, warnings = find_checkpoint(path, None)
            say(warnings)
        path = checkpoint / STATE_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    values = values.get("ledger", values) if isinstance(values, dict) else values
    try:
        return Ledger.from_json(values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def duplicates(options: argparse.Namespace) -> int:
    """Print a line per pair of datasets that agree at both ends."""
    from megatron_steel.data.duplicates import find_duplicates

    prefixes = inspect.find_prefixes(options.prefixes)
    pairs = find_duplicates(prefixes, not options.fast, options.window, not options.read_all)
    for pair in pairs:
        print(pair.one_line())
    if not pairs:
        print(f"{len(prefixes)} datasets, all different")
    return 2 if any(pair.verdict != "different" for pair in pairs) else 0


def import_litpkds(options: argparse.Namespace) -> int:
    """Convert, and print notes and totals."""
    from megatron_steel.data import litpkds

    tokenizer = given_tokenizer(options)
    vocab_size = tokenizer.vocab_size if tokenizer else options.vocab_size
    if vocab_size is None:
        raise ValueError("import-litpkds: give --vocab-size or --tokenizer-model")
    eod_id, pad_id = options.eod_id, options.pad_id
    if tokenizer is not None:
        eod_id = tokenizer.eos_id if eod_id is None and options.bos_id is None else eod_id
        pad_id = tokenizer.pad_id if pad_id is None else pad_id
    if pad_id is None:
        raise ValueError("import-litpkds: give --pad-id, the id that fills the last chunk")
    facts = {}
    if tokenizer is not None:
        facts = {"tokenizer_type": tokenizer.name, "tokenizer_fingerprint": tokenizer.fingerprint()}
    wanted = litpkds.ImportOptions(vocab_size, pad_id, eod_id, options.bos_id)
    report = litpkds.import_litpkds(options.inputs, options.output_prefix, wanted, facts)
    say(report.notes)
    print(
        f"{options.output_prefix}: {report.documents} documents, {report.tokens} tokens of {report.chunks} chunks; "
        f"{report.pad_tokens} of pad removed, {report.unfinished_documents} documents without an end"
    )
    return 0


COMMANDS = {
    "verify": verify,
    "stats": stats,
    "check": check,
    "merge": merge,
    "sample": sample,
    "diff": diff,
    "duplicates": duplicates,
    "import-litpkds": import_litpkds,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    options = build_parser().parse_args(argv)
    leave_on_sigterm()
    try:
        with user_errors():
            return COMMANDS[options.command](options)
    except BrokenPipeError:
        # The reader of a pipe (head) has seen enough; nothing may be flushed into it on the way out.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        print(f"error: {error}; nothing was written", file=sys.stderr)
    except KeyboardInterrupt:
        print("error: interrupted, nothing was written", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
