"""Progress bars on stderr, with the time left; without a terminal a sweep says a line now and then."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

if TYPE_CHECKING:
    from leakaudit.execution import OnProgress

BETWEEN_LINES = 30.0
"""Seconds from one line of a sweep's progress in a log to the next."""

OnSweep = Callable[[int, int, int], None]
"""Called with (jobs finished, of these failed, jobs in all)."""


@contextmanager
def progress_bar(console: Console) -> Iterator[OnProgress]:
    """Yields the callback that `leakaudit.auditing.audit` takes."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.2e}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        tasks: dict[str, TaskID] = {}

        def report(label: str, iteration: int, total: int, loss: float) -> None:
            if label not in tasks:
                for task in tasks.values():
                    bar.update(task, visible=False)
                tasks[label] = bar.add_task(label, total=total, loss=loss)
            bar.update(tasks[label], completed=iteration, total=total, loss=loss)

        yield report


OnStep = Callable[[int, int, float], None]
"""Called with (steps done, steps at most, held-out loss)."""

OnTrial = Callable[[int, int], None]
"""Called with (updates judged, updates in all)."""


@contextmanager
def simulation_bar(console: Console) -> Iterator[Callable[[str], OnStep]]:
    """Yields a function that makes, of a run's label, the callback that `leakaudit.simulating.simulate` takes."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3g}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:

        def begin(label: str) -> OnStep:
            for before in bar.task_ids:
                bar.update(before, visible=False)
            task = bar.add_task(label, total=None, loss=float("nan"))

            def report(step: int, steps: int, loss: float) -> None:
                bar.update(task, completed=step, total=steps, loss=loss)

            return report

        yield begin


@contextmanager
def trial_bar(console: Console) -> Iterator[OnTrial]:
    """Yields the callback that counts updates, with the time left; shown on a terminal only."""
    columns = (TextColumn("updates"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("updates", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def sweep_bar(console: Console) -> Iterator[OnSweep]:
    """Yields the callback that `leakaudit.sweep.run.run_sweep` takes."""
    if not console.is_terminal:
        yield _sweep_lines(console)
        return
    columns = (
        TextColumn("sweep"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[failed]} failed"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("sweep", total=None, failed=0)

        def report(finished: int, failed: int, total: int) -> None:
            bar.update(task, completed=finished, total=total, failed=failed)

        yield report


def _sweep_lines(console: Console) -> OnSweep:
    """For the log of a build: a line when the last is `BETWEEN_LINES` old, none of a short sweep."""
    began = last = time.monotonic()

    def report(finished: int, failed: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < BETWEEN_LINES:
            return
        last = now
        text = f"sweep: {finished} of {total} done, {failed} failed, {now - began:.0f} s"
        console.print(text, soft_wrap=True, highlight=False)

    return report
