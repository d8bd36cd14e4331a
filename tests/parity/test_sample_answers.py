"""Answers sampled into a file, from which the right ones become chat rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pool import WorkerPool
from tiny_chats import write_model

from megatron_steel.checkpoint.hf import import_hf
from tools import build_chat_data, sample_answers

PROMPTS = 7  # the last batch of three holds one


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("root")
    import_hf(Path(write_model(root / "hf")), root / "checkpoint")
    return str(root / "checkpoint")


@pytest.fixture(scope="module")
def problems(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "problems.jsonl"
    rows = [{"prompt": "what is " + "one and " * number, "answer": f"#### {number}"} for number in range(PROMPTS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def work_sample(words: list[str]) -> int:
    """Run the tool on this rank."""
    return sample_answers.main(words)


def command(checkpoint: str, problems: Path, output: Path, *more: str) -> list[str]:
    words = ["--load", checkpoint, "--input", str(problems), "--output", str(output), "--chat-template", "chatml"]
    return [*words, "--samples", "4", "--max-new-tokens", "6", "--batch-size", "3", *more]


def test_samples_do_not_depend_on_batch_and_layout(
    pool: WorkerPool, checkpoint: str, problems: Path, tmp_path: Path
) -> None:
    written = []
    for name, ranks, more in (
        ("one", 1, []),
        ("batch", 1, ["--batch-size", "7"]),
        ("replicas", 2, []),
        ("tp2", 2, ["--tensor-model-parallel-size", "2"]),
    ):
        output = tmp_path / f"{name}.jsonl"
        words = command(checkpoint, problems, output, *more)
        assert pool.run(ranks, work_sample, words, join=False) == [0] * ranks
        written.append(output.read_text())
    assert all(text == written[0] for text in written)
    rows = [json.loads(line) for line in written[0].splitlines()]
    assert [row["answer"] for row in rows] == [f"#### {number}" for number in range(PROMPTS)]
    assert all(len(row["samples"]) == 4 and len(set(row["samples"])) > 1 for row in rows)
    assert rows[2]["messages"] == [{"role": "user", "content": "what is one and one and "}]


def test_the_right_ones_become_rows(pool: WorkerPool, checkpoint: str, problems: Path, tmp_path: Path) -> None:
    """Of answers written over what was sampled, so that it is known which are right."""
    samples, chats = tmp_path / "samples.jsonl", tmp_path / "chats.jsonl"
    pool.run(1, work_sample, command(checkpoint, problems, samples), join=False)
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    for number, row in enumerate(rows):
        row["samples"][1] = f"it is {number}"
        row["samples"][0] = row["samples"][2] = row["samples"][3] = "no idea"
    samples.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["samples", "--input", str(samples), "--output", str(chats), "--verifier", "number"]
    build_chat_data.main(words)
    kept = [json.loads(line)["messages"][-1]["content"] for line in chats.read_text().splitlines()]
    assert kept == [f"it is {number}" for number in range(PROMPTS)]


def test_a_row_without_an_answer_is_refused(
    capsys: pytest.CaptureFixture[str], checkpoint: str, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "q", "answer": 1}\n{"prompt": "q"}\n')
    with pytest.raises(SystemExit) as ended:
        sample_answers.main(command(checkpoint, path, tmp_path / "out.jsonl"))
    said = capsys.readouterr().err
    assert ended.value.code == 2 and "rows.jsonl:2: missing key: the row has no 'answer'" in said
    assert not (tmp_path / "out.jsonl").exists()
