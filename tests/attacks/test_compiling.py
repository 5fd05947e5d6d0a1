"""A compiled step gives the eager step's numbers, or the eager step runs and says why."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from leakaudit.attacks.base import Monitor
from leakaudit.attacks.compiling import COSTS, Compiler, Function
from leakaudit.attacks.gradient_matching import InvertingGradients
from leakaudit.attacks.graphs import UNFOLDED, UNFOLDED_BATCH, Recorded, Unfolding, record
from leakaudit.attacks.optimise import Matching, of_each, value_and_gradient, value_and_gradients
from leakaudit.errors import InputError
from leakaudit.formats.manifest import Normalisation
from leakaudit.models.zoo import load_victim
from leakaudit.randomness import fork
from leakaudit.rounds import Round, client_update
from leakaudit.threat import View

PLAIN = Normalisation(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
DISTANCES = ("squared", "cosine", "relative")


def view_of(model: str = "lenet:init=uniform", seed: int = 0, count: int = 2, steps: int = 1) -> View:
    victim = load_victim(model, num_classes=10, input_shape=(3, 16, 16), normalisation=PLAIN, seed=seed)
    round = Round(count, local_steps=steps, learning_rate=0.1)
    x = victim.space.sample(count, fork(seed, "photo"), victim.dtype)
    return View(victim, round, client_update(victim, victim.params, round, x, torch.arange(count)).detach())


def start(view: View, seed: int = 1) -> tuple[Tensor, Tensor]:
    x = torch.randn(view.round.num_examples, *view.victim.space.shape, generator=fork(seed, "start"))
    return x, torch.arange(view.round.num_examples)


def step_of(view: View, distance: str = "cosine") -> Function:
    return value_and_gradient(Matching(view, distance, tv=1e-4))  # type: ignore[arg-type]


def replayed(recorded: Recorded, *arguments: Tensor) -> tuple[Tensor, ...]:
    """What the recorded graph gives, without compiling it."""
    with torch.no_grad():
        return tuple(recorded.graph(*arguments, *recorded.constants))


def close(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], tolerance: float = 1e-4) -> bool:
    return all(
        float((a - b).norm()) <= tolerance * float(b.norm()) for a, b in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize(
    ("model", "distance"),
    [*(("lenet:init=uniform", distance) for distance in DISTANCES), ("mlp", "squared"),
     pytest.param("resnet20", "cosine", marks=pytest.mark.slow)],
)  # fmt: skip
def test_a_recorded_step_is_the_eager_step(model: str, distance: str) -> None:
    view = view_of(model)
    x, labels = start(view)
    eager = step_of(view, distance)
    recorded = record(eager, (x, labels))
    elsewhere = torch.randn(x.shape, generator=fork(5, "elsewhere"))
    for point in (x, elsewhere):
        assert close(replayed(recorded, point, labels), eager(point, labels))


def test_local_steps_and_free_labels_are_recorded_too() -> None:
    view = view_of(steps=2)
    x, _ = start(view)
    logits = torch.randn(len(x), 10, generator=fork(0, "logits"))
    eager = value_and_gradients(Matching(view, "squared"))
    recorded = record(eager, (x, logits))
    assert close(replayed(recorded, x + 0.3, logits * 2), eager(x + 0.3, logits * 2))


@pytest.mark.parametrize("free", [False, True])
def test_many_candidates_at_once_are_the_same_one_by_one(free: bool) -> None:
    view = view_of()
    objective = Matching(view, "cosine", tv=1e-2)
    x = torch.randn(3, 2, 3, 16, 16, generator=fork(0, "x"))
    second = torch.randn(3, 2, 10, generator=fork(0, "y")) if free else torch.tensor([[0, 1], [1, 0], [3, 3]])
    step = value_and_gradients(objective) if free else value_and_gradient(objective)
    expected = tuple(torch.stack(parts) for parts in zip(*map(step, x, second), strict=True))
    together = of_each(objective, free)
    assert close(together(x, second), expected)
    assert close(replayed(record(together, (x, second)), x, second), expected)


def test_unfolded_convolutions_are_convolutions() -> None:
    generator = fork(0, "convolutions")
    for stride, padding, dilation, groups, bias in [
        (1, 0, 1, 1, False), (2, 1, 1, 1, True), ((1, 2), (2, 0), (2, 1), 1, True),
        (1, 1, 1, 2, True), (1, "valid", 1, 1, False),
    ]:  # fmt: skip
        x = torch.randn(3, 4, 9, 8, generator=generator, dtype=torch.float64)
        w = torch.randn(6, 4 // groups, 3, 2, generator=generator, dtype=torch.float64)
        b = torch.randn(6, generator=generator, dtype=torch.float64) if bias else None
        expected = torch.conv2d(x, w, b, stride, padding, dilation, groups)  # type: ignore[arg-type]
        with Unfolding():
            found = torch.conv2d(x, w, b, stride, padding, dilation, groups)  # type: ignore[arg-type]
        torch.testing.assert_close(found, expected)


def test_large_convolutions_stay() -> None:
    """Their patches would take more memory than the product saves time."""
    x = torch.zeros(1, 1, 1024, 1024)
    assert 9 * x.numel() > UNFOLDED
    assert convolves(record(lambda x: (torch.conv2d(x, torch.ones(1, 1, 3, 3)),), (x,)))


def test_a_convolution_of_many_images_stays_sooner() -> None:
    """Libraries have fast kernels for these; products made a ResNet-20 of batch 8 slower than eager."""
    weight = torch.ones(16, 16, 3, 3)
    assert UNFOLDED_BATCH < weight[0].numel() * 32**2 < UNFOLDED
    for count, stays in ((1, False), (2, True)):
        recorded = record(lambda x: (torch.conv2d(x, weight, padding=1),), (torch.zeros(count, 16, 32, 32),))
        assert convolves(recorded) == stays


def convolves(recorded: Recorded) -> bool:
    return "aten.convolution.default" in {str(node.target) for node in recorded.graph.graph.nodes}


def test_one_graph_serves_other_models_updates_and_labels_of_the_same_shapes() -> None:
    first, second = view_of(seed=0), view_of(seed=1)
    x, labels = start(first)
    a, b = (record(step_of(view), (x, labels)) for view in (first, second))
    assert a.key == b.key
    with torch.no_grad():
        found = tuple(a.graph(x, labels.flip(0), *b.constants))
    assert close(found, step_of(second)(x, labels.flip(0)))
    other = record(step_of(view_of(count=1)), (x[:1], labels[:1]))
    assert other.key != a.key


def test_what_does_not_depend_on_the_candidate_is_computed_once() -> None:
    weights = torch.randn(200, 200, generator=fork(0, "weights"))

    def function(x: Tensor) -> tuple[Tensor, ...]:
        return ((weights @ weights).sum() * x,)

    recorded = record(function, (torch.ones(3),))
    assert [constant.shape for constant in recorded.constants] == [torch.Size([])]
    assert recorded.flops == 0


def test_a_count_of_products_is_exact() -> None:
    weights = torch.ones(5, 7)
    recorded = record(lambda x: (x @ weights,), (torch.ones(3, 5),))
    assert recorded.flops == 2 * 3 * 5 * 7


def branching(x: Tensor) -> tuple[Tensor, ...]:
    return (x if float(x.sum()) > 0 else -x,)


def random(x: Tensor) -> tuple[Tensor, ...]:
    return (x + torch.randn(x.shape),)


@pytest.mark.parametrize("function", [branching, random])
def test_what_cannot_be_recorded_runs_eagerly_and_says_why(
    function: Callable[..., tuple[Tensor, ...]],
) -> None:
    compiler = Compiler("always")
    assert compiler.prepare(function, [torch.ones(3)], evaluations=1) is function
    assert compiler.step.startswith("eager, not compiled: ")
    assert "\n" not in compiler.step
    assert not compiler.seconds


def test_never_means_never_and_few_evaluations_are_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("leakaudit.attacks.graphs.record", lambda *_: pytest.fail("recorded"))
    view = view_of()
    step = step_of(view)
    assert Compiler("never").prepare(step, start(view), evaluations=10**9) is step
    assert Compiler("auto").prepare(step, start(view), evaluations=10) is step


def test_auto_weighs_what_is_saved_against_compiling() -> None:
    view = view_of()
    recorded = record(step_of(view), start(view))
    costs = COSTS["cpu"]
    eager = recorded.operations * costs.operation + recorded.flops * costs.flop
    even = costs.seconds(recorded) / (eager * costs.saved)
    assert not costs.worthwhile(recorded, int(0.9 * even))
    assert costs.worthwhile(recorded, int(1.1 * even))


def test_no_compiling_shortly_before_a_deadline() -> None:
    view = view_of()
    step = step_of(view)
    compiler = Compiler("auto")
    assert compiler.prepare(step, start(view), evaluations=10**6, seconds_left=1.0) is step
    assert not compiler.seconds


def test_an_unknown_mode_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="compile is 'yes'; accepted: auto, always, never"):
        Compiler.of("yes")
    monkeypatch.setenv("LEAKAUDIT_COMPILE", "sometimes")
    with pytest.raises(InputError, match="LEAKAUDIT_COMPILE is 'sometimes'"):
        Compiler.of()
    monkeypatch.setenv("LEAKAUDIT_COMPILE", "always")
    assert Compiler.of().mode == "always"


@pytest.mark.slow
def test_a_compiled_attack_finds_what_the_eager_one_finds() -> None:
    view = view_of(count=1)
    attack = InvertingGradients(iterations=30, signed=False)
    compiler = Compiler("always")
    eager = attack.run(view, fork(0, "a"), Monitor())
    compiled = attack.run(view, fork(0, "a"), Monitor(compiler=compiler))
    again = attack.run(view, fork(0, "a"), Monitor(compiler=compiler))
    assert compiler.step == "compiled"
    assert torch.equal(compiled.x, again.x)
    assert float((compiled.x - eager.x).norm()) <= 1e-2 * float(eager.x.norm())
    torch.testing.assert_close(compiled.loss, eager.loss, rtol=1e-3, atol=1e-6)


def test_what_is_compiled_does_not_depend_on_what_ran_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a sweep one worker keeps its graphs between runs, and two workers must find what one finds."""
    view = view_of()
    step, arguments = step_of(view), start(view)
    compiler = Compiler("auto")
    compiler._compiled[record(step, arguments).key] = None  # type: ignore[assignment]
    monkeypatch.setattr("leakaudit.attacks.compiling.FEW", 0)
    assert compiler.prepare(step, arguments, evaluations=1) is step


def test_a_refusal_lasts_for_one_attempt() -> None:
    compiler, arguments = Compiler("always"), [torch.ones(3)]
    compiler.prepare(branching, arguments, evaluations=1)
    compiler.begin()
    assert compiler.step == "eager"
    compiler.prepare(random, arguments, evaluations=1)
    assert "random" in compiler.step


@pytest.mark.gpu
def test_a_replayed_step_is_the_eager_step() -> None:
    view = view_of().to("cuda")
    step = step_of(view)
    x, labels = (tensor.cuda() for tensor in start(view))
    compiler = Compiler("always")
    quick = compiler.prepare(step, (x, labels), evaluations=1)
    assert compiler.step == "compiled"
    for point in (x, 2 * x):
        assert close(quick(point, labels), step(point, labels))


def test_a_tensor_given_twice_is_two_arguments() -> None:
    same = torch.ones(3)
    recorded = record(lambda x, y: (x - 2 * y,), (same, same))
    assert torch.equal(replayed(recorded, torch.full((3,), 5.0), torch.ones(3))[0], torch.full((3,), 3.0))
