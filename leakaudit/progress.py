"""A progress bar on stderr with the current loss and the time left; quiet when not a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from leakaudit.execution import OnProgress


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
