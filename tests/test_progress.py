"""What a sweep says of its progress."""

from __future__ import annotations

from io import StringIO

import pytest
from rich.console import Console

from leakaudit import progress


def lines(*clock: float, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is printed to a log when the clock shows these seconds: at the start, then at every report."""
    times = iter(clock)
    monkeypatch.setattr("leakaudit.progress.time.monotonic", lambda: next(times))
    log = StringIO()
    with progress.sweep_bar(Console(file=log)) as report:
        for finished in range(1, len(clock)):
            report(finished, 1, 9)
    return log.getvalue().splitlines()


def test_a_log_gets_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    said = lines(0, 10, 31, 40, 62, monkeypatch=monkeypatch)
    assert said == ["sweep: 2 of 9 done, 1 failed, 31 s", "sweep: 4 of 9 done, 1 failed, 62 s"]


def test_a_short_sweep_is_quiet_in_a_log(monkeypatch: pytest.MonkeyPatch) -> None:
    assert lines(0, 10, 20, 29, monkeypatch=monkeypatch) == []
