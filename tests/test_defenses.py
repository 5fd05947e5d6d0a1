from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_audits import private_batch, victim_of
from torch import Tensor

from leakaudit.defenses import (
    Clip,
    DeepGradientCompression,
    Defense,
    GaussianNoise,
    LaplaceNoise,
    Quantise,
    RandomK,
    TopK,
    apply,
)
from leakaudit.defenses.pruning import kept_numbers
from leakaudit.errors import InputError
from leakaudit.models.victim import Params, Victim
from leakaudit.randomness import fork
from leakaudit.rounds import Round, client_update
from leakaudit.update import Update


def defended(defense: Defense, update: Update, seed: int = 0) -> Update:
    """What the defense makes of a client that would share `update`."""

    def client(victim: Victim, params: Params, round: Round, x: Tensor, y: Tensor) -> Update:
        return update

    victim, (x, y) = victim_of("mlp"), private_batch()
    return apply(client, [defense], fork(seed, "defense"))(victim, victim.params, Round(1), x, y)


def repeated(defense: Defense, update: Update, count: int) -> Tensor:
    """`count` independent defended updates, a row each."""
    victim = victim_of("mlp")
    client = apply(lambda *_: update, [defense], fork(0, "defense"))
    nothing = torch.zeros(1)
    return torch.stack([client(victim, {}, Round(1), nothing, nothing).flat() for _ in range(count)])


def example(scale: float = 1.0) -> Update:
    generator = torch.Generator().manual_seed(0)
    return Update(
        {
            "w": scale * torch.randn(60, 50, generator=generator),
            "b": scale * torch.randn(50, generator=generator),
            "zero": torch.zeros(4),
        }
    )


def test_noise_is_white_and_of_the_size_stated() -> None:
    plain = example()
    noise = (defended(GaussianNoise(std=0.3), plain) - plain).flat()
    assert float(noise.std()) == pytest.approx(0.3, rel=0.05)
    assert abs(float(noise.mean())) < 4 * 0.3 / math.sqrt(len(noise))
    assert abs(float((noise @ plain.flat()) / (noise.norm() * plain.flat().norm()))) < 0.06
    assert torch.equal(defended(GaussianNoise(std=0.0), plain).flat(), plain.flat())
    assert not torch.equal(
        defended(GaussianNoise(), plain, 1).flat(), defended(GaussianNoise(), plain, 2).flat()
    )


@pytest.mark.parametrize(("family", "kurtosis"), [(GaussianNoise, 3.0), (LaplaceNoise, 6.0)])
def test_noise_has_the_shape_and_the_deviation_stated(
    family: type[GaussianNoise] | type[LaplaceNoise], kurtosis: float
) -> None:
    plain = Update({"w": torch.zeros(400, 500, dtype=torch.float64)})
    noise = defended(family(std=0.25), plain).flat()
    assert float(noise.std()) == pytest.approx(0.25, rel=0.01)
    assert float(noise.mean()) == pytest.approx(0, abs=4 * 0.25 / math.sqrt(len(noise)))
    assert float((noise / noise.std()).pow(4).mean()) == pytest.approx(kurtosis, rel=0.05)


@pytest.mark.parametrize("family", [GaussianNoise, LaplaceNoise])
@pytest.mark.parametrize("scale", [1e-3, 10.0])
def test_relative_noise_is_a_share_of_the_whole_updates_rms(
    family: type[GaussianNoise] | type[LaplaceNoise], scale: float
) -> None:
    plain = example(scale)
    noise = (defended(family(std=123.0, relative=0.2), plain) - plain).flat()
    wanted = 0.2 * float(plain.flat().square().mean().sqrt())
    assert float(noise.std()) == pytest.approx(wanted, rel=0.06)
    assert family(relative=0.2).std_on(plain) == pytest.approx(wanted, rel=1e-5)
    assert family(std=0.5).std_on(plain) == 0.5


@settings(max_examples=20, deadline=None)
@given(st.floats(1e-3, 1.0))
def test_top_k_keeps_the_largest_share_of_each_tensor(keep: float) -> None:
    plain = example()
    pruned = defended(TopK(keep=keep), plain)
    for name in ("w", "b"):
        kept = pruned[name] != 0
        assert int(kept.sum()) == max(1, math.ceil(keep * plain[name].numel()))
        assert torch.equal(pruned[name][kept], plain[name][kept])
        if not bool(kept.all()):
            assert float(plain[name][kept].abs().min()) >= float(plain[name][~kept].abs().max())


