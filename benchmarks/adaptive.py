"""How much further does an adversary get who knows the defense?

    python benchmarks/adaptive.py --data cifar10_test_first2000.npz
    python benchmarks/adaptive.py --data ... --model lenet:activation=relu --defense gaussian-noise:std=1e-2

Behind each defense, one CIFAR-10 photo a seed and DLG's LeNet (sigmoid, uniform(-0.5, 0.5), 100 classes):

    oblivious   the published attack (Zhu et al. 2019), which takes the defended update for a plain
                gradient: with the authors' blind steps, which often diverge, and as `dlg` mends it
                (line search);
    adaptive    attacks on the view of an adversary who knows the defense (`Defense.adapt`).

Seed s draws the model, the label, the start and the noise; the photo is image s of --data.  Labels are
inferred.  One JSON line a run, then a Markdown table of PSNR; every line holds seconds of CPU
time.  The header of the output names time, hardware, seeds and versions.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import platform
import time
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from leakaudit.attacks.base import Monitor, Reconstruction
from leakaudit.attacks.registry import ATTACKS
from leakaudit.data import load_batch
from leakaudit.defenses import apply
from leakaudit.defenses.naming import adapted, parse_defense
from leakaudit.formats.manifest import Normalisation
from leakaudit.models.zoo import load_victim
from leakaudit.randomness import fork
from leakaudit.rounds import Round, client_update
from leakaudit.spec import parse
from leakaudit.threat import Knowledge, View, known
from leakaudit.update import Update

DEFENSES = (
    *(f"gaussian-noise:std={std}" for std in ("1e-4", "1e-3", "1e-2", "1e-1")),
    *(f"top-k:keep={keep}" for keep in ("0.3", "0.1", "0.01")),
    "quantise:to=int8",
    "quantise:to=sign",
    "clip:max_grad_norm=0.1",
)
PUBLISHED = ("dlg:line_search=false,patience=300", "dlg")


def main() -> None:
    options = parse_options()
    torch.set_num_threads(options.threads)
    print(header(options), flush=True)
    rows = [row(defense, seed, options) for defense in options.defense for seed in range(options.seeds)]
    print(table(rows))


def header(options: argparse.Namespace) -> str:
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="minutes")
    return (
        f"# {now}, {platform.processor() or platform.machine()}, {options.threads} thread(s), "
        f"python {platform.python_version()}, torch {torch.__version__}, model {options.model}, "
        f"seeds 0..{options.seeds - 1}, adaptive: {' '.join(options.adaptive)}"
    )


def row(defense: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    oblivious, truth = capture(defense, seed, options)
    adaptive = adapted(oblivious, parse_defense(defense))
    found: dict[str, Any] = {"defense": defense, "seed": seed}
    tasks = [("oblivious", attack, oblivious) for attack in options.oblivious]
    tasks += [("adaptive", attack, adaptive) for attack in options.adaptive]
    found["attacks"] = [
        {"adversary": adversary, "attack": attack, **score(run(attack, view, seed), truth)}
        for adversary, attack, view in tasks
    ]
    print(json.dumps(found), flush=True)
    return found


def capture(defense: str, seed: int, options: argparse.Namespace) -> tuple[View, Tensor]:
    """The view of an adversary who does not know the defense, and the photo."""
    plain = Normalisation(mean=(0.0,) * 3, std=(1.0,) * 3)
    victim = load_victim(options.model, num_classes=100, normalisation=plain, seed=seed)
    pixels = load_batch(options.data, (3, 32, 32), seed + 1).pixels[seed : seed + 1]
    labels = torch.randint(100, (1,), generator=fork(seed, "labels"))
    parts = [part for _, part in parse_defense(defense)]
    client = apply(client_update, parts, fork(seed, "defense"))
    observed: Update = client(victim, victim.params, Round(1), pixels, labels).detach()
    knowledge = Knowledge(scale=known(True, "a gradient"))
    return View(victim, Round(1), observed, knowledge), pixels


def run(spec: str, view: View, seed: int) -> tuple[Reconstruction | None, float]:
    """One attempt, None where every loss was NaN; CPU seconds."""
    attack = parse(spec, ATTACKS, "attack")
    reason = attack.applies(view)
    if reason is not None:
        raise SystemExit(f"{spec}: {reason}")
    began = time.process_time()
    try:
        found = attack.run(view, fork(seed, spec), Monitor())
        found = replace(found, x=view.decode(found.x, found.y)[0])
    except RuntimeError:
        return None, time.process_time() - began
    return found, time.process_time() - began


def score(attempt: tuple[Reconstruction | None, float], truth: Tensor) -> dict[str, Any]:
    found, seconds = attempt
    if found is None:
        return {"mse": None, "psnr": None, "cpu_seconds": round(seconds, 1)}
    error = float((found.x.to(truth.dtype).clamp(0, 1) - truth).square().mean())
    return {
        "mse": float(f"{error:.3g}"),
        "psnr": round(-10 * math.log10(max(error, 1e-30)), 2),
        "cpu_seconds": round(seconds, 1),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: PSNR in dB, seed by seed; "-" where the attack diverged."""
    names = [f"{entry['adversary']} `{entry['attack']}`" for entry in rows[0]["attacks"]]
    lines = ["| defense | " + " | ".join(names) + " |", "|---" * (1 + len(names)) + "|"]
    for defense in dict.fromkeys(row["defense"] for row in rows):
        own = [row for row in rows if row["defense"] == defense]
        cells = [shown(row["attacks"][index] for row in own) for index in range(len(names))]
        lines.append(f"| {defense} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def shown(scores: Any) -> str:
    return ", ".join("-" if score["psnr"] is None else f"{score['psnr']:.1f}" for score in scores)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", default="lenet:init=uniform")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--defense", nargs="+", default=DEFENSES)
    parser.add_argument("--oblivious", nargs="*", default=PUBLISHED)
    parser.add_argument("--adaptive", nargs="+", default=["tv-path:iterations=15"])
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
