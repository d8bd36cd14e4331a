"""Hugging Face tokenizer folders, with the ids of ``transformers.AutoTokenizer``.

``transformers`` (version 5) rebuilds the tokenizers of some classes instead of taking ``tokenizer.json`` as it is:
for Llama 2's and Yi's folders the ids differ. So ``tokenizer.json`` is read directly, which is fast and needs no
transformers, only where that is certain to be the same; every other folder goes through AutoTokenizer.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_steel.text.files import copy_file
from megatron_steel.text.tokenizer import TIKTOKEN_PATTERN, AddedToken, Tokenizer, digest

# Classes and configuration keys for which AutoTokenizer takes tokenizer.json unchanged.
GENERIC_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")
NEUTRAL_KEYS = frozenset(
    "tokenizer_class backend is_local local_files_only model_max_length padding_side truncation_side bos_token "
    "eos_token pad_token unk_token chat_template clean_up_tokenization_spaces added_tokens_decoder".split()
)
# Of Qwen 2, 2.5 and 3 it takes the vocabulary, the merges and the added tokens, and puts its own steps around them.
QWEN2_CLASSES = ("Qwen2Tokenizer", "Qwen2TokenizerFast")
QWEN2_KEYS = NEUTRAL_KEYS | {"additional_special_tokens", "errors"}
QWEN2_MODELS = ("qwen2", "qwen2_moe", "qwen3", "qwen3_moe")
QWEN2_OFF = ("add_bos_token", "add_prefix_space", "split_special_tokens")
NAMED_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")
BPE_SETTINGS = (
    "dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk", "byte_fallback",
    "ignore_merges",
)  # fmt: skip
TOKEN_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
SAVED_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
)
BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")


class HuggingFaceTokenizer(Tokenizer):
    """A folder that AutoTokenizer can load: ``tokenizer.json`` and ``tokenizer_config.json``.

    Control tokens typed in text become their ids, as in the library and in Megatron-LM.
    """

    name = "HuggingFaceTokenizer"

    def __init__(self, path: Path, include_special_tokens: bool = True) -> None:
        self._folder = path.parent if path.name == "tokenizer.json" else path
        self._include_special_tokens = include_special_tokens
        config = read_config(self._folder)
        direct = load_direct(self._folder, config)
        self._backend, named = direct if direct else load_auto(self._folder)
        # Lengths stored in tokenizer.json are for fixed-size model inputs; documents are encoded whole.
        self._backend.no_truncation()
        self._backend.no_padding()
        self.vocab_size = largest_id(self._backend) + 1
        self.bos_id, self.eos_id, self.pad_id = (
            self._backend.token_to_id(named[key]) if named.get(key) else None
            for key in ("bos_token", "eos_token", "pad_token")
        )

    def encode(self, text: str) -> list[int]:
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def encode_documents(self, texts: Sequence[str]) -> list[list[int]]:
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=self._include_special_tokens)
        return [encoding.ids for encoding in encodings]

    def encode_typed(self, text: str) -> list[int]:
        self._backend.encode_special_tokens = True
        try:
            return self._backend.encode(text, add_special_tokens=False).ids
        finally:
            self._backend.encode_special_tokens = False

    def added_tokens(self) -> list[AddedToken]:
        tokens = self._backend.get_added_tokens_decoder().items()
        return [AddedToken(token.content, index, token.special, token.lstrip, token.rstrip) for index, token in tokens]

    def chat_template(self) -> str | None:
        path = self._folder / "chat_template.jinja"
        if path.is_file():
            return path.read_text(encoding="utf-8")
        found = read_config(self._folder).get("chat_template")
        if isinstance(found, list):  # several, by name
            found = {item["name"]: item["template"] for item in found}.get("default")
        return found

    def backend_text(self) -> str:
        """The content of ``tokenizer.json`` as the library understood it."""
        return self._backend.to_str()

    def steps(self) -> dict[str, Any]:
        """``tokenizer.json`` as the library understood it, without pieces and merges: what is done with a text."""
        return steps_of(self._backend) | {"added_tokens": list(token_flags(self._backend).values())}

    def adds_tokens(self) -> bool:
        """Whether :meth:`encode_documents` puts tokens of its own around a text."""
        return self._include_special_tokens and self._backend.num_special_tokens_to_add(False) > 0

    def decode(self, ids: Sequence[int]) -> str:
        return self._backend.decode([int(index) for index in ids], skip_special_tokens=False)

    def byte_lengths(self) -> np.ndarray:
        state = json.loads(self.backend_text())
        byte_level = is_byte_level(state)
        lengths = np.zeros(self.vocab_size, dtype=np.int32)
        for piece, index in self._backend.get_vocab(with_added_tokens=False).items():
            if byte_level:
                lengths[index] = len(piece)  # byte-level alphabets write one character per byte
            elif BYTE_PIECE.fullmatch(piece):
                lengths[index] = 1
            else:
                lengths[index] = len(piece.replace("\u2581", " ").encode())
        for token in state["added_tokens"]:
            lengths[token["id"]] = 0 if token["special"] else len(token["content"].encode())
        return lengths

    def piece(self, index: int) -> str | None:
        return self._backend.id_to_token(index)

    def parts(self, piece: str) -> list[int]:
        # Pieces are not text: of a byte-level vocabulary they are bytes, often not even whole characters.
        tokens = self._backend.model.tokenize(piece)
        covered = tokens[-1].offsets[1] if tokens else 0
        return [token.id for token in tokens] if covered == len(piece.encode()) else self.encode(piece)

    def fingerprint(self) -> str:
        return self._fingerprint

    def quick_key(self) -> str:
        files = [self._folder / name for name in (*SAVED_FILES, "config.json")]
        return digest(*(path.name.encode() + path.read_bytes() for path in files if path.is_file()))

    @functools.cached_property
    def _fingerprint(self) -> str:
        state = json.loads(self.backend_text())
        parts = ("model", "normalizer", "pre_tokenizer", "post_processor", "added_tokens")
        # Pieces and merges hold no settings, and going through a hundred thousand of them takes seconds.
        large = {part: state["model"].pop(part) for part in ("vocab", "merges") if part in state["model"]}
        decisive = {part: without_defaults(state.get(part)) for part in parts}
        if isinstance(large.get("vocab"), dict):
            large["vocab"].pop("trim_offsets", None)  # dropped among the settings since the first version
        decisive["model"] |= large
        decisive["special"] = [self.bos_id, self.eos_id]
        return digest(self.name.encode(), json.dumps(decisive, sort_keys=True).encode())

    def save_files(self, directory: Path) -> None:
        """Copy the folder's own tokenizer files: rewriting them could change what AutoTokenizer makes of them."""
        for name in SAVED_FILES:
            if (self._folder / name).is_file():
                copy_file(self._folder / name, directory / name)


