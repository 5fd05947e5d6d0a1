"""Property inference: its regression against brute force, and what it tells of real pictures."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_audits import SPACE, victim_of

from leakaudit.data import PrivateBatch
from leakaudit.defenses.naming import parse_all
from leakaudit.inference.base import Records
from leakaudit.inference.experiment import Plan, infer_membership
from leakaudit.inference.properties import discriminant, mixed_rows
from leakaudit.inference.traits import has_trait
from leakaudit.inference_results import InferenceResult
from leakaudit.rounds import Round


def fork(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def crops(photos: torch.Tensor, repeats: int = 3) -> PrivateBatch:
    """Crops of real photographs, 8x8, mirrored and turned to be more, labelled at random."""
    small = torch.nn.functional.interpolate(photos, size=(8, 8), mode="area")
    pixels = torch.cat([torch.rot90(small, turn, (2, 3)) for turn in range(repeats)])
    labels = torch.randint(5, (len(pixels),), generator=fork(1))
    order = torch.randperm(len(pixels), generator=fork(2))
    names = tuple(f"{i}.png" for i in range(len(pixels)))
    return PrivateBatch(pixels[order], labels[order], names)


def auc(result: InferenceResult) -> tuple[float, float, float]:
    rate = result.outcomes[0].rate("auc")
    assert rate is not None
    assert rate.value is not None
    assert rate.low is not None
    assert rate.high is not None
    return rate.value, rate.low, rate.high


def test_the_regression_is_the_ridge_of_least_error_left_out() -> None:
    generator = fork(3)
    labels = torch.tensor([1.0, -1.0]).double().repeat(10)
    table = torch.randn(20, 6, generator=generator, dtype=torch.float64) + 0.4 * labels[:, None]
    table = table - table.mean(0)
    asked = torch.randn(6, generator=generator, dtype=torch.float64)
    X, y = table.numpy(), labels.numpy()

    def ridge(rows: np.ndarray, target: np.ndarray, strength: float) -> np.ndarray:
        return np.linalg.solve(rows.T @ rows + strength * np.eye(6), rows.T @ target)

    grid = np.logspace(-6, 2, 17) * np.linalg.eigvalsh(X @ X.T).max()
    errors = [
        sum((y[i] - X[i] @ ridge(np.delete(X, i, 0), np.delete(y, i), strength)) ** 2 for i in range(20))
        for strength in grid
    ]
    expected = asked.numpy() @ ridge(X, y, grid[int(np.argmin(errors))])
    assert float(discriminant(table, labels, asked)) == pytest.approx(expected, rel=1e-6)


def test_batches_have_the_share_asked_for() -> None:
    flags = torch.tensor([True] * 5 + [False] * 10)
    for share, wanted in ((0.0, 0), (0.5, 4), (0.51, 4), (1.0, 7)):
        rows = mixed_rows(flags, 7, share, fork())
        assert len(rows) == 7
        assert int(flags[rows].sum()) == wanted
        assert len(set(rows.tolist())) == 7 or wanted > 5


def test_a_trait_says_nothing_about_the_label(photo_crops: torch.Tensor) -> None:
    batch = crops(photo_crops)
    flags = has_trait(victim_of("smooth"), Records(SPACE.encode(batch.pixels), batch.labels), "bright")
    brightness = batch.pixels.mean((1, 2, 3))
    for label in range(5):
        own = batch.labels == label
        assert abs(float(flags[own].double().mean()) - 0.5) < 0.05
        assert float(brightness[own & flags].min()) >= float(brightness[own & ~flags].max())


@pytest.mark.parametrize("trait", ["bright", "colourful"])
def test_the_property_of_a_batch_shows_in_its_update(trait: str, photo_crops: torch.Tensor) -> None:
    plan = Plan(("property:updates=64",), 96, 96, trials=60, trait=trait)
    result = infer_membership(victim_of("smooth"), crops(photo_crops), Round(2), (), plan)
    outcome = result.outcomes[0]
    assert (outcome.positives, outcome.negatives, outcome.property) == (30, 30, trait)
    found, low, _ = auc(result)
    assert found > 0.7
    assert low > 0.55
    tpr = outcome.rate("tpr01")
    assert tpr is not None
    assert tpr.value is None
    assert "at least 100 non-members, got 30" in tpr.reason


def test_under_strong_noise_it_does_not(photo_crops: torch.Tensor) -> None:
    plan = Plan(("property:updates=16",), 96, 96, trials=24)
    noise = parse_all(["gaussian-noise:std=10"])
    _, low, high = auc(infer_membership(victim_of("smooth"), crops(photo_crops), Round(8), noise, plan))
    assert low <= 0.5 <= high


def test_labels_drawn_by_lot_are_not_found(
    photo_crops: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The null: the property means nothing, so neither reference nor batch can show it."""
    from leakaudit.inference import traits

    lots = {"bright": lambda pixels: torch.rand(len(pixels), generator=fork(8))}
    monkeypatch.setattr(traits, "IMAGE_TRAITS", lots)
    plan = Plan(("property:updates=24",), 96, 96, trials=30)
    _, low, high = auc(infer_membership(victim_of("smooth"), crops(photo_crops), Round(8), (), plan))
    assert low <= 0.55
    assert high >= 0.45


def test_too_few_records_of_a_kind_are_a_reason(photo_crops: torch.Tensor) -> None:
    plan = Plan(("property",), 100, 6, trials=2)
    outcome = infer_membership(victim_of("smooth"), crops(photo_crops), Round(4), (), plan).outcomes[0]
    assert "with and without the property" in outcome.skipped
    assert outcome.rates == []
