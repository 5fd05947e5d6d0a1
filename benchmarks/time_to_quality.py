"""Seconds until a 32x32 photo is reconstructed: our attacks beside the loop of the authors of DLG.

    python benchmarks/time_to_quality.py --data cifar10_test_first2000.npz
    python benchmarks/time_to_quality.py --data ... --compile never always --attacks idlg --seeds 5 --cold
    python benchmarks/time_to_quality.py --data ... --model resnet20:width=64 --mse 1e-2 --seeds 2 \\
        --compile never always --attacks inverting-gradients:iterations=400

Seed s draws the model (100 classes), the label and the start; the photo is image s of --data.  For each --mse there
are the seconds until the best candidate so far is that near to the photo, and beside them those of the whole attack,
which cannot know the photo.  Every candidate that an attack takes for its best is kept with the time, and compared with
the photo afterwards.  A median counts a run that never gets there as one of endless length.  CPU seconds are of all
threads; --threads 1 makes them those of one core.

Recording and compiling (`prepare`) are in all of these seconds.  Only the first seed pays for compiling, so that
medians are of a process that has compiled before, and `first_cpu_s` says what it paid; --cold gives TorchInductor
an empty folder, as on the first day.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from deep_leakage import authors, ours, update_of
from measuring import finish, options, rounded, show
from torch import Tensor

from leakaudit.attacks.base import Monitor
from leakaudit.attacks.compiling import Compiler, Function
from leakaudit.data import load_batch
from leakaudit.metrics import mse
from leakaudit.threat import View

PLAIN = "authors"


def cpu_seconds() -> float:
    """Of this process and of those it ran, such as the C++ compiler."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


class Timed(Compiler):
    """Counts the CPU seconds that recording and compiling took, one entry a call."""

    def prepare(
        self,
        function: Function,
        arguments: Sequence[Tensor],
        evaluations: int,
        seconds_left: float | None = None,
        compared: int | None = None,
    ) -> Function:
        began = cpu_seconds()
        found = super().prepare(function, arguments, evaluations, seconds_left, compared)
        self.spent.append(cpu_seconds() - began)
        return found

    @cached_property
    def spent(self) -> list[float]:
        return []


