"""Iterations per second of the cosine attack: ours, plain eager PyTorch, and breaching 0.1.2, taking turns.

    python benchmarks/step.py --data cifar10_test_first2000.npz
    python benchmarks/step.py --data ... --models lenet --breaching .breaching/bin/python
    python benchmarks/step.py --data ... --models resnet18 --starts 16 --device cuda

The attack is that of Geiping et al. 2020: cosine distance and total variation, Adam on the signed gradient,
projection into the box; the prior's weight is breaching's.  On a GPU ours and `plain` compute in float32 without TF32,
as an audit does; breaching takes PyTorch's default.  `plain` is that loop written as the paper says, in eager
PyTorch; `leakaudit` is the attack as the command runs it, everything counted but recording and compiling, which have a
column of their own.  `breaching` needs an environment of its own, with `pip install breaching==0.1.2`, whose python is
given by --breaching.

The floor of a step is what the machine needs for its floating point operations, at the rate of a product of two large
float32 matrices, or for reading model and update once, at the rate of a large copy; the larger of the two.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import measuring
import torch
import torch.nn.functional as F
from torch import Tensor

from leakaudit.attacks.base import Monitor
from leakaudit.attacks.compiling import Compiler
from leakaudit.attacks.gradient_matching import InvertingGradients
from leakaudit.attacks.graphs import record
from leakaudit.attacks.matching import total_variation
from leakaudit.attacks.optimise import Matching, of_each, value_and_gradient
from leakaudit.data import load_batch
from leakaudit.metrics import match, mse
from leakaudit.models.zoo import NORMALISATIONS, load_victim
from leakaudit.numerics import faithful
from leakaudit.randomness import fork
from leakaudit.rounds import Round, client_update
from leakaudit.threat import Knowledge, View, known

LEARNING_RATE, TV = 0.1, 0.2
MODELS = {"lenet": "lenet:init=uniform"}
"""As breaching initialises them, where that is not our default."""


@dataclass(frozen=True)
class Turn:
    """Seconds of every iteration of one attack, and what it found."""

    seconds: list[float]
    psnr: float


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    with faithful(torch.device(options.device)):
        matrix_rate, bandwidth = rates(options.device)
        rows = [
            row
            for model in options.models
            for batch in options.batch
            for row in compare(model, batch, options, matrix_rate, bandwidth)
        ]
    measuring.show(
        f"Cosine attack, 32x32, {options.turns} turns of {options.iterations} iterations each;"
        f" {matrix_rate / 1e9:.0f} GFLOP/s, {bandwidth / 1e9:.0f} GB/s",
        rows,
        options.json,
    )


def parse() -> argparse.Namespace:
    parser = measuring.options(__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--models", nargs="+", default=["lenet", "convnet", "resnet18"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--iterations", type=int, default=20, help="a turn")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--starts", type=int, default=0, help="also time so many candidates at once")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--breaching", type=Path, help="a python that has breaching 0.1.2")
    options = parser.parse_args()
    options.iterations = max(options.iterations, 3)
    return options


def compare(
    model: str, batch: int, options: argparse.Namespace, matrix_rate: float, bandwidth: float
) -> list[dict[str, Any]]:
    view, pixels = observe(model, batch, options)
    compiler = Compiler("always")
    began = time.perf_counter()
    turn_of_ours(view, pixels, compiler, 3)
    preparing = time.perf_counter() - began
    contenders: dict[str, Callable[[], Turn]] = {
        "plain": lambda: turn_of_plain(view, pixels, options.iterations),
        "leakaudit": lambda: turn_of_ours(view, pixels, compiler, options.iterations),
    }
    if options.breaching:
        other = Breaching(model, batch, options)
        contenders["breaching"] = lambda: other.turn(options.iterations)
    if options.starts:
        together = batched(view, options.starts)
        contenders[f"leakaudit, {options.starts} at once"] = lambda: together(options.iterations)
    turns: dict[str, list[Turn]] = {name: [] for name in contenders}
    for contender in contenders.values():
        contender()  # the first iterations allocate
    for _ in range(options.turns):
        for name, contender in contenders.items():
            turns[name].append(contender())
    recorded = record(value_and_gradient(objective(view)), start(view, 0))
    numbers = sum(p.numel() for p in view.victim.params.values()) + view.observed.numel()
    floor = max(recorded.flops / matrix_rate, 4 * numbers / bandwidth)
    medians = {
        name: statistics.median(second for turn in found for second in turn.seconds)
        for name, found in turns.items()
    }
    return [
        {
            "model": model,
            "batch": batch,
            "attack": name,
            "ms": 1e3 * seconds,
            "iterations/s": 1 / seconds,
            "times plain": medians["plain"] / seconds,
            "times breaching": medians["breaching"] / seconds if "breaching" in medians else None,
            "share of floor": floor / seconds,
            "psnr": statistics.median(turn.psnr for turn in turns[name]),
            "compiling s": preparing if name == "leakaudit" else None,
            "step": compiler.step if name == "leakaudit" else None,
            **measuring.peak_memory(),
        }
        for name, seconds in medians.items()
    ]


def observe(model: str, batch: int, options: argparse.Namespace) -> tuple[View, Tensor]:
    victim = load_victim(
        MODELS.get(model, model), num_classes=10, normalisation=NORMALISATIONS["cifar10"], mode="eval", seed=0
    ).to(options.device)
    pixels = load_batch(options.data, (3, 32, 32), batch).pixels.to(options.device)
    labels = torch.arange(batch, device=options.device) % 10
    round = Round(batch)
    update = client_update(victim, victim.params, round, victim.space.encode(pixels), labels).detach()
    return View(victim, round, update, Knowledge(labels=known(labels, "benchmark"))), pixels


def objective(view: View) -> Matching:
    return Matching(view, "cosine", tv=TV)


def start(view: View, seed: int) -> tuple[Tensor, Tensor]:
    device = view.victim.device
    x = view.victim.space.sample(view.round.num_examples, fork(seed, "start", device), view.victim.dtype)
    return x, torch.as_tensor(view.knowledge.labels.value, device=device)


def quality(view: View, found: Tensor, pixels: Tensor) -> float:
    """Mean PSNR of a batch after matching its images, in dB."""
    shown = view.victim.space.decode(found.detach()).clamp(0, 1)
    return -10 * math.log10(float(mse(shown[list(match(shown, pixels))], pixels).mean()))


class Clock:
    """The time at every iteration."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def tick(self, *_: object) -> None:
        measuring.finish()
        self.times.append(time.perf_counter())

    def turn(self, psnr: float) -> Turn:
        return Turn([b - a for a, b in zip(self.times, self.times[1:], strict=False)], psnr)


