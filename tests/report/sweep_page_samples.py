"""Made-up sweeps for the tests of their page, and for looking at it in a browser.

`python tests/report/sweep_page_samples.py FOLDER` writes one sweep folder a sample;
`--golden` writes the golden page anew: look at the difference before committing it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from sample_audits import EVIL, photos, recovered, tokens

from leakaudit.report.sweep_page import write_sweep_page
from leakaudit.results import Token
from leakaudit.sweep_results import (
    Acceptance,
    Adversary,
    Bound,
    Cell,
    Curve,
    Example,
    Frame,
    Gate,
    Run,
    SweepResult,
    Utility,
)

ADVERSARIES: tuple[Adversary, Adversary] = ("oblivious", "adaptive")
POLICY = "psnr>20,ssim>0.5"
PROTOCOLS = ("fedsgd", "fedavg:steps=5", "fedavg:steps=20")
ATTACKS = ("auto", "dlg", "inverting-gradients")
GOLDEN = Path(__file__).parent / "golden_sweep"


@dataclass(frozen=True)
class Option:
    """A defense of the made-up sweeps: what an attack then reaches (PSNR), and what training keeps."""

    family: str
    spec: str
    strength: tuple[str, float] | None
    oblivious: float
    adaptive: float
    accuracy: float


def options() -> list[Option]:
    found = [Option("none", "none", None, 62.0, 62.0, 0.81)]
    for std, blind, aware, accuracy in (
        (1e-4, 38.0, 41.0, 0.81),
        (1e-3, 24.0, 31.0, 0.80),
        (1e-2, 11.0, 23.5, 0.76),
        (1e-1, 6.0, 9.0, 0.41),
    ):
        found.append(
            Option("gaussian-noise", f"gaussian-noise:std={std:g}", ("std", std), blind, aware, accuracy)
        )
    for keep, blind, aware, accuracy in (
        (0.3, 17.0, 44.0, 0.81),
        (0.1, 12.0, 28.0, 0.79),
        (0.01, 8.0, 14.0, 0.7),
    ):
        found.append(Option("top-k", f"top-k:keep={keep:g}", ("keep", keep), blind, aware, accuracy))
    for noise, blind, aware, accuracy in (
        (0.0, 40.0, 43.0, 0.8),
        (0.1, 15.0, 22.0, 0.74),
        (0.5, 8.0, 11.0, 0.62),
        (1.0, 7.0, 8.0, 0.5),
    ):
        found.append(
            Option("dp-sgd", f"dp-sgd:noise_multiplier={noise:g},max_grad_norm=1", ("noise_multiplier", noise),
                   blind, aware, accuracy)
        )  # fmt: skip
    found.append(Option("int8", "int8:per=row", None, 28.0, 51.0, 0.81))
    found.append(Option("soteria", "soteria:percentile=1", None, 14.0, 37.0, 0.8))
    return found


def blur(picture: np.ndarray, psnr: float, random: np.random.Generator) -> np.ndarray:
    """The picture with noise of that PSNR, before clipping."""
    noise = random.normal(0, 10 ** (-psnr / 20), picture.shape)
    return np.clip(picture + noise, 0, 1)


class Folder:
    """A sweep's folder with the runs' pictures; writes nothing without `path`."""

    def __init__(self, path: Path | None, size: int, examples: int) -> None:
        self.path, self.size = path, size
        self.originals = photos(examples, size)

    def picture(self, name: str, pixels: np.ndarray) -> str:
        if self.path is not None:
            (self.path / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.rint(pixels * 255).astype(np.uint8)).save(self.path / name)
        return name


def run_of(
    folder: Folder, key: str, group: int, seed: int, psnr: float, count: int, frames: int, noise: float
) -> Run:
    random = np.random.default_rng([seed, group, *key.encode()])
    examples = []
    for place in range(count):
        index = (group * count + place) % len(folder.originals)
        original, reached = folder.originals[index], psnr + random.normal(0, 1.2)
        guess = blur(original, reached, random)
        error = float(np.mean((original - guess) ** 2))
        examples.append(
            Example(
                index=index,
                scores={
                    "psnr": -10 * math.log10(error),
                    "ssim": float(np.clip((reached - 5) / 40, 0, 1)),
                    "mse": error,
                },
                true_label=f"class {index}",
                recovered_label=f"class {index if random.uniform() < 0.8 else 0}",
                original=folder.picture(f"runs/{key}/images/original-{place}.png", original),
                reconstruction=folder.picture(f"runs/{key}/images/best-{place}.png", guess),
            )
        )
    strip = [
        Frame(
            iteration=round(300 * frame / max(1, frames - 1)),
            loss=10.0 ** (2 - frame),
            image=folder.picture(
                f"runs/{key}/images/strip-{frame}.png",
                blur(folder.originals[examples[0].index], psnr * frame / max(1, frames - 1), random),
            ),
        )
        for frame in range(frames)
    ]
    return Run(
        key=key,
        group=group,
        seed=seed,
        status="done",
        verdict="leaks" if psnr > 20 else "not-recovered",
        headline="Private images were reconstructed." if psnr > 20 else "No attack that ran recovered them.",
        attack="inverting-gradients",
        residual=0.01,
        seconds=12.5,
        examples=examples,
        strip=strip,
        noise_std=noise,
        update_rms=0.013,
    )


def bounds_of(protocol: str, option: Option) -> list[Bound]:
    if option.family == "gaussian-noise" and option.strength is not None:
        error = 10 ** (-option.adaptive / 10) * 0.7
        texts = {"cramer-rao": error, "bayesian-cramer-rao": min(error, 0.06) * 0.8}
        return [
            Bound(
                protocol=protocol, defense=option.spec, name=name, kind="indicator", quantity="mse", value=value,
                text="Least error of an unbiased adversary, on average.", source="Hannun et al. 2021, eq. 4",
                assumptions=["unbiased adversary", "the noise is Gaussian"],
            )
            for name, value in texts.items()
        ]  # fmt: skip
    if option.family == "dp-sgd" and option.strength is not None:
        noise = option.strength[1]
        chance = 1.0 if noise == 0 else min(1.0, 0.01 + 0.08 / noise)
        epsilon = None if noise == 0 else 6.0 / noise
        return [
            Bound(
                protocol=protocol, defense=option.spec, name="epsilon", kind="bound", quantity="epsilon",
                value=epsilon, text="At delta 1e-5." if epsilon else "No noise, no guarantee.",
                source="Gopi et al. 2021 (PRV)",
            ),
            Bound(
                protocol=protocol, defense=option.spec, name="reconstruction-robustness", kind="bound",
                quantity="probability", value=chance, text="Greatest success of any adversary.",
                source="Hayes et al. 2023, theorem 2", assumptions=["prior of 10 candidates", "q = 1"],
            ),
        ]  # fmt: skip
    if option.family == "none":
        return [
            Bound(
                protocol=protocol, defense="none", name="rank", kind="indicator", quantity="unknowns-left",
                value=0.0, text="The Jacobian has full rank.", source="numerical rank, 3,072 unknowns",
            )
        ]  # fmt: skip
    return []


def utility_of(protocol: str, option: Option, seeds: int = 3) -> Utility:
    curves = [
        Curve(
            seed=seed,
            points=[(s, option.accuracy * (1 - math.exp(-s / 60)) + 0.005 * seed) for s in range(0, 301, 20)],
        )
        for seed in range(seeds)
    ]
    private = option.family == "dp-sgd" and option.strength is not None and option.strength[1] > 0
    return Utility(
        protocol=protocol,
        defense=option.spec,
        accuracy=option.accuracy,
        low=option.accuracy - 0.021,
        high=option.accuracy + 0.021,
        curves=curves,
        steps=300,
        epsilon=6.0 / option.strength[1] if private and option.strength else None,
        delta=1e-5 if private else None,
    )


def photo_sweep(
    path: Path | None,
    *,
    protocols: Sequence[str] = ("fedsgd", "fedavg:steps=5"),
    attacks: Sequence[str] = ("auto",),
    seeds: int = 2,
    count: int = 2,
    frames: int = 6,
    size: int = 32,
    most: int | None = None,
) -> SweepResult:
    """Images; every run has `count` of them, and there are `seeds` runs a cell."""
    folder = Folder(path, size, max(4, count))
    wanted = [
        (protocol, attack, option, adversary)
        for protocol in protocols
        for attack in attacks
        for option in options()
        for adversary in ADVERSARIES[: 1 if option.family == "none" else 2]
    ]
    cells: list[Cell] = []
    for protocol, attack, option, adversary in wanted[:most]:
        level = option.oblivious if adversary == "oblivious" else option.adaptive
        level -= 4.0 * protocols.index(protocol) + 2.0 * attacks.index(attack)
        name = f"{len(cells):03d}{'ab'[adversary == 'adaptive']}"
        noise = option.strength[1] if option.family == "gaussian-noise" and option.strength else 0.0
        runs = [
            run_of(folder, f"{name}{seed}", seed % 2, seed, max(5.5, level), count, frames, noise)
            for seed in range(seeds)
        ]
        leaks = level > 20
        cells.append(
            Cell(
                protocol=protocol,
                defense=option.spec,
                attack=attack,
                adversary=adversary,
                family=option.family,
                strength=option.strength,
                runs=runs,
                verdict="leaks" if leaks else "not-recovered",
                reasons=["4 of 4 examples cross psnr>20 (worst psnr 38)" if leaks else "Control passed."],
                control=True,
            )
        )
    cells = [_odd(cell, place) for place, cell in enumerate(cells)]
    leaking = [cell.name for cell in cells if cell.verdict == "leaks"]
    accepted = [
        Acceptance(cell=name, owner="ml-platform", expires="2027-03-01", reason="pilot with public photos")
        for name in leaking[:1]
    ]
    targets = [(protocol, option) for protocol in protocols for option in options()]
    return SweepResult(
        created="2026-11-22 18:00 UTC",
        title="Defense sweep",
        command="leakaudit defend --model resnet20 --checkpoint m.pt --data photos/"
        " --defense gaussian-noise:std=1e-4,1e-3 --protocol fedsgd --attack auto --seeds 3 --out runs/sweep",
        config={"images": 16, "seeds": seeds, "knowledge": {"labels": "known", "mode": "eval"}},
        model="resnet20 (cifar10)",
        parameters=272474,
        examples=16,
        seeds=seeds,
        seed=7,
        metrics=["psnr", "ssim", "mse"],
        cells=cells,
        utilities=[utility_of(protocol, option) for protocol, option in targets],
        bounds=[bound for protocol, option in targets for bound in bounds_of(protocol, option)],
        gate=Gate(
            policy=POLICY,
            broken=leaking[1:],
            accepted=accepted,
            expired=leaking[2:3],
            inconclusive=[cell.name for cell in cells if cell.verdict == "inconclusive"],
        ),
        notes=["top-k under fedavg keeps the same coordinates in every step."],
        seconds=5321.0,
        environment={"leakaudit": "0.2.0", "python": "3.11.7", "torch": "2.13.0", "device": "cpu"},
        files={"m.pt": "sha256:" + "3f9a" * 16},
    )


def _odd(cell: Cell, place: int) -> Cell:
    """A few cells that failed, are pending, or whose control failed."""
    if place == 9:
        runs = [
            Run(key=run.key, group=run.group, seed=run.seed, status="failed", error="CUDA out of memory")
            for run in cell.runs
        ]
        changed = {"runs": runs, "verdict": "inconclusive", "reasons": ["2 of 2 runs failed."]}
    elif place == 12:
        runs = [Run(key=run.key, group=run.group, seed=run.seed, status="pending") for run in cell.runs]
        changed = {
            "runs": runs,
            "verdict": "inconclusive",
            "reasons": ["2 of 2 runs are pending."],
            "control": None,
        }
    elif place == 14:
        changed = {"verdict": "inconclusive", "reasons": ["The positive control failed."], "control": False}
    else:
        return cell
    return cell.model_copy(update=changed)


SENTENCES = [
    "the invoice of ms. okafor was paid twice on the third of may",
    "please do not tell the board before the audit is over",
    "blood pressure was one hundred and sixty over ninety at admission",
    "the tenant in flat nine has moved out without notice",
]


def text_sweep(path: Path | None = None) -> SweepResult:
    """Sentences, without pictures."""
    cells: list[Cell] = []
    for option in options():
        for adversary in ADVERSARIES[: 1 if option.family == "none" else 2]:
            level = option.oblivious if adversary == "oblivious" else option.adaptive
            share = float(np.clip((level - 5) / 35, 0, 1))
            examples = [
                Example(
                    index=index,
                    scores={"token-accuracy": share, "rouge-l": share},
                    original_tokens=tokens(text),
                    recovered_tokens=recovered(text, share, seed=index),
                )
                for index, text in enumerate(SENTENCES)
            ]
            run = Run(
                key=f"t{len(cells)}", group=0, seed=0, status="done", attack="lamp", residual=0.1, examples=examples
            )  # fmt: skip
            cells.append(
                Cell(
                    protocol="fedsgd",
                    defense=option.spec,
                    attack="auto",
                    adversary=adversary,
                    family=option.family,
                    strength=option.strength,
                    runs=[run],
                    verdict="leaks" if share > 0.5 else "not-recovered",
                    control=True,
                )
            )
    base = photo_sweep(None, seeds=1, count=1, frames=1)
    broken = [cell.name for cell in cells if cell.verdict == "leaks"]
    return base.model_copy(
        update={
            "medium": "text",
            "model": "bert (6 layers, hidden 384)",
            "metrics": ["token-accuracy", "rouge-l"],
            "cells": cells,
            "gate": Gate(policy="token-accuracy>0.5,rouge-l>0.5", broken=broken),
        }
    )


def hostile_sweep(path: Path | None = None) -> SweepResult:
    """Every string is an attack on the page, every number is odd, no pictures on disk."""
    long = "a-very-long-name-without-any-break-" * 6
    evil = [Token(text=EVIL, right=False), Token(text="\u202e" + long, special=True)]
    base = photo_sweep(None, protocols=("fedsgd",), seeds=1, count=1, frames=2)
    odd = (math.nan, math.inf, -math.inf, 0.0, 1e300, None)
    cells = []
    for place, cell in enumerate(base.cells):
        run = cell.runs[0].model_copy(
            update={
                "key": ("../../etc", EVIL, "ok", "..", "a/b")[place % 5],
                "error": EVIL,
                "headline": EVIL,
                "reasons": [EVIL, long],
                "attack": EVIL,
                "residual": odd[place % 6],
                "noise_std": odd[(place + 1) % 6],
                "update_rms": odd[(place + 3) % 6],
                "examples": [
                    Example(
                        index=0,
                        scores={"psnr": odd[place % 6], EVIL: 1.0, "mse": odd[(place + 2) % 6]},
                        true_label=EVIL,
                        recovered_label=long,
                        original="images/missing.png",
                        reconstruction="images/missing.png",
                        recovered_tokens=evil,
                    )
                ],
                "strip": [Frame(iteration=10**9, loss=math.nan, image="images/missing.png")],
            }
        )
        changed = {
            "protocol": EVIL,
            "defense": f"{EVIL}{place // 2}",
            "attack": EVIL if place % 3 else long,
            "family": EVIL,
            "strength": (EVIL, (odd[place % 5] or 0.0)) if place % 2 else None,
            "runs": [run],
            "reasons": [EVIL],
        }
        cells.append(cell.model_copy(update=changed))
    targets = [(cell.protocol, cell.defense) for cell in cells]
    return base.model_copy(
        update={
            "title": EVIL,
            "command": EVIL,
            "model": EVIL,
            "cells": cells,
            "config": {EVIL: EVIL},
            "notes": [EVIL],
            "environment": {EVIL: EVIL},
            "files": {EVIL: long},
            "utilities": [
                Utility(
                    protocol=p,
                    defense=d,
                    accuracy=odd[i % 6],
                    low=odd[(i + 1) % 6],
                    high=1e300,
                    epsilon=odd[i % 6],
                    reason=EVIL,
                    curves=[Curve(seed=0, points=[(0, math.nan), (5, 1e300), (5, 0.0)])],
                )
                for i, (p, d) in enumerate(targets)
            ],
            "bounds": [
                Bound(
                    protocol=p,
                    defense=d,
                    name=EVIL,
                    kind="bound",
                    quantity=("mse", "probability", "epsilon")[i % 3],
                    value=odd[i % 6],
                    text=EVIL,
                    source=EVIL,
                    assumptions=[EVIL],
                )
                for i, (p, d) in enumerate(targets)
            ],
            "gate": Gate(
                policy=POLICY,
                broken=[EVIL, cells[0].name],
                expired=[EVIL],
                accepted=[Acceptance(cell=EVIL, owner=EVIL, expires=EVIL, reason=EVIL)],
                inconclusive=[long],
            ),
        }
    )


def empty_sweep(path: Path | None = None) -> SweepResult:
    base = photo_sweep(None, seeds=1, count=1, frames=1)
    nothing = {"cells": [], "utilities": [], "bounds": [], "gate": Gate(policy=POLICY), "interrupted": True}
    return base.model_copy(update=nothing)


def large_sweep(path: Path | None) -> SweepResult:
    """200 cells of 3 runs and 24 examples, film strips of 12 frames."""
    return photo_sweep(path, protocols=PROTOCOLS, attacks=ATTACKS, seeds=3, count=8, frames=12, most=200)


def golden_sweep(path: Path | None) -> SweepResult:
    """A few cells.  No film strip: its compression depends on the version of Pillow."""
    return photo_sweep(path, protocols=("fedsgd",), seeds=1, count=1, frames=0, size=16, most=13)


def small_sweep(path: Path | None) -> SweepResult:
    return photo_sweep(path, protocols=("fedsgd",), seeds=2, count=1, frames=3)


SAMPLES = {
    "photos": small_sweep,
    "text": text_sweep,
    "hostile": hostile_sweep,
    "empty": empty_sweep,
    "redacted": lambda path: small_sweep(path).model_copy(update={"redacted": True}),
}


def main(argument: str) -> None:
    if argument == "--golden":
        result = golden_sweep(GOLDEN)
        (GOLDEN / "result.json").write_text(result.to_json())
        write_sweep_page(result, GOLDEN, GOLDEN / "report.html")
        return
    for name, make in (SAMPLES | {"wide": photo_sweep, "large": large_sweep}).items():
        folder = Path(argument) / name
        write_sweep_page(make(folder), folder, folder / "report.html")
        print(folder / "report.html", (folder / "report.html").stat().st_size)


if __name__ == "__main__":
    main(sys.argv[1])
