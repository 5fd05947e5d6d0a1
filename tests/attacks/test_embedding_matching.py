from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_audits import victim_of
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

from leakaudit.attacks.base import Attack, Monitor, Reconstruction
from leakaudit.attacks.embedding_matching import (
    EMBEDDING_ATTACKS,
    EMBEDDING_DESCRIPTIONS,
    EmbeddingMatching,
    LanguageModelPrior,
    TagDistance,
    TextDeepLeakage,
    TextGradientAttack,
    layer_cosine,
)
from leakaudit.attacks.matching import squared
from leakaudit.attacks.sentences import (
    NextTokens,
    PlacedLabels,
    Sentences,
    explained,
    labelled,
    laid_out,
    lay_out,
    order,
    special_tokens,
)
from leakaudit.attacks.tiger import SpanDistance, Tiger, position_start, soft_span
from leakaudit.attacks.token_labels import masked_labels
from leakaudit.models.language import IGNORED, LanguageVictim, Task, language_victim
from leakaudit.models.spaces import NO_TOKEN
from leakaudit.randomness import fork
from leakaudit.rounds import Round, client_update
from leakaudit.threat import Knowledge, View, known

VOCABULARY = 60
GOLDEN = torch.tensor([[2, 17, 41, 5, 33, 58]])
"""A sentence without repetitions."""
REPEATING = torch.tensor([[7, 7, 23, 7, 51]])


def bert(task: Task = "classification", seed: int = 0) -> LanguageVictim:
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=20,
        initializer_range=0.2,
        num_labels=4,
        attn_implementation="eager",
    )
    kind = BertForSequenceClassification if task == "classification" else BertForMaskedLM
    return language_victim(kind(config), None, task)


def gpt2(seed: int = 0) -> LanguageVictim:
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=2,
        n_head=2,
        n_positions=20,
        initializer_range=0.2,
        attn_implementation="eager",
    )
    return language_victim(GPT2LMHeadModel(config), None, "causal-lm")


def view_of_sentence(victim: LanguageVictim, x: Tensor = GOLDEN, y: Tensor | None = None) -> View:
    if y is None:
        y = x if victim.task == "causal-lm" else torch.tensor([3])
    round = Round(len(x))
    return View(victim, round, client_update(victim, victim.params, round, x, y).detach())


def run(attack: Attack, view: View, seed: int = 0, monitor: Monitor | None = None) -> Reconstruction:
    assert attack.applies(view) is None
    return attack.run(view, fork(seed, "start"), monitor or Monitor())


def right(found: Reconstruction, truth: Tensor) -> int:
    return int((found.x == truth).sum())


# ------------------------------------------------------------------ what they recover

FAST: dict[str, Attack] = {
    "tiger": Tiger(rows=False),
    "dlg-text": TextDeepLeakage(iterations=30, every=5, polish=0),
    "dlg-text:distance=squared": TextDeepLeakage(iterations=40, distance="squared", polish=0),
    "lamp": LanguageModelPrior(iterations=300, learning_rate=0.05, starts=5, proposals=10, polish=0),
    "lamp:distance=tag": LanguageModelPrior(
        iterations=300, learning_rate=0.05, starts=5, proposals=10, distance="tag", norm=25.0
    ),
}


@pytest.mark.parametrize("name", FAST)
def test_a_short_sentence_is_recovered_without_its_word_rows(name: str) -> None:
    found = run(FAST[name], view_of_sentence(bert()))
    assert torch.equal(found.x, GOLDEN)
    assert found.y.tolist() == [3]


def test_tag_is_nearly_there_after_few_iterations() -> None:
    found = run(TextGradientAttack(iterations=200, polish=0), view_of_sentence(bert()))
    assert right(found, GOLDEN) >= 4


def test_repeated_tokens_are_recovered() -> None:
    assert torch.equal(run(Tiger(rows=False), view_of_sentence(bert(), REPEATING)).x, REPEATING)


def test_two_sentences_in_any_order_and_their_lengths() -> None:
    x = torch.tensor([[2, 17, 41, 5], [33, 58, 9, NO_TOKEN]])
    view = view_of_sentence(bert(), x, torch.tensor([3, 1]))
    attack = TextDeepLeakage(lengths="4+3", iterations=40)
    found = run(attack, view)
    assert sorted(found.x[found.x != NO_TOKEN].tolist()) == sorted(x[x != NO_TOKEN].tolist())
    assert view.residual(found.x, found.y) < 1e-5


