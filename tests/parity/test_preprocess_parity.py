"""Preprocessing writes what Megatron-LM writes: megatron-core's builder, and its script where a checkout is given.

``MEGATRON_LM_PATH=/path/to/Megatron-LM`` runs ``tools/preprocess_data.py`` of that checkout on the same input,
with the Python of ``MEGATRON_LM_PYTHON`` where the checkout needs packages of its own. Sentences have more to do with
``PUNKT_TAB_ENGLISH``, a folder of NLTK's ``punkt_tab``, and ``ENGLISH_JSONL``, files of a text column.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_steel.text.sentences import make_splitter

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "examples" / "data"
HUGGING_FACE = ("HuggingFaceTokenizer", str(DATA / "tokenizer"))
ODD_ROWS = [
    {"text": ""},
    {"text": "typed <|im_start|>user <|endoftext|></s>"},
    {"text": ["one sentence.", "", "another"]},
    {"text": " \n"},
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled corpus, both languages, and rows that could be treated differently."""
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    rows = [json.loads(line) for line in open(DATA / "train.jsonl", encoding="utf-8")]
    rows[100:100] = ODD_ROWS
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def sentencepiece_tokenizer(corpus: Path) -> tuple[str, str]:
    import sentencepiece

    text = corpus.with_suffix(".txt")
    text.write_text("\n".join(path.read_text(encoding="utf-8") for path in DATA.glob("valid_*.jsonl")), "utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(corpus.parent / "tiny"), vocab_size=3000, byte_fallback=True,
        character_coverage=0.98, model_type="bpe", minloglevel=2, num_threads=1, max_sentence_length=100000,
    )  # fmt: skip
    return "SentencePieceTokenizer", str(corpus.parent / "tiny.model")