def read_config(folder: Path) -> dict[str, Any]:
    """``tokenizer_config.json`` of a folder; ``ValueError`` when neither it nor ``tokenizer.json`` is there."""
    path = folder / "tokenizer_config.json"
    if not path.is_file() and not (folder / "tokenizer.json").is_file():
        raise ValueError(f"HuggingFaceTokenizer: {folder}: holds no tokenizer.json and no tokenizer_config.json")
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}: must be a JSON object")
    return config


def names_qwen2(path: Path) -> bool:
    """Whether a ``config.json`` says no more about the tokenizer than that the model is a Qwen 2, 2.5 or 3."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return False
    if not isinstance(config, dict) or config.get("model_type") not in QWEN2_MODELS:
        return False
    return not {"tokenizer_class", "auto_map", "model_name", "_name_or_path"} & set(config)


def load_direct(folder: Path, config: dict[str, Any]) -> tuple[Any, dict[str, str]] | None:
    """The tokenizer of ``tokenizer.json`` itself and its named tokens, or None where AutoTokenizer may differ.

    ``config.json`` and ``special_tokens_map.json`` also steer AutoTokenizer, so their presence rules it out; but for
    the former in the folder of a Qwen model, for which it means the same class.
    """
    steering = ("special_tokens_map.json", "added_tokens.json")
    kind, keys = config.get("tokenizer_class"), set(config)
    generic = kind in GENERIC_CLASSES and keys <= NEUTRAL_KEYS
    off = {key for key in QWEN2_OFF if config.get(key) is False}
    # Its class has defaults of its own for tokens that the configuration does not name.
    qwen2 = kind in QWEN2_CLASSES and {"eos_token", "pad_token"} <= keys and keys - off <= QWEN2_KEYS
    path, model = folder / "tokenizer.json", folder / "config.json"
    if model.is_file() and not (qwen2 and names_qwen2(model)):
        return None
    if not (generic or qwen2) or not path.is_file() or any((folder / name).exists() for name in steering):
        return None
    import tokenizers

    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{path}: not a tokenizers file: {error}") from error
    named = {key: token_text(config[key]) for key in NAMED_TOKENS if config.get(key)}
    declared = config.get("added_tokens_decoder", {})
    special = [*named.values(), *map(token_text, config.get("additional_special_tokens") or ())]
    if generic:
        special += map(token_text, declared.values())
    elif not is_qwen2(steps_of(backend)) or token_flags(backend) != declared:
        return None
    added = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    if any(text not in added or not added[text].special for text in special):
        return None
    return backend, named


def is_qwen2(state: dict[str, Any]) -> bool:
    """Whether the steps of a ``tokenizer.json`` are those that transformers' Qwen2Tokenizer builds."""
    split = {"type": "Split", "pattern": {"Regex": TIKTOKEN_PATTERN}, "behavior": "Isolated", "invert": False}
    around = (state["pre_tokenizer"] or {}).get("pretokenizers", [])
    return (
        state["normalizer"] == {"type": "NFC"}
        and len(around) == 2
        and around[0] == split
        and all(
            (step or {}).get("type") == "ByteLevel" for step in (around[1], state["decoder"], state["post_processor"])
        )
        and not around[1].get("add_prefix_space", True)
        and not around[1].get("use_regex", True)
        and without_defaults(state["model"]) == {"type": "BPE"}
    )


