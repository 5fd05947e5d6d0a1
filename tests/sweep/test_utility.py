"""Held-out accuracy after federated training with a defense, against plain training loops."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from tiny_audits import CLASSES, SPACE, build, victim_of
from tiny_text import text_victim
from torch import Tensor, nn

from leakaudit.bundled import sentences
from leakaudit.data import PrivateBatch
from leakaudit.defenses import Clip, Defense, GaussianNoise, Quantise, TopK
from leakaudit.errors import InputError
from leakaudit.federated.training import Examples, TrackedClient, accuracy, shuffled, split, train
from leakaudit.models.spaces import NO_TOKEN
from leakaudit.models.victim import Params, Victim
from leakaudit.models.zoo import load_victim
from leakaudit.randomness import fork
from leakaudit.rounds import ClientUpdate, Round, client_update, mean_update
from leakaudit.sweep.utility import Training, measure_utility, training_round
from leakaudit.sweep_results import Utility
from leakaudit.text_data import private_text
from leakaudit.update import Update

SHORT = Training(steps=24, batch_size=8, learning_rate=0.1, evaluations=4, seeds=2)


def patterns(count: int = 80, seed: int = 5) -> PrivateBatch:
    """Five classes of stripes in noise, (count, 3, 8, 8) in [0, 1]: easy to learn."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % CLASSES
    rows = torch.arange(8)
    waves = torch.stack([torch.sin(rows * (label + 1) * 0.8) for label in range(CLASSES)])
    pixels = (
        0.5 + 0.3 * waves[labels][:, None, :, None] + 0.1 * torch.randn(count, 3, 8, 8, generator=generator)
    )
    return PrivateBatch(pixels.clamp(0, 1), labels, tuple(str(i) for i in range(count)))


def examples_of(batch: PrivateBatch, dtype: torch.dtype = torch.float32) -> Examples:
    return Examples(SPACE.encode(batch.pixels.to(dtype)), batch.labels)


def measured(
    *defenses: Defense,
    model: str = "smooth",
    data: PrivateBatch | None = None,
    round: Round | None = None,
    training: Training = SHORT,
    seed: int = 0,
) -> Utility:
    victim = victim_of(model)
    named = [(str(defense), defense) for defense in defenses]
    return measure_utility(
        victim,
        data or patterns(),
        named,
        round or Round(1),
        training,
        protocol="fedsgd",
        defense="+".join(text for text, _ in named) or "none",
        seed=seed,
    )


# ---------------------------------------------------------------------------- against plain loops


def plain_sgd(
    module: nn.Module, examples: Examples, batches: Sequence[Tensor], rate: float, momentum: float = 0.0
) -> nn.Module:
    module = copy.deepcopy(module)
    optimiser = torch.optim.SGD(module.parameters(), lr=rate, momentum=momentum)
    for rows in batches:
        optimiser.zero_grad()
        nn.functional.cross_entropy(module(examples.x[rows]), examples.y[rows]).backward()
        optimiser.step()
    return module


def trained(
    model: str, round: Round, examples: Examples, batches: Sequence[Tensor], momentum: float = 0.0
) -> Victim:
    victim = victim_of(model, "train").to(dtype=examples.x.dtype)
    client = TrackedClient()
    *_, (params, buffers) = train(victim, client, client, round, examples, batches, momentum)
    return replace(victim, params=dict(params), buffers=buffers)


