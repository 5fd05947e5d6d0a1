"""How close a reconstruction is to the truth: scores per example, matching, and chance levels.

The truth enters here and nowhere else.  Images are (N, C, H, W) pixels in [0, 1] on any
device; reconstructions are clamped to that box first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from scipy.special import bdtrc
from torch import Tensor

from leakaudit.errors import InputError, Unmeasurable
from leakaudit.results import Score

CHANCE_DRAWS = 8
"""Batches of unrelated images scored to find a metric's chance level."""


@dataclass(frozen=True)
class Metric:
    """`function` maps reconstructions and truths, both (N, C, H, W) in [0, 1], to (N,) scores.

    It raises `Unmeasurable` with the reason where it cannot be computed.
    """

    name: str
    unit: str
    higher_is_better: bool
    function: Callable[[Tensor, Tensor], Tensor]
    description: str = ""


@dataclass(frozen=True)
class BatchScores:
    """Scores of one batch of private examples.

    Attributes:
        matched: for each private example the index of the reconstruction matched to it, or
            -1 where there are fewer reconstructions than examples.
        scores: one mean over the batch a metric, with its chance level; then the
            identification rank where it can be had.
        per_example: for each private example, metric name -> score; None where not measured.
        chance_source: what the chance levels were measured with.
    """

    matched: tuple[int, ...]
    scores: list[Score]
    per_example: list[dict[str, float | None]]
    chance_source: str


def mse(reconstruction: Tensor, truth: Tensor) -> Tensor:
    """Mean squared error per example, (N,) float64."""
    return (reconstruction.double() - truth.double()).square().flatten(1).mean(1)


def psnr(reconstruction: Tensor, truth: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB for a peak of 1, (N,) float64; infinite when identical."""
    return -10 * mse(reconstruction, truth).log10()


def ssim(reconstruction: Tensor, truth: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004), (N,) float64, in [-1, 1].

    Gaussian window of 11 pixels with sigma 1.5, mean over the pixels whose window lies
    inside the image, as published (torchmetrics 1.9 by itself averages the reflected border
    too).  Images below 11x11 get the largest odd window that fits, 2 r + 1 pixels with
    sigma 0.3 r; below 3x3 there is none.
    """
    radius = min(5, (min(truth.shape[-2:]) - 1) // 2)
    if radius < 1:
        raise Unmeasurable(f"SSIM needs images of at least 3x3 pixels, got {_size(truth)}")
    from torchmetrics.functional.image import structural_similarity_index_measure  # seconds to import

    _, similarity = structural_similarity_index_measure(
        reconstruction.double(),
        truth.double(),
        sigma=0.3 * radius,
        data_range=1.0,
        reduction="none",
        return_full_image=True,
    )
    return similarity[..., radius:-radius, radius:-radius].flatten(1).mean(1)


def lpips_squeeze(reconstruction: Tensor, truth: Tensor) -> Tensor:
    """LPIPS v0.1 with SqueezeNet 1.1 (Zhang et al. 2018), (N,) float32, >= 0."""
    from leakaudit.perceptual import lpips_distance  # torchvision, which takes seconds to import

    return lpips_distance(reconstruction, truth, "squeeze")


def lpips_alex(reconstruction: Tensor, truth: Tensor) -> Tensor:
    """LPIPS v0.1 with AlexNet (Zhang et al. 2018), (N,) float32, >= 0."""
    from leakaudit.perceptual import lpips_distance

    return lpips_distance(reconstruction, truth, "alex")


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("mse", "", False, mse, "mean squared error, pixels in [0, 1]"),
        Metric("psnr", "dB", True, psnr, "peak signal-to-noise ratio"),
        Metric("ssim", "", True, ssim, "structural similarity, 11-pixel Gaussian window"),
        Metric("lpips", "", False, lpips_squeeze, "learned perceptual distance, SqueezeNet"),
        Metric("lpips-alex", "", False, lpips_alex, "learned perceptual distance, AlexNet"),
    )
}

