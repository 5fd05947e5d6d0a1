"""Cells an hour of a sweep against the number of workers, beside what the machine's cores give to anybody.

    python benchmarks/sweep.py --data cifar10_test_first2000.npz --json sweep.json
    python benchmarks/sweep.py --data cifar10_test_first2000.npz --quick
    python benchmarks/sweep.py --data cifar10_test_first2000.npz --kills 5

Each repetition runs in turn: the ceiling (as many independent single-threaded processes of plain torch as there are
workers, each differentiating a LeNet's gradient twice, against one of them), one worker of one thread, one worker of
as many threads as it takes by itself, and more workers, each with its share of the cores.  Every sweep is a process
of its own that is timed from its start to its end, imports, planning and the page included.  Medians over the
repetitions; ratios are formed within a repetition.

"same" says whether every repetition gave the `sweep.json` of the first sweep with as many threads a worker, times
aside (sums of floats depend on the number of threads).  Memory is the proportional set size of all processes of the
sweep together, sampled, so that what forked workers share counts once.

With --kills a sweep is killed (SIGKILL to its whole process group) so many times at random and resumed, and must give
the same result as the one left alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from threading import Event, Thread
from typing import Any

import measuring
import torch
import torch.nn.functional as F

from leakaudit.models.zoo import load_victim

HERE = Path(__file__).parent
CONFIG, QUICK = HERE / "sweeps" / "efficiency.toml", HERE / "sweeps" / "efficiency_quick.toml"
TIMES = {"created", "seconds", "compiling", "environment", "command", "config", "history"}
SAMPLE_SECONDS = 2.0
WARM_STEPS = 20


@dataclass(frozen=True)
class Case:
    """So many workers of so many threads each."""

    workers: int
    threads: int


@dataclass
class Measured:
    """What the repetitions of one case gave: wall seconds, ceilings, MiB, and results without times."""

    seconds: list[float] = field(default_factory=list)
    ceilings: list[float] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)
    results: list[Any] = field(default_factory=list)


# ------------------------------------------------------------------ the machine


def steps_a_second(seconds: float) -> float:
    """How often a second one thread differentiates the gradient of a LeNet for one image."""
    torch.set_num_threads(1)
    victim = load_victim("lenet:init=uniform", seed=0)
    params = {name: p.clone().requires_grad_() for name, p in victim.params.items()}
    x = victim.probe(1).clone().requires_grad_()
    y = torch.zeros(1, dtype=torch.int64)

    def step() -> None:
        loss = F.cross_entropy(victim.logits(params, x), y)
        gradients = torch.autograd.grad(loss, list(params.values()), create_graph=True)
        torch.autograd.grad(sum(gradient.square().sum() for gradient in gradients), x)

    for _ in range(WARM_STEPS):
        step()
    done, began = 0, time.perf_counter()
    while time.perf_counter() < began + seconds:
        step()
        done += 1
    return done / (time.perf_counter() - began)


def ceiling(processes: int, seconds: float) -> float:
    """How many times the steps of one process so many do together."""
    if processes == 1:
        return 1.0
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        list(pool.map(steps_a_second, [0.1] * processes))  # everybody has imported
        alone = pool.submit(steps_a_second, seconds).result()
        together = sum(pool.map(steps_a_second, [seconds] * processes))
        again = pool.submit(steps_a_second, seconds).result()
    return together / ((alone + again) / 2)


# ------------------------------------------------------------------ sweeps


@dataclass(frozen=True)
class Sweep:
    """A configuration, and other data to run it on."""

    config: Path
    data: Path | None

    def command(self, out: Path, workers: int) -> list[str]:
        data = [] if self.data is None else ["--data", str(self.data)]
        return [sys.executable, "-m", "leakaudit", "defend", "--config", str(self.config), "--out", str(out),
                "--workers", str(workers), "--resume", *data]  # fmt: skip

    def start(self, out: Path, case: Case) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            self.command(out, case.workers),
            env={**os.environ, "OMP_NUM_THREADS": str(case.threads)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def timed(self, out: Path, case: Case) -> tuple[float, float]:
        """Wall seconds, and the most memory that all its processes had together, MiB."""
        began = time.monotonic()
        process = self.start(out, case)
        try:
            with sampled(process.pid) as sizes:
                process.wait()
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        return time.monotonic() - began, max(sizes, default=0.0)


@contextlib.contextmanager
def sampled(session: int) -> Iterator[list[float]]:
    """Appends the memory of all processes of a session together, MiB, while the block runs."""
    sizes, ended = list[float](), Event()

    def sample() -> None:
        while not ended.wait(SAMPLE_SECONDS):  # asking takes the processes' time, too
            sizes.append(sum(map(proportional, members(session))))

    thread = Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield sizes
    finally:
        ended.set()
        thread.join()


def members(session: int) -> list[Path]:
    """/proc folders of a session's processes."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError):
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) == session:
                found.append(folder)
    return found


