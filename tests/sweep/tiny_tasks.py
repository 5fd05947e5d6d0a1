"""Jobs that do nothing, wait, or kill their process; a module of its own, so that workers start soon."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from leakaudit.results import Value


class Note(Value):
    text: str
    threads: int = 0


@dataclass(frozen=True)
class Task:
    """Does nothing, or waits, or kills its process as often as `deaths` says."""

    key: str
    deaths: int = 0
    seconds: float = 0.0

    def stored(self, root: Path) -> Note | None:
        return None

    def execute(self, root: Path) -> Note:
        (root / f"{self.key}-{time.monotonic_ns()}").touch()
        if len(list(root.glob(f"{self.key}-*"))) <= self.deaths:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(self.seconds)
        return Note(text=self.key, threads=torch.get_num_threads())

    def failed(self, error: str) -> Note:
        return Note(text=f"{self.key} failed: {error}")
