"""Membership inference: its arithmetic against dense linear algebra, chance where there is nothing, and real leaks."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal
from text_rounds import tiny_victim
from tiny_audits import SPACE, private_batch, victim_of

import leakaudit
from leakaudit.capture import capture
from leakaudit.data import PrivateBatch
from leakaudit.defenses.naming import parse_all
from leakaudit.errors import InputError
from leakaudit.inference import INFERENCES, Alignment, Evidence, LikelihoodRatio, Records, Words
from leakaudit.inference.experiment import Plan, infer_membership, observe
from leakaudit.inference.likelihood import FLOOR, MatchedFilter
from leakaudit.inference.responses import NUMBERS, responses, weight
from leakaudit.inference_results import InferenceResult, Rate
from leakaudit.models.victim import Victim
from leakaudit.rounds import Round
from leakaudit.text_data import private_text
from leakaudit.threat import View

MEMBERSHIP = ("membership-likelihood", "membership-gradient", "membership-loss")


def fork(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def records(count: int, seed: int = 3) -> PrivateBatch:
    x, y = private_batch(count, seed)
    return PrivateBatch(SPACE.decode(x).clamp(0, 1), y, tuple(f"{i}.png" for i in range(count)))


def seen(victim: Victim, round: Round, *specs: str, data: PrivateBatch | None = None, seed: int = 0) -> View:
    parts = parse_all(specs)
    captured = capture(victim, data or records(round.num_examples), round, defenses=parts, seed=seed)
    return observe(victim, captured, parts)


def evidence_of(victim: Victim, count: int = 40, seed: int = 3, own: int = 40) -> Evidence:
    """Candidates are the records of this seed, the first ones those that `seen` trained on."""
    x, y = private_batch(count, seed)
    return Evidence(Records(x, y), Records(*private_batch(own, seed + 100)))


def measured(result: InferenceResult, attack: str, name: str = "auc") -> Rate:
    outcome = next(item for item in result.outcomes if item.attack == attack)
    found = outcome.rate(name)
    assert found is not None, outcome.skipped
    return found


def value(rate: Rate) -> float:
    assert rate.value is not None, rate.reason
    return rate.value


# ------------------------------------------------------------------------------ arithmetic


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_an_update_is_the_weighted_sum_of_its_records_responses(reduction: str) -> None:
    module = victim_of("smooth").module
    victim = Victim.of(module, SPACE, 5, reduction=reduction)
    view = seen(victim, Round(4))
    found = responses(view, evidence_of(victim), NUMBERS)
    total = weight(view) * found.candidates[:4].sum(0)
    assert torch.allclose(total, found.at(view.observed), atol=1e-6 * float(total.abs().max()))


def test_clipped_examples_answer_with_their_clipped_gradients() -> None:
    victim = victim_of("smooth")
    view = seen(victim, Round(4), "clip-examples:max_grad_norm=0.05")
    found = responses(view, evidence_of(victim), NUMBERS)
    assert float(found.candidates.norm(dim=1).max()) <= 0.0501
    total = weight(view) * found.candidates[:4].sum(0)
    assert torch.allclose(total, found.at(view.observed), atol=1e-5 * float(total.abs().max()))


def test_only_what_a_mask_kept_is_looked_at() -> None:
    victim = victim_of("smooth")
    view = seen(victim, Round(4), "top-k:keep=0.05")
    found = responses(view, evidence_of(victim), NUMBERS)
    kept = view.observed.flat().nonzero().flatten()
    assert set(found.places.tolist()) <= set(kept.tolist())
    assert len(found.places) > 0.9 * len(kept)


def test_the_numbers_looked_at_are_those_with_the_strongest_response() -> None:
    victim = victim_of("smooth")
    view, evidence = seen(victim, Round(2)), evidence_of(victim)
    whole, few = (responses(view, replace(evidence, kept={}), numbers) for numbers in (NUMBERS, 50))
    energy = torch.cat([whole.candidates, whole.reference]).square().sum(0)
    strongest = whole.places[energy.topk(50).indices].sort().values
    assert torch.equal(few.places, strongest)
    rows = torch.isin(whole.places, strongest)
    assert torch.allclose(few.candidates, whole.candidates[:, rows])
    assert torch.allclose(few.reference, whole.reference[:, rows])


def problem(seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = fork(seed)
    signals, base = (torch.randn(count, 9, generator=generator, dtype=torch.float64) for count in (4, 6))
    update = torch.randn(9, generator=generator, dtype=torch.float64)
    noise = torch.rand(9, generator=generator, dtype=torch.float64)
    return signals, base - base.mean(0), update, noise


def dense(base: torch.Tensor, noise: torch.Tensor, shrink: float) -> np.ndarray:
    covariance = (base.T @ base / len(base)).numpy()
    diagonal = np.diag(covariance) + FLOOR * np.diag(covariance).mean()
    return (1 - shrink) * covariance + np.diag(shrink * diagonal + noise.numpy() ** 2)


@pytest.mark.parametrize("shrink", [0.003, 0.3, 1.0])
def test_the_matched_filter_inverts_the_covariance(shrink: float) -> None:
    signals, base, update, noise = problem()
    found = MatchedFilter.of(signals, base, noise, shrink)
    solved = np.linalg.solve(dense(base, noise, shrink), signals.numpy().T).T
    np.testing.assert_allclose(found.inner(update).numpy(), solved @ update.numpy(), rtol=1e-6)
    np.testing.assert_allclose(found.squares.numpy(), (solved * signals.numpy()).sum(1), rtol=1e-6)


def test_the_score_is_the_log_likelihood_ratio() -> None:
    """Against scipy's Gaussian densities, with the responses, the mean and the covariance worked out densely."""
    victim, round = victim_of("narrow"), Round(3)
    view, evidence = seen(victim, round, "gaussian-noise:std=0.01"), evidence_of(victim, 12, own=16)
    attack = LikelihoodRatio(joint=False, shrink=0.2)
    scores = attack.scores(view, evidence, fork())
    found = responses(view, evidence, NUMBERS)
    own = found.reference.numpy()
    share, mean = 1 / 3, own.mean(0)
    covariance = dense(
        torch.tensor((own - mean) * share * np.sqrt(3)), torch.full((own.shape[1],), 0.01).double(), 0.2
    )
    observed = found.at(view.observed).numpy()
    outside = multivariate_normal(mean, covariance)
    signals = found.candidates.numpy() - mean
    solved = np.linalg.solve(covariance, signals.T).T
    standard = np.abs(solved @ (observed - mean)) / np.sqrt((solved * signals).sum(1))
    excess = max(1.0, np.sort(standard)[(len(standard) - 1) // 2] / 0.6745) ** 2
    for row, score in zip(found.candidates.numpy(), scores.tolist(), strict=True):
        inside = multivariate_normal(mean + share * (row - mean), covariance)
        ratio = (inside.logpdf(observed) - outside.logpdf(observed)) / excess
        assert score == pytest.approx(ratio, rel=1e-4, abs=1e-6)


def test_the_bare_alignment_is_the_cosine() -> None:
    victim = victim_of("smooth")
    view, evidence = seen(victim, Round(2)), evidence_of(victim)
    scores = Alignment(calibration=0).scores(view, evidence, fork())
    for row in range(5):
        alone = seen(victim, Round(1), data=records(40).part(row, 1)).observed
        expected = alone.dot(view.observed) / alone.norm() / view.observed.norm()
        assert float(scores[row]) == pytest.approx(float(expected), rel=1e-4)


# ---------------------------------------------------------------------- what leaks, and what not


@pytest.mark.parametrize("size", [1, 4])
def test_without_a_defense_small_batches_are_told(size: int) -> None:
    plan = Plan(MEMBERSHIP, 40, 60, trials=6)
    result = infer_membership(victim_of("smooth"), records(100), Round(size), (), plan)
    assert value(measured(result, "membership-likelihood")) > 0.99
    assert value(measured(result, "membership-gradient")) > (0.9 if size == 1 else 0.6)
    assert value(measured(result, "membership-loss")) > (0.9 if size == 1 else 0.6)
    best = measured(result, "membership-likelihood", "tpr01")
    assert value(best) > 0.9
    assert measured(result, "membership-likelihood", "tpr001").value is None


def test_the_rest_of_the_batch_is_taken_away_better_than_by_a_cosine() -> None:
    """At 24 records the cosine is close to chance, the likelihood ratio is not; jointly it is nearly certain."""
    attacks = ("membership-likelihood", "membership-gradient")
    result = infer_membership(
        victim_of("smooth"), records(260), Round(24), (), Plan(attacks, 100, 160, trials=6)
    )
    ratio, cosine = (value(measured(result, name)) for name in attacks)
    assert ratio > 0.95
    assert ratio > cosine + 0.1


@pytest.mark.parametrize("attack", MEMBERSHIP)
def test_an_update_of_other_records_tells_nothing(attack: str) -> None:
    """Truth that is drawn by lot after unrelated updates were scored: chance within the interval."""
    from leakaudit.inference.measures import Trialled, rates

    victim, generator = victim_of("smooth"), fork(4)
    evidence = evidence_of(victim, 60, seed=7)
    trials = []
    for number in range(8):
        view = seen(victim, Round(6), data=records(6, seed=300 + number))
        scores = INFERENCES[attack].scores(view, evidence, generator)
        assert bool(scores.isfinite().all())
        truth = torch.randperm(60, generator=generator) < 6
        trials.append(Trialled(scores[truth], scores[~truth]))
    found = rates(trials, generator)[0]
    assert found.low is not None
    assert found.high is not None
    assert found.low <= 0.5 <= found.high


def test_strong_noise_leaves_chance() -> None:
    plan = Plan(MEMBERSHIP, 60, 60, trials=8)
    result = infer_membership(
        victim_of("smooth"), records(120), Round(4), parse_all(["gaussian-noise:std=10"]), plan
    )
    for attack in MEMBERSHIP:
        found = measured(result, attack)
        assert found.low is not None
        assert found.high is not None
        assert found.low <= 0.5 <= found.high, attack


@pytest.mark.parametrize(
    ("round", "specs"),
    [
        (Round(4, 3, learning_rate=0.05), ()),
        (Round(4), ("clip:max_grad_norm=0.01",)),
        (Round(4), ("top-k:keep=0.2",)),
        (Round(2), ("secure-aggregation:clients=2",)),
        (Round(4), ("dp-sgd:noise_multiplier=0.001,max_grad_norm=1",)),
        (Round(4), ("freeze",)),
    ],
    ids=["fedavg", "clip", "top-k", "secure-aggregation", "dp-sgd", "freeze"],
)
def test_members_are_told_through_other_rounds_and_weak_defenses(
    round: Round, specs: tuple[str, ...]
) -> None:
    plan = Plan(MEMBERSHIP, 40, 60, trials=4)
    result = infer_membership(victim_of("smooth"), records(100), round, parse_all(specs), plan)
    assert value(measured(result, "membership-likelihood")) > 0.85
    assert value(measured(result, "membership-gradient")) > 0.55


# ------------------------------------------------------------------------------------ isolation


@pytest.mark.parametrize("attack", MEMBERSHIP)
def test_scores_do_not_depend_on_the_order_of_candidates(attack: str) -> None:
    """What lies where says nothing: the first candidates are the members here, and that is not used."""
    victim = victim_of("smooth")
    view, evidence = seen(victim, Round(4)), evidence_of(victim)
    order = torch.randperm(40, generator=fork(9))
    shuffled = Evidence(evidence.candidates.take(order), evidence.reference)
    plain, other = (INFERENCES[attack].scores(view, item, fork(1)) for item in (evidence, shuffled))
    assert torch.allclose(plain[order], other, rtol=1e-3, atol=1e-4 * float(plain.abs().max()))


@pytest.mark.parametrize("attack", MEMBERSHIP)
def test_nothing_changes_when_the_truth_is_overwritten(attack: str) -> None:
    victim, batch = victim_of("smooth"), records(4)
    captured = capture(victim, batch, Round(4))
    evidence = evidence_of(victim)
    before = INFERENCES[attack].scores(observe(victim, captured, ()), evidence, fork(1))
    batch.pixels.fill_(float("nan"))
    batch.labels.fill_(-1)
    after = INFERENCES[attack].scores(observe(victim, captured, ()), replace(evidence, kept={}), fork(1))
    assert torch.equal(before, after)


def test_what_is_remembered_does_not_change_the_scores() -> None:
    victim, evidence = victim_of("smooth"), evidence_of(victim_of("smooth"))
    for specs in ((), ("top-k:keep=0.2",), ("dp-sgd:noise_multiplier=0.1",)):
        for seed in (0, 1):
            view = seen(victim, Round(3), *specs, data=records(3, seed=50 + seed), seed=seed)
            warm = LikelihoodRatio().scores(view, evidence, fork(1))
            cold = LikelihoodRatio().scores(view, replace(evidence, kept={}), fork(1))
            assert torch.equal(warm, cold)


def test_inferences_never_import_data_defenses_metrics_or_results() -> None:
    folder = Path(leakaudit.__file__).parent / "inference"
    blind = ("base", "responses", "alignment", "likelihood", "words", "properties", "traits")
    for name in blind:
        tree = ast.parse((folder / f"{name}.py").read_text())
        modules = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        parts = {module.split(".")[1] for module in modules if module.startswith("leakaudit.")}
        hidden = {
            "data",
            "text_data",
            "defenses",
            "metrics",
            "results",
            "inference_results",
            "capture",
            "media",
        }
        assert not parts & hidden, name
        assert not modules & {"leakaudit.inference.measures", "leakaudit.inference.experiment"}, name


def test_the_same_seed_gives_the_same_result() -> None:
    def run() -> dict[str, object]:
        plan = Plan(("membership-gradient",), 30, 20, trials=2, seed=5)
        result = infer_membership(victim_of("smooth"), records(50), Round(2), (), plan)
        outcome = result.outcomes[0].model_dump(exclude={"seconds"})
        return outcome | result.model_dump(exclude={"seconds", "created", "outcomes"})

    assert run() == run()


# ---------------------------------------------------------------------------------------- words

SENTENCES = [
    "The nurse explained the treatment twice.",
    "A violin lay on the kitchen table.",
    "Rain fell on the harbour all night.",
    "He sold his bicycle for forty dollars.",
    "The orchestra plays again on Sunday.",
    "Our garden is full of roses.",
    "She paid the plumber in advance.",
    "They walked along the river at dawn.",
    "The committee rejected the proposal.",
    "My brother drives a yellow tractor.",
    "The soup was cold and salty.",
    "Nobody answered the telephone.",
]


def test_words_that_were_said_betray_the_sentence() -> None:
    victim = tiny_victim("bert", "classification")
    batch = private_text(SENTENCES, victim.space, "classification", [i % 2 for i in range(len(SENTENCES))])
    plan = Plan(("membership-words", "membership-gradient:calibration=0"), 8, 4, trials=5)
    result = infer_membership(victim, batch, Round(2), (), plan)
    assert value(measured(result, "membership-words")) > 0.95
    assert value(measured(result, "membership-gradient")) > 0.8
    assert result.medium == "text"


def test_words_by_hand() -> None:
    """Two records that both said all their words: the one with rarer words scores higher, by -log p."""
    victim = tiny_victim("bert", "classification")
    texts = [*SENTENCES[:3], *SENTENCES[:1] * 3]
    batch = private_text(texts, victim.space, "classification", [0] * 6)
    captured = capture(victim, batch.first(2), Round(2))
    view = observe(victim, captured, ())
    rows = Records(batch.tokens, batch.labels)
    evidence = Evidence(rows.take(torch.arange(3)), rows.take(torch.arange(3, 6)))
    attack = Words(missing=1e-3, smoothing=1.0)
    assert attack.applies(view, evidence) is None
    scores = attack.scores(view, evidence, fork())
    said = set(batch.tokens[:2].flatten().tolist())
    others = set(batch.tokens[3].tolist())
    for row in range(3):
        words = {t for t in batch.tokens[row].tolist() if t not in victim.space.special and t >= 0}
        p = {t: (3.5 if t in others else 0.5) / 4 for t in words}  # N - 1 = 1 other record
        expected = sum(-np.log(p[t]) if t in said else np.log(1e-3) for t in words)
        assert float(scores[row]) == pytest.approx(expected, rel=1e-5)
    assert float(scores[1]) > float(scores[0]) > float(scores[2])


def test_words_do_not_apply_where_all_rows_move() -> None:
    victim = tiny_victim("gpt2", "causal-lm")  # the output layer is tied to the word embedding
    batch = private_text(SENTENCES, victim.space, "causal-lm")
    plan = Plan(("membership-words",), 8, 4, trials=1)
    outcome = infer_membership(victim, batch, Round(2), (), plan).outcomes[0]
    assert "do not tell which words" in outcome.skipped
    assert not outcome.rates


def test_words_do_not_apply_to_images() -> None:
    plan = Plan(("membership-words",), 20, 20, trials=1)
    result = infer_membership(victim_of("smooth"), records(40), Round(2), (), plan)
    assert "takes images" in result.outcomes[0].skipped
    assert result.exit_code == 3


# ------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("plan", "size", "message"),
    [
        (Plan(candidates=90, reference=20), 2, "90 candidates and 20 reference records of 100"),
        (Plan(candidates=4, reference=20), 4, "4 candidates for batches of 4"),
        (Plan(("membership-gradeint",)), 2, "did you mean 'membership-gradient'"),
        (Plan(("property",), trait="brigt"), 2, "did you mean 'bright'"),
        (Plan(policy="auc>2"), 2, "cannot be broken"),
    ],
)
def test_bad_input_is_one_line(plan: Plan, size: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        infer_membership(victim_of("smooth"), records(100), Round(size), (), plan)


def test_too_little_reference_is_a_reason_not_a_number() -> None:
    result = infer_membership(
        victim_of("smooth"), records(30), Round(2), (), Plan(MEMBERSHIP, 26, 4, trials=1)
    )
    for outcome in result.outcomes:
        assert "reference records, got 4" in outcome.skipped
        assert outcome.rates == []
    assert result.exit_code == 3


@pytest.mark.parametrize(
    "spec",
    ["membership-likelihood:shrink=0", "membership-gradient:calibration=1", "membership-loss:step=0",
     "membership-words:missing=1", "property:share=0"],
)  # fmt: skip
def test_options_out_of_range_are_refused(spec: str) -> None:
    with pytest.raises(InputError, match=spec.partition(":")[0]):
        infer_membership(victim_of("smooth"), records(30), Round(2), (), Plan((spec,)))