@pytest.mark.parametrize("attack", [Tiger(), TextDeepLeakage()], ids=["tiger", "dlg-text"])
def test_a_causal_model_gives_its_text_away(attack: Attack) -> None:
    found = run(attack, view_of_sentence(gpt2()))
    assert right(found, GOLDEN) >= 5
    assert torch.equal(found.y, found.x)


def masked() -> tuple[View, Tensor, Tensor]:
    """A masked sentence: token 1 stands for [MASK] at two places."""
    x = GOLDEN.clone()
    x[0, [1, 4]] = 1
    y = torch.full_like(x, IGNORED)
    y[0, [1, 4]] = GOLDEN[0, [1, 4]]
    return view_of_sentence(bert("mlm"), x, y), x, y


def test_masked_text_and_its_labels_are_recovered() -> None:
    view, x, y = masked()
    found = run(TextDeepLeakage(iterations=60), view)
    assert torch.equal(found.x, x)
    assert torch.equal(found.y, y)


def test_labels_of_a_masked_model_are_counted_in_the_output_bias() -> None:
    view, _, y = masked()
    labels = masked_labels(view, 6)
    assert isinstance(labels, Tensor)
    assert sorted(labels.tolist()) == sorted(y[y != IGNORED].tolist())
    twice = view_of_sentence(bert("mlm"), GOLDEN, torch.tensor([[9, IGNORED, 9, 9, 4, IGNORED]]))
    labels = masked_labels(twice, 6)
    assert isinstance(labels, Tensor)
    assert labels.tolist() == [4, 9, 9, 9]


def test_from_position_rows_it_is_a_short_way() -> None:
    view = view_of_sentence(bert())
    sentences = laid_out(view, None)
    start = position_start(view, sentences)
    assert start is not None
    assert torch.equal(start, GOLDEN)
    assert run(Tiger(), view).iterations < run(Tiger(rows=False), view).iterations


def test_noise_of_a_known_size_is_survived_by_tiger() -> None:
    view = view_of_sentence(bert())
    generator = torch.Generator().manual_seed(5)
    noisy = view.observed.map(lambda g: g + 3e-4 * torch.randn(g.shape, generator=generator))
    view = replace(view, observed=noisy, knowledge=Knowledge(noise_std=known(3e-4, "stated")))
    assert torch.equal(run(Tiger(rows=False), view).x, GOLDEN)


# ------------------------------------------------------------------ order and places


def test_embeddings_at_each_others_places_make_the_same_gradients_but_for_position_rows() -> None:
    victim = bert()
    view = view_of_sentence(victim)
    sentences = laid_out(view, None)
    x = sentences.rows_of(GOLDEN)
    turned = sentences.moved(x, torch.tensor([0, 3, 5, 1, 4, 2]))  # the pooler reads the first
    part = explained(view)
    here, there = (part.simulate(sentences.embed(c), torch.tensor([3])) for c in (x, turned))
    assert victim.position is not None
    for name in here:
        same = torch.allclose(here[name], there[name], rtol=1e-3, atol=1e-6)
        assert same == (name != victim.position), name
    assert torch.equal(sentences.nearest(turned), GOLDEN)


def test_the_order_of_a_causal_model_is_not_touched() -> None:
    sentences = laid_out(view_of_sentence(gpt2()), None)
    assert not sentences.movable
    assert torch.equal(sentences.nearest(sentences.rows_of(GOLDEN)), GOLDEN)


def test_rearrangements_are_permutations_of_four_kinds() -> None:
    places = torch.tensor([3, 4, 5, 6, 7])
    generator = torch.Generator().manual_seed(0)
    drawn = {tuple(order(places, generator)) for _ in range(300)}
    assert all(sorted(found) == [3, 4, 5, 6, 7] for found in drawn)
    assert {(4, 3, 5, 6, 7), (5, 6, 7, 3, 4), (3, 5, 6, 7, 4), (3, 6, 4, 5, 7)} <= drawn


