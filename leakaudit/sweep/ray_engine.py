"""Jobs on a Ray cluster (extra `leakaudit[ray]`): the sweep's folder must be one that every node can write to."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from leakaudit.errors import InputError
from leakaudit.formats.phrases import first_line
from leakaudit.results import Value
from leakaudit.sweep.engine import DIED, TRIES, Finished
from leakaudit.sweep.work import Job


@dataclass(frozen=True)
class RayEngine:
    """Ray tasks, each on `threads` cores of some node, or on one GPU.

    Attributes:
        address: of the cluster, as `ray.init` takes it; None starts one on this machine.
        workers: tasks at a time; None for as many as the cluster's cores, or GPUs, take.
    """

    address: str | None = None
    workers: int | None = None
    threads: int = 1
    gpu: bool = False

    def run(self, jobs: Sequence[Job], root: Path, go_on: Callable[[], bool]) -> Finished:
        ray = _ray()
        own = not ray.is_initialized()
        if own:
            self._connect(ray)
        task = ray.remote(num_cpus=self.threads, num_gpus=int(self.gpu), max_retries=TRIES - 1)(_execute)
        waiting, busy = deque(jobs), dict[Any, Job]()
        limit = self.workers or self._slots(ray)
        folder = root.resolve()
        try:
            while True:
                while waiting and len(busy) < limit and go_on():
                    job = waiting.popleft()
                    busy[task.remote(job, folder, self.threads)] = job
                if not busy:
                    return
                done, _ = ray.wait(list(busy), num_returns=1)
                for reference in done:
                    job = busy.pop(reference)
                    try:
                        value = ray.get(reference)
                    except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError):
                        value = job.failed(f"{DIED}, {TRIES} times")
                    yield job, value
        finally:
            for reference in busy:
                ray.cancel(reference, force=True)
            if own:
                ray.shutdown()

    def _connect(self, ray: Any) -> None:
        quiet = {"log_to_driver": False, "logging_level": "ERROR"}
        try:
            if self.address is None:
                ray.init(num_cpus=(self.workers or 1) * self.threads if self.workers else None,
                         include_dashboard=False, **quiet)  # fmt: skip
            else:
                ray.init(address=self.address, **quiet)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise InputError(
                f"no Ray cluster at {self.address or 'this machine'}: {first_line(error)}"
            ) from error

    def _slots(self, ray: Any) -> int:
        there = ray.cluster_resources()
        return max(1, int(there.get("GPU", 0)) if self.gpu else int(there.get("CPU", 1)) // self.threads)


def check_ray() -> None:
    """`InputError` when Ray is not installed."""
    if find_spec("ray") is None:
        raise InputError("engine 'ray' needs Ray; install leakaudit[ray], or use --engine local")


def _ray() -> Any:
    check_ray()
    return import_module("ray")


def _execute(job: Job, root: Path, threads: int) -> Value:
    torch.set_num_threads(threads)
    return job.execute(root)
