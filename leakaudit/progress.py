"""Progress bars on stderr, with the time left; quiet when not a terminal."""

from __future__ import annotations

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


@contextmanager
def sweep_bar(console: Console) -> Iterator[OnSweep]:
    """Yields the callback that `leakaudit.sweep.run.run_sweep` takes."""
    columns = (
        TextColumn("sweep"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[failed]} failed"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("sweep", total=None, failed=0)

        def report(finished: int, failed: int, total: int) -> None:
            bar.update(task, completed=finished, total=total, failed=failed)

        yield report