def proportional(process: Path) -> float:
    """MiB of a process, pages that n processes share counted as 1/n; 0 where that is not told."""
    with contextlib.suppress(OSError):
        for line in (process / "smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) / 1024
    return 0.0


def timeless(value: Any) -> Any:
    """The result without what a clock or the folder's name decides."""
    if isinstance(value, dict):
        return {key: timeless(item) for key, item in value.items() if key not in TIMES}
    return [timeless(item) for item in value] if isinstance(value, list) else value


def result(out: Path) -> Any:
    return timeless(json.loads((out / "sweep.json").read_text()))


def killed(sweep: Sweep, out: Path, case: Case, times: int, longest: float, seed: int) -> list[float]:
    """Start, kill after a random while, and so on `times` times, then finish; the seconds before each kill."""
    generator, waits = random.Random(seed), []
    while len(waits) < times:
        process = sweep.start(out, case)
        wait = generator.uniform(0.3, 1.0) * longest
        try:
            process.wait(wait)
            break  # it finished before it could be killed
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            waits.append(wait)
    sweep.timed(out, case)
    return waits


# ------------------------------------------------------------------ the table


def cases(most: int, quick: bool) -> list[Case]:
    """One worker of one thread, then 1, 2, 4, ... workers up to `most`, which share as many cores; the `quick` leave
    out one worker of all cores."""
    counts = [count for count in (2**power for power in range(most.bit_length())) if count < most] + [most]
    counts = counts[quick:]
    return list(dict.fromkeys([Case(1, 1), *(Case(count, most // count) for count in counts)]))


def measure(
    sweep: Sweep, tried: Sequence[Case], repeats: int, spin: float, root: Path
) -> dict[Case, Measured]:
    found = {case: Measured() for case in tried}
    for repeat in range(repeats):
        for case in tried:
            out = root / f"{case.workers}x{case.threads}-{repeat}"
            found[case].ceilings.append(ceiling(case.workers, spin))
            seconds, memory = sweep.timed(out, case)
            found[case].seconds.append(seconds)
            found[case].memory.append(memory)
            found[case].results.append(result(out))
            print(f"{repeat + 1}/{repeats} {case}: {seconds:.1f} s, ceiling {found[case].ceilings[-1]:.2f}",
                  file=sys.stderr, flush=True)  # fmt: skip
    return found


def row(case: Case, found: dict[Case, Measured]) -> dict[str, Any]:
    own, plain, alone = (
        found[case],
        found[Case(1, 1)],
        found[max(found, key=lambda c: (c.workers == 1, c.threads))],
    )
    first = next(other for other in found if other.threads == case.threads)
    cells = len(own.results[0]["cells"])
    seconds, top = statistics.median(own.seconds), statistics.median(own.ceilings)
    gains = [one / this for one, this in zip(plain.seconds, own.seconds, strict=True)]
    shares = [gain / limit for gain, limit in zip(gains, own.ceilings, strict=True)]
    return {
        "workers": case.workers,
        "threads each": case.threads,
        "seconds": seconds,
        "cells an hour": round(cells / seconds * 3600),
        "to 1 worker of 1 thread": statistics.median(gains),
        "to 1 worker": statistics.median(a / b for a, b in zip(alone.seconds, own.seconds, strict=True)),
        "ceiling": top,
        "of the ceiling": statistics.median(shares),
        "MiB": round(statistics.median(own.memory)),
        "same": all(one == found[first].results[0] for one in own.results),
    }


def main() -> None:
    parser = measuring.options(__doc__)
    parser.add_argument("--config", type=Path, help=f"of the sweep; {CONFIG.name} unless given")
    parser.add_argument("--data", type=Path, help="in place of the configuration's")
    parser.add_argument("--repeats", type=int, help="3 unless given, 1 of the quick")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK.name}, once: about two minutes")
    parser.add_argument("--spin", type=float, default=5.0, help="seconds of each measurement of the ceiling")
    parser.add_argument("--kills", type=int, default=0, help="kill a sweep so many times, and resume it")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of killing")
    options = parser.parse_args()
    sweep = Sweep(options.config or (QUICK if options.quick else CONFIG), options.data)
    tried = cases(options.threads, options.quick)
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        found = measure(sweep, tried, options.repeats or (1 if options.quick else 3), options.spin, root)
        rows = [row(case, found) for case in tried]
        measuring.show(f"Sweep {sweep.config.name}", rows, options.json)
        if options.kills:
            last = tried[-1]
            longest = found[last].seconds[0] / options.kills
            waits = killed(sweep, root / "killed", last, options.kills, longest, options.seed)
            print(f"killed {len(waits)} times, after {', '.join(f'{wait:.1f}' for wait in waits)} s, and resumed:"
                  f" the same result: {result(root / 'killed') == found[last].results[0]}")  # fmt: skip


if __name__ == "__main__":
    main()