# ------------------------------------------------------------------ losses and their gradients


def numeric(function: Callable[[Tensor], Tensor], x: Tensor, step: float = 1e-5) -> Tensor:
    """Central differences along eight random directions."""
    directions = torch.randn(8, *x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(1))
    return torch.stack([(function(x + step * d) - function(x - step * d)) / (2 * step) for d in directions])


def analytic(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    directions = torch.randn(8, *x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(1))
    leaf = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(function(leaf), leaf)
    return (directions * slope).flatten(1).sum(1)


@pytest.mark.parametrize(
    "distance", [squared, layer_cosine, TagDistance(0.01, 0.5)], ids=["l2", "cosine", "tag"]
)
@pytest.mark.parametrize("kind", ["classification", "mlm", "causal-lm"])
def test_slopes_of_matching_losses_are_those_of_finite_differences(distance, kind: str) -> None:  # type: ignore[no-untyped-def]
    view = masked()[0] if kind == "mlm" else view_of_sentence(gpt2() if kind == "causal-lm" else bert())
    view = view.to(dtype=torch.float64)
    sentences = laid_out(view, None)
    labels = labelled(view, sentences)
    generator = torch.Generator().manual_seed(0)
    candidate = labels.candidate(sentences.start(generator), generator)
    loss = EmbeddingMatching(explained(view), sentences, labels, distance, norm=0.5)

    def value(x: Tensor) -> Tensor:
        return loss(x, candidate.y.detach())

    x = candidate.x.detach()
    torch.testing.assert_close(analytic(value, x), numeric(value, x), rtol=1e-4, atol=1e-7)


def test_slopes_of_the_span_distance_are_those_of_finite_differences() -> None:
    view = view_of_sentence(bert()).to(dtype=torch.float64)
    sentences = laid_out(view, None)
    spans = [soft_span(view, n, 6) for n in (0, 1)]
    loss = SpanDistance(bert().to(dtype=torch.float64), sentences, tuple(s for s in spans if s), 0.1, 1.0)
    x = sentences.start(torch.Generator().manual_seed(0))
    empty = torch.empty(0)
    torch.testing.assert_close(
        analytic(lambda x: loss(x, empty), x), numeric(lambda x: loss(x, empty), x), rtol=1e-6, atol=1e-8
    )


def test_soft_labels_at_the_corners_are_hard_labels() -> None:
    for victim, y in ((bert("mlm"), masked()[2]), (gpt2(), GOLDEN)):
        weights = torch.zeros(*y.shape, VOCABULARY)
        weights[y != IGNORED] = torch.eye(VOCABULARY)[y[y != IGNORED]]
        torch.testing.assert_close(
            victim.loss(victim.params, GOLDEN, weights), victim.loss(victim.params, GOLDEN, y)
        )


def test_soft_labels_of_the_text_itself_are_its_tokens() -> None:
    sentences = laid_out(view_of_sentence(gpt2()), None)
    soft = NextTokens(sentences, 0.01).soft(torch.empty(0), sentences.embed(sentences.rows_of(GOLDEN)))
    assert torch.equal(soft.argmax(-1), GOLDEN)
    torch.testing.assert_close(soft.sum(-1), torch.ones(1, 6))


def test_placed_labels_put_each_label_somewhere_else() -> None:
    view, x, _ = masked()
    sentences = laid_out(view, None)
    placed = PlacedLabels(sentences, torch.tensor([9, 9, 4]))
    y = torch.tensor([[0.6, 0.3, 0.1, 0, 0, 0], [0.5, 0.4, 0.1, 0, 0, 0], [0, 0, 0, 0, 0, 1.0]])
    soft = placed.soft(y, sentences.embed(sentences.rows_of(x)))
    assert soft.sum() == pytest.approx(3)
    assert float(soft[0, 0, 9]) == pytest.approx(1.1)
    assert placed.hard(y, x).tolist() == [[9, 9, IGNORED, IGNORED, IGNORED, 4]]


# ------------------------------------------------------------------ spans


@pytest.mark.parametrize("make", [bert, gpt2])
def test_the_true_inputs_lie_in_the_soft_span(make: Callable[[], LanguageVictim]) -> None:
    victim = make()
    view = view_of_sentence(victim)
    seen = slice(0, 5 if victim.task == "causal-lm" else 6)
    for layer in (0, 1):
        span = soft_span(view, layer, seen.stop)
        assert span is not None
        assert span.basis.shape[1] == (5 if layer == 1 else seen.stop)  # two heads that read one token
        assert span.whole == (span.basis.shape[1] == seen.stop)
        true = victim.attention_inputs(GOLDEN, layer)[0, seen]
        other = victim.attention_inputs(GOLDEN.flip(1), layer)[0, seen]
        assert (float(span.distance(true).max()) < 1e-4) == span.whole
        assert float(span.distance(other).mean()) > 0.1
        assert float(span.uncovered(true)) < 1e-2 < float(span.uncovered(other))


def test_the_rank_is_what_stands_out_of_the_noise() -> None:
    view = view_of_sentence(bert())
    generator = torch.Generator().manual_seed(2)
    clean = soft_span(view, 0, 6)
    noise = view.observed.map(lambda g: 1e-3 * torch.randn(g.shape, generator=generator))
    for knowledge in (Knowledge(), Knowledge(noise_std=known(1e-3, "stated"))):
        assert soft_span(replace(view, observed=noise, knowledge=knowledge), 0, 6) is None
        both = soft_span(replace(view, observed=view.observed + noise, knowledge=knowledge), 0, 6)
        assert clean is not None
        assert both is not None
        assert 1 <= both.basis.shape[1] <= clean.basis.shape[1]
        assert bool((both.weights < clean.weights[: len(both.weights)]).all())


def test_attention_inputs_are_those_of_the_victim() -> None:
    victim = bert()
    ours = victim.inputs_of_attention(victim.word_rows[GOLDEN], [0, 1])
    for layer in (0, 1):
        torch.testing.assert_close(ours[layer], victim.attention_inputs(GOLDEN, layer))


# ------------------------------------------------------------------ what they need


@pytest.mark.parametrize("name", EMBEDDING_ATTACKS)
def test_image_models_are_refused(name: str) -> None:
    victim = victim_of("mlp")
    observed = client_update(victim, victim.params, Round(1), victim.probe(1), torch.tensor([1]))
    reason = EMBEDDING_ATTACKS[name].applies(View(victim, Round(1), observed))
    assert reason == "it reconstructs text, this model takes images"


def without(view: View, *parts: str) -> View:
    names = [name for name in view.observed if not any(part in name for part in parts)]
    return replace(view, observed=view.observed.select(names))


@pytest.mark.parametrize("name", EMBEDDING_ATTACKS)
def test_a_length_that_nobody_knows_is_asked_for(name: str) -> None:
    view = without(view_of_sentence(bert()), "position_embeddings")
    reason = EMBEDDING_ATTACKS[name].applies(view)
    assert reason is not None
    assert "state lengths=" in reason
    assert replace(EMBEDDING_ATTACKS[name], lengths="6").applies(view) is None  # type: ignore[type-var]


def test_lengths_that_do_not_fit_are_refused() -> None:
    view = view_of_sentence(bert())
    assert lay_out(view, "6+4") == "lengths=6+4 are of 2 sentences, the update is of 1"
    assert lay_out(view, "21") == "sentences of 21 tokens; the model takes 1 to 20"


def test_word_rows_alone_are_refused() -> None:
    view = view_of_sentence(bert())
    view = replace(view, observed=view.observed.select([view.victim.word]))  # type: ignore[attr-defined]
    reason = TextDeepLeakage(lengths="6").applies(view)
    assert reason is not None
    assert "nothing but the word embedding's gradient" in reason


def test_masked_labels_need_the_output_bias() -> None:
    reason = TextDeepLeakage().applies(without(masked()[0], "predictions.bias", "decoder.bias"))
    assert reason is not None
    assert "output layer's bias" in reason


@pytest.mark.parametrize("name", ["dlg-text", "tag"])
def test_lengths_of_gradients_need_a_scale(name: str) -> None:
    view = replace(view_of_sentence(bert()), knowledge=Knowledge(scale=known(False, "test")))
    reason = EMBEDDING_ATTACKS[name].applies(view)
    assert reason is not None
    assert "no known scale" in reason
    assert EMBEDDING_ATTACKS["lamp"].applies(view) is None


def test_tiger_says_when_tokens_fill_the_space_or_noise_hides_it() -> None:
    long = torch.randint(VOCABULARY, (2, 18), generator=torch.Generator().manual_seed(0))
    view = view_of_sentence(bert(), long, torch.tensor([0, 1]))
    assert Tiger().applies(view) == "36 tokens span all 32 dimensions of the attention inputs"
    noisy = view_of_sentence(bert())
    noisy = replace(noisy, knowledge=Knowledge(noise_std=known(10.0, "stated")))
    assert Tiger(lengths="6").applies(noisy) is not None


def test_a_language_model_of_another_tokenizer_is_refused(tmp_path: Path) -> None:
    gpt2().module.save_pretrained(tmp_path)
    reason = LanguageModelPrior(language_model=f"hf:{tmp_path}").applies(view_of_sentence(bert()))
    assert reason is not None
    assert "has another tokenizer" in reason
    reason = LanguageModelPrior(language_model="hf:./nowhere").applies(view_of_sentence(bert()))
    assert reason is not None
    assert "cannot be had" in reason


def tokenizer() -> PreTrainedTokenizerFast:
    """Words w4 .. w59 behind [PAD], [CLS], [SEP], [UNK]; [CLS] before and [SEP] after a sentence."""
    names = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *(f"w{n}" for n in range(4, VOCABULARY))]
    words = Tokenizer(WordLevel({name: n for n, name in enumerate(names)}, unk_token="[UNK]"))
    words.pre_tokenizer = WhitespaceSplit()
    words.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=20, pad_token="[PAD]")