def assert_same(victim: Victim, module: nn.Module, tolerance: float = 1e-9) -> None:
    state = module.state_dict()
    for name, tensor in {**victim.params, **victim.buffers}.items():
        torch.testing.assert_close(tensor, state[name], rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("model", ["smooth", "norm"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_undefended_fedsgd_is_torch_sgd(model: str, momentum: float) -> None:
    """Parameters and BatchNorm's running statistics, after two epochs."""
    examples = examples_of(patterns(), torch.float64)
    batches = list(islice(shuffled(80, 8, fork(0, "test")), 20))
    ours = trained(model, Round(8, learning_rate=0.1), examples, batches, momentum)
    assert_same(ours, plain_sgd(build(model).double().train(), examples, batches, 0.1, momentum))


def test_undefended_fedsgd_is_torch_sgd_in_single_precision() -> None:
    examples = examples_of(patterns())
    batches = list(islice(shuffled(80, 8, fork(0, "test")), 20))
    ours = trained("smooth", Round(8, learning_rate=0.1), examples, batches)
    assert_same(ours, plain_sgd(build("smooth").train(), examples, batches, 0.1), 1e-6)


def fedavg(module: nn.Module, round: Round, examples: Examples, batches: Sequence[Tensor]) -> nn.Module:
    """McMahan et al. 2017, algorithm 1, on state dicts: the mean of what the clients end with."""
    module = copy.deepcopy(module)
    for rows in batches:
        ends = []
        for own in torch.split(rows, round.own_examples):
            local = [own[round.batch(step)] for step in range(round.local_steps)]
            ends.append(plain_sgd(module, examples, local, round.learning_rate).state_dict())
        mean = {name: torch.stack([end[name].double() for end in ends]).mean(0) for name in ends[0]}
        module.load_state_dict(mean)
    return module


@pytest.mark.parametrize("model", ["smooth", "norm"])
@pytest.mark.parametrize("round", [Round(8, 3, 4, 0.2), Round(8, 2, None, 0.1), Round(24, 4, 4, 0.1, 3)])
def test_fedavg_is_the_mean_of_what_the_clients_end_with(model: str, round: Round) -> None:
    """Several clients, several local steps, several passes: the server's learning rate is 1."""
    examples = examples_of(patterns(), torch.float64)
    batches = list(islice(shuffled(80, round.num_examples, fork(0, "test")), 4))
    ours = trained(model, round, examples, batches)
    assert_same(ours, fedavg(build(model).double().train(), round, examples, batches))


def test_fedavg_of_one_local_step_is_fedsgd() -> None:
    once = measured(round=Round(1, 1, None, learning_rate=0.7))
    assert once.curves == measured(round=Round(1)).curves
    assert training_round(Round(4, 1, 2, 0.7), [], SHORT, 64).learning_rate == SHORT.learning_rate


def test_many_clients_are_one_with_all_their_examples() -> None:
    """The mean of equal clients' gradients is the gradient of the mean, without BatchNorm."""
    examples = examples_of(patterns(), torch.float64)
    batches = list(islice(shuffled(80, 16, fork(0, "test")), 6))
    one, four = (
        trained("smooth", Round(16, learning_rate=0.1, clients=n), examples, batches) for n in (1, 4)
    )
    for name in one.params:
        torch.testing.assert_close(one.params[name], four.params[name], rtol=1e-9, atol=1e-9)


# ------------------------------------------------------------------------------------- the whole


def test_training_learns_and_reports_it() -> None:
    found = measured(training=replace(SHORT, steps=120, seeds=3))
    assert found.accuracy is not None
    assert found.accuracy > 0.9
    assert (found.protocol, found.defense, found.steps, found.reason) == ("fedsgd", "none", 120, "")
    assert [curve.seed for curve in found.curves] == [0, 1, 2]
    assert [step for step, _ in found.curves[0].points] == [0, 30, 60, 90, 120]
    assert (found.epsilon, found.delta, found.supplied) == (None, None, False)
    assert found.seconds > 0


def test_the_interval_is_students_over_seeds() -> None:
    found = measured(GaussianNoise(std=0.3), training=replace(SHORT, seeds=4))
    finals = [curve.points[-1][1] for curve in found.curves]
    assert len(set(finals)) > 1
    low, high = stats.t.interval(0.95, 3, loc=np.mean(finals), scale=stats.sem(finals))
    assert found.accuracy == pytest.approx(np.mean(finals))
    assert (found.low, found.high) == (pytest.approx(max(0, low)), pytest.approx(min(1, high)))


def test_one_seed_has_no_interval_and_is_the_first_of_several() -> None:
    one, two = measured(training=replace(SHORT, seeds=1)), measured()
    assert (one.low, one.high) == (None, None)
    assert one.curves[0] == two.curves[0]
    assert two.curves[1] == measured(training=replace(SHORT, seeds=1), seed=1).curves[0]


def test_same_seed_same_result_whatever_torch_drew_before() -> None:
    first = measured(GaussianNoise(std=0.1))
    torch.rand(7)
    again = measured(GaussianNoise(std=0.1))
    assert first.model_copy(update={"seconds": again.seconds}) == again
    assert measured(GaussianNoise(std=0.1), seed=9).curves[0].points != first.curves[0].points


def test_torchs_own_generator_is_left_alone() -> None:
    torch.manual_seed(3)
    measured()
    drawn = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(1))


def test_noise_costs_accuracy_and_mild_defenses_do_not() -> None:
    training = replace(SHORT, steps=120, seeds=1)
    found = {
        name: measured(defense, training=training).accuracy
        for name, defense in {
            "fp16": Quantise("fp16"),
            "int8": Quantise("int8"),
            "half": TopK(0.5),
            "drowned": GaussianNoise(std=3.0),
        }.items()
    }
    assert min(found["fp16"], found["int8"], found["half"]) > 0.9  # type: ignore[type-var]
    assert found["drowned"] < 0.6  # type: ignore[operator]


def test_defenses_apply_in_the_order_given() -> None:
    """A clip that comes last bounds the noise too."""
    noise, clip = GaussianNoise(std=30.0), Clip(max_grad_norm=1e-9)
    still = measured(noise, clip)
    assert all(accuracy == curve.points[0][1] for curve in still.curves for _, accuracy in curve.points)
    moving = measured(clip, noise)
    assert any(accuracy != curve.points[0][1] for curve in moving.curves for _, accuracy in curve.points)


def test_fine_tuning_starts_from_the_victim_and_fresh_from_each_seed() -> None:
    start = victim_of("smooth")
    asked: list[int] = []

    def fresh(seed: int) -> Victim:
        asked.append(seed)
        scale = 1 + float(torch.rand((), generator=fork(seed, "test")))
        return replace(start, params={name: tensor * scale for name, tensor in start.params.items()})

    data, named = patterns(), {"protocol": "fedsgd", "defense": "none", "seed": 4}
    new = measure_utility(start, data, [], Round(1), SHORT, fresh=fresh, **named)  # type: ignore[arg-type]
    assert asked == [4, 5]
    assert new.curves != measured(seed=4).curves


@pytest.mark.parametrize(("model", "rate"), [("lenet:activation=relu", 0.1), ("resnet20:width=4", 0.05)])
def test_models_of_the_zoo_learn(model: str, rate: float) -> None:
    """BatchNorm included: in eval mode it needs its running statistics to have moved."""
    victim = load_victim(model, num_classes=CLASSES, input_shape=(3, 8, 8))
    training = Training(steps=60, batch_size=8, learning_rate=rate, momentum=0.5, evaluations=1, seeds=1)
    found = measure_utility(
        victim, patterns(), [], Round(1), training, protocol="fedsgd", defense="none", seed=0
    )
    assert found.accuracy is not None
    assert found.accuracy > 0.6


def test_the_victim_is_never_written() -> None:
    victim = victim_of("norm")
    tensors = {name: tensor.clone() for name, tensor in {**victim.params, **victim.buffers}.items()}
    measure_utility(victim, patterns(), [], Round(1), SHORT, protocol="p", defense="none", seed=0)
    for name, tensor in {**victim.params, **victim.buffers}.items():
        assert torch.equal(tensor, tensors[name]), name


# ---------------------------------------------------------------------------------- defenses' seams


@dataclass(frozen=True)
class Remembering(Defense):
    """Shares only every other update, the sum of two: keeps the rest in the function."""

    def wrap(self, client: ClientUpdate, generator: torch.Generator) -> ClientUpdate:
        raise AssertionError("a training uses `training`")

    def training(self, client: ClientUpdate, generator: torch.Generator) -> ClientUpdate:
        kept: list[Update] = []

        def defended(victim: Victim, params: Params, round: Round, x: Tensor, y: Tensor) -> Update:
            kept.append(client(victim, params, round, x, y))
            if len(kept) < 2:
                return kept[0] * 0.0
            total = kept[0] + kept[1]
            kept.clear()
            return total

        return defended


@dataclass(frozen=True)
class Refusing(Defense):
    def wrap(self, client: ClientUpdate, generator: torch.Generator) -> ClientUpdate:
        def defended(victim: Victim, params: Params, round: Round, x: Tensor, y: Tensor) -> Update:
            raise InputError("no training with\nBatchNorm")

        return defended


@dataclass(frozen=True)
class Cohort(Defense):
    """More clients, of two local steps over two batches, and only the last layer trains."""

    def round(self, round: Round) -> Round:
        return Round(6 * round.num_examples, 2, round.num_examples, 0.3, 3)

    def victim(self, victim: Victim) -> Victim:
        *body, weight, bias = victim.params
        kept = {name: victim.params[name] for name in (weight, bias)}
        return replace(victim, params=kept, frozen={name: victim.params[name] for name in body})

    def wrap(self, client: ClientUpdate, generator: torch.Generator) -> ClientUpdate:
        return client

    def epsilon(self, *, sample_rate: float, steps: int, delta: float) -> float:
        return sample_rate * steps + delta


@dataclass(frozen=True)
class OwnGradient(Defense):
    """Makes its update without the client it is given."""

    def wrap(self, client: ClientUpdate, generator: torch.Generator) -> ClientUpdate:
        def own(victim: Victim, params: Params, round: Round, x: Tensor, y: Tensor) -> Update:
            return Update(torch.func.grad(victim.loss)(params, x, y))

        return own


def test_what_a_client_keeps_lives_for_one_seeds_training() -> None:
    training = replace(SHORT, steps=1, evaluations=1)
    found = measured(Remembering(), training=training)
    assert all(curve.points[0][1] == curve.points[1][1] for curve in found.curves)  # first update is zero
    assert measured(Remembering(), training=replace(SHORT, steps=160, seeds=1)).accuracy > 0.7  # type: ignore[operator]


def test_a_defense_that_cannot_train_is_a_result() -> None:
    found = measured(Refusing())
    assert (found.accuracy, found.reason) == (None, "no training with BatchNorm")


def test_a_defense_changes_the_round_and_the_model() -> None:
    seen: list[tuple[Round, list[str], list[Tensor], int]] = []

    @dataclass(frozen=True)
    class Watching(Defense):
        def wrap(self, client: ClientUpdate, generator: torch.Generator) -> ClientUpdate:
            def watched(victim: Victim, params: Params, round: Round, x: Tensor, y: Tensor) -> Update:
                seen.append((round, list(params), list(victim.frozen.values()), len(x)))
                return client(victim, params, round, x, y)

            return watched

    measured(Cohort(), Watching(), training=replace(SHORT, steps=3, seeds=1), round=Round(2))
    expected = Round(48, 2, 8, 0.3, 3)
    assert training_round(Round(2), [Cohort()], SHORT, 64) == expected
    *body, weight, bias = victim_of("smooth").params
    for round, trained_names, frozen, count in seen:
        assert (round, trained_names, count) == (expected, [weight, bias], 48)
        assert all(torch.equal(victim_of("smooth").params[n], t) for n, t in zip(body, frozen, strict=True))
    assert len(seen) == 3


def test_epsilon_is_for_the_training_as_it_was() -> None:
    found = measured(Cohort(), training=replace(SHORT, steps=3))
    assert found.epsilon == pytest.approx(3 * 8 / 64 * 6 + 1 / 64)
    assert found.delta == 1 / 64
    assert measured(Cohort(), training=replace(SHORT, steps=1, delta=1e-5)).delta == 1e-5


@dataclass(frozen=True)
class Sampling(Defense):
    """Replaces the client's SGD, as DP-SGD does, and draws its own batches."""

    poisson: bool = True

    def poisson_rate(self, round: Round) -> float | None:
        return round.batch_size / round.own_examples if self.poisson else None

    def epsilon(self, *, sample_rate: float, steps: int, delta: float) -> float:
        return sample_rate * steps

    def wrap(self, client: ClientUpdate, generator: torch.Generator) -> ClientUpdate:
        if client is not client_update:
            raise InputError("must be first")
        victims: list[Victim] = []

        def sampled(victim: Victim, params: Params, round: Round, x: Tensor, y: Tensor) -> Update:
            if victim.batch_norms():
                raise InputError("no BatchNorm")
            if round.clients > 1:
                return mean_update(sampled, victim, params, round, x, y)
            assert all(victim is other for other in victims)
            victims.append(victim)
            if not self.poisson:
                return client(victim, params, round, x, y)
            assert len(x) == round.own_examples
            drawn = torch.rand(len(x), generator=generator) < round.batch_size / round.own_examples
            if not drawn.any():
                return client(victim, params, Round(1), x[:1], y[:1]) * 0.0
            return client(victim, params, Round(int(drawn.sum())), x[drawn], y[drawn])

        return sampled


def test_a_defense_may_replace_the_clients_training_and_sample_for_itself() -> None:
    training = replace(SHORT, steps=120, seeds=1)
    found = measured(Sampling(), training=training, round=Round(2, clients=2))
    assert found.accuracy is not None
    assert found.accuracy > 0.7
    assert found.epsilon == pytest.approx(8 / 32 * 120)
    assert found.reason == ""
    assert training_round(Round(2, clients=2), [Sampling()], training, 64) == Round(64, 1, 8, 0.1, 2)
    assert training_round(Round(1), [Sampling()], training, 5) == Round(5, 1, 5, 0.1)


def test_shuffled_batches_are_said_to_be_when_epsilon_is_not_of_them() -> None:
    found = measured(Sampling(poisson=False), training=replace(SHORT, steps=4))
    assert found.epsilon == pytest.approx(4 * 8 / 64)
    assert "shuffled" in found.reason


def test_a_defense_that_refuses_batchnorm_says_so_itself() -> None:
    assert measured(Sampling(), model="norm").reason == "no BatchNorm"


def test_running_statistics_move_whoever_makes_the_update() -> None:
    training = replace(SHORT, seeds=1)
    plain, own = (
        measured(model="norm", training=training),
        measured(OwnGradient(), model="norm", training=training),
    )
    assert own.curves == plain.curves


def test_a_larger_audited_batch_counts_only_where_a_defense_made_it() -> None:
    @dataclass(frozen=True)
    class Larger(Defense):
        def round(self, round: Round) -> Round:
            return replace(round, num_examples=16 * round.num_examples)

        def wrap(self, client: ClientUpdate, generator: torch.Generator) -> ClientUpdate:
            return client

    assert training_round(Round(30), [], SHORT, 64).num_examples == 8
    assert training_round(Round(1), [Larger()], SHORT, 64).num_examples == 16
    assert training_round(Round(1), [Larger()], SHORT, 10).num_examples == 10
    assert training_round(Round(4, 4, 1, 0.1), [], SHORT, 64) == Round(32, 4, 8, 0.1)


# ------------------------------------------------------------------------------------ when it fails


def test_a_diverged_training_is_chance_with_a_reason() -> None:
    found = measured(model="norm", training=replace(SHORT, learning_rate=1e38))
    assert found.accuracy == pytest.approx(1 / CLASSES)
    assert "diverged in 2 of 2 seeds" in found.reason
    assert [step for step, _ in found.curves[0].points] == [0, 6, 12, 18, 24]


@pytest.mark.parametrize(("count", "share"), [(4, 0.2), (1, 0.2), (3, 0.9)])
def test_too_few_examples_are_a_reason(count: int, share: float) -> None:
    found = measured(data=patterns(count), training=replace(SHORT, holdout=share))
    assert found.accuracy is None
    assert "at least 2 and 1 are needed" in found.reason


def test_few_examples_are_enough() -> None:
    training = replace(SHORT, steps=2, evaluations=1)
    found = measured(data=patterns(10), round=Round(64, 1, None, 0.1, 16), training=training)
    assert found.accuracy is not None


def test_data_that_do_not_fit_are_refused() -> None:
    wrong = replace(patterns(), labels=torch.full((80,), CLASSES))
    with pytest.raises(InputError, match="label 5"):
        measured(data=wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        {"batch_size": 0},
        {"learning_rate": 0.0},
        {"learning_rate": math.nan},
        {"momentum": 1.0},
        {"holdout": 0.0},
        {"holdout": 1.0},
        {"evaluations": 0},
        {"seeds": 0},
        {"delta": 1.0},
    ],
)
def test_trainings_that_make_no_sense(wrong: dict[str, float]) -> None:
    (name,) = wrong
    with pytest.raises(InputError, match=name):
        Training(**wrong)  # type: ignore[arg-type]


# -------------------------------------------------------------------------------- splits and batches


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(1, 30), min_size=1, max_size=6),
    share=st.floats(0.05, 0.95),
    seed=st.integers(0, 99),
)
def test_a_split_is_stratified_and_whole(counts: list[int], share: float, seed: int) -> None:
    labels = torch.cat([torch.full((count,), label) for label, count in enumerate(counts)])
    labels = labels[torch.randperm(len(labels), generator=fork(seed, "test"))]
    inside, outside = split(labels, share, fork(seed, "split"))
    assert sorted([*inside.tolist(), *outside.tolist()]) == list(range(len(labels)))
    assert len(outside) == round(share * len(labels))
    real = len(outside) / len(labels)
    for label, count in enumerate(counts):
        assert abs(int((labels[outside] == label).sum()) - real * count) < 1 + 1e-6


