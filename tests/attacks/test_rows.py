"""Rows of the embeddings' gradients: the identity they obey, and what is read off them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from text_rounds import labels_of, masked, noisy, pruned, random_tokens, tiny_victim, tokens_of, view_of
from torch import Tensor

from leakaudit.attacks.rows import (
    LEVELS,
    noise_level,
    place,
    position_rows,
    quantised,
    read_rows,
    row_lengths,
)
from leakaudit.attacks.tiger import Tiger
from leakaudit.bundled import TinyModel
from leakaudit.models.language import IGNORED, LanguageVictim, Task
from leakaudit.models.spaces import NO_TOKEN, stack_sentences
from leakaudit.threat import known

TASKS: list[tuple[TinyModel, Task]] = [
    ("bert", "classification"),
    ("bert", "mlm"),
    ("gpt2", "classification"),
    ("gpt2", "causal-lm"),
]
CLASSIFIERS: list[TinyModel] = ["bert", "gpt2"]


@st.composite
def batches(draw: st.DrawFn, most: int = 3, shortest: int = 3, longest: int = 14) -> Tensor:
    """Sentences of few kinds of tokens, so that they repeat, of different lengths."""
    lengths = draw(st.lists(st.integers(shortest, longest), min_size=1, max_size=most))
    kinds = draw(st.lists(st.integers(5, 799), min_size=1, max_size=10, unique=True))
    return stack_sentences([draw(st.lists(st.sampled_from(kinds), min_size=n, max_size=n)) for n in lengths])


def embedding_gradients(victim: LanguageVictim, x: Tensor, y: Tensor) -> Tensor:
    """(N, L, H): e of every place, by differentiating for the embeddings in place of the tokens."""
    rows = victim.word_rows[x.clamp(min=0)].masked_fill((x == NO_TOKEN)[..., None], torch.nan)
    rows.requires_grad_()
    (gradient,) = torch.autograd.grad(victim.loss(victim.params, rows, y), rows)
    return gradient


# ------------------------------------------------------------------------------------ the identity


@settings(max_examples=25, deadline=None)
@given(x=batches(), case=st.sampled_from(TASKS))
def test_word_and_position_rows_are_sums_of_the_same_gradients(
    x: Tensor, case: tuple[TinyModel, Task]
) -> None:
    """The word row of t sums e over the places of t, the position row of i sums it over the batch."""
    victim = tiny_victim(*case)
    y = labels_of(victim, x)
    observed = view_of(victim, x, y).observed
    e = embedding_gradients(victim, x, y)
    there = x != NO_TOKEN
    words = torch.zeros_like(observed[victim.word]).index_add_(0, x[there], e[there])
    scores = observed[victim.word] - words  # the score side of tied weights: the gradient at fixed inputs
    if victim.tied:
        directions = torch.linalg.matrix_rank(scores.double(), rtol=1e-5)
        labelled = y[:, 1:] if victim.task == "causal-lm" else y
        assert directions <= int((labelled != IGNORED).sum())
    else:
        assert float(scores.abs().max()) < 1e-6 * float(words.abs().max())
    assert victim.position is not None
    positions = torch.where(there[..., None], e, 0.0).sum(dim=0)
    torch.testing.assert_close(observed[victim.position][: x.shape[1]], positions, rtol=1e-4, atol=1e-7)
    assert not observed[victim.position][x.shape[1] :].any()


# ----------------------------------------------------------------------------------- bag and lengths


@settings(max_examples=25, deadline=None)
@given(x=batches(), name=st.sampled_from(CLASSIFIERS))
def test_the_bag_of_a_classifier_is_exact(x: Tensor, name: TinyModel) -> None:
    victim = tiny_victim(name, "classification")
    rows = read_rows(view_of(victim, x, labels_of(victim, x)))
    assert rows is not None
    assert rows.certain
    assert rows.reason == ""
    assert rows.tokens.tolist() == [token for token in x.unique().tolist() if token != NO_TOKEN]
    assert rows.length == x.shape[1]
    assert rows.noise == 0.0
    assert len(rows.outputs) == 0


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), count=st.integers(1, 2))
def test_the_bag_of_a_masked_model_is_exact_though_tied(seed: int, count: int) -> None:
    victim = tiny_victim("bert", "mlm")
    x = tokens_of(victim, *torch.randint(327, (count,), generator=torch.Generator().manual_seed(seed)))
    y = labels_of(victim, x, seed)
    x = masked(victim, x, y)
    rows = read_rows(view_of(victim, x, y))
    assert rows is not None
    assert rows.certain
    assert rows.tokens.tolist() == [token for token in x.unique().tolist() if token != NO_TOKEN]
    assert rows.length == x.shape[1]
    assert len(rows.outputs) == int((y != IGNORED).sum())


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), count=st.integers(1, 2))
def test_the_bag_of_a_decoder_is_exact_though_tied(seed: int, count: int) -> None:
    """Last tokens are no input of anything that is scored."""
    victim = tiny_victim("gpt2", "causal-lm")
    x = tokens_of(victim, *torch.randint(327, (count,), generator=torch.Generator().manual_seed(seed)))
    scored = int((x != NO_TOKEN).sum()) - count
    assume(scored + len(x.unique()) < victim.hidden)  # else the tool says that it cannot tell
    rows = read_rows(view_of(victim, x, labels_of(victim, x)))
    inputs = {token for row in x.tolist() for token in [t for t in row if t != NO_TOKEN][:-1]}
    assert rows is not None
    assert rows.certain
    assert set(rows.tokens.tolist()) == inputs
    assert rows.length == x.shape[1] - 1


def test_too_many_tied_places_are_not_called_certain() -> None:
    victim = tiny_victim("gpt2", "causal-lm")
    x = random_tokens(victim, 60, 60, 60)
    rows = read_rows(view_of(victim, x, labels_of(victim, x)))
    assert rows is not None
    assert not rows.certain
    assert "fill the width" in rows.reason


@pytest.mark.parametrize(("name", "task"), TASKS)
def test_the_word_rows_are_the_input_side(name: TinyModel, task: Task) -> None:
    victim = tiny_victim(name, task)
    x = tokens_of(victim, 3)
    y = labels_of(victim, x)
    rows = read_rows(view_of(victim, x, y))
    assert rows is not None
    e = embedding_gradients(victim, x, y)[0].double()
    for token, row in zip(rows.tokens.tolist(), rows.word, strict=True):
        expected = e[x[0] == token].sum(dim=0)
        expected = expected - (expected @ rows.outputs.T) @ rows.outputs
        torch.testing.assert_close(row, expected, rtol=1e-3, atol=1e-5 * float(e.norm(dim=1).max()))


def test_without_the_word_embedding_there_are_no_rows() -> None:
    victim = tiny_victim("bert", "classification")
    x = tokens_of(victim, 0)
    view = view_of(victim, x, labels_of(victim, x))
    rest = [name for name in view.observed if name != victim.word]
    assert read_rows(replace(view, observed=view.observed.select(rest))) is None
    zeros = view.observed.map(torch.zeros_like)
    assert read_rows(replace(view, observed=zeros)) is None


def test_without_either_embedding_no_position_is_in_use() -> None:
    victim = tiny_victim("bert", "classification")
    x = tokens_of(victim, 0)
    view = view_of(victim, x, labels_of(victim, x))
    rest = [name for name in view.observed if name not in (victim.word, victim.position)]
    frozen = replace(view, observed=view.observed.select(rest))
    assert position_rows(frozen, 0.0).shape == (0, victim.hidden)
    assert "is not known" in str(Tiger().applies(frozen))


def test_without_the_position_embedding_there_is_no_length() -> None:
    victim = tiny_victim("bert", "classification")
    x = tokens_of(victim, 0)
    view = view_of(victim, x, labels_of(victim, x))
    rest = [name for name in view.observed if name != victim.position]
    rows = read_rows(replace(view, observed=view.observed.select(rest)))
    assert rows is not None
    assert rows.length == 0
    assert rows.certain


# ------------------------------------------------------------------------------- noise and pruning


@pytest.mark.parametrize(("name", "task"), TASKS)
@pytest.mark.parametrize("level", [1e-6, 1e-4, 1e-2])
def test_the_noise_level_is_estimated_within_a_tenth(name: TinyModel, task: Task, level: float) -> None:
    victim = tiny_victim(name, task)
    x = tokens_of(victim, 1, 2)
    view = view_of(victim, x, labels_of(victim, x))
    assert noise_level(view) == 0.0
    assert noise_level(replace(view, observed=noisy(view.observed, level))) == pytest.approx(level, rel=0.1)


def test_a_known_noise_level_is_taken() -> None:
    victim = tiny_victim("bert", "classification")
    x = tokens_of(victim, 1)
    view = view_of(victim, x, labels_of(victim, x), noise=1e-4, noise_std=known(3e-4, "manifest"))
    assert noise_level(view) == 3e-4


@pytest.mark.parametrize(("name", "task"), TASKS)
def test_tokens_under_noise_are_not_called_certain(name: TinyModel, task: Task) -> None:
    victim = tiny_victim(name, task)
    x = tokens_of(victim, 1)
    y = labels_of(victim, x)
    x = masked(victim, x, y)
    rows = read_rows(view_of(victim, x, y, noise=1e-6))
    assert rows is not None
    assert not rows.certain
    assert "noise" in rows.reason
    assert rows.noise == pytest.approx(1e-6, rel=0.1)
    assert set(x[0, :-1].tolist()) <= set(rows.tokens.tolist())


def test_noise_hides_no_token_and_adds_hardly_any() -> None:
    victim = tiny_victim("bert", "classification")
    x = tokens_of(victim, 5, 6)
    rows = read_rows(view_of(victim, x, labels_of(victim, x), noise=1e-6))
    assert rows is not None
    assert rows.length == x.shape[1]
    present = {token for token in x.flatten().tolist() if token != NO_TOKEN}
    assert present <= set(rows.tokens.tolist())
    assert len(rows.tokens) <= len(present) + 1


@pytest.mark.parametrize(
    ("name", "task", "keep"),
    [
        *((name, task, 0.01) for name, task in TASKS),  # a classifier's rows are sparse, and 0.1 keeps them
        ("bert", "mlm", 0.1),
        ("gpt2", "causal-lm", 0.1),
    ],
)
def test_pruned_rows_are_not_called_certain(name: TinyModel, task: Task, keep: float) -> None:
    victim = tiny_victim(name, task)
    x = tokens_of(victim, 1, 2)
    view = view_of(victim, x, labels_of(victim, x))
    rows = read_rows(replace(view, observed=pruned(view.observed, keep)))
    assert rows is not None
    assert not rows.certain
    assert "prun" in rows.reason


# ------------------------------------------------------------------------------------------- place


@settings(max_examples=40, deadline=None)
@given(x=batches(most=1, longest=24))
def test_places_are_exact_with_repeated_tokens(x: Tensor) -> None:
    victim = tiny_victim("bert", "classification")
    rows = read_rows(view_of(victim, x, labels_of(victim, x)))
    assert rows is not None
    assert place(rows).tolist() == x[0].tolist()


@settings(max_examples=15, deadline=None)
@given(number=st.integers(0, 326), task=st.sampled_from(["classification", "mlm"]))
def test_places_of_real_sentences_are_exact(number: int, task: Task) -> None:
    victim = tiny_victim("bert", task)
    x = tokens_of(victim, number)
    y = labels_of(victim, x, number)
    x = masked(victim, x, y)
    rows = read_rows(view_of(victim, x, y))
    assert rows is not None
    assert place(rows).tolist() == x[0].tolist()


@settings(max_examples=15, deadline=None)
@given(number=st.integers(0, 326))
def test_places_of_a_decoders_sentences_are_exact(number: int) -> None:
    victim = tiny_victim("gpt2", "causal-lm")
    x = tokens_of(victim, number)
    assume(x.shape[1] + len(x.unique()) < victim.hidden)
    rows = read_rows(view_of(victim, x, labels_of(victim, x)))
    assert rows is not None
    assert place(rows).tolist() == x[0, :-1].tolist()


@pytest.mark.parametrize("number", range(8))
def test_places_are_exact_under_little_noise(number: int) -> None:
    """Noise of 1e-3 of the typical number of a token's row."""
    victim = tiny_victim("bert", "classification")
    x = tokens_of(victim, number)
    y = labels_of(victim, x)
    clean = view_of(victim, x, y)
    rows = read_rows(clean)
    assert rows is not None
    level = 1e-3 * float(rows.word.square().mean(dim=1).sqrt().median())
    found = read_rows(replace(clean, observed=noisy(clean.observed, level, seed=number)))
    assert found is not None
    assert not found.certain
    assert place(found).tolist() == x[0].tolist()