def test_a_language_model_weighs_rearrangements(tmp_path: Path) -> None:
    gpt2().module.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    victim = language_victim(bert().module, tokenizer(), "classification")
    assert special_tokens(victim.space) == ([1], [2])
    x, _ = victim.space.encode(["w9 w17 w41 w5"])
    view = view_of_sentence(victim, x)
    attack = LanguageModelPrior(
        language_model=f"hf:{tmp_path}", iterations=200, learning_rate=0.05, every=20, starts=5, proposals=10
    )
    found = run(attack, view)
    assert found.x[0, 0] == 1
    assert found.x[0, -1] == 2
    assert torch.equal(found.x, x)


def test_lengths_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="numbers with \\+ between"):
        TextDeepLeakage(lengths="12,9")


# ------------------------------------------------------------------ repeatable, within bounds


@pytest.mark.parametrize(
    "attack",
    [
        Tiger(rows=False, iterations=3),
        TextDeepLeakage(iterations=2, every=1, polish=4),
        TextGradientAttack(iterations=12, polish=4),
        LanguageModelPrior(iterations=12, every=5, starts=3, proposals=4, polish=4),
    ],
    ids=lambda attack: type(attack).__name__,
)
def test_the_same_seed_gives_the_same_result_and_a_deadline_is_kept(attack: Attack) -> None:
    view = view_of_sentence(bert())
    first, again = run(attack, view, seed=3), run(attack, view, seed=3)
    assert torch.equal(first.x, again.x)
    assert first.history == again.history
    frames = [frame for _, _, frame in first.strip]
    assert all(frame.dtype == torch.int64 and frame.shape == GOLDEN.shape for frame in frames)
    assert torch.equal(frames[-1], first.x)
    late = run(attack, view, monitor=Monitor(deadline=time.monotonic() - 1))
    assert late.stopped == "budget"
    assert late.x.shape == GOLDEN.shape


def test_every_attack_is_described() -> None:
    assert EMBEDDING_ATTACKS.keys() == EMBEDDING_DESCRIPTIONS.keys()


def test_candidates_leave_what_is_not_theirs_alone() -> None:
    view = view_of_sentence(bert(), torch.tensor([[5, 6, 7], [8, NO_TOKEN, NO_TOKEN]]), torch.tensor([0, 1]))
    sentences = laid_out(view, "3+1")
    assert isinstance(sentences, Sentences)
    embeddings = sentences.embed(torch.ones(4, 32))
    assert bool(embeddings[1, 1:].isnan().all())
    assert bool((embeddings[sentences.there] == 1).all())
