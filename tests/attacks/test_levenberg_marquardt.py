"""Levenberg-Marquardt on small real networks: machine precision, and every protocol it claims."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_audits import Asked
from torch import Tensor

from leakaudit import spec
from leakaudit.attacks.base import Monitor
from leakaudit.attacks.jacobian import System
from leakaudit.attacks.levenberg_marquardt import (
    LevenbergMarquardt,
    choose_labels,
    smoothness_matrix,
)
from leakaudit.attacks.matching import squared
from leakaudit.errors import InputError
from leakaudit.models.spaces import Pixels
from leakaudit.models.victim import Victim
from leakaudit.models.vision import Activation, LeNet, initialise_uniform
from leakaudit.randomness import fork
from leakaudit.rounds import Round, client_update
from leakaudit.threat import Knowledge, View, known
from leakaudit.verification import verify

SHAPE = (3, 8, 8)
CLASSES = 10
ATTACK = LevenbergMarquardt()


def capture(
    round: Round, seed: int = 0, activation: Activation = "tanh", **facts: Any
) -> tuple[View, Tensor, Tensor]:
    """DLG's LeNet: sigmoid with its own initialisation, others with the framework's."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = LeNet(CLASSES, SHAPE, activation)
    if activation == "sigmoid":
        initialise_uniform(module, fork(seed, "model"))
    victim = Victim.of(module, Pixels(SHAPE, (0.5,) * 3, (0.25,) * 3), CLASSES)
    generator = fork(seed, "data")
    coarse = torch.rand((round.num_examples, 3, 4, 4), generator=generator)
    pixels = torch.nn.functional.interpolate(coarse, size=SHAPE[1:], mode="bilinear")
    x, y = victim.space.encode(pixels), torch.randperm(CLASSES, generator=generator)[: round.num_examples]
    observed = client_update(victim, victim.params, round, x, y).detach()
    return View(victim, round, observed, Knowledge(**facts)), x, y


def told(y: Tensor) -> dict[str, Any]:
    return {"labels": known(y, "test")}


def error(found: Tensor, truth: Tensor) -> float:
    return float((found - truth).square().mean())


@pytest.mark.parametrize(
    ("activation", "seed"),
    [("sigmoid", 1), ("sigmoid", 2), ("gelu", 0), ("silu", 0), ("tanh", 0), ("softplus", 0)],
)
def test_one_example_to_rounding_precision_with_the_label_inferred(activation: Activation, seed: int) -> None:
    view, x, y = capture(Round(1), seed, activation)
    found = replace(ATTACK, spectrum=True).run(view, fork(seed, "attack"), Monitor())
    assert error(found.x, x) < 1e-8
    assert torch.equal(found.y, y)
    assert found.stopped == "converged"
    assert found.details["rank"] == found.details["unknowns"] == 192
    assert found.details["labels"] == "sign of the bias gradient"
    assert 0 < found.details["cramer_rao_rms"] < 10


@pytest.mark.parametrize("scale", [True, False])
def test_verification_says_what_the_own_spectrum_does(scale: bool) -> None:
    """Known noise gives both the same equations and weights; rank and Cramer-Rao must agree."""
    clean, _, y = capture(Round(1), seed=1)
    std = 0.001
    noisy = clean.observed.map(lambda g: g + std * torch.randn(g.shape, generator=fork(1, "dp")))
    facts = Knowledge(noise_std=known(std, "test"), scale=known(scale, "test"), **told(y))
    view = replace(clean, observed=noisy, knowledge=facts)
    attack = replace(ATTACK, smoothness=0.0)
    brief, full = (replace(attack, spectrum=on).run(view, fork(0, "a"), Monitor()) for on in (False, True))
    assert full.details.items() > brief.details.items()
    assert "rank" not in brief.details
    check = verify(view, full.x, full.y)
    assert check.rank == full.details["rank"] == 192
    assert check.cramer_rao == pytest.approx(full.details["cramer_rao_rms"], rel=0.05)
    assert check.smallest_singular_value == pytest.approx(full.details["smallest_singular_value"], rel=0.05)


def test_float64_update_to_machine_precision() -> None:
    view, x, y = capture(Round(1))
    exact = view.to(dtype=torch.float64)
    exact = replace(exact, observed=exact.simulate(x.double(), y).detach())
    found = ATTACK.run(exact, fork(0, "attack"), Monitor())
    assert error(found.x, x.double()) < 1e-24


ROUNDS = {
    "batch": Round(2),
    "local steps": Round(2, local_steps=3, learning_rate=0.1),
    "local batches": Round(2, local_steps=2, local_batch_size=1, learning_rate=0.1),
}


@pytest.mark.parametrize("round", ROUNDS.values(), ids=list(ROUNDS))
def test_batches_and_local_steps(round: Round) -> None:
    view, x, y = capture(round)
    view = replace(view, knowledge=Knowledge(**told(y)))
    found = ATTACK.run(view, fork(0, "attack"), Monitor())
    assert error(found.x, x) < 1e-8
    assert view.residual(found.x.float(), found.y) < 1e-5


