"""One function of tensors moves a candidate as torch's Adam under torch's schedulers does, recorded or not."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_audits import private_batch, victim_of, view_of
from torch import Tensor

from leakaudit.attacks.adam import Rule, State, Watch, iteration, rates, schedule
from leakaudit.attacks.base import Monitor
from leakaudit.attacks.compiling import Compiler
from leakaudit.attacks.graphs import record
from leakaudit.attacks.optimise import Candidate, Matching, adam, value_and_gradient, value_and_gradients
from leakaudit.randomness import fork
from leakaudit.rounds import Round

ITERATIONS = 24


class Recorder(Monitor):
    """Keeps every (loss, x, y) it is given."""

    def __init__(self, stop_after: float = math.inf, compiler: Compiler | None = None) -> None:
        super().__init__(compiler=compiler)
        self.seen: list[tuple[float, Tensor, Tensor]] = []
        self._stop_after = stop_after

    def step(self, loss: float, x: Tensor, y: Tensor) -> bool:
        self.seen.append((loss, x.detach().clone(), y.detach().clone()))
        return super().step(loss, x, y) or len(self.seen) >= self._stop_after


def torch_adam(
    candidate: Candidate, objective: Matching, signed: bool, cosine_decay: bool
) -> list[tuple[float, Tensor, Tensor]]:
    """What torch's own optimiser and schedulers go through: the loop that `adam` replaces."""
    optimizer = torch.optim.Adam(candidate.variables, lr=0.1)
    scheduler: torch.optim.lr_scheduler.LRScheduler
    if cosine_decay:
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, ITERATIONS)
    else:
        scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [9, 15, 21], gamma=0.1)
    seen = []
    for _ in range(ITERATIONS + 1):
        loss = objective(candidate.x, candidate.y)
        seen.append((float(loss.detach()), candidate.x.detach().clone(), candidate.y.detach().clone()))
        candidate.differentiate(loss)
        if signed:
            assert candidate.x.grad is not None
            candidate.x.grad = candidate.x.grad.sign()
        optimizer.step()
        scheduler.step()
        with torch.no_grad():
            candidate.x.copy_(objective.view.victim.space.project(candidate.x))
    return seen


def start(count: int, free: bool, dtype: torch.dtype = torch.float32) -> Candidate:
    x = torch.randn(count, 3, 8, 8, generator=fork(0, "start"), dtype=dtype)
    if free:
        return Candidate(x, logits=torch.randn(count, 5, generator=fork(0, "logits"), dtype=dtype))
    return Candidate(x, labels=torch.arange(count))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("free", [True, False])
@pytest.mark.parametrize("cosine_decay", [True, False])
def test_every_step_is_torchs(dtype: torch.dtype, signed: bool, free: bool, cosine_decay: bool) -> None:
    objective = Matching(view_of(victim_of("smooth"), Round(2)).to(dtype=dtype), "cosine", tv=1e-3)
    expected = torch_adam(start(2, free, dtype), objective, signed, cosine_decay)
    monitor = Recorder()
    adam(
        start(2, free, dtype), objective, monitor, iterations=ITERATIONS, learning_rate=0.1, signed=signed,
        cosine_decay=cosine_decay, project=objective.view.victim.space.project,
    )  # fmt: skip
    assert len(monitor.seen) == len(expected)
    for (loss, x, y), (own_loss, own_x, own_y) in zip(expected, monitor.seen, strict=True):
        torch.testing.assert_close(own_x, x)
        torch.testing.assert_close(own_y, y)
        assert own_loss == pytest.approx(loss, rel=1e-4)


@pytest.mark.parametrize("iterations", [1, 2, 7, 100])
@pytest.mark.parametrize("cosine_decay", [True, False])
def test_rates_are_those_of_torchs_schedulers(iterations: int, cosine_decay: bool) -> None:
    optimizer = torch.optim.Adam([torch.zeros(1, requires_grad=True)], lr=0.3)
    scheduler: torch.optim.lr_scheduler.LRScheduler
    if cosine_decay:
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    else:
        milestones = [math.ceil(iterations * share) for share in (3 / 8, 5 / 8, 7 / 8)]
        scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma=0.1)
    expected = []
    for _ in range(iterations):
        expected.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates(iterations, 0.3, cosine_decay) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("free", [True, False])