def steps_of(backend: Any) -> dict[str, Any]:
    """What a backend's ``tokenizer.json`` says about everything but pieces, merges and added tokens."""
    state: dict[str, Any] = {
        name: None if (step := getattr(backend, name)) is None else json.loads(step.__getstate__())
        for name in ("normalizer", "pre_tokenizer", "post_processor", "decoder")
    }
    model = backend.model
    state["model"] = {"type": type(model).__name__}
    if state["model"]["type"] == "BPE":
        state["model"] |= {name: getattr(model, name) for name in BPE_SETTINGS}
    return state


def token_flags(backend: Any) -> dict[str, dict[str, Any]]:
    """The added tokens as ``added_tokens_decoder`` in a configuration declares them."""
    tokens = backend.get_added_tokens_decoder().items()
    return {
        str(index): {"content": token.content} | {flag: getattr(token, flag) for flag in TOKEN_FLAGS}
        for index, token in tokens
    }


def largest_id(backend: Any) -> int:
    """The largest id of a vocabulary and its added tokens."""
    count = backend.get_vocab_size(with_added_tokens=True)
    if all(backend.id_to_token(index) is not None for index in range(count)):
        return count - 1  # as many ids as there are below it: no need to hold all pieces
    return max(backend.get_vocab(with_added_tokens=True).values())


def load_auto(folder: Path) -> tuple[Any, dict[str, str]]:
    """The tokenizer AutoTokenizer makes of a folder, reduced to its Rust backend and named tokens."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # whatever goes wrong inside, the folder is what the user has to look at
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"HuggingFaceTokenizer: {folder}: transformers cannot load it: {reason}") from error
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(f"HuggingFaceTokenizer: {folder}: has no fast tokenizer; save one with tokenizer.json")
    named = {key: str(getattr(tokenizer, key)) for key in NAMED_TOKENS if getattr(tokenizer, key, None)}
    return backend, named


def token_text(value: str | dict[str, Any]) -> str:
    """The text of a token that a configuration gives as a string or as an AddedToken object."""
    return value["content"] if isinstance(value, dict) else value


def step_types(step: dict[str, Any] | None) -> set[str]:
    """Types of a pre-tokenizer or decoder and of everything nested in it."""
    if not step:
        return set()
    nested = [*step.get("pretokenizers", []), *step.get("decoders", [])]
    return {step["type"]}.union(*(step_types(item) for item in nested))


def is_byte_level(state: dict[str, Any]) -> bool:
    """Whether the pieces of a ``tokenizer.json`` are written with one character per byte."""
    return "ByteLevel" in step_types(state.get("pre_tokenizer")) | step_types(state.get("decoder"))


def is_byte_level_bpe(state: dict[str, Any]) -> bool:
    """Whether a ``tokenizer.json`` is a byte-pair encoding of bytes, as those of GPT-2, Llama 3 and Qwen are."""
    return is_byte_level(state) and state["model"]["type"] == "BPE" and bool(state.get("pre_tokenizer"))


def without_defaults(value: Any) -> Any:
    """Drop settings that do not decide ids: unset ones, which differ between versions, and those about offsets."""
    if isinstance(value, dict):
        return {
            key: without_defaults(item)
            for key, item in value.items()
            if key != "trim_offsets" and item is not None and item is not False and item != ""
        }
    if isinstance(value, list):
        return [without_defaults(item) for item in value]
    return value