@settings(max_examples=20, deadline=None)
@given(st.floats(1e-3, 0.95))
def test_global_top_k_keeps_the_largest_of_all(keep: float) -> None:
    plain = example()
    pruned, flat = defended(TopK(keep=keep, scope="global"), plain).flat(), plain.flat()
    kept = pruned != 0
    assert int(kept.sum()) == math.ceil(keep * len(flat))
    assert torch.equal(pruned[kept], flat[kept])
    assert float(flat[kept].abs().min()) >= float(flat[~kept].abs().max())


@settings(max_examples=20, deadline=None)
@given(st.floats(1e-3, 0.9), st.sampled_from(["tensor", "global"]), st.booleans())
def test_random_k_keeps_as_many_numbers(keep: float, scope: str, unbiased: bool) -> None:
    plain = example()
    defense = RandomK(keep=keep, scope=scope, unbiased=unbiased)  # type: ignore[arg-type]
    pruned = defended(defense, plain)
    if scope == "global":
        lots = int((pruned.flat() != 0).sum())
        assert kept_numbers(plain.numel(), keep) - 4 <= lots <= kept_numbers(plain.numel(), keep)
    for name in ("w", "b"):
        kept = pruned[name] != 0
        numbers = plain[name].numel()
        if scope == "tensor":
            assert int(kept.sum()) == kept_numbers(numbers, keep)
        share = kept_numbers(numbers, keep) / numbers
        if scope == "global":
            share = kept_numbers(plain.numel(), keep) / plain.numel()
        torch.testing.assert_close(pruned[name][kept], plain[name][kept] / (share if unbiased else 1.0))


@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_unbiased_random_k_is_right_on_average(scope: str) -> None:
    plain = Update({"w": torch.linspace(-1, 2, 40), "b": torch.ones(3)})
    defense = RandomK(keep=0.3, scope=scope, unbiased=True)  # type: ignore[arg-type]
    draws = repeated(defense, plain, 2000)
    error = (draws.mean(0) - plain.flat()).abs()
    assert bool((error <= 4.5 * draws.std(0) / math.sqrt(len(draws)) + 1e-6).all())


# ------------------------------------------------------------------ deep gradient compression


def gradients(count: int) -> list[Update]:
    generator = torch.Generator().manual_seed(5)
    return [
        Update(
            {
                "w": torch.randn(6, 7, generator=generator, dtype=torch.float64),
                "b": torch.randn(5, generator=generator, dtype=torch.float64),
            }
        )
        for _ in range(count)
    ]


def test_compressing_nothing_is_the_plain_update() -> None:
    plain = example()
    defense = DeepGradientCompression(keep=1.0, momentum=0.0, rounds=1)
    assert torch.equal(defended(defense, plain).flat(), plain.flat())


@settings(max_examples=20, deadline=None)
@given(st.floats(0.01, 1.0), st.integers(1, 6))
def test_nothing_is_lost_without_momentum(keep: float, rounds: int) -> None:
    """Lin et al. 2018, section 3: what was sent, and the residual, are the sum of all gradients."""
    defense = DeepGradientCompression(keep=keep, momentum=0.0)
    memory, sent = None, gradients(1)[0] * 0.0
    for gradient in gradients(rounds):
        part, memory = defense.send(defense.gather(memory, gradient))
        assert all(int((t != 0).sum()) <= kept_numbers(t.numel(), keep) for t in part.values())
        sent = sent + part
    assert memory is not None
    total = sum((g.flat() for g in gradients(rounds)), torch.zeros(47, dtype=torch.float64))
    torch.testing.assert_close((sent + memory.residual).flat(), total)


