"""Many random starts of `inverting-gradients`: one, several one after another, as one batch, and raced.

    python benchmarks/restarts.py --data cifar10_test_first2000.npz --models lenet resnet20
    python benchmarks/restarts.py --data cifar10_test_first2000.npz --steps --models lenet resnet20 convnet
    python benchmarks/restarts.py --data cifar10_test_first2000.npz --quick

Every way begins from the same starts and has the same loss, learning rate and number of iterations; what it found is
the candidate with the smallest matching loss, whose PSNR stands beside it.  Seconds are medians over the photos, each
of which meets an untrained model of its own seed; "cpu" ones are this process's own, which other work on the
machine disturbs less.

--steps measures one evaluation of loss and gradient instead, by the number of candidates in a batch, and the same
for as many independent audits of one model, each with an observed update of its own.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import measuring
import torch
from torch import Tensor
from torch.func import grad_and_value, vmap

from leakaudit.attacks.adam import Rule
from leakaudit.attacks.base import Monitor
from leakaudit.attacks.compiling import Compiler, Function
from leakaudit.attacks.matching import cosine, total_variation
from leakaudit.attacks.optimise import Candidate, Matching, adam, of_each, value_and_gradient
from leakaudit.attacks.racing import Field, Race, bytes_of, width_of
from leakaudit.data import load_batch
from leakaudit.formats.manifest import Normalisation
from leakaudit.metrics import METRICS
from leakaudit.models.zoo import load_victim
from leakaudit.randomness import fork
from leakaudit.rounds import Round, client_update
from leakaudit.threat import Knowledge, View, known
from leakaudit.update import Update

CIFAR = Normalisation(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
TV = 1e-4
RATE = 0.1


@dataclass(frozen=True)
class Case:
    """One photo (1, 3, 32, 32) in [0, 1], its label and what the server sees of it."""

    view: View
    photo: Tensor
    label: Tensor

    @property
    def loss(self) -> Matching:
        return Matching(self.view, "cosine", tv=TV)

    def starts(self, count: int) -> Tensor:
        space, generator = self.view.victim.space, fork(0, "starts", self.view.victim.device)
        return torch.stack([space.sample(1, generator) for _ in range(count)])

    def psnr(self, x: Tensor) -> float:
        found = self.view.victim.space.decode(x).clamp(0, 1)
        return float(METRICS["psnr"].function(found.cpu(), self.photo.cpu())[0])


def cases(model: str, data: Path, count: int, device: str) -> list[Case]:
    batch = load_batch(str(data), (3, 32, 32), count)
    found = []
    for seed in range(count):
        victim = load_victim(
            model, num_classes=10, input_shape=(3, 32, 32), normalisation=CIFAR, seed=seed
        ).to(device)
        photo, label = (tensor[seed : seed + 1].to(device) for tensor in (batch.pixels, batch.labels))
        found.append(Case(seen(victim, photo, label), photo, label))
    return found


def seen(victim: Any, photo: Tensor, label: Tensor) -> View:
    observed = client_update(victim, victim.params, Round(1), victim.space.encode(photo), label)
    return View(victim, Round(1), observed.detach(), Knowledge(labels=known(label, "given")))


# ------------------------------------------------------------------ whole attacks


def one_by_one(case: Case, starts: Tensor, iterations: int, compiler: Compiler) -> tuple[float, Tensor]:
    best = []
    for start in starts:
        monitor = Monitor(compiler=compiler)
        adam(
            Candidate(start, labels=case.label),
            case.loss,
            monitor,
            iterations=iterations,
            learning_rate=RATE,
            signed=True,
            project=case.view.victim.space.project,
        )
        best.append(monitor.result())
    winner = min(best, key=lambda found: found.loss)
    return winner.loss, winner.x


def together(
    case: Case, starts: Tensor, iterations: int, compiler: Compiler, survivors: int
) -> tuple[float, Tensor]:
    rule = Rule(True, case.view.victim.space.project)
    monitor = Monitor(compiler=compiler)
    race = Race(iterations, RATE, rule, bytes_of(case.view), survivors=survivors)
    race.run(Field.starting(starts, case.label), case.loss, monitor)
    found = monitor.result()
    return found.loss, found.x


def attacks(
    model: str, given: Sequence[Case], starts: int, iterations: int, mode: str
) -> list[dict[str, Any]]:
    """One row a way."""
    compilers = {way: Compiler.of(mode) for way in range(4)}
    ways: list[tuple[str, int, Callable[[Case], tuple[float, Tensor]]]] = [
        ("1 start", 1, lambda c: one_by_one(c, c.starts(1), iterations, compilers[0])),
        ("one after another", starts, lambda c: one_by_one(c, c.starts(starts), iterations, compilers[1])),
        (
            "one batch to the end",
            starts,
            lambda c: together(c, c.starts(starts), iterations, compilers[2], starts),
        ),
        ("raced", starts, lambda c: together(c, c.starts(starts), iterations, compilers[3], 1)),
    ]
    rows = []
    for place, (name, count, way) in enumerate(ways):
        wall, cpu, losses, psnrs = [], [], [], []
        for case in given:
            before, began = time.process_time(), time.perf_counter()
            loss, x = way(case)
            measuring.finish()
            wall.append(time.perf_counter() - began)
            cpu.append(time.process_time() - before)
            losses.append(loss)
            psnrs.append(case.psnr(x))
        rows.append(
            {
                "model": model,
                "way": name,
                "starts": count,
                "iterations": iterations,
                "photos": len(given),
                "wall s": statistics.median(wall),
                "cpu s": statistics.median(cpu),
                "cpu s/start": statistics.median(cpu) / count,
                "compiling s": compilers[place].seconds,
                "loss": statistics.mean(losses),
                "PSNR dB": statistics.mean(psnrs),
                "step": compilers[place].step,
            }
        )
    return rows


# ------------------------------------------------------------------ single evaluations


def of_each_audit(victim: Any) -> Function:
    """As `of_each`, for candidates that each have an observed update of their own, name -> (R, ...)."""

    def one(x: Tensor, labels: Tensor, *observed: Tensor) -> tuple[Tensor, ...]:
        def value(x: Tensor) -> Tensor:
            update = client_update(victim, victim.params, Round(1), x, labels)
            own = Update(dict(zip(update, observed, strict=True)))
            return cosine(update, own) + TV * total_variation(x)

        gradient, loss = grad_and_value(value)(x)
        return loss, gradient

    return vmap(one)


def evaluations(
    model: str, case: Case, widths: Sequence[int], mode: str, rounds: int, data: Path
) -> list[dict[str, Any]]:
    victim, device = case.view.victim, case.view.victim.device
    batch = load_batch(str(data), (3, 32, 32), max(widths))
    functions: dict[tuple[str, int], Callable[[], object]] = {}
    steps: dict[tuple[str, int], str] = {}

    def add(kind: str, width: int, function: Function, arguments: Sequence[Tensor]) -> None:
        compiler = Compiler.of(mode)
        quick = compiler.prepare(function, arguments, 10**5)
        steps[kind, width] = compiler.step
        functions[kind, width] = lambda: quick(*arguments)

    for width in widths:
        x, labels = case.starts(width), case.label.expand(width, 1).contiguous()
        if width == 1:
            add("restarts", 1, value_and_gradient(case.loss), (x[0], labels[0]))
            continue
        add("restarts", width, of_each(case.loss, free=False), (x, labels))
        photos, own = batch.pixels[:width].to(device), batch.labels[:width].to(device)
        views = [seen(victim, photos[i : i + 1], own[i : i + 1]) for i in range(width)]
        observed = [torch.stack([view.observed[name] for view in views]) for name in case.view.observed]
        add("audits", width, of_each_audit(victim), (x, own.reshape(width, 1), *observed))
    times: dict[tuple[str, int], list[float]] = {key: [] for key in functions}
    for warm in range(-1, rounds):
        for key, function in functions.items():
            began = time.process_time() if device.type == "cpu" else time.perf_counter()
            function()
            measuring.finish()
            end = time.process_time() if device.type == "cpu" else time.perf_counter()
            if warm >= 0:
                times[key].append((end - began) * 1e3)
    alone = statistics.median(times["restarts", 1])
    return [
        {
            "model": model,
            "kind": kind,
            "in a batch": width,
            "ms": statistics.median(found),
            "ms each": statistics.median(found) / width,
            "times faster each": alone * width / statistics.median(found),
            "a batch takes by itself": width_of(bytes_of(case.view), device),
            "step": steps[kind, width],
        }
        for (kind, width), found in times.items()
    ]


def main() -> None:
    parser = measuring.options(__doc__)
    parser.add_argument("--data", type=Path, required=True, help=".npz with `images` and `labels`")
    parser.add_argument("--models", nargs="+", default=["lenet", "resnet20"])
    parser.add_argument("--starts", type=int, default=16)
    parser.add_argument("--iterations", type=int, nargs="+", default=[400, 80], help="by model; last for all")
    parser.add_argument("--photos", type=int, default=3)
    parser.add_argument("--compile", choices=["auto", "always", "never"], default="auto")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", action="store_true", help="single evaluations by width")
    parser.add_argument("--widths", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--rounds", type=int, default=5, help="of single evaluations, taking turns")
    parser.add_argument("--quick", action="store_true", help="one photo, few iterations, under two minutes")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.quick:
        options.photos, options.iterations, options.rounds = 1, [100, 20], 3
    rows: list[dict[str, Any]] = []
    for place, model in enumerate(options.models):
        given = cases(model, options.data, 1 if options.steps else options.photos, options.device)
        if options.steps:
            widths = sorted({1, *options.widths})
            rows += evaluations(model, given[0], widths, options.compile, options.rounds, options.data)
        else:
            iterations = options.iterations[min(place, len(options.iterations) - 1)]
            rows += attacks(model, given, options.starts, iterations, options.compile)
    title = "one evaluation" if options.steps else "whole attacks, medians and means over photos"
    measuring.show(title, rows, options.json)


if __name__ == "__main__":
    main()
