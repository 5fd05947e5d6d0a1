"""Cramer-Rao figures against the attack that reaches them: a sigmoid LeNet, DLG's initialisation, one photo.

    python benchmarks/bounds.py --cifar cifar10_test_first2000.npz          # photo 0; noise of 0.1, 1 and 10 %
    python benchmarks/bounds.py --noise 0.01 --draws 3                     # examples/photos

Noise is given as a share of the gradient's rms.  The attack is levenberg-marquardt under known noise, with its
smoothness prior (maximum a posteriori) and without (maximum likelihood); both figures are mean squared errors
per pixel of [0, 1].

Photo 0 of CIFAR-10's test set, seed 0, 100 classes, condition number 4300, one draw of the noise, --iterations 25;
15 minutes on one busy x86-64 core, torch 2.15:

    noise/rms | Cramer-Rao | Bayesian | MAP attack | ML attack
         0.1% |     7.4e-6 |   7.1e-6 |     6.9e-6 |    8.6e-6
           1% |     7.4e-4 |   2.8e-4 |     2.9e-4 |    7.2e-4
          10% |     0.074  |   0.0019 |     0.0030 |    0.032

The box of [0, 1] is a prior too: it is why maximum likelihood comes below Cramer-Rao at 10 %.  With photo 1, and with
seed 1, both of 10 classes, the Cramer-Rao figure at 0.1 % is 5.3e-5 and 6.5e-5.
"""

from __future__ import annotations

import argparse
import platform
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from leakaudit.attacks.base import Monitor
from leakaudit.attacks.levenberg_marquardt import LevenbergMarquardt
from leakaudit.bounds import Limits, target_bounds
from leakaudit.defenses import GaussianNoise, apply
from leakaudit.formats.manifest import Normalisation
from leakaudit.models.victim import Victim
from leakaudit.models.zoo import load_victim
from leakaudit.randomness import fork
from leakaudit.rounds import Round, client_update
from leakaudit.sweep_results import Bound
from leakaudit.threat import Knowledge, View, known

PHOTOS = Path(__file__).parents[1] / "examples" / "photos"


def main() -> None:
    options = parse_options()
    print(
        f"torch {torch.__version__}, python {platform.python_version()}, {platform.machine()}, "
        f"{torch.get_num_threads()} thread(s); {options.model}, photo {options.index}, seed {options.seed}"
    )
    victim = load_victim(
        options.model, normalisation=Normalisation(mean=(0.0,), std=(1.0,)), seed=options.seed
    )
    pixels = photo(options.cifar, options.index)
    x, y = victim.space.encode(pixels), torch.tensor([3])
    clean = client_update(victim, victim.params, Round(1), x, y)
    rms = float(clean.flat().square().mean().sqrt())
    print(
        "noise/rms | Cramer-Rao | Bayesian | condition |    time | MAP attack |    time |  ML attack |    time"
    )
    for share in options.noise:
        row(victim, x, y, share, share * rms, options)


def row(victim: Victim, x: Tensor, y: Tensor, share: float, std: float, options: argparse.Namespace) -> None:
    noise = GaussianNoise(std=std)
    knowledge = Knowledge(labels=known(y, "told", upper_bound=True), noise_std=known(std, "known defense"))
    client = apply(client_update, [noise], fork(options.seed, f"noise/{share}"))
    views = [
        View(victim, Round(1), observed, knowledge, spread=dict.fromkeys(observed, std))
        for observed in (client(victim, victim.params, Round(1), x, y).detach() for _ in range(options.draws))
    ]
    began = time.monotonic()
    bounds = figures(
        target_bounds(
            views[0],
            x,
            y,
            [("gaussian-noise", noise)],
            protocol="fedsgd",
            defense=f"gaussian-noise:std={std:.3g}",
            generator=fork(options.seed, "bounds"),
            limits=Limits(seconds=3600),
        )
    )
    print(
        f"{share:9.3%} | {bounds['cramer-rao']:10.2g} | {bounds['bayesian-cramer-rao']:8.2g} |"
        f" {bounds['condition']:9.2g} | {time.monotonic() - began:5.0f} s",
        end="",
        flush=True,
    )
    for smoothness in (0.1, 0.0):
        began = time.monotonic()
        attack = LevenbergMarquardt(smoothness=smoothness, iterations=options.iterations)
        found = [attack.run(view, fork(options.seed, "attack"), Monitor()) for view in views]
        middle = float(np.median([mse(victim, one.x, x) for one in found]))
        print(f" | {middle:10.2g} | {time.monotonic() - began:5.0f} s", end="", flush=True)
    print()


def figures(bounds: list[Bound]) -> dict[str, float]:
    return {bound.name: float("nan") if bound.value is None else bound.value for bound in bounds}


def mse(victim: Victim, found: Tensor, x: Tensor) -> float:
    decode = victim.space.decode
    return float((decode(found.double()).clamp(0, 1) - decode(x.double())).square().mean())


def photo(cifar: Path | None, index: int) -> Tensor:
    """(1, 3, 32, 32) in [0, 1], float32."""
    if cifar is not None:
        image = np.load(cifar, allow_pickle=False)["images"][index]
    else:
        image = np.array(Image.open(sorted(PHOTOS.glob("*.png"))[index]).convert("RGB").resize((32, 32)))
    return torch.tensor(image).permute(2, 0, 1)[None].float() / 255


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="lenet:init=uniform")
    parser.add_argument("--noise", type=float, nargs="+", default=[1e-3, 1e-2, 1e-1])
    parser.add_argument("--draws", type=int, default=1)
    parser.add_argument("--index", type=int, default=0)
    parser.add_argument("--iterations", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cifar", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
