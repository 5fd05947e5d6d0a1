from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_audits import private_batch, victim_of
from torch import Tensor

from leakaudit.defenses import Clip, Defense, GaussianNoise, Quantise, TopK, apply
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
        lambda: Clip(max_grad_norm=0.0),
        lambda: Clip(max_grad_norm=math.nan),
    ],
)
def test_values_that_cannot_be(make) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match="got"):
        make()
