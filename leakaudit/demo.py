"""The demo: bundled photos or sentences, two small models, and a report of what their gradients give away."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from leakaudit.api import audit
from leakaudit.bundled import labelled_sentences, tiny_model
from leakaudit.execution import OnProgress
from leakaudit.photos import photo_folder
from leakaudit.report.terminal import plain
from leakaudit.results import Trial


@dataclass(frozen=True)
class Scene:
    """One audit of the demo; `model` is a spec for `leakaudit.models.zoo`, `task` that of a language model."""

    name: str
    title: str
    model: str
    num_examples: int
    attacks: tuple[str, ...]
    task: str | None = None
    budget: float = 90.0
    """Seconds for the attacks; seed 1 takes about 20 on two cores, a start that stalls would take minutes."""


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


def text_scenes() -> tuple[Scene, ...]:
    """A sentence behind each of the two tiny language models, which have not seen it; one of them found again by
    the optimiser of Deep Leakage from Gradients, token by token."""
    bert, gpt2 = tiny_model("bert"), tiny_model("gpt2")
    return (
        Scene("gpt2", "A sentence behind a tiny GPT-2", f"hf:{gpt2}", 1, ("auto",), "causal-lm"),
        Scene(
            "dlg",
            "The same behind a tiny BERT classifier, by Deep Leakage from Gradients",
            f"hf:{bert}",
            1,
            ("dlg-text:iterations=60,polish=0",),
            "classification",
            budget=25.0,
        ),
        Scene("bert", "A review behind a tiny BERT classifier", f"hf:{bert}", 1, ("auto",), "classification"),
    )


def run_demo(
    out: Path, seed: int, console: Console, on_progress: OnProgress, *, text: bool = False
) -> list[Path]:
    """Audit every scene into `out`/NAME; returns the paths of the reports, the headline one last."""
    reports = []
    for scene in text_scenes() if text else SCENES:
        console.rule(plain(scene.title))
        result = audit(
            scene.model,
            None if text else photo_folder(),
            text=labelled_sentences() if text else None,
            task=scene.task,
            num_examples=scene.num_examples,
            attacks=scene.attacks,
            seed=seed,
            out=out / scene.name,
            budget=scene.budget,
            force=True,
            title=scene.title,
            command="leakaudit demo --text" if text else "leakaudit demo",
            on_progress=on_progress,
        )
        best = result.best_trial
        console.print(plain(result.verdict.headline))
        if best is not None:
            scores = ", ".join(
                f"{s.metric} {s.value:.3g} {s.unit}".strip() for s in best.scores if s.value is not None
            )
            console.print(plain(f"{best.attack}, {best.seconds:.0f} s: {scores}"))
            if text:
                console.print(plain(f"Recovered: {_recovered(best)}"))
            console.print(plain(best.verification.text if best.verification else ""))
        reports.append(out / scene.name / "report.html")
    return reports


def _recovered(trial: Trial) -> str:
    tokens = trial.examples[0].recovered_tokens or []
    return " ".join(token.text for token in tokens)
