"""Levenberg-Marquardt on the LeNet of "Deep Leakage from Gradients", over seeds.

    python benchmarks/levenberg_marquardt.py                                  # 20 seeds, sigmoid, batch 1
    python benchmarks/levenberg_marquardt.py --activation gelu --seeds 5
    python benchmarks/levenberg_marquardt.py --batch 2 --seeds 3
    python benchmarks/levenberg_marquardt.py --cifar cifar10_test_first2000.npz

Each seed draws its own model (all parameters uniform(-0.5, 0.5), or the framework's
default with --init default), photo, labels of 100 classes and start.  The gradient is captured in
float32; the attack is told the labels only for batches.  Photos are random square crops of
examples/photos resized to 32x32, or for --cifar the CIFAR-10 test images 0, 1, 2, ...

Prints a line a seed and writes one JSON line a seed to --out.  Figures are in
docs/levenberg-marquardt.md.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from leakaudit import spec
from leakaudit.attacks.base import Monitor
from leakaudit.attacks.levenberg_marquardt import LevenbergMarquardt
from leakaudit.models.spaces import Pixels
from leakaudit.models.victim import Victim
from leakaudit.models.vision import LeNet, initialise_uniform
from leakaudit.randomness import fork
from leakaudit.rounds import Round, client_update
from leakaudit.threat import Knowledge, View, known
from leakaudit.verification import verify

PHOTOS = Path(__file__).parents[1] / "examples" / "photos"
SHAPE = (3, 32, 32)
CLASSES = 100


def main() -> None:
    options = parse_options()
    print(
        f"torch {torch.__version__}, python {platform.python_version()}, {torch.get_num_threads()} thread(s)"
    )
    attack = spec.parse(
        f"levenberg-marquardt:{options.options}", {"levenberg-marquardt": LevenbergMarquardt()}
    )
    rows = [one_seed(seed, attack, options) for seed in range(options.first, options.first + options.seeds)]
    for key, low in (
        ("mse < 1e-8", lambda row: row["mse"] < 1e-8),
        ("psnr > 30", lambda row: row["psnr"] > 30),
    ):
        print(f"{key}: {sum(map(low, rows))} of {len(rows)}")
    print(f"median seconds {np.median([row['seconds'] for row in rows]):.1f}")


def one_seed(seed: int, attack: LevenbergMarquardt, options: argparse.Namespace) -> dict[str, Any]:
    x = images(seed, options.batch, options.cifar)
    view, y = capture(seed, x, options)
    started, cpu = time.monotonic(), time.process_time()
    monitor = Monitor(on_step=report if options.verbose else None)
    found = attack.run(view, fork(seed, "attack"), monitor)
    seconds, cpu = time.monotonic() - started, time.process_time() - cpu
    row = {
        "seed": seed,
        "activation": options.activation,
        "init": options.init,
        "batch": options.batch,
        "options": options.options,
        "mse": float((found.x.cpu() - x).square().mean()),
        "psnr": worst_psnr(found.x.cpu(), x),
        "labels": bool(len(found.y) == len(y) and (found.y.cpu() == y).all()) if found.y.dim() == 1 else None,
        "loss": found.loss,
        "residual": view.residual(found.x.float(), found.y if found.y.dim() == 1 else found.y.float()),
        "iterations": found.iterations,
        "stopped": found.stopped,
        "seconds": seconds,
        "cpu_seconds": cpu,
        "details": found.details,
    }
    if options.verify:
        row["verification"] = verify(view, found.x, found.y).model_dump()
    print(
        f"seed {seed:2d}  MSE {row['mse']:.1e}  worst PSNR {row['psnr']:6.1f} dB  "
        f"residual {row['residual']:.0e}  {found.iterations:3d} steps  {seconds:6.1f} s ({cpu:.1f} CPU)  "
        f"{found.stopped}{'  warm start' if found.details.get('warm_start') else ''}",
        flush=True,
    )
    if options.out:
        with options.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
    return row


def capture(seed: int, x: Tensor, options: argparse.Namespace) -> tuple[View, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = LeNet(CLASSES, SHAPE, options.activation)
    if options.init == "uniform":
        initialise_uniform(module, fork(seed, "model"))
    space = Pixels(SHAPE, (0.0,) * 3, (1.0,) * 3)
    victim = Victim.of(module, space, CLASSES, name=f"lenet-{options.activation}")
    y = torch.randperm(CLASSES, generator=fork(seed, "labels"))[: len(x)]
    round = Round(len(x))
    observed = client_update(victim, victim.params, round, x, y).detach()
    knowledge = Knowledge() if len(x) == 1 else Knowledge(labels=known(y, "told", upper_bound=True))
    return View(victim, round, observed, knowledge), y


def images(seed: int, count: int, cifar: Path | None) -> Tensor:
    """(count, 3, 32, 32) in [0, 1], float32, multiples of 1/255."""
    if cifar is not None:
        pixels = np.load(cifar, allow_pickle=False)["images"][seed * count : (seed + 1) * count]
    else:
        pixels = np.stack([crop(seed * count + index) for index in range(count)])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255


def crop(index: int) -> np.ndarray:
    """A random square of at least half the height of a bundled photo, at 32x32."""
    paths = sorted(PHOTOS.glob("*.png"))
    photo = Image.open(paths[index % len(paths)]).convert("RGB")
    size, left, top = torch.rand(3, generator=fork(index, "crop")).tolist()
    side = int(min(photo.size) * (0.5 + size / 2))
    corner = int(left * (photo.width - side)), int(top * (photo.height - side))
    box = (*corner, corner[0] + side, corner[1] + side)
    return np.asarray(photo.resize(SHAPE[1:], Image.Resampling.BOX, box=box))


def worst_psnr(found: Tensor, truth: Tensor) -> float:
    """The lowest over the batch, each true image against the nearest reconstruction, in dB."""
    error = (found.clamp(0, 1)[None] - truth[:, None].to(found.dtype)).square().mean((2, 3, 4))
    return -10 * math.log10(max(float(error.min(1).values.max()), 1e-30))


def report(iteration: int, total: int, loss: float) -> None:
    print(f"    {iteration}/{total} {loss:.2e}", flush=True)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--activation", default="sigmoid")
    parser.add_argument("--init", choices=("uniform", "default"), default="uniform")
    parser.add_argument("--options", default="", help="of the attack, as key=value,...")
    parser.add_argument("--cifar", type=Path)
    parser.add_argument("--out", type=Path, help="JSON lines are appended here")
    parser.add_argument("--verify", action="store_true")
    parser.add_argument("--verbose", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
