"""Jobs: what a sweep is made of, each done by itself in whichever process takes it.

A job is plain values, knows the key of its full specification, and leaves its result in a file of
that key, written last and in one step.  The same job gives the same result under every engine.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from leakaudit.errors import LeakauditError
from leakaudit.formats.phrases import first_line
from leakaudit.results import Value


class Job(Protocol):
    """One piece of work of a sweep."""

    @property
    def key(self) -> str:
        """Of its full specification."""

    def stored(self, root: Path) -> Value | None:
        """The result that an earlier sweep left in the folder `root`; None when there is none."""

    def execute(self, root: Path) -> Value:
        """Do it, and leave the result in the folder.  What goes wrong is a result."""

    def failed(self, error: str) -> Value:
        """The result when the process that did it died."""


def one_line(error: Exception) -> str:
    """What went wrong, as a result says it: our own errors are one line already."""
    return str(error) if isinstance(error, LeakauditError) else first_line(error)
