"""The real Weights & Biases client, without a service or with a broken one. About 10 s on an idle machine."""

from __future__ import annotations

import json
import os
import struct
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from megatron_steel.metrics.sinks import WandbSink, wandb_identity

pytest.importorskip("wandb")


def report(save: Path, first: int) -> float:
    """One start of a run that reports three rows; returns the seconds that ``write`` took together."""
    sink = WandbSink("steel", "a name", wandb_identity(save), save, {"lr": 3e-4})
    sink.CLOSE_SECONDS = 120.0  # the machine may be busy; how long a close takes is not the subject here
    start = time.monotonic()
    for iteration in range(first, first + 3):
        sink.write({"iteration": iteration, "loss": 1.0 / iteration})
    spent = time.monotonic() - start
    sink.close()
    return spent


def records(path: Path) -> Iterator[bytes]:
    """The records of an offline run's file: LevelDB's log format after a header of 7 bytes."""
    data, position, whole = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        if (left := 32768 - position % 32768) < 7:
            position += left  # a header is never split over two blocks
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        whole += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # all of a record, or its last part
            yield whole
            whole = b""


def logged(folder: Path) -> tuple[str, list[dict[str, float]]]:
    """Run id and rows of an offline run."""
    from wandb.proto import wandb_internal_pb2

    (path,) = folder.glob("run-*.wandb")
    identity, rows = "", []
    for data in records(path):
        record = wandb_internal_pb2.Record.FromString(data)
        if record.HasField("run"):
            identity = record.run.run_id
        if record.HasField("history"):
            items = record.history.item
            rows.append({"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items})
    return identity, rows


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No settings of the user's own."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    return monkeypatch


def test_offline_runs_of_two_starts_are_one_run(tmp_path: Path, environment: pytest.MonkeyPatch) -> None:
    environment.setenv("WANDB_MODE", "offline")
    report(tmp_path, 1)
    time.sleep(1.0)  # the client names its directories by the second
    report(tmp_path, 3)
    first, second = sorted((tmp_path / "wandb").glob("offline-run-*"))
    (one, rows), (two, more) = logged(first), logged(second)
    assert one == two == wandb_identity(tmp_path)
    assert [row["iteration"] for row in rows + more] == [1, 2, 3, 3, 4, 5]
    assert [row["train/loss"] for row in rows] == [1.0, 1 / 2, 1 / 3]


def test_an_unreachable_service_means_offline(
    tmp_path: Path, environment: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    environment.setenv("WANDB_BASE_URL", "http://192.0.2.1:9")  # RFC 5737: an address nobody has
    assert report(tmp_path, 1) < 1.0
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    assert len(logged(folder)[1]) == 3
    assert "wandb: offline: 192.0.2.1:9 cannot be reached" in capfd.readouterr().err


@pytest.fixture
def refusing_service() -> Iterator[str]:
    """A service that answers 401 to everything."""

    class Refuse(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_response(401)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_POST

        def log_message(self, *_: object) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Refuse)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_a_refused_key_means_offline(
    tmp_path: Path, environment: pytest.MonkeyPatch, refusing_service: str, capfd: pytest.CaptureFixture[str]
) -> None:
    environment.setenv("WANDB_BASE_URL", refusing_service)
    environment.setenv("WANDB_API_KEY", "a" * 40)
    assert report(tmp_path, 1) < 1.0
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    assert logged(folder)[0] == wandb_identity(tmp_path) and len(logged(folder)[1]) == 3
    errors = capfd.readouterr().err
    assert errors.startswith("wandb: offline: ") and "401" in errors and "Traceback" not in errors