def test_position_rows_start_at_the_first_token() -> None:
    victim = tiny_victim("bert", "classification")
    x = tokens_of(victim, 2)
    view = view_of(victim, x, labels_of(victim, x))
    assert victim.position is not None
    rows = position_rows(view, 0.0)
    assert torch.equal(rows, view.observed[victim.position].double()[: x.shape[1]])


def test_a_tied_model_whose_every_position_is_used_shows_no_noise() -> None:
    victim = tiny_victim("bert", "mlm")
    x = random_tokens(victim, 64, kinds=30)
    y = labels_of(victim, x)
    assert noise_level(view_of(victim, masked(victim, x, y), y)) == 0.0


@pytest.mark.parametrize("task", ["classification", "mlm"])
def test_padding_that_was_not_masked_is_a_token(task: Task) -> None:
    """Its lookup hands on no gradient; what the words lack of the positions' sum shows it all the same."""
    victim = tiny_victim("bert", task)
    padding = victim.module.get_input_embeddings().padding_idx
    x = tokens_of(victim, 3)
    filled = torch.cat([x, torch.full((1, 6), padding)], dim=1)
    y = labels_of(victim, x)
    if y.dim() == 2:
        y = torch.cat([y, torch.full((1, 6), IGNORED)], dim=1)
    rows = read_rows(view_of(victim, masked(victim, filled, y), y))
    assert rows is not None
    assert padding in rows.tokens.tolist()
    if task == "classification":
        assert torch.equal(place(rows)[None], filled)


@pytest.mark.parametrize(("levels", "expected"), [(1, True), (LEVELS, True), (LEVELS + 1, False)])
def test_quantised_rows_hold_few_numbers(levels: int, expected: bool) -> None:
    """In any order: what the first rows show is not all there is."""
    numbers = torch.arange(100_000).clamp(max=levels - 1).float()
    assert quantised(numbers.view(-1, 10)) == expected
    assert quantised(numbers.flip(0).view(-1, 10)) == expected


def test_row_lengths_are_those_of_float64() -> None:
    """Several blocks, the last one shorter, and numbers whose squares float32 does not hold."""
    rows = torch.randn(3000, 96, generator=torch.Generator().manual_seed(0)) * 1e-25
    rows[7] = 0
    found = row_lengths(rows)
    torch.testing.assert_close(found, rows.double().norm(dim=1), rtol=1e-14, atol=0)
    assert found[7] == 0
