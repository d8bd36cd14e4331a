"""Progress of conversions: lines in a log, a bar on a terminal."""

from __future__ import annotations

import io
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from megatron_steel.checkpoint.converted import progress
from megatron_steel.data import progress as lines


def test_a_log_gets_lines_that_end_at_everything(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lines, "FIRST_LINE_SECONDS", 0.0)
    monkeypatch.setattr(lines, "LINE_SECONDS", 0.0)
    with progress(4000, "import") as advance, ThreadPoolExecutor(4) as pool:
        list(pool.map(advance, [1] * 4000))
    printed = capsys.readouterr().err.splitlines()
    assert len(printed) == 4000 and all(line.startswith("import: ") for line in printed)
    assert any(line.startswith("import: 100.0% | ") for line in printed)


def test_quick_work_says_nothing_in_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    with progress(10, "import") as advance:
        advance(10)
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress(10, "export") as advance:
        advance(10)
    assert "export: 100%" in terminal.getvalue()
