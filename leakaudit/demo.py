"""The demo: bundled photos, two small models, and a report of what their gradients give away."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from leakaudit.api import audit
from leakaudit.execution import OnProgress
from leakaudit.photos import photo_folder
from leakaudit.report.terminal import plain


@dataclass(frozen=True)
class Scene:
    """One audit of the demo; `model` is a spec for `leakaudit.models.zoo`."""

    name: str
    title: str
    model: str
    num_examples: int
    attacks: tuple[str, ...]


BUDGET = 90.0
"""Seconds a scene may attack; seed 1 takes about 20 on two cores, a start that stalls would take minutes."""

SCENES = (
    Scene("batch", "Four photos behind a fully connected network", "mlp:width=512", 4, ("linear",)),
    Scene(
        "photo",
        "One photo behind the LeNet of Deep Leakage from Gradients",
        "lenet:init=uniform",
        1,
        ("levenberg-marquardt",),
    ),
)


def run_demo(out: Path, seed: int, console: Console, on_progress: OnProgress) -> list[Path]:
    """Audit every scene into `out`/NAME; returns the paths of the reports, the headline one last."""
    reports = []
    for scene in SCENES:
        console.rule(plain(scene.title))
        result = audit(
            scene.model,
            photo_folder(),
            num_examples=scene.num_examples,
            attacks=scene.attacks,
            seed=seed,
            out=out / scene.name,
            budget=BUDGET,
            force=True,
            title=scene.title,
            command="leakaudit demo",
            on_progress=on_progress,
        )
        best = result.best_trial
        console.print(plain(result.verdict.headline))
        if best is not None:
            scores = ", ".join(
                f"{s.metric} {s.value:.3g} {s.unit}".strip() for s in best.scores if s.value is not None
            )
            console.print(plain(f"{best.attack}, {best.seconds:.0f} s: {scores}"))
            console.print(plain(best.verification.text if best.verification else ""))
        reports.append(out / scene.name / "report.html")
    return reports
