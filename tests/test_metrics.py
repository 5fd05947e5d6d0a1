"""Scores against independent implementations, matching, chance levels and ranks."""

from __future__ import annotations

import itertools
import math
import urllib.error
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torchmetrics.functional.image as tm
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.metrics import mean_squared_error, peak_signal_noise_ratio, structural_similarity

from leakaudit import metrics, perceptual
from leakaudit.errors import InputError, Unmeasurable
from leakaudit.metrics import METRICS, Metric, label_score, match, score_batch

TORCH_HOME = Path(__file__).parents[1].parent / "shared" / "data" / "torch_home"
PIXEL = [METRICS[name] for name in ("mse", "psnr", "ssim")]


def images(count: int, channels: int = 3, side: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, channels, side, side, generator=torch.Generator().manual_seed(seed))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def fresh_lpips() -> Iterator[None]:
    perceptual.lpips_model.cache_clear()
    yield
    perceptual.lpips_model.cache_clear()


def refuse_downloads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """No network; returns the list of addresses that will be asked for."""
    asked: list[str] = []

    def refuse(url: str, *_: object, **__: object) -> None:
        asked.append(url)
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    return asked


@pytest.fixture
def lpips_weights(monkeypatch: pytest.MonkeyPatch, fresh_lpips: None) -> None:
    if not TORCH_HOME.is_dir():
        pytest.skip("shared data are absent")
    monkeypatch.setenv("TORCH_HOME", str(TORCH_HOME))
    refuse_downloads(monkeypatch)


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fresh_lpips: None) -> list[str]:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    return refuse_downloads(monkeypatch)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1000),
    channels=st.sampled_from([1, 3]),
    side=st.integers(11, 40),
    noise=st.floats(1e-4, 1.0),
)
def test_pixel_scores_equal_scikit_image(seed: int, channels: int, side: int, noise: float) -> None:
    truth = images(2, channels, side, seed).double()
    found = (truth + noise * (images(2, channels, side, seed + 1).double() - 0.5)).clamp(0, 1)
    for index, (a, b) in enumerate(zip(found.numpy(), truth.numpy(), strict=True)):
        assert float(metrics.mse(found, truth)[index]) == pytest.approx(mean_squared_error(a, b))
        assert float(metrics.psnr(found, truth)[index]) == pytest.approx(
            peak_signal_noise_ratio(b, a, data_range=1)
        )
        expected = structural_similarity(
            a, b, data_range=1, channel_axis=0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
        assert float(metrics.ssim(found, truth)[index]) == pytest.approx(expected, abs=1e-9)


def test_scores_equal_torchmetrics() -> None:
    truth, found = images(4), images(4, seed=1)
    expected = tm.peak_signal_noise_ratio(found, truth, data_range=1.0, reduction="none", dim=(1, 2, 3))
    torch.testing.assert_close(metrics.psnr(found, truth).float(), expected)


def test_labels_by_chance_where_fewer_are_recovered_than_there_are() -> None:
    """Of 3 and 1 examples of two classes, one label drawn of 4: it is right with probability 1/2."""
    score = label_score(torch.tensor([0]), torch.tensor([0, 0, 0, 1]), 4)
    assert score.chance == pytest.approx(0.5 / 4)


@pytest.mark.parametrize("side", range(3, 12))
def test_ssim_of_tiny_images_uses_the_window_that_fits(side: int) -> None:
    truth, found = images(2, 1, side).double(), images(2, 1, side, seed=1).double()
    radius = min(5, (side - 1) // 2)
    expected = structural_similarity(
        found[0, 0].numpy(),
        truth[0, 0].numpy(),
        data_range=1,
        gaussian_weights=True,
        sigma=0.3 * radius,
        use_sample_covariance=False,
        win_size=2 * radius + 1,
        truncate=3.5,
    )
    assert float(metrics.ssim(found, truth)[0]) == pytest.approx(expected, abs=1e-9)


def test_ssim_below_three_pixels_is_not_measured() -> None:
    with pytest.raises(Unmeasurable, match="at least 3x3 pixels, got 1x2x2"):
        metrics.ssim(images(1, 1, 2), images(1, 1, 2))


def test_identical_images_have_the_best_scores() -> None:
    truth = images(2)
    scores = {
        score.metric: score.value for score in score_batch(truth, truth, PIXEL, generator=generator()).scores
    }
    assert scores["mse"] == 0
    assert scores["psnr"] == math.inf
    assert scores["ssim"] == pytest.approx(1)


def test_psnr_beyond_float32_is_kept() -> None:
    truth = images(1).double() * 0.5
    assert float(metrics.psnr(truth + 1e-9, truth)) == pytest.approx(180, abs=1e-3)


def test_reconstructions_are_clamped_to_the_box() -> None:
    truth = torch.ones(1, 3, 4, 4)
    scores = score_batch(truth * 7, truth, [METRICS["mse"]], generator=generator())
    assert scores.scores[0].value == 0


def test_lpips_gives_the_value_torchmetrics_documents(lpips_weights: None) -> None:
    """0.1024 and 0.0938 in torchmetrics' docstring, there from images in [-1, 1]."""
    seeded = generator(42)
    first, second = (torch.rand(2, 3, 100, 100, generator=seeded) for _ in range(2))
    assert metrics.lpips_squeeze(first, second).tolist() == pytest.approx([0.1024, 0.0938], abs=1e-4)


def test_lpips_takes_grey_and_tiny_images(lpips_weights: None) -> None:
    grey, other = images(2, 1, 28), images(2, 1, 28, seed=1)
    values = metrics.lpips_squeeze(grey, other)
    torch.testing.assert_close(
        values, metrics.lpips_squeeze(grey.expand(-1, 3, -1, -1), other.expand(-1, 3, -1, -1))
    )
    assert bool((values > 0.01).all())
    assert float(metrics.lpips_squeeze(images(1, 3, 5), images(1, 3, 5)).abs()) < 1e-6


def test_lpips_is_built_once(lpips_weights: None) -> None:
    metrics.lpips_squeeze(images(1, 3, 32), images(1, 3, 32))
    metrics.lpips_squeeze(images(1, 3, 32), images(1, 3, 32))
    assert perceptual.lpips_model.cache_info().misses == 1


def test_lpips_without_weights_is_not_measured_with_the_reason(
    no_weights: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    truth = images(2, 3, 32)
    for _ in range(2):
        scores = score_batch(truth, truth, generator=generator())
    lpips = next(score for score in scores.scores if score.metric == "lpips")
    assert (lpips.value, lpips.chance) == (None, None)
    assert "cannot be had" in lpips.reason
    assert "no network" in lpips.reason
    assert [example["lpips"] for example in scores.per_example] == [None, None]
    assert len(no_weights) == 1, "a dead network is asked once a process"
    assert capfd.readouterr() == ("", "")


def test_lpips_of_other_channel_counts_is_not_measured() -> None:
    scores = score_batch(images(1, 4), images(1, 4), [METRICS["lpips"]], generator=generator())
    assert scores.scores[0].reason == "LPIPS needs 1 or 3 channels, got 4"


@settings(max_examples=30, deadline=None)
@given(order=st.permutations(range(5)), seed=st.integers(0, 100))
def test_scores_do_not_depend_on_the_order_of_the_reconstructions(order: list[int], seed: int) -> None:
    truth = images(5, 1, 8, seed)
    found = (truth + 0.3 * images(5, 1, 8, seed + 1)).clamp(0, 1)
    plain = score_batch(found, truth, PIXEL, generator=generator(seed))
    shuffled = score_batch(found[order], truth, PIXEL, generator=generator(seed))
    assert shuffled.per_example == plain.per_example
    assert shuffled.scores == plain.scores
    assert [order[index] for index in shuffled.matched] == list(plain.matched)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), count=st.integers(1, 5))
def test_matching_is_the_cheapest_of_all_permutations(seed: int, count: int) -> None:
    truth, found = images(count, 1, 3, seed), images(count, 1, 3, seed + 1)

    def cost(order: tuple[int, ...]) -> float:
        return float(metrics.mse(found[list(order)], truth).sum())

    assert cost(match(found, truth)) == pytest.approx(min(map(cost, itertools.permutations(range(count)))))


def test_too_few_reconstructions_leave_examples_unmatched() -> None:
    truth = images(3)
    scores = score_batch(truth[[2]], truth, PIXEL, generator=generator())
    assert scores.matched == (-1, -1, 0)
    assert [example["mse"] for example in scores.per_example] == [None, None, 0.0]
    assert scores.scores[0].reason == "2 of 3 examples have no finite reconstruction"


def test_too_many_reconstructions_are_matched_to_the_nearest() -> None:
    truth = images(2)
    assert match(torch.cat([images(3, seed=5), truth]), truth) == (3, 4)


def test_a_reconstruction_of_nan_is_not_measured() -> None:
    truth = images(2)
    found = truth.clone()
    found[1, 0, 0, 0] = float("nan")
    scores = score_batch(found, truth, PIXEL, pool=images(4, seed=3), generator=generator())
    assert scores.matched == (0, 1)
    assert set(scores.per_example[1].values()) == {None}
    assert scores.scores[0].value == 0
    assert "1 of 2 examples" in scores.scores[0].reason


def test_chance_is_what_uniform_noise_scores() -> None:
    """The truth is grey 0.5: uniform noise has MSE 1/12 to it, 10.79 dB."""
    truth = torch.full((1, 3, 32, 32), 0.5)
    scores = score_batch(truth, truth, PIXEL, generator=generator())
    chance = {score.metric: score.chance for score in scores.scores}
    assert chance["mse"] == pytest.approx(1 / 12, rel=0.02)
    assert chance["psnr"] == pytest.approx(10 * math.log10(12), abs=0.1)
    assert scores.chance_source == "uniform noise images"


def test_chance_is_the_score_of_images_from_the_pool_matched_alike() -> None:
    """Two truths, black and white, and a pool of light and dark grey: matched, each is 0.1 or 0.8 away."""
    truth = torch.stack([torch.zeros(1, 4, 4), torch.ones(1, 4, 4)])
    pool = torch.stack([torch.full((1, 4, 4), 0.9), torch.full((1, 4, 4), 0.2)])
    scores = score_batch(truth, truth, [METRICS["mse"]], pool=pool, generator=generator())
    assert scores.scores[0].chance == pytest.approx((0.2**2 + 0.1**2) / 2)
    assert scores.chance_source == "a pool of 2 unrelated images"


def test_private_images_in_the_pool_are_left_out() -> None:
    truth = images(2)
    scores = score_batch(
        truth, truth, PIXEL, pool=torch.cat([truth, images(3, seed=2)]), generator=generator()
    )
    assert scores.scores[-1].unit == "of 5"
    assert scores.chance_source == "a pool of 3 unrelated images"


def test_a_random_reconstruction_scores_its_chance_level() -> None:
    """The chance level is unbiased: guesses from the same pool score the same on average."""
    pool, truth = images(40, 1, 6, seed=1), images(3, 1, 6, seed=2)
    chances, values = [], []
    for seed in range(60):
        guess = pool[torch.randperm(40, generator=generator(1000 + seed))[:3]]
        scores = score_batch(guess, truth, [METRICS["mse"]], pool=pool, generator=generator(seed)).scores
        values.append(scores[0].value)
        chances.append(scores[0].chance)
    assert np.mean(values) == pytest.approx(np.mean(chances), rel=0.02)


def test_identification_rank_counts_the_nearer_images() -> None:
    level = torch.tensor([0.0, 0.1, 0.2, 0.9]).view(-1, 1, 1, 1)
    truth, pool = level[2:3], level[[0, 1, 3]]
    scores = score_batch(torch.zeros(1, 1, 1, 1), truth, [], pool=pool, generator=generator())
    assert scores.per_example == [{"rank": 3.0}]
    rank = scores.scores[-1]
    assert (rank.metric, rank.value, rank.unit, rank.chance) == ("identification-rank", 3.0, "of 4", 2.5)
    assert not rank.higher_is_better


def test_rank_of_guesses_is_the_chance_rank() -> None:
    everything = images(60, 1, 4, seed=7)
    ranks = []
    for index in range(60):
        others = torch.cat([everything[:index], everything[index + 1 :]])
        scores = score_batch(
            images(1, 1, 4, seed=9), everything[index : index + 1], [], pool=others, generator=generator()
        )
        ranks.append(scores.scores[-1].value)
    assert sorted(ranks) == list(range(1, 61))
    assert np.mean(ranks) == scores.scores[-1].chance


def test_a_tie_counts_half() -> None:
    pool = images(1, 1, 2).expand(6, -1, -1, -1).clone()
    truth = pool[:1].clone()
    ranks = metrics.identification_ranks(truth * 0, truth, [0], pool)
    assert ranks == [4.0]


def test_rank_without_other_images_is_not_measured() -> None:
    scores = score_batch(images(1), images(1), [], generator=generator())
    assert scores.scores[-1].value is None
    assert scores.scores[-1].reason
    assert scores.per_example == [{"rank": None}]


@settings(max_examples=60, deadline=None)
@given(data=st.data(), classes=st.integers(2, 6), count=st.integers(1, 8))
def test_label_accuracy_is_the_overlap_of_multisets(data: st.DataObject, classes: int, count: int) -> None:
    labels = st.lists(st.integers(0, classes - 1), min_size=count, max_size=count)
    recovered, true = data.draw(labels), data.draw(labels)
    score = label_score(torch.tensor(recovered), torch.tensor(true), classes)
    assert score.value == sum((Counter(recovered) & Counter(true)).values()) / count


@pytest.mark.parametrize("true", [[0], [1, 1], [0, 1], [2, 2, 0]])
def test_label_chance_is_exact(true: list[int]) -> None:
    """Against all equally likely guesses, counted out."""
    guesses = itertools.product(range(3), repeat=len(true))
    overlap = [sum((Counter(guess) & Counter(true)).values()) / len(true) for guess in guesses]
    score = label_score(torch.zeros(len(true)), torch.tensor(true), 3)
    assert score.chance == pytest.approx(np.mean(overlap))


def test_label_probabilities_count_as_their_most_probable_class() -> None:
    probabilities = torch.tensor([[0.1, 0.9], [0.8, 0.2]])
    assert label_score(probabilities, torch.tensor([0, 1]), 2).value == 1


@pytest.mark.parametrize("wrong", ["reconstruction", "pool"])
def test_images_of_another_shape_are_refused(wrong: str) -> None:
    truth, other = images(1), images(1, side=8)
    with pytest.raises(InputError, match=r"3x8x8, the truth is 3x16x16"):
        score_batch(
            other if wrong == "reconstruction" else truth,
            truth,
            pool=other if wrong == "pool" else None,
            generator=generator(),
        )


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
def test_every_metric_prefers_the_truth_to_noise(metric: Metric, lpips_weights: None) -> None:
    truth, noise = images(3, side=32), images(3, side=32, seed=1)
    try:
        best, worse = metric.function(truth, truth), metric.function(noise, truth)
    except Unmeasurable as reason:
        pytest.skip(str(reason))
    assert best.shape == worse.shape == (3,)
    assert bool(((best > worse) if metric.higher_is_better else (best < worse)).all())
    assert metric.description