def test_every_example_is_as_likely_held_out() -> None:
    labels = torch.tensor([0] * 7 + [1] * 3)
    held = torch.zeros(10)
    for seed in range(2000):
        held[split(labels, 0.3, fork(seed, "split"))[1]] += 1
    assert float((held / 2000 - 0.3).abs().max()) < 0.05


@settings(max_examples=40, deadline=None)
@given(available=st.integers(1, 20), needed=st.integers(1, 50), seed=st.integers(0, 9))
def test_batches_use_every_example_once_an_epoch(available: int, needed: int, seed: int) -> None:
    drawn = torch.cat(list(islice(shuffled(available, needed, fork(seed, "test")), available)))
    for epoch in torch.split(drawn, available)[:needed]:
        assert sorted(epoch.tolist()) == list(range(available))


# --------------------------------------------------------------------------------------------- text


def text_utility(model: str, task: str, training: Training) -> Utility:
    victim = text_victim(model, task)
    texts = sentences()[:30]
    labels = [len(text) % 2 for text in texts] if task == "classification" else None
    data = private_text(texts, victim.space, victim.task, labels)
    return measure_utility(victim, data, [], Round(1), training, protocol="fedsgd", defense="none", seed=0)


@pytest.mark.parametrize(
    ("model", "task", "said"),
    [("bert", "classification", ""), ("bert", "mlm", "masked words"), ("gpt2", "causal-lm", "next token")],
)
def test_accuracy_of_text_says_what_it_is_of(model: str, task: str, said: str) -> None:
    training = Training(steps=4, batch_size=4, learning_rate=0.05, evaluations=1, seeds=1)
    found = text_utility(model, task, training)
    assert found.accuracy is not None
    assert 0 <= found.accuracy <= 1
    assert said in found.reason
    assert bool(said) == bool(found.reason)
    again = text_utility(model, task, training)
    assert again.curves == found.curves