def test_scale_free_update() -> None:
    view, x, _ = capture(Round(1), scale=known(False, "test"))
    view = replace(view, observed=view.observed * 1234.5)
    assert error(ATTACK.run(view, fork(0, "attack"), Monitor()).x, x) < 1e-8


def test_labels_found_jointly() -> None:
    view, x, y = capture(Round(2))
    found = ATTACK.run(view, fork(0, "attack"), Monitor())
    assert found.details["labels"] == "found jointly"
    assert found.y.shape == (2, CLASSES)
    order = found.y.argmax(1).argsort()
    assert torch.equal(found.y.argmax(1)[order], y.sort().values)
    assert error(found.x[order], x[y.argsort()]) < 1e-6


def test_known_noise_makes_it_maximum_a_posteriori() -> None:
    """Without a prior it reaches the Cramer-Rao figure; the prior beats it, and the truth's objective."""
    clean, x, y = capture(Round(1), seed=1)
    std = 0.01
    noisy = clean.observed.map(lambda g: g + std * torch.randn(g.shape, generator=fork(1, "dp")))
    view = replace(clean, observed=noisy, knowledge=Knowledge(noise_std=known(std, "test"), **told(y)))
    with_prior = ATTACK.run(view, fork(0, "attack"), Monitor())
    without = replace(ATTACK, smoothness=0.0, spectrum=True).run(view, fork(0, "attack"), Monitor())
    pixel_error = 0.25 * error(without.x, x) ** 0.5
    assert without.details["cramer_rao_noise"] == "the known noise"
    assert pixel_error == pytest.approx(without.details["cramer_rao_rms"], rel=0.25)
    assert error(with_prior.x, x) < 0.5 * error(without.x, x)

    def objective(candidate: Tensor) -> float:
        matching = float(squared(clean.simulate(candidate, y), noisy)) / std**2
        pixels = view.victim.space.decode(candidate)
        differences = pixels.diff(dim=-1).square().sum() + pixels.diff(dim=-2).square().sum()
        return matching + float(differences) / ATTACK.smoothness**2

    assert objective(with_prior.x.float()) < objective(x)
    assert float(view.victim.space.decode(with_prior.x).min()) >= -1e-6