def reference_compression(
    sequence: list[Tensor], keep: float, momentum: float, clip: float, nodes: int
) -> list[Tensor]:
    """Algorithm 4 of Lin et al. 2018, number by number, for one tensor."""
    u, v, sent = [0.0] * len(sequence[0]), [0.0] * len(sequence[0]), []
    for gradient in sequence:
        factor = min(1.0, clip / nodes**0.5 / float(gradient.norm()))
        u = [momentum * a + factor * float(b) for a, b in zip(u, gradient, strict=True)]
        v = [a + b for a, b in zip(v, u, strict=True)]
        chosen = sorted(range(len(v)), key=lambda i: -abs(v[i]))[: math.ceil(keep * len(v))]
        sent.append(torch.tensor([v[i] if i in chosen else 0.0 for i in range(len(v))], dtype=torch.float64))
        u = [0.0 if i in chosen else a for i, a in enumerate(u)]
        v = [0.0 if i in chosen else a for i, a in enumerate(v)]
    return sent


@settings(max_examples=20, deadline=None)
@given(st.floats(0.02, 1.0), st.floats(0, 0.95), st.floats(0.1, 20), st.integers(1, 9))
def test_it_is_the_papers_algorithm(keep: float, momentum: float, clip: float, nodes: int) -> None:
    sequence = [Update({"w": gradient["w"].reshape(-1)}) for gradient in gradients(4)]
    wanted = reference_compression([g["w"] for g in sequence], keep, momentum, clip, nodes)
    defense = DeepGradientCompression(keep=keep, momentum=momentum, clip=clip, nodes=nodes, rounds=4)
    memory, victim = None, victim_of("mlp")
    shares = iter(sequence)
    training = defense.training(lambda *_: next(shares), fork(0, "dgc"))
    for gradient, share in zip(sequence, wanted, strict=True):
        sent, memory = defense.send(defense.gather(memory, gradient))
        torch.testing.assert_close(sent["w"], share)
        again = training(victim, victim.params, Round(1), torch.zeros(1), torch.zeros(1))
        torch.testing.assert_close(again["w"], share)


def test_the_update_shared_is_that_of_the_last_round() -> None:
    victim, (x, y) = victim_of("smooth"), private_batch(6)
    defense = DeepGradientCompression(keep=0.1, momentum=0.9, clip=0.5, rounds=3)
    round = defense.round(Round(2, 2, learning_rate=0.1))
    assert round.num_examples == 6
    found = apply(client_update, [defense], fork(0, "d"))(victim, victim.params, round, x, y)
    memory = None
    for start in (0, 2, 4):
        own = Round(2, 2, learning_rate=0.1)
        gradient = client_update(victim, victim.params, own, x[start : start + 2], y[start : start + 2])
        sent, memory = defense.send(defense.gather(memory, gradient))
    torch.testing.assert_close(found.flat(), sent.flat())


def test_rounds_of_batches_are_refused() -> None:
    with pytest.raises(InputError, match=r"rounds=2 takes all .* local_batch_size=2"):
        DeepGradientCompression(rounds=2).round(Round(4, 2, 2))
    assert DeepGradientCompression().round(Round(4, 2, 2)) == Round(4, 2, 2)


# ------------------------------------------------------------------ clipping and rounding


@settings(max_examples=20, deadline=None)
@given(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3))
def test_clipping_bounds_the_length_and_keeps_the_direction(scale: float, limit: float) -> None:
    plain = example(scale)
    clipped = defended(Clip(max_grad_norm=limit), plain)
    assert float(clipped.norm()) == pytest.approx(min(limit, float(plain.norm())), rel=1e-4)
    cosine = float(clipped.dot(plain) / (clipped.norm() * plain.norm()))
    assert cosine == pytest.approx(1, abs=1e-5)


def test_clipping_nothing_gives_nothing() -> None:
    assert not defended(Clip(), example() * 0.0).flat().any()


def test_int8_has_255_even_levels_and_a_bounded_error() -> None:
    plain = example()
    rounded = defended(Quantise(to="int8"), plain)
    for name in ("w", "b"):
        step = float(plain[name].abs().max()) / 127
        assert float((rounded[name] - plain[name]).abs().max()) <= step / 2 * 1.001
        levels = rounded[name] / step
        torch.testing.assert_close(levels, levels.round(), atol=1e-3, rtol=0)
        assert len(rounded[name].unique()) <= 255
    assert torch.equal(rounded["zero"], plain["zero"])


