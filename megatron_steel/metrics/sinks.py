"""Where rows of metrics go: console, metrics.jsonl, TensorBoard, Weights & Biases, all behind ``write`` and ``close``.

A row is one dictionary: ``iteration`` and the fields of metrics.jsonl, all numbers or dictionaries of numbers. A row
with ``"split": "valid"`` holds the scores of the validation set ``name``. Only one rank opens sinks. What is broken
outside of this program (a service, a full disk) costs rows and one warning, never the run.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Protocol

from megatron_steel.config.load import to_flat
from megatron_steel.config.schema import Config
from megatron_steel.text.files import write_text

Row = dict[str, Any]
METRICS_FILE = "metrics.jsonl"
WANDB_ID_FILE = "wandb_run_id"


class Sink(Protocol):
    """Takes rows."""

    def write(self, row: Row) -> None:
        """Take one row."""

    def close(self) -> None:
        """Finish; no more rows come."""


class Sinks:
    """Several sinks as one."""

    def __init__(self, sinks: Iterable[Sink]) -> None:
        self.sinks = list(sinks)

    def write(self, row: Row) -> None:
        """Give a row to every sink."""
        for sink in self.sinks:
            sink.write(row)

    def close(self) -> None:
        """Close every sink."""
        for sink in self.sinks:
            sink.close()


def open_sinks(config: Config, iteration: int = 0) -> Sinks:
    """The sinks that a checked configuration asks for; call it on one rank only.

    ``iteration`` is the last one done before this start: what an earlier attempt reported after it is void.
    """
    logging, save = config.logging, config.checkpoint.save
    sinks: list[Sink] = [ConsoleSink(config.training.train_iters)]
    if save is not None:
        sinks.append(JsonlSink(Path(save) / METRICS_FILE))
    if logging.tensorboard_dir is not None:
        sinks.append(TensorBoardSink(Path(logging.tensorboard_dir), iteration))
    if logging.wandb_project is not None:
        identity = wandb_identity(Path(save)) if save is not None else uuid.uuid4().hex[:8]
        folder = Path(logging.wandb_save_dir or save or ".")
        sinks.append(WandbSink(logging.wandb_project, logging.wandb_exp_name, identity, folder, to_flat(config)))
    return Sinks(sinks)


def check_packages(config: Config) -> None:
    """``ValueError`` when a wanted tracker is not installed."""
    wanted = {"tensorboard": config.logging.tensorboard_dir, "wandb": config.logging.wandb_project}
    flags = {"tensorboard": "--tensorboard-dir", "wandb": "--wandb-project"}
    for name in (name for name, value in wanted.items() if value is not None):
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"{flags[name]} needs the package {name}; pip install {name}, or leave the flag out")


def warn(text: str) -> None:
    """One line on stderr."""
    print(f"warning: {text}", file=sys.stderr, flush=True)


def scalars(row: Row) -> dict[str, float]:
    """The numbers of a row with the names trackers show: ``train/loss``, ``train/loss_by_source/zh``,
    ``valid/NAME/loss``."""
    prefix = "valid/" + (f"{row['name']}/" if "name" in row else "") if row.get("split") == "valid" else "train/"
    flat: dict[str, float] = {}
    for key, value in row.items():
        if isinstance(value, dict):
            flat.update({f"{prefix}{key}/{inner}": number for inner, number in value.items()})
        elif key != "iteration" and isinstance(value, (int, float)):
            flat[prefix + key] = value
    return flat


class ConsoleSink:
    """One line per row, with the field names of Megatron-LM's log."""

    # Field of a row, how it is printed. The order and the names up to "number of nan iterations" are Megatron-LM's.
    FIELDS: tuple[tuple[str, Callable[[Any], str]], ...] = (
        ("consumed_samples", lambda v: f"consumed samples: {v:12d}"),
        ("step_time_s", lambda v: f"elapsed time per iteration (ms): {v * 1000:.1f}"),
        # A CPU does a fraction of a TFLOP/s; one decimal would print it as 0.0.
        ("tflops_per_device", lambda v: f"throughput per GPU (TFLOP/s/GPU): {v:.{1 if v >= 10 else 4}f}"),
        ("lr", lambda v: f"learning rate: {v:.6E}"),
        ("global_batch_size", lambda v: f"global batch size: {v:5d}"),
        ("loss", lambda v: f"lm loss: {v:.6E}"),
        ("loss_by_source", lambda v: " | ".join(f"lm loss {name}: {loss:.6E}" for name, loss in v.items())),
        ("rewards/accuracies", lambda v: f"accuracy: {v:.4f}"),
        ("rewards/margins", lambda v: f"margin: {v:.4E}"),
        ("loss_scale", lambda v: f"loss scale: {v:.1f}"),
        ("grad_norm", lambda v: f"grad norm: {v:.3f}"),
        ("skipped_iterations", lambda v: f"number of skipped iterations: {v:3.0f}"),
        ("nan_iterations", lambda v: f"number of nan iterations: {v:3.0f}"),
        ("tokens_per_second_per_device", lambda v: f"tokens/s/GPU: {v:.1f}"),
        ("mfu", lambda v: f"MFU: {v:.2%}"),
        ("eta_s", lambda v: f"ETA: {timedelta(seconds=round(v))}"),
    )

    def __init__(self, train_iters: int) -> None:
        self.train_iters = train_iters

    def write(self, row: Row) -> None:
        """Print the fields that the row has."""
        print(self.validation(row) if row.get("split") == "valid" else self.training(row), flush=True)

    def training(self, row: Row) -> str:
        """The line of a training row."""
        parts = [f"iteration {row['iteration']:8d}/{self.train_iters:8d}"]
        parts += [show(row[name]) for name, show in self.FIELDS if row.get(name) not in (None, {})]
        return f" [{datetime.now():%Y-%m-%d %H:%M:%S.%f}] " + "".join(f"{part} | " for part in parts).rstrip()

    def validation(self, row: Row) -> str:
        """The line of a validation row."""
        name = f"-{row['name']}" if "name" in row else ""
        line = f" validation{name} loss at iteration {row['iteration']} | lm loss value: {row['loss']:.6E} |"
        if "perplexity" in row:
            line += f" lm loss PPL: {math.exp(min(20.0, row['loss'])):.6E} |"
        if "rewards/accuracies" in row:
            line += f" accuracy: {row['rewards/accuracies']:.4f} | margin: {row['rewards/margins']:.4E} |"
        if row.get("bits_per_byte") is not None:
            line += f" bits per byte: {row['bits_per_byte']:.6f} |"
        return line

    def close(self) -> None:
        """Nothing to do."""