@dataclass
class Clock:
    """Seconds since the start of a run, besides what the benchmark itself takes.

    Attributes:
        seen: (CPU seconds, wall seconds, candidate) of every candidate so far.
    """

    compiler: Compiler
    seen: list[tuple[float, float, Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._cpu, self._wall = cpu_seconds(), time.perf_counter()

    def now(self) -> tuple[float, float]:
        """CPU and wall seconds."""
        finish()
        return cpu_seconds() - self._cpu, time.perf_counter() - self._wall

    def keep(self, candidate: Tensor) -> None:
        cpu, wall = self.now()
        self.seen.append((cpu, wall, candidate.detach().clone()))
        self._cpu += self.now()[0] - cpu
        self._wall += self.now()[1] - wall


class Watch(Monitor):
    """Shows the clock every new best candidate."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(compiler=clock.compiler)
        self._clock = clock

    def rehearsal(self) -> Monitor:
        return Monitor(compiler=self.compiler)

    def step(self, loss: float, x: Tensor, y: Tensor) -> bool:
        before = self.best_x
        stop = super().step(loss, x, y)
        if self.best_x is not None and self.best_x is not before:
            self._clock.keep(self.best_x)
        return stop


@dataclass(frozen=True)
class Run:
    """One seed: the final error, the whole attack's seconds, and those until each error asked for; inf for never."""

    mse: float
    cpu: float
    wall: float
    cpu_until: list[float]
    wall_until: list[float]


def timed(
    attack: Callable[[View, Clock], Tensor],
    view: View,
    pixels: Tensor,
    errors: Sequence[float],
    compiler: Compiler,
) -> Run:
    clock = Clock(compiler)
    found = attack(view, clock)
    cpu, wall = clock.now()
    final = _error(found, pixels)
    at = [(*seconds, _error(candidate, pixels)) for *seconds, candidate in clock.seen] + [(cpu, wall, final)]

    def until(error: float, which: int) -> float:
        return next((seen[which] for seen in at if seen[2] < error), math.inf)

    return Run(final, cpu, wall, [until(e, 0) for e in errors], [until(e, 1) for e in errors])


def _error(found: Tensor, pixels: Tensor) -> float:
    return float(mse(found.cpu().float(), pixels).nan_to_num(nan=1e9).max())


def chosen(name: str, seed: int) -> Callable[[View, Clock], Tensor]:
    """The attack of this name from the start that `seed` draws, as a function of what is seen and a clock."""
    if name == PLAIN:
        return lambda view, clock: authors(view, seed, clock.keep)
    return lambda view, clock: ours(name, lambda: Watch(clock))(view, seed)


def row(name: str, mode: str, runs: Sequence[Run], errors: Sequence[float], index: int) -> dict[str, Any]:
    """The medians of one attack for one of the errors."""
    reached = [run.mse < errors[index] for run in runs]
    whole = [
        (run.cpu, run.wall) if good else (math.inf, math.inf) for run, good in zip(runs, reached, strict=True)
    ]
    return {
        "attack": name,
        "compile": mode,
        "mse below": errors[index],
        "reached": f"{sum(reached)} of {len(runs)}",
        "cpu_s": statistics.median(run.cpu_until[index] for run in runs),
        "wall_s": statistics.median(run.wall_until[index] for run in runs),
        "whole cpu_s": statistics.median(cpu for cpu, _ in whole),
        "whole wall_s": statistics.median(wall for _, wall in whole),
        "slowest cpu_s": max(run.cpu for run in runs),
        "median mse": statistics.median(run.mse for run in runs),
    }


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--data", required=True, help="images, as `leakaudit demo --data`")
    parser.add_argument("--model", default="lenet:init=uniform")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--first", type=int, default=0, help="seed")
    parser.add_argument("--mse", type=float, nargs="+", default=[1e-3, 1e-6])
    parser.add_argument(
        "--attacks", nargs="+", default=["recursive", "levenberg-marquardt", "idlg", "dlg", PLAIN]
    )
    parser.add_argument("--compile", nargs="+", default=["auto"], choices=["auto", "always", "never"])
    parser.add_argument("--cold", action="store_true", help="nothing compiled is on disk beforehand")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    with tempfile.TemporaryDirectory() as folder:
        if asked.cold:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        rows = measure(asked)
    show(f"time to quality, {asked.model}", rows, asked.json)


def measure(asked: argparse.Namespace) -> list[dict[str, Any]]:
    batch = load_batch(asked.data, (3, 32, 32), asked.first + asked.seeds)
    modes = {
        (name, mode): Timed.of(mode) for name in asked.attacks for mode in asked.compile if name != PLAIN
    }
    modes |= {(PLAIN, "never"): Timed("never")} if PLAIN in asked.attacks else {}
    runs: dict[tuple[str, str], list[Run]] = {key: [] for key in modes}
    for seed in range(asked.first, asked.first + asked.seeds):
        pixels = batch.pixels[seed : seed + 1]
        view = update_of(asked.model, pixels, seed)
        for (name, mode), compiler in modes.items():
            run = timed(chosen(name, seed), view, pixels, asked.mse, compiler)
            runs[name, mode].append(run)
            line = {
                "attack": name,
                "compile": mode,
                "seed": seed,
                "mse": rounded(run.mse),
                "cpu_s": rounded(run.cpu),
            }
            print(json.dumps(line | {"cpu_until": [rounded(s) for s in run.cpu_until]}), flush=True)
    return [
        row(*key, found, asked.mse, index) | {"first_cpu_s": max(modes[key].spent, default=0.0)}
        for key, found in runs.items()
        for index in range(len(asked.mse))
    ]


if __name__ == "__main__":
    main()
