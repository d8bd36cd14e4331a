"""Pieces of preprocessing in one process: cuts, shards, quotas, rows of every form, sentences, restarts."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_steel.data import preprocess as module
from megatron_steel.data.encode import Encoder, KeyTokens
from megatron_steel.data.indexed import IndexedReader, IndexedWriter
from megatron_steel.data.pieces import Block
from megatron_steel.data.preprocess import preprocess
from megatron_steel.data.preprocess_options import PreprocessOptions, rejection_limit
from megatron_steel.data.progress import TaskProgress
from megatron_steel.data.workers import Aside, run_work
from megatron_steel.text import fast
from megatron_steel.text.fast import FastEncoder, ReferenceEncoder, fast_encoder
from megatron_steel.text.tokenizer import build_tokenizer

DATA = Path(__file__).resolve().parents[2] / "examples" / "data"
TOKENIZER = ("HuggingFaceTokenizer", str(DATA / "tokenizer"))


def options(folder: Path, name: str = "out", **changes: Any) -> PreprocessOptions:
    values = {"input": [str(folder / "in.jsonl")], "output_prefix": str(folder / name), "append_eod": True}
    return PreprocessOptions(**values | {"tokenizer_type": TOKENIZER[0], "tokenizer_model": TOKENIZER[1]} | changes)


def content(folder: Path, name: str = "out") -> dict[str, bytes]:
    return {path.name.removeprefix(name): path.read_bytes() for path in sorted(folder.glob(f"{name}_*"))}


@pytest.fixture
def rows(tmp_path: Path) -> list[Any]:
    """400 rows with texts, lists of sentences, empty ones and blank lines, in ``in.jsonl``."""
    texts: list[Any] = []
    for index in range(400):
        text: Any = f"document {index} " * (index % 50) + "\u4e2d\u6587\u3002" * (index % 7)
        texts.append([text, "", "and more"] if index % 11 == 0 else text)
    lines = [json.dumps({"text": text}, ensure_ascii=index % 2 == 0) for index, text in enumerate(texts)]
    (tmp_path / "in.jsonl").write_text("\n \n".join(lines), encoding="utf-8")
    return texts


def test_documents_are_what_the_tokenizer_makes_of_them(tmp_path: Path, rows: list[Any]) -> None:
    tokenizer = build_tokenizer(*TOKENIZER)
    preprocess(options(tmp_path))
    reader = IndexedReader(str(tmp_path / "out_text_document"))
    assert reader.num_documents == len(rows)
    for index, text in enumerate(rows):
        pieces = [tokenizer.encode(piece) for piece in (text if isinstance(text, list) else [text])]
        ids = [number for piece in pieces for number in piece]
        assert reader.document(index).tolist() == (ids + [tokenizer.eod_id] if ids else [])
        first, last = reader.document_indices[index : index + 2]
        lengths = [len(piece) for piece in pieces if piece]
        if lengths:
            lengths[-1] += 1
        assert reader.sequence_lengths[first:last].tolist() == lengths


@pytest.mark.parametrize("task_bytes", [1, 1000, 5000, 10**9])
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_bytes_depend_neither_on_cut_nor_on_workers(
    task_bytes: int, workers: int, tmp_path: Path, rows: list[Any]
) -> None:
    if task_bytes == 1:
        (tmp_path / "in.jsonl").write_text('{"text": "one"}\n\n{"text": ["two", "three"]}\n{"text": ""}')
    preprocess(options(tmp_path, fast_tokenizer=False, task_bytes=10**9))
    expected = content(tmp_path)
    assert set(expected) == {"_text_document.bin", "_text_document.idx", "_text_document.json"}
    preprocess(options(tmp_path, workers=workers, task_bytes=task_bytes))
    assert content(tmp_path) == expected
    assert not (tmp_path / "out.parts").exists()


def test_a_run_goes_on_from_finished_pieces(
    tmp_path: Path, rows: list[Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    preprocess(options(tmp_path))
    expected = content(tmp_path)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    def start_and_fail(name: str) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(IndexedWriter, "commit", fail)
            with pytest.raises(OSError, match="No space left"):
                preprocess(options(tmp_path, name, task_bytes=2000))
        assert list((tmp_path / f"{name}.parts").glob("0*.json"))
        capsys.readouterr()

    start_and_fail("again")
    assert not content(tmp_path, "again")
    parts = tmp_path / "again.parts"
    (parts / "0000001.json").unlink()  # was not finished
    with open(parts / "0000002.0.tokens", "r+b") as stream:  # is not what it was
        stream.write(b"\xff\xff")
    preprocess(options(tmp_path, "again", task_bytes=7, workers=2))
    said = capsys.readouterr().err
    assert "going on from" in said and said.count("\n") == 1
    assert content(tmp_path, "again") == {
        name: data.replace(b'"out_text', b'"again_text') for name, data in expected.items()
    }
    assert not parts.exists()
    for change in ({"append_eod": False}, {"json_keys": ["text"], "fast_tokenizer": False}, {}):
        start_and_fail("other")
        if not change:
            os.utime(tmp_path / "in.jsonl", ns=(1, 1))
        preprocess(options(tmp_path, "other", **change))
        assert "starting over" in capsys.readouterr().err
    assert content(tmp_path, "other")["_text_document.bin"] == expected["_text_document.bin"]


class Wrong:
    """A backend that adds a letter to one text."""

    def __init__(self, backend: Any, text: str) -> None:
        self.backend, self.text = backend, text

    def encode_batch(self, texts: list[str], parallel: bool) -> Any:
        return self.backend.encode_batch([text + "x" if text == self.text else text for text in texts], parallel=False)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_difference_starts_the_run_over_with_the_reference(
    workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [f"text number {index}" for index in range(3000)]
    picked = [text for text in texts if fast.is_checked(text)][-1]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    preprocess(options(tmp_path, fast_tokenizer=False))
    expected = content(tmp_path)

    def broken(tokenizer: Any, sample: Any) -> FastEncoder:
        found = fast_encoder(tokenizer, sample)
        assert isinstance(found, FastEncoder)
        return FastEncoder(lambda: Wrong(found._backend, picked), ReferenceEncoder(tokenizer), None)

    monkeypatch.setattr(module, "fast_encoder", broken)
    preprocess(options(tmp_path, workers=workers, task_bytes=20_000))
    said = capsys.readouterr().err
    assert "different ids" in said and "starting over" in said and said.count("\n") == 1
    assert content(tmp_path) == expected


def test_a_tokenizer_gigatoken_cannot_replace_is_told_in_one_line(
    tmp_path: Path, rows: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fast, "TESTED_PATTERNS", ())
    preprocess(options(tmp_path))
    said = capsys.readouterr().err
    assert said == "preprocess: encoding with the tokenizer's own library: its pre-tokenizer is not a tested one\n"


def test_sentences_become_sequences(tmp_path: Path) -> None:
    text = "\u4ed6\u6765\u4e86\u3002\u4f60\u5462\uff1f\n\u597d"
    (tmp_path / "in.jsonl").write_text(json.dumps({"text": text}) + "\n")
    preprocess(options(tmp_path, split_sentences=True, lang="chinese"))
    tokenizer, reader = build_tokenizer(*TOKENIZER), IndexedReader(str(tmp_path / "out_text_sentence"))
    sentences = ["\u4ed6\u6765\u4e86\u3002", "\u4f60\u5462\uff1f", "\u597d"]
    assert [reader.sequence(index).tolist() for index in range(3)] == [
        tokenizer.encode(sentence) + [tokenizer.eod_id] * (index == 2) for index, sentence in enumerate(sentences)
    ]
    assert reader.num_documents == 1
    preprocess(options(tmp_path, split_sentences=True, lang="chinese", keep_newlines=True))
    kept = IndexedReader(str(tmp_path / "out_text_sentence"))
    assert "".join(tokenizer.decode(kept.sequence(index)) for index in range(3)) == text + "<|endoftext|>"


def test_a_source_format_is_converted_and_its_left_out_rows_counted(tmp_path: Path) -> None:
    rows = [{"title": "a", "content": "b"}, {"title": "", "content": " "}, {"title": "c", "content": "d"}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sidecar = preprocess(options(tmp_path, input_format="wudao"))[0]
    reader = IndexedReader(str(tmp_path / "out_text_document"))
    tokenizer = build_tokenizer(*TOKENIZER)
    assert sidecar["documents"] == 2 and sidecar["rejected_lines"] == {"blank": 0, "dropped_by_format": 1}
    assert tokenizer.decode(reader.document(0)) == "a\nb<|endoftext|>"


def test_tables_are_read_like_lines(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = [f"text {index} \u4e2d" * 20 for index in range(1000)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    pq.write_table(pa.table({"text": texts, "n": list(range(1000))}), tmp_path / "in.parquet", row_group_size=100)
    preprocess(options(tmp_path))
    expected = content(tmp_path)
    for workers in (1, 2):
        preprocess(options(tmp_path, input=[str(tmp_path / "in.parquet")], task_bytes=1, workers=workers))
        assert content(tmp_path) == expected


@given(
    st.lists(
        st.one_of(
            st.binary(max_size=12),
            st.sampled_from(
                [b"", b" ", b"\r", b"{}", b'{"text": "a"}', b'{"text": "\\ud800"}', b'{"text": NaN}', b"[" * 3000]
            ),
        ),
        max_size=8,
    )
)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_any_bytes_are_a_document_a_blank_line_or_a_reject(lines: list[bytes]) -> None:
    tokenizer = build_tokenizer("NullTokenizer", None, 9)
    encoder = Encoder(ReferenceEncoder(tokenizer), ["text"], None, np.dtype(np.int32))
    data = b"\n".join(line.replace(b"\n", b"") for line in lines) + b"\n"
    found = encoder.encode(Block("f", 1, data))
    assert found.documents + found.blank_lines + len(found.rejects) == found.lines == data.count(b"\n")
    assert all("\n" not in reject.reason and json.dumps(reject.text) for reject in found.rejects)


@pytest.mark.parametrize(("value", "limit"), [("0", (0, None)), ("12", (12, None)), ("0.5%", (None, 0.005))])
def test_quotas(value: str, limit: tuple[int | None, float | None]) -> None:
    assert rejection_limit(value) == limit


@pytest.mark.parametrize("value", ["", "x", "-1", "1.5", "101%", "%", "-1%", "1e3%"])
def test_unusable_quotas(value: str) -> None:
    with pytest.raises(ValueError, match="--max-rejected"):
        rejection_limit(value)


def test_two_runs_do_not_share_a_folder(tmp_path: Path, rows: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_steel.data import shards

    monkeypatch.setattr(shards, "LOCK_SECONDS", 0.0)
    first = shards.WorkFolder(str(tmp_path / "out"))
    with pytest.raises(ValueError, match="another run is writing there"):
        preprocess(options(tmp_path))
    first.close()
    preprocess(options(tmp_path))


ODD_LINES = st.sampled_from(
    [b"", b" ", b"{}", b'{"text": 3}', b'{"text": null}', b'{"text": ["a", "b"]}', b'["text"]', b'"text"', b"[",
     b"\xff", b'{"text": "\\ud800"}', b'{"text": NaN}', b'{"text": ""}', b'{"text": "x"}\r', b"\xef\xbb\xbf{}"]
)  # fmt: skip
LINES = st.one_of(st.text(max_size=9).map(lambda text: json.dumps({"n": 1, "text": text}).encode()), ODD_LINES)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(LINES, max_size=6), st.booleans(), st.booleans())
def test_the_short_way_through_a_block_gives_what_the_careful_one_does(
    lines: list[bytes], ends: bool, append_eod: bool
) -> None:
    tokenizer = build_tokenizer(*TOKENIZER)
    short, careful = (
        Encoder(ReferenceEncoder(tokenizer), ["text"], tokenizer.eod_id if append_eod else None, np.dtype(np.int32))
        for _ in range(2)
    )
    careful._plain = lambda block: None  # type: ignore[method-assign]
    block = Block("f", 1, b"\n".join(lines) + b"\n" * ends)
    one, other = vars(short.encode(block)), vars(careful.encode(block))
    for parts in (one.pop("by_key"), other.pop("by_key")):
        for name, value in vars(parts["text"]).items():
            one.setdefault(name, []).append(np.asarray(value).tolist())
    assert all(first == second for first, second in (one.pop(name) for name in vars(KeyTokens(*[None] * 5))))  # type: ignore[arg-type]
    assert one == other


def double(item: int, report: Any) -> int:
    """Work for the tests of the pool."""
    report(item)
    if item == 99:
        raise ValueError("ninety-nine")
    if item == 98:
        os._exit(3)
    return 2 * item


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_work_gives_every_result_and_its_progress(workers: int) -> None:
    seen: list[tuple[int, Any]] = []
    found = dict(run_work(double, range(20), workers, lambda item, progress: seen.append((item, progress))))
    assert found == {item: 2 * item for item in range(20)}
    assert sorted(seen) == [(item, item) for item in range(20)]


@pytest.mark.parametrize(("item", "error"), [(99, ValueError), (98, RuntimeError)])
def test_work_that_fails_or_dies_ends_it(item: int, error: type[Exception]) -> None:
    with pytest.raises(error):
        list(run_work(double, [1, item, 2, 3], 2, lambda *_: None))


def whoami(item: int, _: Any) -> int:
    """Work that tells who does it."""
    return os.getpid()


def test_a_worn_worker_makes_way_for_a_fresh_one() -> None:
    fresh = dict(run_work(whoami, range(8), 2, lambda *_: None, lambda: True))
    assert sorted(fresh) == list(range(8)) and len(set(fresh.values())) == 8
    kept = dict(run_work(whoami, range(8), 2, lambda *_: None))
    assert sorted(kept) == list(range(8)) and len(set(kept.values())) <= 2
    assert not {os.getpid()} & (set(fresh.values()) | set(kept.values()))


def test_a_call_aside_runs_elsewhere_and_its_end_is_noticed() -> None:
    with Aside(os.getpid) as there:
        assert there.result != os.getpid() and there.result == there.result
    with Aside(lambda: os._exit(3)) as dying, pytest.raises(RuntimeError, match="died"):
        print(dying.result)
    with Aside(lambda: time.sleep(60)):
        pass  # leaving does not wait for it


def test_progress_counts_running_and_skipped_tasks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    progress = TaskProgress("preprocess", [4_000_000, 4_000_000, 8_000_000], 1)
    progress.skip(0)
    progress.update(1, (1_000_000, 5, 500))
    assert not capsys.readouterr().err, "nothing in the first seconds"
    now = 110.0
    progress.finish(1, 20, 2000)
    line = capsys.readouterr().err
    assert "20 documents, 50.0% | 2 docs/s | 0.40 MB/s | 200 tokens/s | ETA 00:00:20" in line