def test_rank_deficiency_is_filled_with_the_smoothest_solution() -> None:
    """Two strided layers of four channels leave directions open: 12 dB better, at the same residual."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        body = torch.nn.Sequential(
            torch.nn.Conv2d(3, 4, 5, 2, 2), torch.nn.Tanh(), torch.nn.Conv2d(4, 4, 5, 2, 2)
        )
        module = torch.nn.Sequential(body, torch.nn.Tanh(), torch.nn.Flatten(), torch.nn.Linear(16, CLASSES))
    victim = Victim.of(module, Pixels(SHAPE, (0.0,) * 3, (1.0,) * 3), CLASSES)
    ramp = torch.linspace(0.2, 0.8, 8)
    picture = (ramp[:, None] * ramp).expand(SHAPE)
    x, y = torch.stack([picture, picture.flip(1), picture.flip(2), picture.flip(1, 2)]), torch.arange(4)
    observed = client_update(victim, victim.params, Round(4), x, y).detach()
    view = View(victim, Round(4), observed, Knowledge(**told(y)))
    smooth, rough = (
        replace(ATTACK, smoothness=value, spectrum=True).run(view, fork(0, "attack"), Monitor())
        for value in (0.1, 0.0)
    )
    assert smooth.details["rank"] < smooth.details["unknowns"]
    assert (smooth.details["smoothed"], rough.details["smoothed"]) == (True, False)
    assert error(smooth.x, x) < error(rough.x, x) / 16
    assert view.residual(smooth.x.float(), y) < 1e-5
    assert smooth.loss < 1e-12
    assert torch.equal(smooth.strip[-1][2], smooth.x), "the film ends with what is shown"


def test_same_generator_same_result() -> None:
    view, _, _ = capture(Round(1))
    first, again = (ATTACK.run(view, fork(3, "attack"), Monitor()) for _ in range(2))
    assert torch.equal(first.x, again.x)
    assert first.history == again.history


def test_deadline_and_divergence_keep_the_best() -> None:
    view, _, _ = capture(Round(1))
    late = ATTACK.run(view, fork(0, "attack"), Monitor(deadline=time.monotonic()))
    assert (late.stopped, late.iterations) == ("budget", 1)
    assert late.x.shape == (1, *SHAPE)


def test_progress_and_falling_loss() -> None:
    view, _, _ = capture(Round(1))
    seen: list[tuple[int, int, float]] = []
    found = replace(ATTACK, warm_start=0).run(
        view, fork(0, "attack"), Monitor(on_step=lambda i, total, loss: seen.append((i, total, loss)))
    )
    losses = [loss for _, _, loss in seen]
    assert losses == sorted(losses, reverse=True)
    assert found.loss == losses[-1]
    assert {total for _, total, _ in seen} == {ATTACK.iterations}


def test_warm_start_runs_after_a_stall() -> None:
    view, _, _ = capture(Round(1), activation="relu")
    found = replace(ATTACK, warm_start=30, iterations=5).run(view, fork(0, "attack"), Monitor())
    assert found.details["warm_start"]
    assert found.iterations > 6


def test_the_warm_start_is_compiled_where_the_audit_compiles() -> None:
    view, _, _ = capture(Round(1), activation="relu")
    compiler = Asked()
    replace(ATTACK, warm_start=30, iterations=5).run(view, fork(0, "attack"), Monitor(compiler=compiler))
    assert 30 in compiler.evaluations


def test_applies_reasons_with_figures() -> None:
    view, _, _ = capture(Round(1))
    assert ATTACK.applies(view) is None
    reason = replace(ATTACK, memory_gb=1e-3).applies(view)
    assert reason is not None
    assert "192 unknowns" in reason
    assert "GB" in reason


def test_eight_photos_behind_the_lenet_fit_where_only_the_small_gram_matrix_is_held() -> None:
    """15,180 equations in 24,576 unknowns: 12 m^2 bytes; under noise the prior needs J^T J."""
    shape, round = (3, 32, 32), Round(8)
    victim = Victim.of(LeNet(100, shape), Pixels(shape, (0.5,) * 3, (0.25,) * 3), 100)
    x, y = victim.space.encode(torch.rand(8, *shape)), torch.arange(8)
    observed = client_update(victim, victim.params, round, x, y).detach()
    view = View(victim, round, observed, Knowledge(**told(y)))
    assert ATTACK.applies(view) is None
    reason = replace(ATTACK, memory_gb=2.7).applies(view)
    assert reason is not None
    assert "15,180 equations in 24,576 unknowns takes 2.8 GB" in reason
    noisy = replace(view, knowledge=Knowledge(noise_std=known(0.1, "test"), **told(y)))
    assert "GB" in str(ATTACK.applies(noisy))
    assert replace(ATTACK, memory_gb=20).applies(noisy) is None


def test_without_products_the_jacobian_itself_serves() -> None:
    """A client whose update has one derivative only by reverse mode still has all by forward mode."""
    view, x, y = capture(Round(1))
    problem = ATTACK._problem(view.to(dtype=torch.float64), y, fork(0, "attack"))
    assert problem.graph
    start = problem.system.point(x.double() + 0.1)
    ends = [ATTACK._descend(p, start, Monitor()) for p in (problem, replace(problem, graph=False))]
    assert [end.stopped for end in ends] == ["converged", "converged"]
    assert torch.allclose(ends[0].here.point, ends[1].here.point, atol=1e-5)


@pytest.mark.parametrize("change", ["iterations=0", "damping=-1", "memory_gb=0", "smoothness=-0.1"])
def test_bad_options_are_input_errors(change: str) -> None:
    with pytest.raises(InputError, match=change.partition("=")[0]):
        spec.parse(f"levenberg-marquardt:{change}", {"levenberg-marquardt": ATTACK})


def test_given_labels_win_over_inference() -> None:
    view, _, y = capture(Round(1))
    wrong = (y + 1) % CLASSES
    labels, source = choose_labels(replace(view, knowledge=Knowledge(**told(wrong))), fork(0, "labels"))
    assert labels is not None
    assert torch.equal(labels, wrong)
    assert source == "known: test"


def test_overflowing_jacobian_ends_the_descent() -> None:
    """Square roots of zero have infinite slopes: the attack must end, with its start as the best."""

    class Roots(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = torch.nn.Linear(192, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x.clamp(min=0).flatten(1).sqrt())

    victim = Victim.of(Roots(), Pixels(SHAPE, (0.5,) * 3, (0.25,) * 3), CLASSES)
    x, y = victim.space.encode(torch.rand(1, *SHAPE)), torch.tensor([3])
    view = View(victim, Round(1), client_update(victim, victim.params, Round(1), x, y).detach())
    found = replace(ATTACK, warm_start=0).run(view, fork(0, "attack"), Monitor())
    assert (found.stopped, bool(found.x.isfinite().all())) == ("plateau", True)


def test_smoothness_matrix_is_the_sum_over_neighbours() -> None:
    view, x, _ = capture(Round(1))
    system = System.of(view.to(dtype=torch.float64), None, fork(0, "system"))
    matrix = smoothness_matrix(system, 0.1)
    point = system.point(x.double(), torch.randn(1, CLASSES, dtype=torch.float64))
    pixels = view.victim.space.decode(x.double())
    differences = pixels.diff(dim=-1).square().sum() + pixels.diff(dim=-2).square().sum()
    assert float((point @ matrix @ point.T)[0, 0]) == pytest.approx(float(differences) / 0.01, rel=1e-9)
