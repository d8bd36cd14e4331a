"""Train a byte-level BPE tokenizer from JSON lines into a folder that ``transformers.AutoTokenizer`` loads alone.

python tools/train_tokenizer.py --input FILE.jsonl ... --vocab-size 4096 --output FOLDER

The result depends only on the input and the flags. ``<|endoftext|>`` ends documents and pads; ``<|im_start|>`` and
``<|im_end|>`` delimit the turns of its ChatML template.
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

    from megatron_steel.text.tokenizer import write_atomic, write_json

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
    write_atomic(output / "tokenizer.json", (tokenizer.to_str(pretty=True) + "\n").encode())
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


def main() -> None:
    """Entry point: user errors are one line and exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", required=True, help=".jsonl files")
    parser.add_argument("--json-key", default="text", help="key of the text")
    parser.add_argument("--vocab-size", type=int, default=4096, help="ids, special tokens included")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    args = parser.parse_args()
    try:
        size = train(list(read_texts(args.input, args.json_key)), args.vocab_size, args.output)
    except ValueError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    print(f"{args.output}: {size} ids")


if __name__ == "__main__":
    main()