@pytest.mark.parametrize("signed", [True, False])
def test_a_recorded_iteration_is_the_eager_one(free: bool, signed: bool) -> None:
    """Forward, double backward, sign, update and projection in one graph."""
    view = view_of(victim_of("smooth"), Round(2))
    candidate, objective = start(2, free), Matching(view, "cosine", tv=1e-3)
    differentiated = value_and_gradients(objective) if free else value_and_gradient(objective)
    advance = iteration(differentiated, Rule(signed, view.victim.space.project), free)
    labels = () if free else (torch.arange(2),)
    row = schedule(rates(100, 0.1), candidate.x)[3]
    state = State.starting(*candidate.variables)
    recorded = record(advance, (row, *labels, *state.tensors))
    for _ in range(3):
        expected = advance(row, *labels, *state.tensors)
        with torch.no_grad():
            found = recorded.graph(row, *labels, *state.tensors, *recorded.constants)
        torch.testing.assert_close(tuple(found), expected)
        state = State.of(expected[1 + len(state.variables) :])


@pytest.mark.slow
@pytest.mark.parametrize("signed", [True, False])
def test_a_compiled_descent_is_the_eager_one(signed: bool) -> None:
    """To the rounding of a few steps; a sign may turn one into a step later on."""
    objective = Matching(view_of(victim_of("smooth"), Round(2)), "cosine", tv=1e-3)
    compiler = Compiler("always")
    monitors = [Recorder(), Recorder(compiler=compiler)]
    for monitor in monitors:
        adam(start(2, False), objective, monitor, iterations=3, learning_rate=0.1, signed=signed)
    assert compiler.step == "compiled"
    for (loss, x, _), (own_loss, own_x, _) in zip(*(monitor.seen for monitor in monitors), strict=True):
        assert float((x - own_x).norm()) <= 1e-2 * float(x.norm())
        assert own_loss == pytest.approx(loss, rel=1e-2)


def test_a_descent_ends_where_the_last_loss_was_measured() -> None:
    candidate, monitor = start(1, True), Recorder(stop_after=4)
    adam(
        candidate, Matching(view_of(victim_of("smooth")), "squared"), monitor, iterations=9, learning_rate=0.1
    )
    assert len(monitor.seen) == 4
    assert torch.equal(candidate.x, monitor.seen[-1][1])
    assert torch.equal(candidate.y, monitor.seen[-1][2])


@pytest.mark.parametrize("count", [3, 8, 10])
def test_a_monitor_gets_every_candidate_in_order_however_many_at_a_time(count: int) -> None:
    x, y = private_batch()
    plain, several = Recorder(stop_after=9), Recorder(stop_after=9)
    for monitor, every in ((plain, 1), (several, 4)):
        monitor.start(20)
        watch = Watch(monitor, every)
        stopped = any(watch.step(torch.tensor(1.0 / (i + 1)), x + i, y) for i in range(count))
        assert (stopped or watch.flush()) == (count >= 9)
    assert [(loss, float(x.sum())) for loss, x, _ in plain.seen] == [
        (loss, float(x.sum())) for loss, x, _ in several.seen
    ]
    assert plain.best_loss == several.best_loss


def test_an_iteration_does_not_write_to_what_it_gets() -> None:
    view = view_of(victim_of("smooth"))
    candidate = start(1, False)
    advance = iteration(value_and_gradient(Matching(view, "cosine")), Rule(True), free=False)
    state = State.starting(*candidate.variables).map(lambda tensor: tensor + 0.5)
    before = [tensor.clone() for tensor in state.tensors]
    advance(schedule([0.1], candidate.x)[0], torch.tensor([1]), *state.tensors)
    assert all(map(torch.equal, before, state.tensors))