DEFAULT_METRICS = ("mse", "psnr", "ssim", "lpips")


def match(reconstruction: Tensor, truth: Tensor) -> tuple[int, ...]:
    """For each truth the index of its reconstruction, by the smallest total MSE (Hungarian method).

    The numbers of images may differ; a truth that is left over gets -1.  Pixels that are
    not finite count as the worst match.
    """
    costs = torch.stack([mse(reconstruction, image.expand_as(reconstruction)) for image in truth])
    costs = costs.nan_to_num(nan=1e9, posinf=1e9)
    rows, columns = linear_sum_assignment(costs.cpu().numpy())
    found = dict(zip(rows.tolist(), columns.tolist(), strict=True))
    return tuple(found.get(index, -1) for index in range(len(truth)))


def score_batch(
    reconstruction: Tensor,
    truth: Tensor,
    metrics: Iterable[Metric] | None = None,
    *,
    pool: Tensor | None = None,
    generator: torch.Generator,
) -> BatchScores:
    """Match, then score every private example, with the chance level of each metric.

    Chance is what a guess scores in the same procedure: as many unrelated images as there
    are reconstructions, matched and scored in the same way, on average over `CHANCE_DRAWS`
    draws.  The unrelated images come from `pool`, or are uniform noise without one.

    Args:
        reconstruction: (M, C, H, W) pixels; clamped to [0, 1].
        truth: (N, C, H, W) pixels in [0, 1].
        metrics: None for `DEFAULT_METRICS`.
        pool: (P, C, H, W) distractors, for chance and for the identification rank; images
            of the truth among them are left out.
        generator: draws the unrelated images; on the CPU.

    Raises `InputError` for images that do not have the same shape.
    """
    truth, reconstruction = truth.detach().cpu(), reconstruction.detach().cpu().clamp(0, 1)
    pool = _distractors(pool, truth)
    if reconstruction.shape[1:] != truth.shape[1:]:
        raise InputError(f"reconstructions are {_size(reconstruction)}, the truth is {_size(truth)}")
    chosen = [METRICS[name] for name in DEFAULT_METRICS] if metrics is None else list(metrics)
    matched = match(reconstruction, truth)
    guesses = list(_guesses(len(reconstruction), truth, pool, generator))
    scores: list[Score] = []
    per_example: list[dict[str, float | None]] = [{} for _ in truth]
    for metric in chosen:
        try:
            values = _measure(metric, reconstruction, truth, matched)
            chance = _mean([_mean(_measure(metric, guess, truth, match(guess, truth))) for guess in guesses])
        except Unmeasurable as reason:
            scores.append(_score(metric, [None] * len(truth), None, str(reason)))
            values = [None] * len(truth)
        else:
            scores.append(_score(metric, values, chance, ""))
        for example, value in zip(per_example, values, strict=True):
            example[metric.name] = value
    ranks = identification_ranks(reconstruction, truth, matched, pool)
    scores.append(_rank_score(ranks, len(truth) + len(pool)))
    for example, rank in zip(per_example, ranks, strict=True):
        example["rank"] = rank
    return BatchScores(matched, scores, per_example, _chance_source(pool))


def identification_ranks(
    reconstruction: Tensor, truth: Tensor, matched: Sequence[int], pool: Tensor
) -> list[float | None]:
    """Rank of each true image by its MSE to its reconstruction, among `pool` and the other truths.

    1 says that the true image is the nearest.  A tie counts half, so a reconstruction
    that says nothing has the chance rank.  None without a distractor or a reconstruction.
    """
    candidates = torch.cat([truth, pool])
    if len(candidates) == 1:
        return [None]
    ranks: list[float | None] = []
    for index, found in enumerate(matched):
        if found < 0 or not bool(reconstruction[found].isfinite().all()):
            ranks.append(None)
            continue
        distances = mse(candidates, reconstruction[found].expand_as(candidates))
        nearer = (distances < distances[index]).sum()
        ties = (distances == distances[index]).sum() - 1
        ranks.append(1.0 + float(nearer) + float(ties) / 2)
    return ranks