def test_accuracy_of_tokens_against_a_plain_loop() -> None:
    victim = text_victim("gpt2", "causal-lm")
    data = private_text(sentences()[:7], victim.space, victim.task)
    hits = total = 0
    for row in data.tokens:
        tokens = row[row != NO_TOKEN]
        with torch.no_grad():
            scores = victim.module(input_ids=tokens[None]).logits[0]
        hits += int((scores[:-1].argmax(-1) == tokens[1:]).sum())
        total += len(tokens) - 1
    assert accuracy(victim, Examples(data.tokens, data.labels), chunk=3) == pytest.approx(hits / total)


def test_a_model_of_sentences_learns_its_classes() -> None:
    """Fine-tuned on sentences that it also answers for, by their first word."""
    victim = text_victim("bert", "classification")
    texts = [f"{'Good' if i % 2 else 'Bad'}, {sentence}" for i, sentence in enumerate(sentences()[:32])]
    data = private_text(texts, victim.space, victim.task, [i % 2 for i in range(32)])
    training = Training(steps=40, batch_size=8, learning_rate=0.1, evaluations=1, seeds=1, holdout=0.25)
    found = measure_utility(victim, data, [], Round(1), training, protocol="p", defense="none", seed=0)
    assert found.accuracy is not None
    assert found.accuracy >= 0.75


def test_an_accuracy_of_the_commonest_class_is_called_so() -> None:
    found = measured(training=replace(SHORT, learning_rate=1e-9))
    assert found.accuracy is not None
    assert found.accuracy <= 1 / CLASSES + 0.02
    assert "no better than always saying the commonest class, which is right in 2" in found.reason