@pytest.mark.parametrize(("to", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_half_precision_can_be_stored_in_half(to: str, dtype: torch.dtype) -> None:
    rounded = defended(Quantise(to=to), example())  # type: ignore[arg-type]
    assert torch.equal(rounded["w"], rounded["w"].to(dtype).float())
    assert not torch.equal(rounded["w"], example()["w"])


def test_sign_keeps_signs_and_the_mean_magnitude() -> None:
    plain = example()
    found = defended(Quantise(to="sign"), plain)["w"]
    assert torch.equal(found.sign(), plain["w"].sign())
    torch.testing.assert_close(found.abs().unique(), plain["w"].abs().mean().view(1))


@pytest.mark.parametrize("bits", [2, 4, 8, 12])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("scope", ["tensor", "row"])
def test_integers_have_even_levels_within_the_largest_number(bits: int, rounding: str, scope: str) -> None:
    plain = example()
    rounded = defended(Quantise(bits=bits, rounding=rounding, scope=scope), plain)  # type: ignore[arg-type]
    most = 2 ** (bits - 1) - 1
    largest = plain["w"].abs().amax(1, keepdim=True) if scope == "row" else plain["w"].abs().max()
    levels = rounded["w"] / (largest / most)
    torch.testing.assert_close(levels, levels.round(), atol=1e-2, rtol=0)
    assert float(levels.abs().max()) <= most + 1e-2
    width = 1.0 if rounding == "stochastic" else 0.5
    assert float(((rounded["w"] - plain["w"]) / (largest / most)).abs().max()) <= width * 1.001
    assert torch.equal(rounded["zero"], plain["zero"])
    if rounding == "nearest":
        whole = plain["b"].abs().max() / most
        torch.testing.assert_close(rounded["b"], (plain["b"] / whole).round() * whole)


@pytest.mark.parametrize("scope", ["tensor", "row"])
def test_stochastic_rounding_is_right_on_average(scope: str) -> None:
    plain = Update({"w": torch.linspace(-1, 2, 40).reshape(4, 10)})
    defense = Quantise(bits=3, rounding="stochastic", scope=scope)  # type: ignore[arg-type]
    draws = repeated(defense, plain, 2000)
    error = (draws.mean(0) - plain.flat()).abs()
    assert bool((error <= 4.5 * draws.std(0) / math.sqrt(len(draws)) + 1e-6).all())
    nearest = defended(Quantise(bits=3), plain).flat()
    assert float((nearest - plain.flat()).abs().max()) > 0.1


def test_signs_of_rows_have_their_own_size() -> None:
    plain = example()
    found = defended(Quantise(to="sign", scope="row"), plain)
    torch.testing.assert_close(found["w"].abs()[:, 0], plain["w"].abs().mean(1))
    torch.testing.assert_close(found["b"].abs().unique(), plain["b"].abs().mean().view(1))


def test_the_first_defense_is_applied_first() -> None:
    """Clipping before noise leaves the noise at its size; after it, not."""
    victim, (x, y) = victim_of("mlp"), private_batch()

    def length(*chain: Defense) -> float:
        client = apply(client_update, chain, fork(0, "chain"))
        return float(client(victim, victim.params, Round(1), x, y).norm())

    clip, noise = Clip(max_grad_norm=0.1), GaussianNoise(std=1.0)
    assert length(noise, clip) == pytest.approx(0.1, rel=1e-4)
    assert length(clip, noise) > 10


def test_a_known_defense_can_be_simulated_and_differentiated() -> None:
    victim, (x, y) = victim_of("smooth"), private_batch()
    client = apply(client_update, [Clip(max_grad_norm=0.01), TopK(keep=0.5)], fork(0, "chain"))
    x = x.requires_grad_()
    (gradient,) = torch.autograd.grad(client(victim, victim.params, Round(1), x, y).flat().square().sum(), x)
    assert bool(gradient.isfinite().all())


@pytest.mark.parametrize(
    "make",
    [
        lambda: GaussianNoise(std=-1.0),
        lambda: GaussianNoise(std=math.inf),
        lambda: TopK(keep=0.0),
        lambda: TopK(keep=1.5),
        lambda: RandomK(keep=math.nan),
        lambda: LaplaceNoise(relative=-1.0),
        lambda: Quantise(bits=17),
        lambda: DeepGradientCompression(momentum=-0.1),
        lambda: Clip(max_grad_norm=0.0),
        lambda: Clip(max_grad_norm=math.nan),
    ],
)
def test_values_that_cannot_be(make) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match="got"):
        make()
