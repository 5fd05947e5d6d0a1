"""Private images: model inputs are normalised pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import Tensor

from leakaudit.attacks.base import OnStep, Reconstruction
from leakaudit.attacks.registry import AUTO
from leakaudit.data import PrivateBatch, control_photos, load_batch, load_truth, save_truth
from leakaudit.errors import InputError
from leakaudit.formats.manifest import Manifest
from leakaudit.hypotheses import Sweep, settle
from leakaudit.illustration import Yardstick, hard_labels, thinned
from leakaudit.inspection import inspect_update
from leakaudit.media.base import Exhibit, check_count
from leakaudit.metrics import DEFAULT_METRICS, METRICS, BatchScores, label_score, score_batch
from leakaudit.models.spaces import Pixels
from leakaudit.models.victim import Victim
from leakaudit.photos import distractors
from leakaudit.randomness import fork
from leakaudit.report.pictures import contact_sheet, difference, write_png
from leakaudit.results import ExampleScores, Finding, Frame, Verification
from leakaudit.threat import View
from leakaudit.verification import verify


@dataclass(frozen=True)
class Images:
    """The medium of `Pixels`; a pool is (P, C, H, W) pixels in [0, 1]."""

    name: ClassVar[Literal["images"]] = "images"
    specimen: ClassVar[str] = "photo"
    auto: ClassVar[tuple[str, ...]] = AUTO
    metrics: ClassVar[tuple[str, ...]] = DEFAULT_METRICS
    known_metrics: ClassVar[tuple[str, ...]] = tuple(METRICS)
    facts_left_out: ClassVar[frozenset[str]] = frozenset()

    inspect = staticmethod(inspect_update)

    def load(
        self,
        source: str | Path,
        victim: Victim,
        count: int | None,
        *,
        start: int = 0,
        max_length: int | None = None,
        seed: int = 0,
    ) -> PrivateBatch:
        return load_batch(source, victim.space.shape, count, start=start, classes=victim.num_classes)

    def save_truth(self, path: str | Path, batch: PrivateBatch) -> None:
        save_truth(path, batch)

    def advice(self, victim: Victim, *, saved: bool) -> list[str]:
        return []

    def tensors(self, victim: Victim, batch: PrivateBatch) -> tuple[Tensor, Tensor]:
        shape = tuple(batch.pixels.shape[1:])
        if shape != victim.space.shape:
            raise InputError(f"images of shape {shape} for inputs of {victim.space.shape}")
        if int(batch.labels.max()) >= victim.num_classes:
            raise InputError(f"label {int(batch.labels.max())} for a model of {victim.num_classes} classes")
        x = victim.space.encode(batch.pixels.to(victim.device, victim.dtype))
        return x, batch.labels.to(victim.device)

    def manifest_fields(self, victim: Victim) -> dict[str, Any]:
        space = victim.space
        return {
            "normalisation": None if space.mean is None else {"mean": space.mean, "std": space.std},
            "input_shape": space.shape,
            "num_classes": victim.num_classes,
        }

    def task(self, victim: Victim) -> None:
        return None

    def read_truth(self, path: str | Path, view: View) -> PrivateBatch:
        truth = load_truth(path)
        shape = tuple(truth.pixels.shape[1:])
        if shape != view.victim.space.shape:
            raise InputError(
                f"{path} holds images of shape {shape}, the model takes {view.victim.space.shape}"
            )
        check_count(path, len(truth), "image", view)
        return truth

    def read_pool(self, path: str | Path | None, view: View) -> Tensor:
        if path is None:
            return distractors(view.victim.space)
        return load_batch(path, view.victim.space.shape, None).pixels

    def remarks(self, victim: Victim, manifest: Manifest) -> list[Finding]:
        return []

    def settle(
        self, view: View, seed: int, on_step: OnStep | None, budget: float | None
    ) -> tuple[View, Sweep]:
        return settle(view, seed, on_step, budget)

    def verify(self, view: View, x: Tensor, y: Tensor) -> Verification:
        return verify(view, x, y)

    def measure(
        self,
        found: Reconstruction,
        view: View,
        yardstick: Yardstick[PrivateBatch, Tensor],
        names: Sequence[str],
    ) -> BatchScores:
        assert yardstick.truth is not None
        return score_batch(
            shown(view.victim.space, found.x),
            yardstick.truth.pixels,
            [METRICS[name] for name in names],
            pool=yardstick.pool,
            generator=fork(yardstick.seed, "chance"),
        )

    def exhibit(
        self,
        found: Reconstruction,
        view: View,
        yardstick: Yardstick[PrivateBatch, Tensor],
        folder: Path,
        attack: str,
        *,
        best: bool,
    ) -> Exhibit:
        album = Album(folder, attack)
        pixels, labels = shown(view.victim.space, found.x), hard_labels(found.y)
        strip = album.strip(view.victim.space, found)
        truth = yardstick.truth
        if truth is None:
            return Exhibit(examples=_unmatched(pixels, labels, album), strip=strip)
        scored = self.measure(found, view, yardstick, yardstick.metrics)
        examples = _matched(pixels, labels, truth, scored, album, show=not yardstick.redact, best=best)
        scores = [*scored.scores, label_score(labels, truth.labels, view.victim.num_classes)]
        return Exhibit(scores, examples, strip)

    def control(self, view: View) -> PrivateBatch:
        photo = control_photos(view.victim.space.shape).first(1)
        return replace(photo, labels=photo.labels % view.victim.num_classes)

    def contents(self, found: Reconstruction, view: View) -> tuple[dict[str, Tensor], dict[str, str]]:
        pixels = view.victim.space.decode(found.x)
        return {"pixels": pixels, "inputs": found.x, "labels": found.y}, {}


IMAGES = Images()


def shown(space: Pixels, x: Tensor) -> Tensor:
    """Model inputs as float32 pixels on the CPU, clamped to [0, 1]."""
    return space.decode(x.detach().cpu().float()).clamp(0, 1)


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
        for position, (iteration, loss, x) in enumerate(thinned(found.strip)):
            sheet = contact_sheet(shown(space, x).permute(0, 2, 3, 1).numpy())
            relative = f"images/{self._attack}-strip-{position:02d}.png"
            write_png(sheet, self._folder / relative)
            frames.append(Frame(iteration=iteration, loss=loss, image=relative))
        return frames


def _array(image: Tensor):  # type: ignore[no-untyped-def]
    return image.detach().cpu().permute(1, 2, 0).numpy()


def _unmatched(pixels: Tensor, labels: Tensor, album: Album) -> list[ExampleScores]:
    return [
        ExampleScores(
            index=i,
            matched=i,
            recovered_label=str(int(labels[i])),
            reconstruction=album.picture(f"{i:03d}", image),
        )
        for i, image in enumerate(pixels)
    ]


def _matched(
    pixels: Tensor,
    labels: Tensor,
    truth: PrivateBatch,
    scored: BatchScores,
    album: Album,
    *,
    show: bool,
    best: bool,
) -> list[ExampleScores]:
    """Every private example beside its reconstruction; pictures of the truth only where it is to `show`."""
    examples = []
    for i, (values, j) in enumerate(zip(scored.per_example, scored.matched, strict=True)):
        example = ExampleScores(
            index=i,
            matched=j,
            true_label=truth.label_name(i),
            scores=values,
        )
        if show:
            path = album.picture(f"original-{i:03d}", truth.pixels[i], shared=True)
            example = example.model_copy(update={"original": path})
        if j >= 0:
            example = example.model_copy(
                update={
                    "recovered_label": truth.class_name(int(labels[j])),
                    "reconstruction": album.picture(f"{j:03d}", pixels[j]),
                    "difference": album.difference(f"difference-{i:03d}", truth.pixels[i], pixels[j])
                    if best and show
                    else None,
                }
            )
        examples.append(example)
    return examples
