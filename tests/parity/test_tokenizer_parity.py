"""Hugging Face folders give AutoTokenizer's ids, also where transformers rebuilds the tokenizer of a class."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_steel.text import huggingface
from megatron_steel.text.tokenizer import TIKTOKEN_PATTERN, build_tokenizer

DATA = Path(__file__).resolve().parents[2] / "examples" / "data"
TYPED = ["<|im_start|>user\nhi<|im_end|>\n<|endoftext|>", " <|im_end|> x", "<s>y</s>", "", " ", "e\u0301"]


def texts() -> list[str]:
    """Real text of both languages and typed control tokens."""
    lines = [line for name in ("valid_zh", "valid_en") for line in open(DATA / f"{name}.jsonl", encoding="utf-8")]
    return [json.loads(line)["text"] for line in lines] + TYPED


def folder(tmp_path: Path, config: dict[str, Any], state: dict[str, Any] | None = None) -> Path:
    """A copy of the bundled tokenizer with changes to its configuration and to tokenizer.json."""
    path = tmp_path / "folder"
    shutil.copytree(DATA / "tokenizer", path)
    for name, changes in (("tokenizer_config.json", config), ("tokenizer.json", state or {})):
        content = json.loads((path / name).read_text(encoding="utf-8")) | changes
        (path / name).write_text(json.dumps(content), encoding="utf-8")
    return path


def add_bos(token: str, index: int) -> dict[str, Any]:
    """A post-processor that puts one token in front of every text."""
    single = [{"SpecialToken": {"id": token, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    special = {token: {"id": token, "ids": [index], "tokens": [token]}}
    return {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": special}


@pytest.mark.parametrize(
    ("config", "state"),
    [
        ({}, {}),
        ({"tokenizer_class": "Qwen2Tokenizer"}, {}),
        ({"tokenizer_class": "GPT2Tokenizer"}, {}),
        ({"bos_token": "<|im_start|>"}, {"post_processor": add_bos("<|im_start|>", 1)}),
        ({"bos_token": "<|im_start|>", "add_bos_token": True}, {}),
        ({"eos_token": "<|new_end|>"}, {}),
        ({"eos_token": {"content": "<|im_end|>", "special": True, "__type": "AddedToken"}}, {}),
        ({}, {"truncation": {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}}),
        ({}, {"padding": {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                          "pad_type_id": 0, "pad_token": "<|endoftext|>"}}),
    ],
    ids=["plain", "qwen2", "gpt2", "post-processor", "add-bos", "new-token", "object", "truncation", "padding"],
)  # fmt: skip
def test_ids_are_auto_tokenizers(config: dict[str, Any], state: dict[str, Any], tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    path = folder(tmp_path, config, state)
    ours, library = build_tokenizer("HuggingFaceTokenizer", str(path)), AutoTokenizer.from_pretrained(str(path))
    expected = [library(text).input_ids for text in texts()]
    plain = [library(text, add_special_tokens=False).input_ids for text in texts()]
    assert ours.encode_documents(texts()) == expected
    assert ours.encode_batch(texts()) == plain
    assert (ours.vocab_size, ours.eos_id) == (len(library), library.eos_token_id)
    assert (ours.bos_id, ours.pad_id) == (library.bos_token_id, library.pad_token_id)
    without = build_tokenizer("HuggingFaceTokenizer", str(path), include_special_tokens=False)
    assert without.encode_documents(texts()[:3]) == plain[:3]
    ours.save(tmp_path / "saved")
    assert build_tokenizer("HuggingFaceTokenizer", str(tmp_path / "saved")).fingerprint() == ours.fingerprint()
    copy = AutoTokenizer.from_pretrained(str(tmp_path / "saved"))
    assert [copy(text).input_ids for text in texts()[:5]] == expected[:5]


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
def test_the_bundled_tokenizer_is_the_same_beside_an_exported_model(model_type: str, tmp_path: Path) -> None:
    """transformers replaces parts of a tokenizer for some model types, Qwen2 for one."""
    path = folder(tmp_path, {})
    (path / "config.json").write_text(json.dumps({"model_type": model_type}), encoding="utf-8")
    exported = build_tokenizer("HuggingFaceTokenizer", str(path))
    bundled = build_tokenizer("HuggingFaceTokenizer", str(DATA / "tokenizer"))
    assert exported.describe() == bundled.describe()
    assert exported.encode_documents(texts()) == bundled.encode_documents(texts())


def declared(**changes: Any) -> dict[str, Any]:
    """``added_tokens_decoder`` of the bundled tokenizer, with changes to its second token."""
    state = json.loads((DATA / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8"))
    tokens = {str(token["id"]): {key: token[key] for key in token if key != "id"} for token in state["added_tokens"]}
    tokens["1"] |= changes
    return tokens


def qwen2(**changes: Any) -> dict[str, Any]:
    """A configuration as Qwen 2 and 2.5 publish it."""
    off = dict.fromkeys(huggingface.QWEN2_OFF, False)
    more = {"additional_special_tokens": ["<|im_start|>"], "errors": "replace", "unk_token": None, "bos_token": None}
    return {"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": declared()} | off | more | changes


def steps(**changes: Any) -> dict[str, Any]:
    """Qwen 2's steps in a tokenizer.json, with changes."""
    split = {"type": "Split", "pattern": {"Regex": TIKTOKEN_PATTERN}, "behavior": "Isolated", "invert": False}
    alphabet = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    before = {"type": "Sequence", "pretokenizers": [split, alphabet]}
    return {"normalizer": {"type": "NFC"}, "pre_tokenizer": before, "decoder": alphabet} | changes


