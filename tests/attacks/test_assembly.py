"""Taking sentences out of an update one after another, and the search for the next one in the rest."""

from __future__ import annotations

import itertools

import pytest
import torch
from text_rounds import tiny_victim, tokens_of, view_of
from torch import Tensor

from leakaudit.attacks.assembly import _peel, _Search
from leakaudit.attacks.rows import read_rows
from leakaudit.attacks.spans import attention_span
from leakaudit.models.spaces import NO_TOKEN
from leakaudit.randomness import fork


def plain(row: Tensor) -> list[int]:
    return [int(token) for token in row if token != NO_TOKEN]


@pytest.mark.parametrize("labels", list(itertools.product((0, 1), repeat=3)))
def test_peeling_leaves_the_spans_of_the_rest_and_then_nothing(labels: tuple[int, ...]) -> None:
    """Whatever the labels, in whatever order the sentences are found: the rounding of the whole update, that its
    rest still holds, spans nothing."""
    victim = tiny_victim("bert", "classification")
    x = tokens_of(victim, 3, 4, 7)
    view = view_of(victim, x, torch.tensor(labels))
    left = [plain(row) for row in x]
    rest = view
    for place in (1, 0, 0):
        rows = read_rows(rest)
        assert rows is not None
        sentence = left.pop(place)
        rest = _peel(rest, sentence, rows, 0, view).rest
        span = attention_span(victim, rest.observed, 1, whole=view.observed)
        assert span is not None
        count = sum(len(other) for other in left)
        assert count <= span.rank <= count + 1  # simulations of all places err in one direction together
        if left:
            away = span.distance(victim.attention_inputs(torch.tensor([sentence]), 1))
            assert away.median() > 0.05
            for other in left:
                assert span.distance(victim.attention_inputs(torch.tensor([other]), 1)).max() < 1e-3
    assert rest.observed.norm() < 1e-5 * view.observed.norm()


@pytest.mark.parametrize("shift", [-3, -1, 1, 3])
def test_a_sentence_at_the_wrong_length_is_cut_or_drawn_out(shift: int) -> None:
    """A descent of another length ends at the true sentence but for its end; from there its own length is found."""
    victim = tiny_victim("bert", "classification")
    x = tokens_of(victim, 3, 4)
    view = view_of(victim, x, torch.tensor([0, 1]))
    rows = read_rows(view)
    assert rows is not None
    search = _Search.of(view, rows, fork(0, "test"), view.observed)
    assert search is not None
    true = torch.tensor([rows.tokens.tolist().index(token) for token in plain(x[0])])
    length = len(true) + shift
    wrong = true[:length] if shift < 0 else torch.cat([true, true[1 : 1 + shift]])
    far = torch.ones(len(true))
    best = {length: (wrong, torch.ones(length)), len(true): (true.flip(0), far)}
    search._resize(best, [length])
    chosen, here = best[len(true)]
    assert here.mean() < 1e-4
    assert torch.equal(chosen, true)
