"""The search among texts near the one found: what it mends, and that it keeps to its means."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from text_rounds import labels_of, noisy, tiny_victim, tokens_of, view_of
from torch import Tensor

from leakaudit.attacks.base import Monitor
from leakaudit.attacks.near_misses import REPRODUCED, descend, put, search, swap
from leakaudit.attacks.rows import Rows, read_rows
from leakaudit.bundled import TinyModel
from leakaudit.models.language import Task
from leakaudit.threat import View
from leakaudit.update import Update

CASES: list[tuple[TinyModel, Task]] = [
    ("bert", "classification"),
    ("gpt2", "classification"),
    ("gpt2", "causal-lm"),
]
MANY = 200


class Counted:
    """A client that counts how often it is simulated."""

    def __init__(self, view: View) -> None:
        self.calls = 0
        self._client = view.client

    def __call__(self, *round: object) -> Update:
        self.calls += 1
        return self._client(*round)  # type: ignore[arg-type]


def shared(name: TinyModel, task: Task, number: int = 3) -> tuple[View, Tensor, Tensor, Rows]:
    victim = tiny_victim(name, task)
    x = tokens_of(victim, number)
    y = labels_of(victim, x)
    view = view_of(victim, x, y)
    rows = read_rows(view)
    assert rows is not None
    return view, x, y, rows


def wrong_token(x: Tensor, rows: Rows) -> Tensor:
    """Another token of the text in the middle."""
    other = next(token for token in x[0].tolist() if token != int(x[0, 4]) and token in rows.tokens)
    return put(0, 4, other)(x)


def swapped(x: Tensor, _: Rows) -> Tensor:
    assert int(x[0, 3]) != int(x[0, 4])
    return swap(0, 3)(x)


def labels_for(task: Task, x: Tensor, y: Tensor) -> Tensor:
    return x.clone() if task == "causal-lm" else y


# ------------------------------------------------------------------------------------------ what it mends


@pytest.mark.parametrize("damage", [wrong_token, swapped], ids=["wrong token", "swapped neighbours"])
@pytest.mark.parametrize(("name", "task"), CASES)
def test_a_near_miss_comes_back_exactly(
    name: TinyModel, task: Task, damage: Callable[[Tensor, Rows], Tensor]
) -> None:
    view, x, y, rows = shared(name, task)
    near = damage(x, rows)
    assert not torch.equal(near, x)
    found, labels, residual = search(view, near, labels_for(task, near, y), rows, Monitor(), MANY)
    assert torch.equal(found, x)
    assert torch.equal(labels, y)
    assert residual < REPRODUCED
    assert residual == view.residual(found, labels)


def test_two_errors_take_two_rounds() -> None:
    view, x, y, rows = shared("bert", "classification")
    near = swap(0, 9)(wrong_token(x, rows))
    found, _, residual = search(view, near, y, rows, Monitor(), MANY)
    assert torch.equal(found, x)
    assert residual < REPRODUCED


@pytest.mark.parametrize("one_a_round", [True, False])
def test_a_round_makes_one_edit_or_every_one_that_helps(one_a_round: bool) -> None:
    view, x, y, _ = shared("bert", "classification")
    edits = [put(0, place, int(x[0, place])) for place in (2, 5, 8)]
    near = x.clone()
    near[0, [2, 5, 8]] = torch.tensor([700, 701, 702])
    client = Counted(view)
    view = replace(view, client=client)
    found, _, _ = descend(view, near, y, edits, lambda _: y, Monitor(), MANY, one_a_round)
    assert torch.equal(found, x)
    assert (client.calls == 1 + 3 + 2 + 1) == one_a_round
    assert client.calls <= 1 + 3 + 2 + 1


def test_under_noise_the_text_comes_back_though_no_residual_vanishes() -> None:
    view, x, y, _ = shared("bert", "classification")
    view = replace(view, observed=noisy(view.observed, 1e-4))
    rows = read_rows(view)
    assert rows is not None
    found, _, residual = search(view, wrong_token(x, rows), y, rows, Monitor(), 60)
    assert torch.equal(found, x)
    assert residual == pytest.approx(view.residual(x, y))
    assert residual > 1e-3


def test_a_text_that_nothing_improves_stays() -> None:
    view, x, y, rows = shared("bert", "classification")
    found, labels, residual = search(view, x, y, rows, Monitor(), MANY)
    assert found is x
    assert labels is y
    assert residual < REPRODUCED


# ---------------------------------------------------------------------------------------------- its means


@pytest.mark.parametrize("evaluations", [0, 1, 5])
def test_no_more_updates_are_simulated_than_allowed(evaluations: int) -> None:
    view, x, y, rows = shared("bert", "classification")
    near = put(0, 2, 700)(wrong_token(x, rows))
    client = Counted(view)
    view = replace(view, client=client)
    found, labels, residual = search(view, near, y, rows, Monitor(), evaluations)
    assert client.calls == 1 + evaluations
    assert residual == view.residual(found, labels)


def test_it_stops_at_the_update_itself() -> None:
    view, x, y, _ = shared("bert", "classification")
    view = replace(view, client=Counted(view))
    edits = [put(0, 4, int(x[0, 4])), *(put(0, 4, token) for token in range(50, 60))]
    found, _, _ = descend(view, put(0, 4, 30)(x), y, edits, lambda _: y, Monitor(), MANY)
    assert torch.equal(found, x)
    assert view.client.calls == 2  # type: ignore[attr-defined]


def test_a_deadline_in_the_past_ends_it_before_the_first_edit() -> None:
    view, x, y, rows = shared("bert", "classification")
    near = wrong_token(x, rows)
    client = Counted(view)
    monitor = Monitor(deadline=time.monotonic() - 1)
    found, labels, _ = search(replace(view, client=client), near, y, rows, monitor, MANY)
    assert client.calls == 1
    assert torch.equal(found, near)
    assert torch.equal(labels, y)
    assert monitor.stopped == "budget"


def test_a_deadline_is_kept_on_the_way() -> None:
    view, x, y, rows = shared("bert", "classification")
    monitor = Monitor(deadline=time.monotonic() + 0.2)

    class Slow(Counted):
        def __call__(self, *round: object) -> Update:
            time.sleep(0.06)
            return super().__call__(*round)

    client = Slow(view)
    near = put(0, 2, 700)(put(0, 3, 701)(wrong_token(x, rows)))
    search(replace(view, client=client), near, y, rows, monitor, MANY)
    assert 1 <= client.calls <= 4


def test_the_monitor_sees_the_best_so_far() -> None:
    view, x, y, rows = shared("bert", "classification")
    losses: list[float] = []
    monitor = Monitor(lambda _, total, loss: losses.append(loss) if total == MANY else None)
    _, _, residual = search(view, wrong_token(x, rows), y, rows, monitor, MANY)
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] == residual == monitor.best_loss
    assert monitor.best_x is not None
    assert torch.equal(monitor.best_x, x)
