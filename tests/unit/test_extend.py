"""Extended vocabularies: old ids stay, new ones are what the libraries make of them, and refusals."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
from transformers import AutoTokenizer

from megatron_steel.text.extend import extend_folder, extend_sentencepiece, new_ids, sub_pieces
from megatron_steel.text.tokenizer import Tokenizer, build_tokenizer
from tools.train_tokenizer import train

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "examples" / "data"
BUNDLED = DATA / "tokenizer"
CHINESE = "\u8bdd\u8bf4\u5929\u4e0b\u5927\u52bf\uff0c\u5206\u4e45\u5fc5\u5408\uff0c\u5408\u4e45\u5fc5\u5206\u3002"


def texts() -> list[str]:
    """Some of the bundled held-out text in both languages."""
    lines = [next(open(DATA / f"{name}.jsonl", encoding="utf-8")) for name in ("valid_zh", "valid_en")]
    return [json.loads(line)["text"][:6000] for line in lines]


def folder_tokenizer(folder: Path) -> Tokenizer:
    return build_tokenizer("HuggingFaceTokenizer", str(folder))


def test_merges_go_on_as_if_training_had_never_stopped(tmp_path: Path) -> None:
    """The library's own training to 400 ids gives the merges of 300 ids and then of our 100."""
    train(texts(), 300, tmp_path / "small")
    train(texts(), 400, tmp_path / "whole")
    assert extend_folder(tmp_path / "small", tmp_path / "grown", texts(), 400, [], []) == 400
    grown, whole = (json.loads((tmp_path / name / "tokenizer.json").read_text("utf-8")) for name in ("grown", "whole"))
    assert grown["model"]["merges"] == whole["model"]["merges"]
    assert grown["model"]["vocab"] == whole["model"]["vocab"]
    old, new = folder_tokenizer(tmp_path / "small"), folder_tokenizer(tmp_path / "grown")
    assert new_ids(old, new) == list(range(300, 400))
    for text in texts():
        assert len(new.encode(text)) < len(old.encode(text)) and new.decode(new.encode(text)) == text


def test_added_tokens_come_after_merges_and_control_tokens_keep_their_ids(tmp_path: Path) -> None:
    count = extend_folder(BUNDLED, tmp_path, texts(), 4200, [CHINESE[:4]], ["<|tool|>"])
    old, new, auto = folder_tokenizer(BUNDLED), folder_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert count == 4202 == new.vocab_size == len(auto)
    assert new_ids(old, new) == list(range(4096, 4202))
    assert new.encode("<|endoftext|><|im_start|><|im_end|><|tool|>" + CHINESE[:4]) == [0, 1, 2, 4201, 4200]
    assert (new.eos_id, new.pad_id) == (old.eos_id, old.pad_id)
    for text in (*texts(), CHINESE, f"a<|tool|>{CHINESE}b <|im_end|>"):
        assert new.encode(text) == auto.encode(text, add_special_tokens=False)
        assert new.decode(new.encode(text)) == text
    lengths = new.byte_lengths()
    assert lengths[4200] == 12 and lengths[4201] == 0 and (lengths[:4096] == old.byte_lengths()).all()


def test_text_without_new_tokens_keeps_its_ids(tmp_path: Path) -> None:
    extend_folder(BUNDLED, tmp_path, [], 0, ["zzyzx"], [])
    old, new = folder_tokenizer(BUNDLED), folder_tokenizer(tmp_path)
    for text in texts():
        assert new.encode(text) == old.encode(text)


def test_sub_pieces_spell_the_new_piece(tmp_path: Path) -> None:
    """Also those that are no whole characters: joined, the old pieces are the new one."""
    extend_folder(BUNDLED, tmp_path, texts(), 4300, [CHINESE[:4]], [])
    old, new = folder_tokenizer(BUNDLED), folder_tokenizer(tmp_path)
    found = sub_pieces(old, new, new_ids(old, new))
    assert len(found) == 205 and all(len(ids) > 1 for ids in found.values())
    for index, ids in list(found.items())[:-1]:
        assert "".join(str(old.piece(part)) for part in ids) == new.piece(index)
    assert old.decode(found[4300]) == CHINESE[:4]


