"""Exact text attacks end to end on tiny models: every task and family, and what they say when they cannot."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from text_rounds import (
    labels_of,
    masked,
    noisy,
    random_tokens,
    rows_of,
    tiny_victim,
    tokens_of,
    victim_in,
    view_of,
)
from tiny_audits import victim_of
from tiny_audits import view_of as image_view
from tiny_language_models import tiny_llama
from torch import Tensor

from leakaudit.attacks.base import Attack, Monitor, Reconstruction
from leakaudit.attacks.rows import explains, read_rows
from leakaudit.attacks.text_recovery import BagOfTokens, PositionRows, SpanCheck
from leakaudit.models.language import IGNORED, LanguageVictim, Task
from leakaudit.models.spaces import NO_TOKEN
from leakaudit.randomness import fork
from leakaudit.threat import View

__all__ = ["tiny_llama"]

EXACT: dict[str, Attack] = {
    "bag-of-tokens": BagOfTokens(),
    "position-rows": PositionRows(),
    "span-check": SpanCheck(),
}
ROUNDING = 1e-5
"""Residual of a perfect reconstruction in float32, with room."""


def attack(view: View, name: str, seed: int = 0) -> Reconstruction:
    chosen = EXACT[name]
    assert chosen.applies(view) is None
    return chosen.run(view, fork(seed, name), Monitor())


def private(victim: LanguageVictim, *numbers: int) -> tuple[Tensor, Tensor]:
    x = tokens_of(victim, *numbers)
    y = labels_of(victim, x)
    return masked(victim, x, y), y


def assert_exact(found: Reconstruction, view: View, x: Tensor, y: Tensor) -> None:
    assert found.loss < ROUNDING
    assert found.loss == pytest.approx(view.residual(found.x, found.y), rel=1e-6)
    assert rows_of(found.x) == rows_of(x)
    assert found.x.dtype == found.y.dtype == torch.int64
    if y.dim() == 1:
        assert sorted(zip(rows_of_in_order(found.x), found.y.tolist(), strict=True)) == sorted(
            zip(rows_of_in_order(x), y.tolist(), strict=True)
        )
    else:
        assert labelled(found.x, found.y) == labelled(x, y)


def rows_of_in_order(x: Tensor) -> list[tuple[int, ...]]:
    return [tuple(int(token) for token in row if token != NO_TOKEN) for row in x]


def labelled(x: Tensor, y: Tensor) -> list[tuple[tuple[int, ...], tuple[tuple[int, int], ...]]]:
    """Each sentence with its labels at their places."""
    places = [tuple((i, int(label)) for i, label in enumerate(row) if label != IGNORED) for row in y]
    return sorted(zip(rows_of_in_order(x), places, strict=True))


# ------------------------------------------------------------------------------------------- golden


@pytest.mark.parametrize("name", ["position-rows", "span-check"])
@pytest.mark.parametrize("task", ["classification", "mlm"])
@pytest.mark.parametrize("number", [3, 40, 100, 326])
def test_one_sentence_of_bert(name: str, task: Task, number: int) -> None:
    victim = tiny_victim("bert", task)
    x, y = private(victim, number)
    view = view_of(victim, x, y)
    assert_exact(attack(view, name), view, x, y)


@pytest.mark.parametrize("name", ["position-rows", "span-check"])
@pytest.mark.parametrize("task", ["classification", "causal-lm"])
@pytest.mark.parametrize("number", [3, 40, 100, 326])
def test_one_sentence_of_gpt2(name: str, task: Task, number: int) -> None:
    victim = tiny_victim("gpt2", task)
    x, y = private(victim, number)
    view = view_of(victim, x, y)
    assert_exact(attack(view, name), view, x, y)


@pytest.mark.parametrize(
    ("task", "numbers"), [("classification", (40, 7)), ("mlm", (40, 7)), ("mlm", (64, 272))]
)
def test_two_sentences_of_bert(task: Task, numbers: tuple[int, int]) -> None:
    victim = tiny_victim("bert", task)
    x, y = private(victim, *numbers)
    view = view_of(victim, x, y)
    assert_exact(attack(view, "span-check"), view, x, y)


@pytest.mark.parametrize("task", ["classification", "causal-lm"])
@pytest.mark.parametrize("numbers", [(40, 7), (5, 6, 9)])
def test_batches_of_gpt2(task: Task, numbers: tuple[int, ...]) -> None:
    victim = tiny_victim("gpt2", task)
    x, y = private(victim, *numbers)
    view = view_of(victim, x, y)
    assert_exact(attack(view, "span-check"), view, x, y)


@pytest.mark.parametrize(
    ("task", "numbers"),
    [
        ("causal-lm", (3,)),
        ("causal-lm", (40, 7)),
        ("causal-lm", (5, 6, 9)),
        ("classification", (3,)),
        pytest.param(
            "classification",
            (5, 6, 9),
            marks=pytest.mark.xfail(
                strict=True,
                raises=(AssertionError, RuntimeError),
                reason="in a batch the gradients of early tokens sink below the rounding edge of the second"
                " layer's span (72 of 83 directions kept), and true prefixes fail its test",
            ),
        ),
    ],
)
def test_batches_of_llama(tiny_llama: Path, task: Task, numbers: tuple[int, ...]) -> None:
    victim = victim_in(tiny_llama, task)
    x, y = private(victim, *numbers)
    view = view_of(victim, x, y)
    assert_exact(attack(view, "span-check"), view, x, y)


@pytest.mark.parametrize("task", ["classification", "mlm"])
def test_the_bag_of_bert(task: Task) -> None:
    victim = tiny_victim("bert", task)
    x, y = private(victim, 40, 7)
    found = attack(view_of(victim, x, y), "bag-of-tokens")
    assert found.x.shape[0] == 2
    assert sorted(t for row in rows_of(found.x) for t in row) == x[x != NO_TOKEN].unique().tolist()
    assert found.details["tokens"] == len(x[x != NO_TOKEN].unique())


# ------------------------------------------------------------------------------- batches that are hard


def of_length(victim: LanguageVictim, count: int) -> tuple[int, ...]:
    """Numbers of bundled sentences that share a length."""
    lengths: dict[int, list[int]] = {}
    for number in range(60):
        same = lengths.setdefault(tokens_of(victim, number).shape[1], [])
        same.append(number)
        if len(same) == count:
            return tuple(same)
    raise AssertionError("no such sentences")


@pytest.mark.parametrize(("family", "task"), [("bert", "classification"), ("gpt2", "causal-lm")])
def test_sentences_that_share_a_length(family: str, task: Task) -> None:
    victim = tiny_victim("bert" if family == "bert" else "gpt2", task)
    x, y = private(victim, *of_length(victim, 2))
    assert (x != NO_TOKEN).all()
    view = view_of(victim, x, y)
    assert_exact(attack(view, "span-check"), view, x, y)


HARD = [
    ("bert", "mlm", (149, 80), "the sentences are right, one masked label is another token of its sentence"),
    ("gpt2", "classification", (79, 324), "early tokens sink below the rounding edge of the second layer"),
]


@pytest.mark.parametrize(
    ("family", "task", "numbers"),
    [pytest.param(*case[:3], marks=pytest.mark.xfail(strict=True, reason=case[3])) for case in HARD],
)
def test_two_sentences_that_are_not_found(family: str, task: Task, numbers: tuple[int, ...]) -> None:
    victim = tiny_victim("bert" if family == "bert" else "gpt2", task)
    x, y = private(victim, *numbers)
    view = view_of(victim, x, y)
    assert_exact(attack(view, "span-check"), view, x, y)


@pytest.mark.parametrize(("family", "task"), [("bert", "classification"), ("gpt2", "causal-lm")])
def test_the_same_sentence_twice(family: str, task: Task) -> None:
    victim = tiny_victim("bert" if family == "bert" else "gpt2", task)
    x = tokens_of(victim, 3, 3)
    y = torch.tensor([1, 1]) if task == "classification" else labels_of(victim, x)
    view = view_of(victim, x, y)
    assert_exact(attack(view, "span-check"), view, x, y)


@pytest.mark.parametrize(
    ("family", "task"),
    [("bert", "classification"), ("bert", "mlm"), ("gpt2", "classification"), ("gpt2", "causal-lm")],
)
@pytest.mark.parametrize("name", ["position-rows", "span-check"])
def test_sentences_of_three_tokens(family: str, task: Task, name: str) -> None:
    victim = tiny_victim("bert" if family == "bert" else "gpt2", task)
    x = torch.tensor([[2, 300, 3]])
    y = torch.tensor([[IGNORED, 301, IGNORED]]) if task == "mlm" else labels_of(victim, x)
    view = view_of(victim, x, y)
    assert_exact(attack(view, name), view, x, y)


def test_a_short_sentence_beside_a_long_one() -> None:
    victim = tiny_victim("gpt2", "causal-lm")
    x = random_tokens(victim, 3, 20)
    y = labels_of(victim, x)
    view = view_of(victim, x, y)
    assert_exact(attack(view, "span-check"), view, x, y)


# ------------------------------------------------------------------------------------- determinism


@pytest.mark.parametrize("name", EXACT)
def test_the_same_seed_finds_the_same(name: str) -> None:
    victim = tiny_victim("bert", "classification")
    x, y = private(victim, *(3,) if name == "position-rows" else (40, 7))
    view = view_of(victim, x, y)
    torch.manual_seed(1)
    first = attack(view, name, seed=5)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = attack(view, name, seed=5)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(first.x, second.x)
    assert torch.equal(first.y, second.y)
    assert first.loss == second.loss


def test_the_victim_is_left_alone() -> None:
    victim = tiny_victim("bert", "mlm")
    before = {name: tensor.clone() for name, tensor in victim.params.items()}
    x, y = private(victim, 3)
    for name in EXACT:
        attack(view_of(victim, x, y), name)
    assert all(torch.equal(tensor, before[name]) for name, tensor in victim.params.items())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in victim.module.modules())


# ------------------------------------------------------------------------------------------ reasons


@pytest.mark.parametrize("name", EXACT)
def test_image_models_are_refused(name: str) -> None:
    reason = EXACT[name].applies(image_view(victim_of("mlp")))
    assert reason == "it reconstructs text, this model takes images"


def without(view: View, *parts: str) -> View:
    kept = [name for name in view.observed if not any(part in name for part in parts)]
    return replace(view, observed=view.observed.select(kept))


def test_a_frozen_word_embedding_is_a_reason() -> None:
    victim = tiny_victim("bert", "classification")
    x, y = private(victim, 3)
    view = without(view_of(victim, x, y), "word_embeddings")
    for attack_of_rows in (BagOfTokens(), PositionRows()):
        reason = attack_of_rows.applies(view)
        assert reason is not None
        assert "word embedding was not shared (frozen, or LoRA)" in reason
    assert SpanCheck().applies(view) is None


def test_frozen_embeddings_leave_the_span_check_of_a_decoder() -> None:
    victim = tiny_victim("gpt2", "classification")
    x, y = private(victim, 3)
    view = without(view_of(victim, x, y), "wte", "wpe")
    found = attack(view, "span-check")
    assert rows_of(found.x) == rows_of(x)
    assert found.loss < ROUNDING


def test_a_batch_is_a_reason_against_position_rows() -> None:
    victim = tiny_victim("bert", "classification")
    x, y = private(victim, 40, 7)
    reason = PositionRows().applies(view_of(victim, x, y))
    assert reason is not None
    assert "add up over the batch" in reason


def test_rotary_positions_are_a_reason_against_position_rows(tiny_llama: Path) -> None:
    victim = victim_in(tiny_llama, "causal-lm")
    x, y = private(victim, 3)
    reason = PositionRows().applies(view_of(victim, x, y))
    assert reason is not None
    assert "no learnt absolute positions" in reason


def test_an_unknown_family_is_a_reason_against_the_span_check() -> None:
    victim = replace(tiny_victim("bert", "classification"), architecture=None)
    x, y = private(victim, 3)
    view = view_of(victim, x, y)
    reason = SpanCheck().applies(view)
    assert reason is not None
    assert "where bert keeps its attention inputs is not known" in reason
    reason = PositionRows().applies(view)
    assert reason is not None
    assert "its family is not known" in reason
    assert BagOfTokens().applies(view) is None


def test_noise_leaves_a_bag_of_what_stands_out_where_the_embedding_is_not_tied() -> None:
    victim = tiny_victim("bert", "classification")
    x, y = private(victim, 3)
    view = view_of(victim, x, y)
    view = replace(view, observed=noisy(view.observed, 1e-4))
    found = attack(view, "bag-of-tokens")
    recovered, true = set(found.x[0].tolist()), set(x[0].tolist())
    assert not found.details["exact"]
    assert len(recovered & true) > 0.8 * len(true)
    assert len(recovered - true) <= 1
    assert PositionRows().applies(view) is None


def test_noise_is_a_reason_against_the_bag_of_a_tied_model() -> None:
    victim = tiny_victim("bert", "mlm")
    x, y = private(victim, 3)
    view = view_of(victim, x, y)
    reason = BagOfTokens().applies(replace(view, observed=noisy(view.observed, 1e-4)))
    assert reason is not None
    assert "the tokens cannot be told from the rest: noise or pruning hides" in reason


def test_rows_prove_a_sentence_whose_update_the_client_took_with_dropout() -> None:
    victim = tiny_victim("bert", "classification")
    x, y = private(victim, 3)
    dropping = victim.with_mode("train")
    view = replace(view_of(victim, x, y), observed=view_of(dropping, x, y).observed)
    found = attack(view, "position-rows")
    assert found.loss > 1e-2
    assert found.details["proven"]
    assert torch.equal(found.x, x)
    wrong = x.clone()
    wrong[0, [2, 3]] = x[0, [3, 2]]
    rows = read_rows(view)
    assert rows is not None
    assert explains(rows, x[0])
    assert not explains(rows, wrong[0])