def label_score(recovered: Tensor, true: Tensor, num_classes: int) -> Score:
    """Share of the true labels that were recovered, as multisets: order does not matter.

    Args:
        recovered: (M,) integers, or (M, K) probabilities, then the most probable class counts.
        true: (N,) integers in 0 .. num_classes - 1.

    Chance is the expected share for M labels drawn uniformly.
    """
    if recovered.dim() == 2:
        recovered = recovered.argmax(1)
    found, wanted = (
        torch.bincount(labels.cpu().long(), minlength=num_classes) for labels in (recovered, true)
    )
    drawn = len(recovered)
    expected = sum(
        float(bdtrc(np.arange(min(int(count), drawn)), drawn, 1 / num_classes).sum()) for count in wanted
    )
    return Score(
        metric="label-accuracy",
        value=float(torch.minimum(found, wanted).sum()) / len(true),
        chance=expected / len(true),
    )


def _distractors(pool: Tensor | None, truth: Tensor) -> Tensor:
    """The pool without images of the truth; (0, C, H, W) without a pool."""
    if pool is None:
        return truth[:0]
    pool = pool.detach().cpu().to(truth.dtype)
    if pool.shape[1:] != truth.shape[1:]:
        raise InputError(f"images of the pool are {_size(pool)}, the truth is {_size(truth)}")
    private = [bool((truth == image).flatten(1).all(1).any()) for image in pool]
    return pool[[index for index, same in enumerate(private) if not same]]


def _guesses(count: int, truth: Tensor, pool: Tensor, generator: torch.Generator) -> Iterator[Tensor]:
    """Batches of `count` unrelated images."""
    for _ in range(CHANCE_DRAWS):
        if len(pool) == 0:
            yield torch.rand((count, *truth.shape[1:]), generator=generator, dtype=truth.dtype)
        elif len(pool) < count:
            yield pool[torch.randint(len(pool), (count,), generator=generator)]
        else:
            yield pool[torch.randperm(len(pool), generator=generator)[:count]]


def _chance_source(pool: Tensor) -> str:
    return f"a pool of {len(pool)} unrelated images" if len(pool) else "uniform noise images"


def _measure(
    metric: Metric, reconstruction: Tensor, truth: Tensor, matched: Sequence[int]
) -> list[float | None]:
    """One score a private example; None where it has no reconstruction, or one that is not finite."""
    present = [index for index, found in enumerate(matched) if found >= 0]
    scores = metric.function(reconstruction[[matched[index] for index in present]], truth[present])
    values = dict(zip(present, scores.tolist(), strict=True))
    return [None if math.isnan(values.get(index, math.nan)) else values[index] for index in range(len(truth))]


def _mean(values: Sequence[float | None]) -> float | None:
    measured = [value for value in values if value is not None]
    return sum(measured) / len(measured) if measured else None


def _score(metric: Metric, values: Sequence[float | None], chance: float | None, reason: str) -> Score:
    absent = sum(value is None for value in values)
    return Score(
        metric=metric.name,
        value=_mean(values),
        unit=metric.unit,
        higher_is_better=metric.higher_is_better,
        chance=chance,
        reason=reason
        or (f"{absent} of {len(values)} examples have no finite reconstruction" if absent else ""),
    )


def _rank_score(ranks: Sequence[float | None], candidates: int) -> Score:
    measured = candidates > 1
    return Score(
        metric="identification-rank",
        value=_mean(ranks),
        unit=f"of {candidates}",
        higher_is_better=False,
        chance=(candidates + 1) / 2 if measured else None,
        reason="" if measured else "no pool of other images to tell the true one from",
    )


def _size(images: Tensor) -> str:
    return "x".join(str(side) for side in images.shape[1:])
