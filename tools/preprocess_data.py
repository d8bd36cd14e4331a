"""Encode JSON lines into an indexed dataset, with Megatron-LM's flags and Megatron-LM's bytes.

python tools/preprocess_data.py --input FILE|DIR|GLOB ... --output-prefix P --tokenizer-type HuggingFaceTokenizer \
    --tokenizer-model FOLDER --append-eod --workers N

writes P_text_document.bin, .idx and .json (what the dataset is). Exit codes: 0 done, 2 user error, 1 anything else.
"""

from __future__ import annotations

import argparse
import difflib
import os
import signal
import sys
import time
from pathlib import Path
from typing import NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout this file belongs to

UNSUPPORTED = {
    "--split-sentences": "sentence splitting is not supported yet; documents are stored whole",
    "--keep-newlines": "only with sentence splitting, which is not supported yet",
    "--lang": "only with sentence splitting, which is not supported yet",
    "--partitions": "--workers alone spreads the work; the output does not depend on it",
    "--keep-sequential-samples": "always on here; remove the flag",
    "--find-optimal-num-workers": "use --workers with the number of cores",
    "--vocab-file": "use --tokenizer-model",
    "--merge-file": "use --tokenizer-model",
}


class Parser(argparse.ArgumentParser):
    """argparse that raises its errors instead of printing the usage."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def parse(argv: list[str]) -> argparse.Namespace:
    """The options; ``ValueError`` with the nearest flag for one that does not exist."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("--input", nargs="+", required=True, help=".jsonl or .jsonl.gz files, directories of them, or glob patterns")
    add("--output-prefix", required=True, help="files are PREFIX_KEY_document.bin, .idx and .json")
    add(
        "--tokenizer-type",
        required=True,
        metavar="TYPE",
        help="HuggingFaceTokenizer, SentencePieceTokenizer, TikTokenizer or NullTokenizer",
    )
    add("--tokenizer-model", help="Hugging Face folder, SentencePiece .model or tiktoken ranks file")
    add("--vocab-size", type=int, help="NullTokenizer: number of ids before end of document")
    add("--tokenizer-hf-no-include-special-tokens", action="store_true", help="without the tokens it adds itself")
    add("--json-keys", nargs="+", default=["text"], help="keys to encode, one dataset each")
    add("--append-eod", action="store_true", help="end every document with the end-of-document token")
    add("--workers", type=int, default=os.cpu_count() or 1, help="processes that encode; all cores when not given")
    add("--log-interval", type=int, default=1000, help="documents between progress lines, at most one in 2 s")
    known = sorted(option for action in parser._actions for option in action.option_strings)
    for item in argv:
        name = item.split("=", 1)[0]
        if name in UNSUPPORTED:
            raise ValueError(f"{name}: {UNSUPPORTED[name]}")
        if item.startswith("--") and name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise ValueError(f"unknown flag {name}; " + (f"did you mean {near[0]}?" if near else "see --help"))
    return parser.parse_args(argv)


def run(argv: list[str]) -> None:
    """Parse, encode, and print one line per dataset."""
    args = parse(argv)
    # transformers imports torch when it can, for two seconds of nothing: ids need no torch.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]
    from megatron_steel.data.preprocess import PreprocessOptions, preprocess

    options = PreprocessOptions(
        input=args.input,
        output_prefix=args.output_prefix,
        tokenizer_type=args.tokenizer_type,
        tokenizer_model=args.tokenizer_model,
        vocab_size=args.vocab_size,
        json_keys=args.json_keys,
        append_eod=args.append_eod,
        include_special_tokens=not args.tokenizer_hf_no_include_special_tokens,
        workers=args.workers,
        log_interval=args.log_interval,
    )
    start = time.monotonic()
    for sidecar in preprocess(options):
        seconds = time.monotonic() - start
        print(
            f"{args.output_prefix}_{sidecar['json_key']}_document: {sidecar['documents']} documents, "
            f"{sidecar['tokens']} tokens, {sidecar['text_bytes'] / 1e6:.2f} MB of text in {seconds:.1f} s "
            f"({sidecar['text_bytes'] / 1e6 / seconds:.2f} MB/s), {sidecar['rejected_lines']['blank']} blank lines"
        )


def stop(signum: int, _frame: object) -> NoReturn:
    """Leave through the normal clean-up when asked to terminate."""
    raise SystemExit(1)


def main() -> None:
    """Entry point: user errors are one line and exit code 2."""
    signal.signal(signal.SIGTERM, stop)
    try:
        run(sys.argv[1:])
    except ValueError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    except (RuntimeError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print("error: interrupted, nothing was written", file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