class JsonlSink:
    """Appends rows to a file, each in one write; readers and a crash see whole lines only.

    Floats keep full precision; infinities and NaN, which JSON does not have, become null. A line that a crash cut off
    is removed at the next start.
    """

    def __init__(self, path: Path) -> None:
        """Open or create ``path`` and its directory."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.file = path.open("ab", buffering=0)
        self.size = whole_lines(path)
        self.file.truncate(self.size)
        self.failed = False

    def write(self, row: Row) -> None:
        """Append one line. When the disk refuses it, the line is left out as a whole."""
        line = (json.dumps(json_numbers(row), ensure_ascii=False, allow_nan=False) + "\n").encode()
        try:
            written = self.file.write(line)
            if written != len(line):
                raise OSError("disk full")
        except OSError as error:
            self.file.truncate(self.size)
            if not self.failed:
                warn(f"{self.path}: {error}; rows are lost until it can be written again")
            self.failed = True
            return
        self.size += len(line)
        self.failed = False

    def close(self) -> None:
        """Close the file."""
        self.file.close()


def json_numbers(value: Any) -> Any:
    """The same value with null for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: json_numbers(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def whole_lines(path: Path) -> int:
    """Bytes up to the end of the last complete line."""
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        while end > 0:
            start = max(0, end - (1 << 16))
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            if newline >= 0:
                return start + newline + 1
            end = start
    return 0


def read_metrics(path: Path) -> list[Row]:
    """The rows of a metrics.jsonl, by iteration.

    A later row for the same iteration (and validation set) supersedes an earlier one; a last line without its end is
    ignored. Raises ``ValueError`` naming the line for any other line that is not JSON.
    """
    rows: dict[tuple[Any, ...], Row] = {}
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines[:-1], start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error}); remove this line") from error
        rows[row["iteration"], row.get("split", "train"), row.get("name")] = row
    return sorted(rows.values(), key=lambda row: row["iteration"])