def preprocess(corpus: Path, tokenizer: tuple[str, str], prefix: Path, workers: int, *flags: str) -> Path:
    """Run the tool and return the dataset's prefix."""
    command = [sys.executable, str(ROOT / "tools" / "preprocess_data.py"), "--input", str(corpus)]
    command += ["--output-prefix", str(prefix), "--tokenizer-type", tokenizer[0], "--tokenizer-model", tokenizer[1]]
    done = subprocess.run([*command, "--workers", str(workers), *flags], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert all("the tokenizer's own library: " in line for line in done.stderr.splitlines()), done.stderr
    return prefix.with_name(prefix.name + "_text_document")


def megatron_core(corpus: Path, encode: object, eod: int | None, vocab_size: int, prefix: Path) -> Path:
    """The same documents through megatron-core's ``IndexedDatasetBuilder.add_document``."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(vocab_size))
    for line in open(corpus, encoding="utf-8"):
        text = json.loads(line)["text"]
        sentences = [ids for ids in map(encode, text if isinstance(text, list) else [text]) if ids]
        if sentences and eod is not None:
            sentences[-1] = [*sentences[-1], eod]
        builder.add_document([index for ids in sentences for index in ids], [len(ids) for ids in sentences])
    builder.finalize(f"{prefix}.idx")
    return prefix


def assert_same_bytes(ours: Path, theirs: Path) -> None:
    for suffix in (".idx", ".bin"):
        assert Path(f"{ours}{suffix}").read_bytes() == Path(f"{theirs}{suffix}").read_bytes(), suffix


def test_hugging_face_bytes_equal_megatron_core_for_any_worker_count(corpus: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    library = AutoTokenizer.from_pretrained(HUGGING_FACE[1])
    expected = megatron_core(
        corpus, lambda text: library(text).input_ids, library.eos_token_id, len(library), tmp_path / "core"
    )
    for workers in (1, 2, 3):
        assert_same_bytes(
            preprocess(corpus, HUGGING_FACE, tmp_path / f"ours{workers}", workers, "--append-eod"), expected
        )


def test_sentencepiece_bytes_equal_megatron_core_for_any_worker_count(
    corpus: Path, sentencepiece_tokenizer: tuple[str, str], tmp_path: Path
) -> None:
    import sentencepiece

    library = sentencepiece.SentencePieceProcessor(model_file=sentencepiece_tokenizer[1])
    size, eod = library.get_piece_size(), library.eos_id()
    for flag, end in (("--append-eod", eod), (None, None)):
        expected = megatron_core(corpus, library.encode_as_ids, end, size, tmp_path / f"core{end}")
        for workers in (1, 2, 3) if flag else (2,):
            prefix = tmp_path / f"ours{end}_{workers}"
            assert_same_bytes(
                preprocess(corpus, sentencepiece_tokenizer, prefix, workers, *([flag] if flag else [])), expected
            )


@pytest.mark.parametrize("through_transformers", [False, True])
def test_tokens_a_tokenizer_adds_itself_are_kept_unless_told_otherwise(
    through_transformers: bool, tmp_path: Path
) -> None:
    """Megatron-LM stores ``tokenizer(text).input_ids``; --tokenizer-hf-no-include-special-tokens leaves them out."""
    from transformers import AutoTokenizer

    folder = tmp_path / "tokenizer"
    shutil.copytree(HUGGING_FACE[1], folder)
    state = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    start = {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}
    template = [start, {"Sequence": {"id": "A", "type_id": 0}}]
    special = {"<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}}
    state["post_processor"] = {"type": "TemplateProcessing", "single": template, "pair": template}
    state["post_processor"]["special_tokens"] = special
    (folder / "tokenizer.json").write_text(json.dumps(state), encoding="utf-8")
    if through_transformers:
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        config["split_special_tokens"] = False  # a setting that only transformers knows
        (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    library, short = AutoTokenizer.from_pretrained(str(folder)), tmp_path / "short.jsonl"
    short.write_text("".join(json.dumps(row) + "\n" for row in ODD_ROWS), encoding="utf-8")
    for flags, added in (([], True), (["--tokenizer-hf-no-include-special-tokens"], False)):

        def encode(text: str, added: bool = added) -> list[int]:
            return library(text, add_special_tokens=added).input_ids

        expected = megatron_core(short, encode, 0, 4096, tmp_path / f"core{added}")
        ours = preprocess(
            short, ("HuggingFaceTokenizer", str(folder)), tmp_path / f"ours{added}", 2, "--append-eod", *flags
        )
        assert_same_bytes(ours, expected)
        first = np.fromfile(f"{ours}.bin", dtype=np.uint16)[:2].tolist()
        assert (first == [1, 0]) == added, "an empty text is the beginning token alone, or nothing"


def test_sidecar_says_what_was_written(corpus: Path, tmp_path: Path) -> None:
    from megatron_steel.text.tokenizer import build_tokenizer

    prefix = preprocess(corpus, HUGGING_FACE, tmp_path / "ours", 2, "--append-eod")
    sidecar = json.loads(Path(f"{prefix}.json").read_text(encoding="utf-8"))
    tokens = np.fromfile(f"{prefix}.bin", dtype=sidecar["dtype"])
    rows = [json.loads(line)["text"] for line in open(corpus, encoding="utf-8")]
    texts = ["".join(row) for row in rows]
    han = sum("\u4e00" <= letter <= "\u9fff" for text in texts for letter in text)
    latin = sum(letter.isascii() and letter.isalpha() for text in texts for letter in text)
    assert sidecar["tokenizer_fingerprint"] == build_tokenizer(*HUGGING_FACE).fingerprint()
    assert (sidecar["vocab_size"], sidecar["eod_id"], sidecar["append_eod"]) == (4096, 0, True)
    assert sidecar["documents"] == len(rows) and sidecar["tokens"] == len(tokens)
    assert int((tokens == 0).sum()) == len(rows) - 1 + 1  # one empty document has none, one has it typed as well
    assert sidecar["text_bytes"] == sum(len(text.encode()) for text in texts)
    assert sidecar["language_shares"]["zh"] == pytest.approx(han / (han + latin), abs=1e-4)
    assert sum(sidecar["language_shares"].values()) == pytest.approx(1, abs=1e-5)
    for suffix in ("bin", "idx"):
        assert sidecar[f"{suffix}_sha256"] == hashlib.sha256(Path(f"{prefix}.{suffix}").read_bytes()).hexdigest()


def test_megatron_core_reads_the_dataset(corpus: Path, tmp_path: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    from megatron_steel.data.indexed import IndexedReader

    prefix = str(preprocess(corpus, HUGGING_FACE, tmp_path / "ours", 2))
    theirs, ours = IndexedDataset(prefix), IndexedReader(prefix)
    assert len(theirs) == len(ours)
    assert theirs.document_indices.tolist() == ours.document_indices.tolist()
    assert all(np.array_equal(theirs[index], ours.sequence(index)) for index in range(0, len(ours), 7))


SCRIPT = """
import runpy, sys, typing
import typing_extensions
typing.override = typing_extensions.override
sys.path.insert(0, sys.argv[1])
sys.argv = [sys.argv[1] + "/tools/preprocess_data.py", *sys.argv[2:]]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


needs_checkout = pytest.mark.skipif(
    "MEGATRON_LM_PATH" not in os.environ, reason="MEGATRON_LM_PATH names no Megatron-LM checkout"
)


def megatron_lm(corpus: Path, tokenizer: tuple[str, str], prefix: Path, *flags: str, home: Path | None = None) -> Path:
    """Run the checkout's script; ``home`` is the home folder it sees."""
    checkout = os.environ["MEGATRON_LM_PATH"]
    python = os.environ.get("MEGATRON_LM_PYTHON", sys.executable)
    command = [python, "-c", SCRIPT, checkout, "--input", str(corpus), *flags, "--workers", "2"]
    command += ["--output-prefix", str(prefix)]
    command += ["--tokenizer-type", tokenizer[0], "--tokenizer-model", tokenizer[1]]
    environment = os.environ | {"PYTHONPATH": checkout} | ({"HOME": str(home)} if home else {})
    subprocess.run(command, check=True, capture_output=True, timeout=300, env=environment)
    return prefix


@needs_checkout
@pytest.mark.parametrize("kind", ["hugging_face", "sentencepiece"])
@pytest.mark.parametrize("flags", [["--append-eod"], []], ids=["eod", "no-eod"])
def test_bytes_equal_megatron_lms_script(
    flags: list[str], kind: str, corpus: Path, sentencepiece_tokenizer: tuple[str, str], tmp_path: Path
) -> None:
    tokenizer = HUGGING_FACE if kind == "hugging_face" else sentencepiece_tokenizer
    megatron_lm(corpus, tokenizer, tmp_path / "theirs", *flags)
    for workers in (1, 2, 3):
        ours = preprocess(corpus, tokenizer, tmp_path / f"ours{workers}", workers, *flags)
        assert_same_bytes(ours, tmp_path / "theirs_text_document")


@needs_checkout
def test_two_keys_equal_megatron_lms_script(tmp_path: Path) -> None:
    """Of several keys the script writes an index for the last one only."""
    rows = [json.loads(line)["text"] for line in open(DATA / "valid_en.jsonl", encoding="utf-8")]
    path = tmp_path / "two.jsonl"
    path.write_text("".join(json.dumps({"title": row[:50], "text": row}) + "\n" for row in rows), encoding="utf-8")
    flags = ["--json-keys", "title", "text", "--append-eod"]
    theirs = megatron_lm(path, HUGGING_FACE, tmp_path / "theirs", *flags)
    ours = preprocess(path, HUGGING_FACE, tmp_path / "ours", 2, *flags)
    assert_same_bytes(ours, theirs.with_name("theirs_text_document"))
    assert (tmp_path / "ours_title_document.bin").read_bytes() == (tmp_path / "theirs_title_document.bin").read_bytes()
    assert (tmp_path / "ours_title_document.idx").exists() > (tmp_path / "theirs_title_document.idx").exists()


@pytest.fixture(scope="module")
def punkt_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home folder with parameters of Punkt for English: those of ``PUNKT_TAB_ENGLISH``, or learnt here."""
    home = tmp_path_factory.mktemp("home")
    folder = home / "nltk_data" / "tokenizers" / "punkt_tab" / "english"
    if given := os.environ.get("PUNKT_TAB_ENGLISH"):
        shutil.copytree(given, folder)
        return home
    from nltk.tokenize.punkt import PunktTrainer

    learnt = PunktTrainer((DATA / "valid_en.jsonl").read_text(encoding="utf-8")).get_params()
    tables = {
        "abbrev_types.txt": sorted(learnt.abbrev_types | {"mr", "dr"}),
        "sent_starters.txt": sorted(learnt.sent_starters),
        "collocations.tab": ["\t".join(pair) for pair in sorted(learnt.collocations)],
        "ortho_context.tab": [f"{word}\t{context}" for word, context in sorted(learnt.ortho_context.items())],
    }
    folder.mkdir(parents=True)
    for name, lines in tables.items():
        (folder / name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return home


@needs_checkout
@pytest.mark.parametrize("keep", [[], ["--keep-newlines"]], ids=["plain", "keep-newlines"])
def test_sentences_equal_megatron_lms_script(keep: list[str], punkt_home: Path, tmp_path: Path) -> None:
    """Plain sentences have its bytes. With --keep-newlines the script loses white space, which is kept here."""
    paths = os.environ.get("ENGLISH_JSONL", str(DATA / "valid_en.jsonl")).split(os.pathsep)
    path, split = tmp_path / "en.jsonl", tmp_path / "en_ss.jsonl"
    path.write_text("".join(Path(name).read_text(encoding="utf-8") for name in paths), encoding="utf-8")
    flags = ["--split-sentences", "--append-eod", *keep]
    for _ in range(2):  # with one partition the first run only splits
        theirs = megatron_lm(path, HUGGING_FACE, tmp_path / "theirs", *flags, home=punkt_home)
    model = punkt_home / "nltk_data" / "tokenizers" / "punkt_tab" / "english"
    preprocess(path, HUGGING_FACE, tmp_path / "ours", 2, *flags, "--punkt-model", str(model))
    if not keep:
        assert_same_bytes(tmp_path / "ours_text_sentence", theirs.with_name("theirs_text_sentence"))
        return
    splitter = make_splitter("english", True, str(model), list)
    for before, after in zip(*(map(json.loads, open(name, encoding="utf-8")) for name in (path, split)), strict=True):
        found, expected = splitter(before["text"]), after["text"]
        assert "".join(found) == before["text"]
        assert "".join("".join(expected).split()) == "".join(before["text"].split())
        # It ends sentences also at an end mark in the middle of a word (what?no), never fewer.
        assert len(expected) >= len(found)
        same = [ours.strip() == other.strip() for ours, other in zip(found, expected, strict=False)]
        assert len(expected) > len(found) or all(same)
