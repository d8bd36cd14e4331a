"""Larger vocabularies: new ids after the old ones, which all keep their meaning.

What can grow is a Hugging Face folder (added tokens; merges too when it is a byte-level BPE) and a SentencePiece
model (added tokens, pieces of another model). Tiktoken files cannot: their control tokens come after the last rank.
"""

from __future__ import annotations

import json
import struct
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from megatron_steel.text.files import write_bytes, write_json
from megatron_steel.text.huggingface import SAVED_FILES, is_byte_level_bpe
from megatron_steel.text.merges import learn_merges
from megatron_steel.text.tokenizer import SentencePieceTokenizer, Tokenizer, read_bytes

USER_DEFINED = 4
# They repeat the vocabulary and would be out of date; AutoTokenizer needs tokenizer.json alone.
REPEATED_FILES = ("vocab.json", "merges.txt", "added_tokens.json")


def new_ids(old: Tokenizer, new: Tokenizer) -> list[int]:
    """Ids that only the new tokenizer uses; ``ValueError`` when an old one has another meaning there."""
    fresh = []
    for index in range(max(old.vocab_size, new.vocab_size)):
        before = old.piece(index) if index < old.vocab_size else None
        after = new.piece(index) if index < new.vocab_size else None
        if before is not None and before != after:
            raise ValueError(
                f"the new tokenizer is no extension of the old one: id {index} was {before!r} and is {after!r}"
            )
        if before is None and after is not None:
            fresh.append(index)
    return fresh


def sub_pieces(old: Tokenizer, new: Tokenizer, fresh: Iterable[int]) -> dict[int, list[int]]:
    """For every new id, the ids its text has in the old tokenizer."""
    found = {}
    for index in fresh:
        piece = new.piece(index)
        assert piece is not None
        found[index] = old.parts(piece)
    return found


def extend_folder(
    folder: Path, output: Path, texts: Iterable[str], vocab_size: int, tokens: Sequence[str], special: Sequence[str]
) -> int:
    """Write a Hugging Face tokenizer folder with more ids, and return how many there are.

    ``vocab_size`` ids after merges learned from ``texts`` (no merges when there are no more ids than before); then
    ``tokens`` as whole words and ``special`` as control tokens. Raises ``ValueError`` for a folder that cannot grow.
    """
    from tokenizers import Tokenizer as Backend

    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"--extend {folder}: holds no tokenizer.json")
    state = json.loads(path.read_text(encoding="utf-8"))
    before = used = largest(state) + 1
    if vocab_size > used:
        if not is_byte_level_bpe(state):
            raise ValueError(f"--extend {folder}: merges can be added to a byte-level BPE only; use --add-tokens")
        used += add_merges(state, Backend.from_str(json.dumps(state)), texts, used, vocab_size - used)
    for content, control in [*((text, False) for text in tokens), *((text, True) for text in special)]:
        if content in {token["content"] for token in state["added_tokens"]} or content in ids_of(state):
            raise ValueError(f"--extend {folder}: {content!r} is a token already")
        state["added_tokens"].append(added_token(used, content, control))
        used += 1
    if used == before:
        raise ValueError(f"--extend {folder}: nothing to add that it does not have")
    # The library numbers an added token by what the vocabulary has before it, unless the vocabulary names it.
    if isinstance(vocabulary := state["model"].get("vocab"), dict):
        vocabulary.update((token["content"], token["id"]) for token in state["added_tokens"])
    output.mkdir(parents=True, exist_ok=True)
    for name in SAVED_FILES:
        if (folder / name).is_file() and name not in (*REPEATED_FILES, "tokenizer_config.json", "tokenizer.json"):
            write_bytes(output / name, (folder / name).read_bytes())
    write_json(output / "tokenizer.json", state)
    write_json(output / "tokenizer_config.json", extended_config(folder, state["added_tokens"]))
    return used


