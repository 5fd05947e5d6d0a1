"""Outcome -> `Trial`: scores against the truth, where it is at hand, and pictures.

This is where truth enters, after the attacks have run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from scipy.stats import binomtest
from torch import Tensor

from leakaudit.attacks.base import Reconstruction
from leakaudit.data import PrivateBatch
from leakaudit.execution import MATCHED, Measured, Outcome
from leakaudit.metrics import METRICS, label_score, score_batch
from leakaudit.models.spaces import Pixels
from leakaudit.policy import Policy
from leakaudit.randomness import fork
from leakaudit.report.pictures import contact_sheet, difference, write_png
from leakaudit.results import Attempt, ExampleScores, Frame, Score, SuccessRate, Trial
from leakaudit.threat import View

T = TypeVar("T")
MOST_FRAMES = 16
"""Of a film strip as shown: two rows of the report."""


@dataclass(frozen=True)
class Yardstick:
    """What reconstructions are measured against.

    Attributes:
        truth: the private batch, or None.
        pool: (P, C, H, W) unrelated images in [0, 1].
        metrics: names in `leakaudit.metrics.METRICS`.
        policy: what counts as success.
        seed: for the chance levels.
        redact: write no picture of the truth.
    """

    truth: PrivateBatch | None
    pool: Tensor | None
    metrics: tuple[str, ...]
    policy: Policy
    seed: int
    redact: bool = False

    def scores(
        self, pixels: Tensor, names: Sequence[str]
    ) -> tuple[list[Score], list[dict[str, float | None]], tuple[int, ...]]:
        """Means, scores of every private example, and which reconstruction was matched to it."""
        assert self.truth is not None
        scored = score_batch(
            pixels,
            self.truth.pixels,
            [METRICS[name] for name in names],
            pool=self.pool,
            generator=fork(self.seed, "chance"),
        )
        return scored.scores, scored.per_example, scored.matched

    def succeeded(self, space: Pixels, attempt: Measured) -> bool:
        """With the truth: the policy is broken.  Without: the update is matched."""
        if self.truth is None:
            return attempt.residual < MATCHED
        scores = self.scores(shown(space, attempt.found.x), self.policy.metrics)[1]
        return bool(self.policy.broken_by(scores))

    @property
    def criterion(self) -> str:
        return f"relative residual below {MATCHED:g}" if self.truth is None else str(self.policy)


def shown(space: Pixels, x: Tensor) -> Tensor:
    """Model inputs as float32 pixels on the CPU, clamped to [0, 1]."""
    return space.decode(x.detach().cpu().float()).clamp(0, 1)


def hard_labels(y: Tensor) -> Tensor:
    """(N,) integers, from integers or (N, K) probabilities."""
    return (y.argmax(dim=1) if y.is_floating_point() else y).cpu()


def illustrate(outcome: Outcome, view: View, yardstick: Yardstick, folder: Path, *, best: bool) -> Trial:
    """The trial of one attack; PNGs go to `folder`/images, difference pictures only for the best attack."""
    attempts = [_attempt(attempt, view.victim.space, yardstick) for attempt in outcome.attempts]
    trial = Trial(
        attack=outcome.chosen.name,
        spec=outcome.chosen.spec,
        status=outcome.status,
        reason=outcome.reason,
        seconds=outcome.seconds,
        attempts=attempts,
        verification=outcome.verification,
    )
    winner = outcome.best
    if winner is None:
        return trial
    album = Album(folder, outcome.chosen.name)
    pixels = shown(view.victim.space, winner.found.x)
    labels = hard_labels(winner.found.y)
    scores, examples = _examples(pixels, labels, view.victim.num_classes, yardstick, album, best)
    return trial.model_copy(
        update={
            "best": outcome.attempts.index(winner),
            "residual": winner.residual,
            "success": _success_rate(attempts, yardstick.criterion),
            "label_source": label_source(view, winner.found),
            "scores": scores,
            "examples": examples,
            "strip": album.strip(view.victim.space, winner.found),
            "details": winner.found.details,
        }
    )


def label_source(view: View, found: Reconstruction) -> str:
    """Where the labels came from, in words."""
    if view.knowledge.labels.status == "known":
        return "given"
    return "jointly optimised" if found.y.is_floating_point() else "inferred from the last layer"


class Album:
    """Pictures of one attack under `folder`/images; returns paths relative to `folder`."""

    def __init__(self, folder: Path, attack: str) -> None:
        self._folder = folder
        self._attack = attack

    def picture(self, name: str, image: Tensor, *, shared: bool = False) -> str:
        """One (C, H, W) image in [0, 1]; a shared one is the same for all attacks."""
        relative = f"images/{name}.png" if shared else f"images/{self._attack}-{name}.png"
        write_png(_array(image), self._folder / relative)
        return relative

    def difference(self, name: str, original: Tensor, reconstruction: Tensor) -> str:
        relative = f"images/{self._attack}-{name}.png"
        write_png(difference(_array(original), _array(reconstruction)), self._folder / relative)
        return relative

    def strip(self, space: Pixels, found: Reconstruction) -> list[Frame]:
        frames = []
        for position, (iteration, loss, x) in enumerate(_thinned(found.strip, MOST_FRAMES)):
            sheet = contact_sheet(shown(space, x).permute(0, 2, 3, 1).numpy())
            relative = f"images/{self._attack}-strip-{position:02d}.png"
            write_png(sheet, self._folder / relative)
            frames.append(Frame(iteration=iteration, loss=loss, image=relative))
        return frames


def _thinned(frames: list[T], most: int) -> list[T]:
    """At most `most` of them, evenly spread, the first and the last among them."""
    if len(frames) <= most:
        return frames
    return [frames[round(i * (len(frames) - 1) / (most - 1))] for i in range(most)]


def _array(image: Tensor):  # type: ignore[no-untyped-def]
    return image.detach().cpu().permute(1, 2, 0).numpy()


def _attempt(attempt: Measured, space: Pixels, yardstick: Yardstick) -> Attempt:
    found = attempt.found
    return Attempt(
        restart=attempt.restart,
        loss=found.loss,
        residual=attempt.residual,
        iterations=found.iterations,
        seconds=attempt.seconds,
        stopped=found.stopped,
        success=yardstick.succeeded(space, attempt),
        history=found.history,
    )


def _success_rate(attempts: Sequence[Attempt], criterion: str) -> SuccessRate:
    """Wilson 1927 score interval at 95 %."""
    successes = sum(bool(attempt.success) for attempt in attempts)
    interval = binomtest(successes, len(attempts)).proportion_ci(method="wilson")
    return SuccessRate(
        successes=successes,
        restarts=len(attempts),
        low=float(interval.low),
        high=float(interval.high),
        criterion=criterion,
    )


def _examples(
    pixels: Tensor, labels: Tensor, num_classes: int, yardstick: Yardstick, album: Album, best: bool
) -> tuple[list[Score], list[ExampleScores]]:
    truth = yardstick.truth
    if truth is None:
        return [], [
            ExampleScores(
                index=i,
                matched=i,
                recovered_label=str(int(labels[i])),
                reconstruction=album.picture(f"{i:03d}", image),
            )
            for i, image in enumerate(pixels)
        ]
    scores, per_example, matched = yardstick.scores(pixels, yardstick.metrics)
    examples = []
    for i, (values, j) in enumerate(zip(per_example, matched, strict=True)):
        example = ExampleScores(
            index=i,
            matched=j,
            true_label=truth.label_name(i),
            scores=values,
        )
        if not yardstick.redact:
            path = album.picture(f"original-{i:03d}", truth.pixels[i], shared=True)
            example = example.model_copy(update={"original": path})
        if j >= 0:
            example = example.model_copy(
                update={
                    "recovered_label": truth.class_name(int(labels[j])),
                    "reconstruction": album.picture(f"{j:03d}", pixels[j]),
                    "difference": album.difference(f"difference-{i:03d}", truth.pixels[i], pixels[j])
                    if best and not yardstick.redact
                    else None,
                }
            )
        examples.append(example)
    return [*scores, label_score(labels, truth.labels, num_classes)], examples
