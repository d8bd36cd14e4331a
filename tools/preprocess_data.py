"""Encode JSON lines into an indexed dataset, with Megatron-LM's flags and Megatron-LM's bytes.

python tools/preprocess_data.py --input FILE|DIR|GLOB ... --output-prefix P --tokenizer-type HuggingFaceTokenizer \
    --tokenizer-model FOLDER --append-eod --workers N

writes P_text_document.bin, .idx and .json (what the dataset is). Exit codes: 0 done, 2 user error, 1 anything else.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout this file belongs to

from tools.command_line import Parser, run_tool

UNSUPPORTED = {
    "--partitions": "--workers alone spreads the work; the output does not depend on it",
    "--keep-sequential-samples": "always on here; remove the flag",
    "--find-optimal-num-workers": "use --workers with the number of cores",
    "--vocab-file": "use --tokenizer-model",
    "--merge-file": "use --tokenizer-model",
}


def build_parser() -> Parser:
    """The flags."""
    parser = Parser(__doc__, UNSUPPORTED)
    add = parser.add_argument
    add(
        "--input",
        nargs="+",
        required=True,
        help="files, directories of them, or glob patterns; .jsonl .json .txt .csv (.gz, .zst) .parquet .arrow",
    )
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
    add("--no-fast-tokenizer", action="store_true", help="encode with the tokenizer's own library, never gigatoken")
    add("--json-keys", nargs="+", default=["text"], help="keys to encode, one dataset each")
    add("--input-format", metavar="NAME", help="source format of the rows, for example baike, belle, sharegpt, pile")
    add("--split-sentences", action="store_true", help="store sentences as sequences, in PREFIX_KEY_sentence")
    add("--keep-newlines", action="store_true", help="keep the white space around sentences")
    add("--lang", default="english", help="language of --split-sentences; chinese needs no model")
    add("--punkt-model", metavar="DIR", help="a language's folder of punkt_tab; else Punkt learns from the input")
    add("--append-eod", action="store_true", help="end every document with the end-of-document token")
    add(
        "--max-rejected",
        default="0",
        metavar="N|P%",
        help="bad lines, or their share, that go to PREFIX.rejected.jsonl before they end the run (default 0)",
    )
    add("--workers", type=int, default=os.cpu_count() or 1, help="processes that encode; all cores when not given")
    add("--log-interval", type=int, default=1000, help="documents between progress lines, at most one in 2 s")
    return parser


def run(argv: list[str]) -> None:
    """Parse, encode, and print one line per dataset."""
    args = build_parser().parse(argv)
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
        input_format=args.input_format,
        append_eod=args.append_eod,
        include_special_tokens=not args.tokenizer_hf_no_include_special_tokens,
        fast_tokenizer=not args.no_fast_tokenizer,
        split_sentences=args.split_sentences,
        keep_newlines=args.keep_newlines,
        lang=args.lang,
        punkt_model=args.punkt_model,
        max_rejected=args.max_rejected,
        workers=args.workers,
        log_interval=args.log_interval,
    )
    start = time.monotonic()
    for sidecar in preprocess(options):
        seconds = time.monotonic() - start
        print(
            f"{Path(args.output_prefix).parent / sidecar['prefix']}: {sidecar['documents']} documents, "
            f"{sidecar['tokens']} tokens, {sidecar['text_bytes'] / 1e6:.2f} MB of text in {seconds:.1f} s "
            f"({sidecar['text_bytes'] / 1e6 / seconds:.2f} MB/s), {sidecar['rejected_lines']['blank']} blank lines"
            + (f", {sidecar['rejected_lines']['bad']} rejected" if "bad" in sidecar["rejected_lines"] else "")
        )


if __name__ == "__main__":
    run_tool(run, "the same command goes on from the pieces it finished")
