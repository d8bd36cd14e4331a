"""Console line, metrics.jsonl and TensorBoard, and a tracker that cannot hold up the run."""

from __future__ import annotations

import json
import math
import re
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_steel.config.schema import CheckpointConfig, Config, LoggingConfig, TrainingConfig
from megatron_steel.metrics import sinks
from megatron_steel.metrics.sinks import (
    ConsoleSink,
    JsonlSink,
    TensorBoardSink,
    WandbSink,
    check_packages,
    open_sinks,
    read_metrics,
)

ROW = {
    "iteration": 20,
    "consumed_samples": 10240,
    "consumed_tokens": 20971520,
    "loss": 0.1 + 0.2,
    "grad_norm": 1.0 / 3.0,
    "lr": 3e-4,
    "step_time_s": 0.1234567,
    "tokens_per_second_per_device": 45678.9,
    "tflops_per_device": 412.345,
    "mfu": 0.41693,
    "eta_s": 93784.4,
    "peak_memory_bytes": 2**35,
    "global_batch_size": 512,
    "skipped_iterations": 0,
    "nan_iterations": 0,
    "loss_by_source": {"zh": 2.5, "en": 3.5},
}
VALID = {"iteration": 20, "split": "valid", "name": "web", "loss": 2.0, "perplexity": math.e**2, "bits_per_byte": 0.9}


def test_console_line_has_the_fields_of_megatron_lm(capsys: pytest.CaptureFixture[str]) -> None:
    ConsoleSink(100).write(ROW)
    line = capsys.readouterr().out
    assert re.match(r" \[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{6}\] iteration ", line)
    assert line.split("] ")[1] == (
        "iteration       20/     100 | consumed samples:        10240 | elapsed time per iteration (ms): 123.5 | "
        "throughput per GPU (TFLOP/s/GPU): 412.3 | learning rate: 3.000000E-04 | global batch size:   512 | "
        "lm loss: 3.000000E-01 | lm loss zh: 2.500000E+00 | lm loss en: 3.500000E+00 | grad norm: 0.333 | "
        "number of skipped iterations:   0 | number of nan iterations:   0 | tokens/s/GPU: 45678.9 | MFU: 41.69% | "
        "ETA: 1 day, 2:03:04 |\n"
    )


def test_console_leaves_out_what_a_row_has_not(capsys: pytest.CaptureFixture[str]) -> None:
    ConsoleSink(100).write({"iteration": 3, "loss": math.nan, "loss_by_source": {}, "tflops_per_device": 0.0123})
    line = capsys.readouterr().out.split("] ")[1]
    assert line == ("iteration        3/     100 | throughput per GPU (TFLOP/s/GPU): 0.0123 | lm loss: NAN |\n")


def test_console_validation_line(capsys: pytest.CaptureFixture[str]) -> None:
    ConsoleSink(100).write(VALID)
    ConsoleSink(100).write({"iteration": 5, "split": "valid", "loss": 1e9})
    first, second = capsys.readouterr().out.splitlines()
    assert first == (
        " validation-web loss at iteration 20 | lm loss value: 2.000000E+00 | lm loss PPL: 7.389056E+00 | "
        "bits per byte: 0.900000 |"
    )
    assert second.startswith(" validation loss at iteration 5 | lm loss value: 1.000000E+09 |")


def test_jsonl_keeps_every_bit(tmp_path: Path) -> None:
    path = tmp_path / "new" / "metrics.jsonl"
    sink = JsonlSink(path)
    sink.write(ROW)
    assert json.loads(path.read_text()) == ROW  # readable before close
    sink.write(VALID)
    sink.close()
    assert read_metrics(path) == [ROW, VALID]


