"""Train a byte-level BPE tokenizer from JSON lines into a folder that ``transformers.AutoTokenizer`` loads alone.

    python tools/train_tokenizer.py --input FILE.jsonl ... --vocab-size 4096 --output FOLDER

The result depends only on the input and the flags. ``<|endoftext|>`` ends documents and pads; ``<|im_start|>`` and
``<|im_end|>`` delimit the turns of its ChatML template.

Or extend a tokenizer: all its ids stay, new ones follow. More merges learned from a corpus (byte-level BPE), whole
words, control tokens; or, for a SentencePiece model, the pieces it lacks of another one.

    python tools/train_tokenizer.py --extend FOLDER --input zh.jsonl --vocab-size 6000 --output LARGER
    python tools/train_tokenizer.py --extend FOLDER --add-tokens WORD ... --add-special-tokens "<|a|>" --output LARGER
    python tools/train_tokenizer.py --extend tokenizer.model --add-pieces zh.model --output larger.model
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout this file belongs to

END = "<|endoftext|>"
SPECIAL_TOKENS = [END, "<|im_start|>", "<|im_end|>"]
# Words keep one leading space, digits stand alone, Chinese runs are cut by the merges themselves. This split and NFC
# are Qwen2's: transformers puts them in place of a tokenizer's own beside a config.json of model_type qwen2.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' "
    "+ '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def read_texts(paths: Sequence[str], key: str) -> Iterator[str]:
    """The text of every line; ``ValueError`` names file and line of one without it."""
    for path in paths:
        if not Path(path).is_file():
            raise ValueError(f"--input {path}: no such file")
        with open(path, encoding="utf-8") as stream:
            for number, line in enumerate(stream, start=1):
                try:
                    yield json.loads(line)[key]
                except (ValueError, KeyError, TypeError) as error:
                    raise ValueError(f"{path}:{number}: no JSON object with the key {key!r}") from error


def train(texts: Sequence[str], vocab_size: int, output: Path) -> int:
    """Train, write ``tokenizer.json`` and ``tokenizer_config.json``, and return the vocabulary's size."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    from megatron_steel.text.files import write_bytes, write_json

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(alphabet) + len(SPECIAL_TOKENS):
        raise ValueError(f"--vocab-size {vocab_size}: at least {len(alphabet) + len(SPECIAL_TOKENS)} for bytes alone")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=SPECIAL_TOKENS, initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer, length=len(texts))
    output.mkdir(parents=True, exist_ok=True)
    write_bytes(output / "tokenizer.json", (tokenizer.to_str(pretty=True) + "\n").encode())
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 1_000_000_000,
        "eos_token": END,
        "pad_token": END,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHATML,
    }
    write_json(output / "tokenizer_config.json", config)
    return tokenizer.get_vocab_size()


def extend(args: argparse.Namespace) -> int:
    """Write a larger tokenizer, check that it keeps the old ids, and return how many ids it has."""
    from megatron_steel.text.extend import extend_folder, extend_sentencepiece, new_ids
    from megatron_steel.text.tokenizer import build_tokenizer

    if args.output.resolve() == args.extend.resolve():
        raise ValueError(f"--output {args.output}: is the tokenizer that is extended; give a new name")
    if bool(args.input) != (args.vocab_size is not None):
        raise ValueError("--extend: new merges need both --input and --vocab-size (all ids, old ones included)")
    if args.extend.is_dir():
        kind = "HuggingFaceTokenizer"
        old = build_tokenizer(kind, str(args.extend))
        if args.add_pieces:
            raise ValueError("--add-pieces: only for a SentencePiece model (--extend tokenizer.model)")
        if args.vocab_size is not None and args.vocab_size <= old.vocab_size:
            raise ValueError(f"--vocab-size {args.vocab_size}: {args.extend} has {old.vocab_size} ids already")
        texts = read_texts(args.input or [], args.json_key)
        tokens, special = args.add_tokens or [], args.add_special_tokens or []
        size = extend_folder(args.extend, args.output, texts, args.vocab_size or 0, tokens, special)
    else:
        kind = "SentencePieceTokenizer"
        old = build_tokenizer(kind, str(args.extend))
        if args.input or args.add_special_tokens:
            raise ValueError("a SentencePiece model is extended with --add-pieces and --add-tokens only")
        size = extend_sentencepiece(args.extend, args.output, args.add_pieces or [], args.add_tokens or [])
    new = build_tokenizer(kind, str(args.output))
    assert new_ids(old, new) and new.vocab_size == size, (old.vocab_size, new.vocab_size, size)
    return size


def main() -> None:
    """Entry point: user errors are one line and exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", help=".jsonl files")
    parser.add_argument("--json-key", default="text", help="key of the text")
    parser.add_argument("--vocab-size", type=int, help="ids, special tokens included; 4096 unless extending")
    parser.add_argument("--output", type=Path, required=True, help="folder (or SentencePiece model) to write")
    parser.add_argument("--extend", type=Path, help="tokenizer folder or SentencePiece model whose ids stay")
    parser.add_argument("--add-tokens", nargs="+", help="whole words, with --extend")
    parser.add_argument("--add-special-tokens", nargs="+", help="control tokens, with --extend FOLDER")
    parser.add_argument("--add-pieces", nargs="+", type=Path, help="SentencePiece models, with --extend MODEL")
    args = parser.parse_args()
    try:
        if args.extend:
            size = extend(args)
        elif not args.input or args.add_tokens or args.add_special_tokens or args.add_pieces:
            raise ValueError("give --input to train a tokenizer, or --extend to add to one")
        else:
            size = train(list(read_texts(args.input, args.json_key)), args.vocab_size or 4096, args.output)
    except ValueError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    print(f"{args.output}: {size} ids")


if __name__ == "__main__":
    main()