class TensorBoardSink:
    """Event files for TensorBoard."""

    def __init__(self, folder: Path, iteration: int) -> None:
        """``iteration`` is the last one done: points of an earlier attempt after it are hidden."""
        from torch.utils.tensorboard import SummaryWriter

        self.writer: Any = SummaryWriter(str(folder), purge_step=iteration + 1, flush_secs=10)

    def write(self, row: Row) -> None:
        """Add every number of the row; the first failure ends the reporting."""
        if self.writer is None:
            return
        try:
            for name, value in scalars(row).items():
                self.writer.add_scalar(name, value, row["iteration"])
        except OSError as error:
            self.writer = None
            warn(f"TensorBoard: {error}; no more events are written")

    def close(self) -> None:
        """Write out what is pending."""
        if self.writer is None:
            return
        try:
            self.writer.close()
        except OSError as error:
            warn(f"TensorBoard: {error}; the last events are lost")


def wandb_identity(save: Path) -> str:
    """The run id kept in the checkpoint directory, so that a restart goes on with the same run."""
    path = save / WANDB_ID_FILE
    if path.is_file() and (identity := path.read_text(encoding="ascii").strip()):
        return identity
    identity = uuid.uuid4().hex[:8]
    save.mkdir(parents=True, exist_ok=True)
    write_text(path, identity + "\n")
    return identity


class WandbSink:
    """Rows to Weights & Biases through a process of its own, which never makes this one wait.

    Rows go into a pipe that is never waited for; what does not fit is kept here, up to :data:`BACKLOG` bytes.
    """

    BACKLOG = 16 << 20
    CLOSE_SECONDS = 30.0

    def __init__(self, project: str, name: str | None, identity: str, folder: Path, config: Row) -> None:
        """``identity`` is the run id, ``folder`` gets the directory ``wandb``, ``config`` is shown with the run."""
        folder.mkdir(parents=True, exist_ok=True)
        # A session of its own: Ctrl-C must end the training first, and the last rows with it. -P: the modules beside
        # the script must not hide installed ones.
        settings: Row = {"project": project, "name": name, "id": identity, "dir": str(folder), "config": config}
        settings["trainer_pid"] = os.getpid()
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(Path(__file__).with_name("wandb_process.py")), json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            bufsize=0,
            start_new_session=True,
        )
        assert self.process.stdin is not None
        self.pipe = self.process.stdin
        os.set_blocking(self.pipe.fileno(), False)
        self.pending = bytearray()

    def write(self, row: Row) -> None:
        """Pass a row on, without waiting; the first failure ends the reporting."""
        self.send({"iteration": row["iteration"], **scalars(row)})

    def send(self, values: Row) -> None:
        """Queue one line and push as much as the pipe takes."""
        if self.pipe.closed:
            return
        self.pending += json.dumps(values).encode() + b"\n"
        if not self.push():
            self.end("its process ended")
        elif len(self.pending) > self.BACKLOG:
            self.end("it takes no rows")

    def push(self) -> bool:
        """Hand over pending bytes as far as the pipe takes them; False when nobody reads it any more."""
        try:
            while self.pending:
                del self.pending[: os.write(self.pipe.fileno(), self.pending)]
        except BlockingIOError:
            return True
        except BrokenPipeError:
            return False
        return True

    def end(self, reason: str) -> None:
        """Stop the tracker's process, whatever it is doing, and say so."""
        self.pipe.close()
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        warn(f"wandb: {reason}; nothing more is reported there")

    def close(self) -> None:
        """Let the tracker finish its upload, for :data:`CLOSE_SECONDS` at most."""
        if self.pipe.closed:
            return
        deadline = time.monotonic() + self.CLOSE_SECONDS
        while self.push() and self.pending and time.monotonic() < deadline:
            time.sleep(0.05)
        self.pipe.close()
        try:
            code = self.process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.end(f"not done {self.CLOSE_SECONDS:.0f} s after the last row")
            return
        if code != 0:
            warn(f"wandb: its process ended with exit code {code}")