def ids_of(state: dict[str, Any]) -> dict[str, int]:
    """Ids of the model in a ``tokenizer.json``, by piece."""
    vocabulary = state["model"]["vocab"]
    return vocabulary if isinstance(vocabulary, dict) else {piece: index for index, (piece, _) in enumerate(vocabulary)}


def largest(state: dict[str, Any]) -> int:
    """The largest id of a ``tokenizer.json``."""
    return max([*ids_of(state).values(), *(token["id"] for token in state["added_tokens"])])


def added_token(index: int, content: str, special: bool) -> dict[str, Any]:
    """A token as ``tokenizer.json`` has it."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": special}
    return {"id": index, "content": content, **flags}


def extended_config(folder: Path, added: list[dict[str, Any]]) -> dict[str, Any]:
    """``tokenizer_config.json`` of a folder, with all added tokens where it lists them."""
    path = folder / "tokenizer_config.json"
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if "added_tokens_decoder" in config:
        declared = {str(token["id"]): {k: v for k, v in token.items() if k != "id"} for token in added}
        config["added_tokens_decoder"] = declared | config["added_tokens_decoder"]
    return config


def add_merges(state: dict[str, Any], backend: Any, texts: Iterable[str], first_id: int, count: int) -> int:
    """Learn merges from texts and add them to a ``tokenizer.json``; returns the number of new ids."""
    words: Counter[str] = Counter()
    for text in texts:
        text = backend.normalizer.normalize_str(text) if backend.normalizer else text
        words.update(word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text))
    spelled: Counter[tuple[int, ...]] = Counter()
    for word, times in words.items():
        spelled[tuple(token.id for token in backend.model.tokenize(word))] += times
    vocabulary, merges = state["model"]["vocab"], state["model"]["merges"]
    pieces = {index: piece for piece, index in vocabulary.items()}
    learned = learn_merges(spelled, pieces, first_id, count)
    vocabulary.update((piece, index) for index, piece in pieces.items() if index >= first_id)
    joined = bool(merges) and isinstance(merges[0], str)  # written like that by old versions of the library
    merges.extend(" ".join(pair) if joined else list(pair) for pair in learned)
    return sum(index >= first_id for index in pieces)


def extend_sentencepiece(path: Path, output: Path, others: Sequence[Path], tokens: Sequence[str]) -> int:
    """Write a SentencePiece model with the pieces of other models it lacks and with tokens; returns the ids.

    Pieces keep their order and score, as in Chinese-LLaMA and Open-Llama. The file is a protocol buffer, and one that
    repeats a field may be written behind another: field 1 of the model is its pieces, with piece (1), score (2) and
    type (3).
    """
    model = SentencePieceTokenizer(path)
    known = {model.piece(index) for index in range(model.vocab_size)}
    more: list[tuple[str, float, int | None]] = []
    for other in others:
        more += [(piece, score, None) for piece, score in SentencePieceTokenizer(other).normal_pieces()]
    more += [(token, 0.0, USER_DEFINED) for token in tokens]
    content = read_bytes(path, "SentencePieceTokenizer")
    count = model.vocab_size
    for piece, score, kind in more:
        if piece in known:
            if kind == USER_DEFINED:
                raise ValueError(f"--extend {path}: {piece!r} is a token already")
            continue
        known.add(piece)
        text = piece.encode()
        entry = b"\x0a" + varint(len(text)) + text + b"\x15" + struct.pack("<f", score)
        entry += b"" if kind is None else b"\x18" + varint(kind)
        content += b"\x0a" + varint(len(entry)) + entry
        count += 1
    if count == model.vocab_size:
        raise ValueError(f"--extend {path}: nothing to add that it does not have")
    output.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(output, content)
    return count


def varint(value: int) -> bytes:
    """A number as protocol buffers write it: seven bits a byte, the lowest first."""
    parts = []
    while value > 127:
        parts.append(value & 127 | 128)
        value >>= 7
    return bytes([*parts, value])
