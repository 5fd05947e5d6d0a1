"""Engines: who does the jobs.  The same jobs give the same results in this process, in a pool, or under Ray.

A pool is one executor of one process for each worker, so that when a process dies (killed, out of
memory) it is certain which job it was doing.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import active_children
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Protocol

import torch

from leakaudit.results import Value
from leakaudit.sweep.work import Job
from leakaudit.sweep.workers import new_executor

TRIES = 2
"""How often a job may cost its worker's life."""
DIED = "the process died, as one that is killed or runs out of memory does"

Finished = Generator[tuple[Job, Value], None, None]


class Engine(Protocol):
    """Where jobs run."""

    def run(self, jobs: Sequence[Job], root: Path, go_on: Callable[[], bool]) -> Finished:
        """Jobs and their results as they finish; when `go_on` says no, no further job is begun.

        Closing the iterator, also by Ctrl-C, ends the jobs in progress without a result.
        """


@dataclass(frozen=True)
class InProcess:
    """One job after the other, here."""

    def run(self, jobs: Sequence[Job], root: Path, go_on: Callable[[], bool]) -> Finished:
        for job in jobs:
            if not go_on():
                return
            yield job, job.execute(root)


@dataclass
class _Worker:
    """One slot of the pool: its executor, which is replaced when its process dies."""

    threads: int
    gpu: int | None
    executor: ProcessPoolExecutor = field(init=False)

    def __post_init__(self) -> None:
        self.start()

    def start(self) -> None:
        self.executor = new_executor(self.threads, self.gpu)

    def submit(self, job: Job, root: Path) -> Future[Value]:
        return self.executor.submit(execute, job, root)


@dataclass(frozen=True)
class LocalPool:
    """Processes of this machine, each with its share of the cores, or with one GPU of its own.

    Attributes:
        workers: processes, at least 1.
        threads: of each.
        gpus: how many there are to hand out, one a worker in turn; 0 for the CPU.
    """

    workers: int
    threads: int
    gpus: int = 0

    def run(self, jobs: Sequence[Job], root: Path, go_on: Callable[[], bool]) -> Finished:
        waiting, tries, strangers = deque(jobs), dict[str, int](), active_children()
        count = min(self.workers, len(jobs))
        idle = [_Worker(self.threads, slot % self.gpus if self.gpus else None) for slot in range(count)]
        busy: dict[Future[Value], tuple[_Worker, Job]] = {}
        try:
            while True:
                while waiting and idle and go_on():
                    worker, job = idle.pop(), waiting.popleft()
                    tries[job.key] = tries.get(job.key, 0) + 1
                    busy[worker.submit(job, root)] = worker, job
                if not busy:
                    return
                done, _ = wait(busy, return_when=FIRST_COMPLETED)
                for future in done:
                    worker, job = busy.pop(future)
                    idle.append(worker)
                    try:
                        value = future.result()
                    except BrokenProcessPool:
                        worker.executor.shutdown(wait=False)
                        worker.start()
                        if tries[job.key] < TRIES:
                            waiting.appendleft(job)
                            continue
                        value = job.failed(f"{DIED}, {TRIES} times")
                    yield job, value
        finally:
            for worker in [*idle, *(worker for worker, _ in busy.values())]:
                worker.executor.shutdown(wait=not busy, cancel_futures=True)
            if busy:
                _kill(set(active_children()) - set(strangers))


def _kill(processes: Iterable[BaseProcess]) -> None:
    for process in processes:
        process.kill()
        process.join()


def execute(job: Job, root: Path) -> Value:
    return job.execute(root)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def local_engine(workers: int | None, device: str) -> Engine:
    """This process for 0 workers, else a pool; None makes one worker a core, or one a GPU.

    The workers share the cores, within the threads that this process may use (OMP_NUM_THREADS).  Sums of
    floats, and so the last digits of results, depend on the number of threads.
    """
    from leakaudit.subject import pick_device  # a worker has no use for it, and starts sooner without

    chosen = pick_device(device)
    gpus = torch.cuda.device_count() if chosen.type == "cuda" and ":" not in device else 0
    if workers is None:
        workers = cores() if chosen.type == "cpu" else max(1, gpus)
    if workers == 0:
        return InProcess()
    return LocalPool(workers, max(1, min(cores() // workers, torch.get_num_threads())), gpus)