def turn_of_ours(view: View, pixels: Tensor, compiler: Compiler, iterations: int) -> Turn:
    clock = Clock()
    attack = InvertingGradients(iterations=iterations, tv=TV, learning_rate=LEARNING_RATE)
    found = attack.run(view, fork(0, "start", view.victim.device), Monitor(clock.tick, compiler=compiler))
    return clock.turn(quality(view, found.x, pixels))


def turn_of_plain(view: View, pixels: Tensor, iterations: int) -> Turn:
    """The published loop; it keeps no best candidate and watches nothing."""
    model, space = view.victim.module, view.victim.space
    x, labels = start(view, 0)
    x.requires_grad_()
    params = [p.clone().requires_grad_() for p in view.victim.params.values()]
    names, observed = list(view.victim.params), list(view.observed.values())
    optimizer = torch.optim.Adam([x], lr=LEARNING_RATE)
    milestones = [math.ceil(iterations * share) for share in (3 / 8, 5 / 8, 7 / 8)]
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma=0.1)
    clock = Clock()
    clock.tick()
    for _ in range(iterations):
        optimizer.zero_grad()
        named = {**dict(zip(names, params, strict=True)), **view.victim.buffers}
        task = F.cross_entropy(torch.func.functional_call(model, named, (x,)), labels)
        gradients = torch.autograd.grad(task, params, create_graph=True)
        inner = sum((g * o).sum() for g, o in zip(gradients, observed, strict=True))
        norm = sum(g.square().sum() for g in gradients).sqrt()  # type: ignore[union-attr]
        length = sum(o.square().sum() for o in observed).sqrt()  # type: ignore[union-attr]
        loss = 1 - inner / (norm * length) + TV * total_variation(x)
        loss.backward(inputs=[x])
        assert x.grad is not None
        x.grad.sign_()
        optimizer.step()
        scheduler.step()
        with torch.no_grad():
            x.copy_(space.project(x))
        loss.item()
        clock.tick()
    return clock.turn(quality(view, x, pixels))


def batched(view: View, starts: int) -> Callable[[int], Turn]:
    """Evaluations of so many candidates at once, seconds divided by their number."""
    pairs = [start(view, seed) for seed in range(starts)]
    x, labels = (torch.stack(parts) for parts in zip(*pairs, strict=True))
    step = Compiler("always").prepare(of_each(objective(view), free=False), (x, labels), starts)

    def turn(iterations: int) -> Turn:
        seconds = [measuring.seconds(lambda: step(x, labels)) / starts for _ in range(iterations)]
        return Turn(seconds, math.nan)

    return turn


class Breaching:
    """The other tool, in a process of its own."""

    def __init__(self, model: str, batch: int, options: argparse.Namespace) -> None:
        script = Path(__file__).with_name("breaching_step.py")
        arguments = ["--model", model, "--batch", str(batch), "--data", options.data,
                     "--device", options.device, "--threads", str(options.threads)]  # fmt: skip
        self._process = subprocess.Popen(
            [str(options.breaching), "-W", "ignore", str(script), *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip

    def turn(self, iterations: int) -> Turn:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{iterations + 3}\n")  # it leaves out its first and last ones
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            sys.exit(f"breaching_step.py ended with {self._process.wait()}; run it by hand to see why")
        row = json.loads(line)
        return Turn(row["seconds"], row["psnr"])


def rates(device: str) -> tuple[float, float]:
    """Measured floating point operations per second of a float32 product, and bytes per second of a copy."""
    a = torch.randn(2048, 2048, device=device)
    big = torch.randn(2**26, device=device)
    seconds = measuring.paired({"product": lambda: a @ a, "copy": lambda: big.clone()}, rounds=7)
    return 2 * 2048**3 / seconds["product"], 8 * big.numel() / seconds["copy"]


if __name__ == "__main__":
    main()