def test_a_generic_and_a_qwen_folder_take_new_tokens(tmp_path: Path) -> None:
    """Qwen's has its control tokens after the vocabulary, and transformers builds that class itself."""
    state = json.loads((BUNDLED / "tokenizer.json").read_text("utf-8"))
    vocabulary = {piece: index - 3 for piece, index in state["model"]["vocab"].items() if index > 2}
    for index, token in enumerate(state["added_tokens"]):
        token["id"] = len(vocabulary) + index
    state["model"]["vocab"] = vocabulary
    flags = [{k: v for k, v in token.items() if k != "id"} for token in state["added_tokens"]]
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "added_tokens_decoder": {str(len(vocabulary) + i): token for i, token in enumerate(flags)},
    }
    (tmp_path / "qwen").mkdir()
    (tmp_path / "qwen" / "tokenizer.json").write_text(json.dumps(state), "utf-8")
    (tmp_path / "qwen" / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    assert extend_folder(tmp_path / "qwen", tmp_path / "more", texts(), 4150, ["zzyzx"], []) == 4151
    old, new, auto = (
        folder_tokenizer(tmp_path / "qwen"), folder_tokenizer(tmp_path / "more"),
        AutoTokenizer.from_pretrained(tmp_path / "more"),
    )  # fmt: skip
    assert new_ids(old, new) == list(range(4096, 4151)) and len(auto) == 4151
    for text in (*texts(), "a zzyzx<|im_end|>"):
        assert new.encode(text) == auto.encode(text, add_special_tokens=False)


def test_pieces_of_another_sentencepiece_model(tmp_path: Path) -> None:
    import sentencepiece

    for name, text, size in (("en", texts()[1], 330), ("zh", texts()[0], 1500)):
        (tmp_path / "text").write_text(text, "utf-8")
        sentencepiece.SentencePieceTrainer.train(
            input=str(tmp_path / "text"), model_prefix=str(tmp_path / name), vocab_size=size, byte_fallback=True,
            model_type="bpe", character_coverage=0.98, minloglevel=2, num_threads=1, max_sentence_length=100000,
            hard_vocab_limit=False,
        )  # fmt: skip
    english, chinese, both = (tmp_path / f"{name}.model" for name in ("en", "zh", "both"))
    count = extend_sentencepiece(english, both, [chinese], ["<pad>"])
    old, other, new = (build_tokenizer("SentencePieceTokenizer", str(path)) for path in (english, chinese, both))
    library = sentencepiece.SentencePieceProcessor(model_file=str(both))
    pieces = [library.id_to_piece(index) for index in range(library.get_piece_size())]
    first, second = ([model.piece(i) for i in range(model.vocab_size)] for model in (old, other))
    missing = [piece for piece in second if piece not in first]
    assert pieces == [*first, *missing, "<pad>"] and count == len(pieces) and missing
    scores = {piece: library.get_score(index) for index, piece in enumerate(pieces)}
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(chinese))
    assert all(scores[piece] == theirs.get_score(theirs.piece_to_id(piece)) for piece in missing)
    fresh = new_ids(old, new)
    assert fresh == list(range(len(first), count))
    text = texts()[0].split("\n")[0]
    assert len(new.encode(text)) < len(old.encode(text)) and new.decode(new.encode(text)) == text
    assert new.encode("a<pad>b")[-2] == count - 1
    spelled = sub_pieces(old, new, fresh)
    for index in fresh[:-1]:
        assert old.decode(spelled[index]) == str(new.piece(index)).replace("\u2581", " ").strip()


def test_a_tokenizer_that_moves_an_old_id_is_no_extension(tmp_path: Path) -> None:
    state = json.loads((BUNDLED / "tokenizer.json").read_text("utf-8"))
    vocabulary = state["model"]["vocab"]
    vocabulary["he"], vocabulary["ll"] = vocabulary["ll"], vocabulary["he"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(state), "utf-8")
    with pytest.raises(ValueError, match="id 262 was 'he' and is 'll'"):
        new_ids(folder_tokenizer(BUNDLED), folder_tokenizer(tmp_path))
    train(texts(), 400, tmp_path / "fewer")
    with pytest.raises(ValueError, match="no extension"):
        new_ids(folder_tokenizer(BUNDLED), folder_tokenizer(tmp_path / "fewer"))
    null = build_tokenizer("NullTokenizer", None, 9)
    with pytest.raises(ValueError, match="cannot be extended"):
        new_ids(null, build_tokenizer("NullTokenizer", None, 12))


def test_a_vocabulary_without_bytes_takes_whole_tokens_only(tmp_path: Path) -> None:
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "<unk>": 2}, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    (tmp_path / "words").mkdir()
    words.save(str(tmp_path / "words" / "tokenizer.json"))
    (tmp_path / "words" / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(ValueError, match="byte-level BPE only"):
        extend_folder(tmp_path / "words", tmp_path / "out", ["a b c"], 9, [], [])
    assert not (tmp_path / "out").exists()
    assert extend_folder(tmp_path / "words", tmp_path / "out", [], 0, ["c"], []) == 4
    assert folder_tokenizer(tmp_path / "out").encode("a c b d") == [0, 3, 1, 2]


def test_the_tool_refuses_what_does_not_fit(tmp_path: Path) -> None:
    tool = [sys.executable, str(ROOT / "tools" / "train_tokenizer.py"), "--output", str(tmp_path / "out")]
    extend = ["--extend", str(BUNDLED)]
    for flags, message in (
        ([*extend, "--add-tokens", "he"], f"error: --extend {BUNDLED}: 'he' is a token already\n"),
        ([*extend, "--vocab-size", "5000"], "error: --extend: new merges need both --input and --vocab-size"),
        (["--add-tokens", "x"], "error: give --input to train a tokenizer, or --extend to add to one\n"),
        ([*extend, "--input", str(DATA / "valid_en.jsonl"), "--vocab-size", "4096"], "error: --vocab-size 4096: "),
        (extend, f"error: --extend {BUNDLED}: nothing to add that it does not have\n"),
    ):
        done = subprocess.run([*tool, *flags], capture_output=True, text=True, check=False)
        assert done.returncode == 2 and done.stderr.startswith(message) and done.stderr.count("\n") == 1
        assert not (tmp_path / "out").exists()
    done = subprocess.run([*tool, *extend, "--add-tokens", "zzyzx"], capture_output=True, text=True, check=True)
    assert done.stdout == f"{tmp_path / 'out'}: 4097 ids\n"
