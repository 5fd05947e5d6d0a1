"""32x32 photos behind the DLG LeNet (100 classes, uniform(-0.5, 0.5)): who reaches MSE < 1e-3, and how fast?

    python benchmarks/deep_leakage.py --data cifar10_test_first2000.npz --seeds 20
    python benchmarks/deep_leakage.py --data cifar10_test_first2000.npz --seeds 4 --batch 4 --attacks recursive
    python benchmarks/deep_leakage.py --data ... --model lenet:activation=relu --attacks recursive

Seed s draws the model, the label and the start; the photo is image s of --data.  `authors` is the
loop of Zhu et al. 2019 (their main.py: L-BFGS, learning rate 1, 300 iterations, no line search, joint
soft labels, one start), written plainly.  One JSON line a run, then medians.  Seconds are CPU time.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from leakaudit.attacks.base import Monitor
from leakaudit.attacks.registry import ATTACKS
from leakaudit.data import load_batch
from leakaudit.formats.manifest import Normalisation
from leakaudit.metrics import match, mse
from leakaudit.models.zoo import load_victim
from leakaudit.randomness import fork
from leakaudit.rounds import Round, client_update
from leakaudit.spec import parse
from leakaudit.threat import View


def authors(view: View, seed: int, seen: Callable[[Tensor], None] = lambda image: None) -> Tensor:
    """The published loop; returns its last image.  `seen` gets the image after every iteration."""
    generator = fork(seed, "authors")
    model, params = view.victim.module, [p.clone().requires_grad_() for p in view.victim.params.values()]
    names = list(view.victim.params)
    original = list(view.observed.values())
    data = torch.randn(view.round.num_examples, 3, 32, 32, generator=generator).requires_grad_()
    label = torch.randn(view.round.num_examples, 100, generator=generator).requires_grad_()
    optimizer = torch.optim.LBFGS([data, label])

    def closure() -> Tensor:
        optimizer.zero_grad()
        output = torch.func.functional_call(model, dict(zip(names, params, strict=True)), (data,))
        loss = torch.mean(torch.sum(-F.softmax(label, dim=-1) * F.log_softmax(output, dim=-1), 1))
        gradients = torch.autograd.grad(loss, params, create_graph=True)
        distance = sum(((g - o) ** 2).sum() for g, o in zip(gradients, original, strict=True))
        distance.backward(inputs=[data, label])
        return distance

    for _ in range(300):
        before = data.detach().clone()
        if not bool(optimizer.step(closure).isfinite()) or torch.equal(before, data):
            break  # nothing changes any more: the published loop would idle to the end
        seen(data.detach())
    return data.detach()


def ours(spec: str, monitor: Callable[[], Monitor] = Monitor) -> Callable[[View, int], Tensor]:
    """Best of the attack's own restarts by residual, as the audit runs them, each under its own `monitor`."""
    attack = parse(spec, ATTACKS, "attack")

    def run(view: View, seed: int) -> Tensor:
        best: tuple[float, Tensor] | None = None
        for restart in range(attack.restarts):
            found = attack.run(view, fork(seed, f"{spec}/{restart}"), monitor())
            residual = view.residual(found.x, found.y)
            if best is None or residual < best[0]:
                best = residual, found.x
            if residual < 1e-4:
                break
        assert best is not None
        return best[1]

    return run


def update_of(model: str, pixels: Tensor, seed: int) -> View:
    """What the server sees of one step on `pixels` (N, 3, 32, 32); `seed` draws the model and the labels."""
    plain = Normalisation(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    victim = load_victim(model, num_classes=100, normalisation=plain, seed=seed)
    labels = torch.randint(100, (len(pixels),), generator=fork(seed, "labels"))
    round = Round(num_examples=len(pixels))
    return View(victim, round, client_update(victim, victim.params, round, pixels, labels).detach())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", default="lenet:init=uniform")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--attacks", nargs="+", default=["authors", "dlg"])
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    batch = load_batch(options.data, (3, 32, 32), options.seeds * options.batch)
    rows: dict[str, list[tuple[float, float]]] = {name: [] for name in options.attacks}
    for seed in range(options.seeds):
        rank = seed * options.batch
        pixels = batch.pixels[rank : rank + options.batch]
        view = update_of(options.model, pixels, seed)
        for name in options.attacks:
            began = time.process_time()
            found = authors(view, seed) if name == "authors" else ours(name)(view, seed)
            seconds = time.process_time() - began
            order = list(match(found, pixels))
            errors = mse(found[order], pixels).nan_to_num(nan=1e9)
            worst = float(errors.max())
            rows[name].append((worst, seconds))
            decibels = [round_to(-10 * math.log10(max(float(error), 1e-300))) for error in errors]
            row = {"attack": name, "seed": seed, "worst_mse": worst, "psnr": decibels}
            row["cpu_seconds"] = round_to(seconds)
            print(json.dumps(row), flush=True)
    for name, results in rows.items():
        good = [seconds for error, seconds in results if error < 1e-3]
        summary = {
            "attack": name,
            "model": options.model,
            "batch": options.batch,
            "mse<1e-3": f"{len(good)} of {len(results)}",
            "mse<1e-8": f"{sum(error < 1e-8 for error, _ in results)} of {len(results)}",
            "median_cpu_seconds_of_all": round_to(statistics.median(seconds for _, seconds in results)),
            "median_cpu_seconds_of_successes": round_to(statistics.median(good)) if good else None,
        }
        print(json.dumps({**summary, "torch": torch.__version__, "threads": options.threads}))


def round_to(seconds: float) -> float:
    return float(f"{seconds:.3g}")


if __name__ == "__main__":
    main()