def same_as_auto_tokenizer(path: Path, direct: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder is read directly or not, and either way it is what AutoTokenizer makes of it."""
    assert (huggingface.load_direct(path, huggingface.read_config(path)) is not None) == direct
    ours = build_tokenizer("HuggingFaceTokenizer", str(path))
    monkeypatch.setattr(huggingface, "load_direct", lambda *_: None)
    library = build_tokenizer("HuggingFaceTokenizer", str(path))
    assert ours.describe() == library.describe()
    assert ours.encode_documents(texts()) == library.encode_documents(texts())


GPT2 = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


@pytest.mark.parametrize(
    ("config", "state", "direct"),
    [
        (qwen2(), steps(), True),
        (qwen2(tokenizer_class="Qwen2TokenizerFast"), steps(), True),
        (qwen2(), steps(post_processor=None), False),
        (qwen2(add_prefix_space=True), steps(), False),
        (qwen2(add_bos_token=True), steps(), False),
        (qwen2(), steps(normalizer=None), False),
        (qwen2(), steps(pre_tokenizer=GPT2), False),
        (qwen2(), steps(post_processor=add_bos("<|im_start|>", 1)), False),
        (qwen2(added_tokens_decoder=declared(lstrip=True)), steps(), False),
        (qwen2(added_tokens_decoder={}), steps(), False),
        (qwen2(additional_special_tokens=["<|new|>"]), steps(), False),
    ],
    ids=["qwen2", "fast", "no-post", "prefix", "bos", "normalizer", "split", "post", "flags", "undeclared", "new"],
)
def test_a_qwen2_folder_is_read_directly_only_where_that_is_the_same(
    config: dict[str, Any], state: dict[str, Any], direct: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder(tmp_path, config, state)
    same_as_auto_tokenizer(path, direct, monkeypatch)


@pytest.mark.parametrize(
    ("model", "direct"),
    [
        ({"model_type": "qwen2"}, True),
        ({"model_type": "qwen3_moe"}, True),
        ({"model_type": "llama"}, False),
        ({"model_type": "qwen2", "tokenizer_class": "LlamaTokenizer"}, False),
    ],
    ids=["qwen2", "qwen3-moe", "llama", "class"],
)
def test_a_model_beside_it_rules_that_out_unless_it_is_a_qwen(
    model: dict[str, Any], direct: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder(tmp_path, qwen2(), steps())
    (path / "config.json").write_text(json.dumps(model), encoding="utf-8")
    same_as_auto_tokenizer(path, direct, monkeypatch)


def test_documents_are_never_cut_or_padded(tmp_path: Path) -> None:
    limit = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    cut = build_tokenizer("HuggingFaceTokenizer", str(folder(tmp_path, {}, {"truncation": limit})))
    whole = build_tokenizer("HuggingFaceTokenizer", str(DATA / "tokenizer"))
    assert cut.encode_documents(texts()) == whole.encode_documents(texts())


def test_the_direct_path_is_taken_only_where_nothing_steers_auto_tokenizer(tmp_path: Path) -> None:
    bundled = DATA / "tokenizer"
    assert huggingface.load_direct(bundled, huggingface.read_config(bundled)) is not None
    for config in ({"tokenizer_class": "LlamaTokenizer"}, {"add_bos_token": True}, {"eos_token": "<|new|>"}):
        path = folder(tmp_path, config)
        assert huggingface.load_direct(path, huggingface.read_config(path)) is None
        shutil.rmtree(path)


def test_the_chat_template_is_chatml() -> None:
    from transformers import AutoTokenizer

    library = AutoTokenizer.from_pretrained(str(DATA / "tokenizer"))
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    text = library.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    expected = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n<|im_start|>assistant\n"
    assert text == expected