def test_jsonl_is_json_even_with_nan(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "m.jsonl")
    sink.write({"iteration": 1, "loss": math.nan, "grad_norm": math.inf, "loss_by_source": {"zh": -math.inf}})
    line = (tmp_path / "m.jsonl").read_text()

    def refuse(word: str) -> None:
        raise AssertionError(word)

    row = json.loads(line, parse_constant=refuse)
    assert row == {"iteration": 1, "loss": None, "grad_norm": None, "loss_by_source": {"zh": None}}


def test_later_rows_supersede(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    first = JsonlSink(path)
    for iteration in (1, 2, 3):
        first.write({"iteration": iteration, "loss": 1.0})
    first.write({"iteration": 3, "split": "valid", "name": "a", "loss": 9.0})
    first.close()
    second = JsonlSink(path)
    second.write({"iteration": 3, "loss": 2.0})
    second.write({"iteration": 3, "split": "valid", "name": "b", "loss": 8.0})
    second.write({"iteration": 4, "loss": 2.0})
    second.close()
    rows = [(row["iteration"], row.get("name"), row["loss"]) for row in read_metrics(path)]
    assert rows == [(1, None, 1.0), (2, None, 1.0), (3, None, 2.0), (3, "a", 9.0), (3, "b", 8.0), (4, None, 2.0)]
    assert len(path.read_text().splitlines()) == 7  # nothing was rewritten


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_torn_tail_costs_one_row(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.mktemp("torn") / "m.jsonl"
    rows = [{"iteration": n, "note": "\u4e2d" * data.draw(st.sampled_from([0, 5, 40000]))} for n in range(1, 4)]
    sink = JsonlSink(path)
    for row in rows:
        sink.write(row)
    sink.close()
    whole = path.read_bytes()
    cut = data.draw(st.integers(0, len(whole)))
    tail = data.draw(st.sampled_from([b"", b"\0" * 9]))  # what some file systems leave after a power cut
    path.write_bytes(whole[:cut] + tail)
    complete = whole[:cut].count(b"\n")
    assert read_metrics(path) == rows[:complete]
    sink = JsonlSink(path)
    sink.write({"iteration": 9})
    sink.close()
    assert read_metrics(path) == [*rows[:complete], {"iteration": 9}]
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"iteration": 1}\n{"iter\n{"iteration": 3}\n')
    with pytest.raises(ValueError, match=r"m\.jsonl, line 2: not JSON"):
        read_metrics(path)


def test_a_full_disk_costs_rows_not_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class FullDisk:
        """A disk that takes the first half of a line."""

        def __init__(self, file: object) -> None:
            self.file, self.full = file, True

        def write(self, line: bytes) -> int:
            return self.file.write(line[: len(line) // 2] if self.full else line)

        def __getattr__(self, name: str) -> object:
            return getattr(self.file, name)

    path = tmp_path / "m.jsonl"
    sink = JsonlSink(path)
    sink.write({"iteration": 1})
    sink.file = FullDisk(sink.file)
    sink.write({"iteration": 2})
    sink.write({"iteration": 3})
    assert capsys.readouterr().err.count("warning") == 1
    sink.file.full = False
    sink.write({"iteration": 4})
    assert [row["iteration"] for row in read_metrics(path)] == [1, 4]


def test_tensorboard_reads_back_and_hides_what_was_redone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    first = TensorBoardSink(tmp_path, 0)
    for iteration in range(1, 9):
        first.write({**ROW, "iteration": iteration, "loss": 10.0 + iteration})
    first.write({**VALID, "iteration": 4})
    first.close()
    # Event files are read in the order of their names, which hold seconds: the restart comes later.
    later = SimpleNamespace(time=lambda: time.time() + 5)
    monkeypatch.setattr("tensorboard.summary.writer.event_file_writer.time", later)
    second = TensorBoardSink(tmp_path, 5)
    for iteration in range(6, 8):
        second.write({**ROW, "iteration": iteration, "loss": 20.0 + iteration})
    second.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    points = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert points == [(1, 11.0), (2, 12.0), (3, 13.0), (4, 14.0), (5, 15.0), (6, 26.0), (7, 27.0)]
    assert events.Scalars("train/loss_by_source/zh")[0].value == 2.5
    assert [(event.step, event.value) for event in events.Scalars("valid/web/loss")] == [(4, 2.0)]


def test_tensorboard_failure_ends_the_reporting_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(*_: object) -> None:
        raise OSError("disk full")

    sink = TensorBoardSink(tmp_path, 0)
    sink.writer.add_scalar = refuse
    for iteration in (1, 2):
        sink.write({"iteration": iteration, "loss": 1.0})
    sink.close()
    assert capsys.readouterr().err.count("disk full") == 1


def wandb_like(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, program: str) -> WandbSink:
    """The sink with another program in the place of the tracker's process."""
    script = tmp_path / "wandb_process.py"
    script.write_text(program)
    monkeypatch.setattr(sinks, "__file__", str(tmp_path / "sinks.py"))
    return WandbSink("project", None, "abc", tmp_path, {"lr": 1.0})


def test_wandb_rows_arrive_in_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = "import sys, time\ntime.sleep(0.2)\nopen(__file__ + '.got', 'w').write(sys.stdin.read())"
    sink = wandb_like(monkeypatch, tmp_path, program)
    for iteration in range(3000):  # more than a pipe holds
        sink.write({**ROW, "iteration": iteration})
    sink.close()
    got = [json.loads(line) for line in (tmp_path / "wandb_process.py.got").read_text().splitlines()]
    assert [row["iteration"] for row in got] == list(range(3000))
    assert got[0]["train/loss"] == ROW["loss"] and got[0]["train/loss_by_source/en"] == 3.5


def test_a_hanging_tracker_never_makes_training_wait(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sink = wandb_like(monkeypatch, tmp_path, "import time; time.sleep(600)")
    monkeypatch.setattr(sink, "BACKLOG", 1 << 20)
    monkeypatch.setattr(sink, "CLOSE_SECONDS", 0.2)
    longest = 0.0
    for iteration in range(3000):
        start = time.monotonic()
        sink.write({**ROW, "iteration": iteration})
        longest = max(longest, time.monotonic() - start)
    start = time.monotonic()
    sink.close()
    assert time.monotonic() - start < 5.0 and longest < 1.0
    assert sink.process.returncode is not None
    assert capsys.readouterr().err.count("wandb") == 1


@pytest.mark.parametrize("program", ["raise SystemExit(3)", "import os; os.kill(os.getpid(), 9)"])
def test_a_dead_tracker_costs_one_warning(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], program: str
) -> None:
    sink = wandb_like(monkeypatch, tmp_path, program)
    sink.process.wait()
    for iteration in range(3):
        sink.write({**ROW, "iteration": iteration})
    sink.close()
    assert capsys.readouterr().err.count("warning: wandb: its process ended") == 1


def test_wandb_id_survives_a_restart(tmp_path: Path) -> None:
    save = tmp_path / "save"
    first = sinks.wandb_identity(save)
    assert re.fullmatch("[0-9a-f]{8}", first) and sinks.wandb_identity(save) == first
    assert sinks.wandb_identity(tmp_path / "other") != first


def test_open_sinks_follows_the_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = TrainingConfig(train_iters=10, global_batch_size=4)
    assert [type(sink) for sink in open_sinks(Config(training=training)).sinks] == [ConsoleSink]
    config = Config(
        training=training,
        checkpoint=CheckpointConfig(save=str(tmp_path)),
        logging=LoggingConfig(tensorboard_dir=str(tmp_path / "tb")),
    )
    opened = open_sinks(config, 3)
    opened.write({"iteration": 4, "loss": 1.0})
    opened.close()
    assert [type(sink) for sink in opened.sinks] == [ConsoleSink, JsonlSink, TensorBoardSink]
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"iteration": 4, "loss": 1.0}]
    monkeypatch.setattr(sinks.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="--tensorboard-dir needs the package tensorboard"):
        check_packages(config)
