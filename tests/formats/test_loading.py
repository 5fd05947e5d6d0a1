from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_victims import assert_same, backward, gradient_of, network, plain_network, private_batch, victim_of
from torch import nn

from leakaudit.errors import InputError
from leakaudit.formats.loading import SharedUpdate, check_checkpoint, load_update
from leakaudit.formats.manifest import Manifest
from leakaudit.rounds import Round, client_update
from leakaudit.update import Update

VICTIM = victim_of(network())
DELTA = Manifest(kind="delta", sign="before-minus-after", learning_rate=0.1)


def loaded(path: Path, value: object, manifest: Manifest | None = None, **kwargs: Path) -> SharedUpdate:
    torch.save(value, path / "shared.pt")
    return load_update(path / "shared.pt", VICTIM, overrides=manifest, before=kwargs.get("before"))


def test_the_real_gradient_of_a_training_loop(tmp_path: Path) -> None:
    module = network()
    module.train()
    backward(module)
    shared = loaded(tmp_path, {n: p.grad for n, p in module.named_parameters()}, Manifest(kind="gradient"))
    assert_same(shared.update, gradient_of(VICTIM), tolerance=1e-6)
    assert shared.has_scale
    assert shared.missing == ()
    assert set(shared.dtypes.values()) == {"float32"}
    assert shared.notes == ()
    assert 0 < shared.rounding < 1e-7


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rate=st.floats(1e-3, 10), after_first=st.booleans())
def test_a_delta_becomes_the_pseudo_gradient(tmp_path: Path, rate: float, after_first: bool) -> None:
    update = gradient_of(VICTIM)
    sign = "after-minus-before" if after_first else "before-minus-after"
    delta = update * (-rate if after_first else rate)
    shared = loaded(tmp_path, dict(delta), Manifest(kind="delta", sign=sign, learning_rate=rate))
    assert_same(shared.update, update, tolerance=1e-6)
    assert_same(shared.raw, delta)
    assert shared.has_scale


def test_a_delta_without_a_learning_rate_has_no_scale(tmp_path: Path) -> None:
    update = gradient_of(VICTIM)
    shared = loaded(tmp_path, dict(update), Manifest(kind="delta", sign="after-minus-before"))
    assert not shared.has_scale
    assert_same(shared.update, update * -1)
    assert shared.notes == ("The learning rate is unknown, so the update has a direction but no scale.",)


def test_a_delta_without_a_sign_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="delta without a sign; state sign=before-minus-after or"):
        loaded(tmp_path, dict(gradient_of(VICTIM)), Manifest(kind="delta", learning_rate=0.1))
    with pytest.raises(InputError, match="delta without a sign"):
        loaded(tmp_path, {"delta": dict(gradient_of(VICTIM))})


def trained(steps: int, rate: float, mode: bool = True) -> nn.Module:
    """Plain PyTorch: `steps` steps of SGD, full batch."""
    module = network()
    module.train(mode)
    optimiser = torch.optim.SGD(module.parameters(), lr=rate)
    for _ in range(steps):
        optimiser.zero_grad()
        backward(module)
        optimiser.step()
    return module


@pytest.mark.parametrize(("steps", "rate"), [(1, 0.5), (3, 0.5), (5, 0.05)])
def test_a_pair_of_checkpoints_is_the_pseudo_gradient_of_the_round(
    tmp_path: Path, steps: int, rate: float
) -> None:
    torch.save(network().state_dict(), tmp_path / "before.pt")
    after = trained(steps, rate)
    shared = loaded(
        tmp_path,
        after.state_dict(),
        Manifest(learning_rate=rate, local_steps=steps),
        before=tmp_path / "before.pt",
    )
    x, y = private_batch()
    expected = client_update(VICTIM, VICTIM.params, Round(3, steps, learning_rate=rate), x, y)
    error = float((shared.update - expected).norm() / expected.norm())
    assert error < 1e-4
    assert error < 10 * shared.rounding
    assert shared.has_scale
    assert int(shared.buffers["1.num_batches_tracked"]) == steps
    assert torch.equal(shared.buffers["1.running_var"], dict(after.named_buffers())["1.running_var"])


def test_a_pair_equals_its_delta(tmp_path: Path) -> None:
    torch.save(network().state_dict(), tmp_path / "before.pt")
    before, after = network(), trained(2, 0.1)
    pair = loaded(tmp_path, after.state_dict(), Manifest(learning_rate=0.1), before=tmp_path / "before.pt")
    delta = {n: p - dict(before.named_parameters())[n] for n, p in after.named_parameters()}
    manifest = Manifest(kind="delta", sign="after-minus-before", learning_rate=0.1)
    assert_same(pair.update, loaded(tmp_path, delta, manifest).update, tolerance=1e-6)


@pytest.mark.parametrize("buffers", [True, False])
def test_weights_alone_are_recognised(tmp_path: Path, buffers: bool) -> None:
    after = trained(2, 0.1)
    value = after.state_dict() if buffers else dict(after.named_parameters())
    shared = loaded(tmp_path, value, Manifest(learning_rate=0.1))
    torch.save(network().state_dict(), tmp_path / "before.pt")
    pair = loaded(tmp_path, value, Manifest(learning_rate=0.1), before=tmp_path / "before.pt")
    assert_same(shared.update, pair.update)
    assert "it holds weights, so the checkpoint in use was taken as the model before" in shared.notes[0]


def test_weights_far_from_the_checkpoint_raise_a_doubt(tmp_path: Path) -> None:
    shared = loaded(tmp_path, network(seed=9).state_dict())
    assert not shared.has_scale
    assert "does the checkpoint belong to them?" in shared.notes[0]


def test_numbers_that_say_nothing_are_a_gradient_of_unknown_scale(tmp_path: Path) -> None:
    update = gradient_of(VICTIM)
    shared = loaded(tmp_path, dict(update))
    assert not shared.has_scale
    assert shared.manifest == Manifest()
    assert "read as a gradient of unknown scale" in shared.notes[0]
    assert_same(shared.update, update)


def test_the_key_around_the_tensors_speaks_when_the_manifest_does_not(tmp_path: Path) -> None:
    shared = loaded(tmp_path, {"gradients": dict(gradient_of(VICTIM))})
    assert shared.has_scale
    assert shared.manifest.kind is None
    assert shared.notes[-1] == "Taken as a gradient, because the file keeps it under 'gradients'."


def test_deltas_of_state_dicts_have_differences_of_buffers(tmp_path: Path) -> None:
    before, after = network().state_dict(), trained(3, 0.1).state_dict()
    shared = loaded(tmp_path, {n: before[n] - after[n] for n in before}, DELTA)
    for name in VICTIM.buffers:
        torch.testing.assert_close(shared.buffers[name], after[name])
    assert "taken as differences" in shared.notes[0]
    backwards = {n: after[n] - before[n] for n in before}
    shared = loaded(tmp_path, backwards, DELTA.merged(Manifest(sign="after-minus-before")))
    assert int(shared.buffers["1.num_batches_tracked"]) == 3


def test_buffers_listed_in_the_manifest_are_values_after_training(tmp_path: Path) -> None:
    after = trained(3, 0.1)
    value = {**gradient_of(VICTIM), **dict(after.named_buffers())}
    shared = loaded(tmp_path, value, DELTA.merged(Manifest(buffers=tuple(VICTIM.buffers))))
    for name, tensor in after.named_buffers():
        assert torch.equal(shared.buffers[name], tensor)


def test_half_precision_is_kept_track_of(tmp_path: Path) -> None:
    update = gradient_of(VICTIM)
    value = {name: tensor.half() for name, tensor in update.items()}
    shared = loaded(tmp_path, value, Manifest(kind="gradient"))
    assert set(shared.dtypes.values()) == {"float16"}
    error = float((shared.update - update).norm() / update.norm())
    assert error < shared.rounding == pytest.approx(2**-11)
    assert {t.dtype for t in shared.update.values()} == {torch.float32}


def test_a_vector_keeps_its_type_for_every_parameter(tmp_path: Path) -> None:
    shared = loaded(tmp_path, gradient_of(VICTIM).flat().bfloat16(), Manifest(kind="gradient"))
    assert set(shared.dtypes.values()) == {"bfloat16"}
    assert len(shared.dtypes) == len(VICTIM.params)


def test_frozen_parameters_are_not_part_of_the_update(tmp_path: Path) -> None:
    module = network()
    module[0].requires_grad_(False)
    victim = victim_of(module)
    torch.save(dict(gradient_of(VICTIM)), tmp_path / "a.pt")
    shared = load_update(tmp_path / "a.pt", victim)
    assert list(shared.update) == victim.trainable()
    torch.save({n: t for n, t in gradient_of(VICTIM).items() if n.startswith("0.")}, tmp_path / "a.pt")
    with pytest.raises(InputError, match="holds no trainable parameter of model small"):
        load_update(tmp_path / "a.pt", victim)


def test_partial_updates_are_noted(tmp_path: Path) -> None:
    update = gradient_of(VICTIM).select(["7.weight", "7.bias"])
    shared = loaded(tmp_path, dict(update), Manifest(kind="gradient"))
    assert list(shared.update) == ["7.weight", "7.bias"]
    assert len(shared.missing) == 8
    assert shared.notes[0].startswith("The file lacks 8 trainable parameters: 0.weight")


@pytest.mark.parametrize("victim", [VICTIM.to(dtype=torch.float64), VICTIM.with_mode("eval")])
def test_the_update_is_float32_whatever_the_victim_is(tmp_path: Path, victim: object) -> None:
    torch.save(trained(1, 0.1).state_dict(), tmp_path / "a.pt")
    shared = load_update(tmp_path / "a.pt", victim)  # type: ignore[arg-type]
    assert {t.dtype for t in shared.update.values()} == {torch.float32}


@pytest.mark.parametrize(
    ("value", "manifest", "message"),
    [
        ("gradient", Manifest(kind="gradient", local_steps=3), "kind=gradient and local_steps=3"),
        ("zeros", Manifest(kind="gradient"), "zero everywhere"),
        ("before", None, "zero everywhere"),
        ("gradient", DELTA.merged(Manifest(learning_rate=1e-300)), "overflows"),
    ],
)
def test_updates_without_meaning(tmp_path: Path, value: str, manifest: Manifest | None, message: str) -> None:
    values = {
        "gradient": dict(gradient_of(VICTIM)),
        "zeros": dict(gradient_of(VICTIM) * 0),
        "before": network().state_dict(),
    }
    with pytest.raises(InputError, match=message):
        loaded(tmp_path, values[value], manifest)


def test_pairs_without_meaning(tmp_path: Path) -> None:
    before, other, part = (tmp_path / f"{name}.pt" for name in ("before", "other", "part"))
    torch.save(network().state_dict(), before)
    torch.save(network(seed=5).state_dict(), other)
    torch.save({"0.weight": VICTIM.params["0.weight"]}, part)
    after, update = trained(1, 0.1).state_dict(), dict(gradient_of(VICTIM))
    with pytest.raises(InputError, match="holds a gradient, so there is no checkpoint before it"):
        loaded(tmp_path, update, Manifest(kind="gradient"), before=before)
    with pytest.raises(InputError, match="holds a delta, so"):
        loaded(tmp_path, update, DELTA, before=before)
    with pytest.raises(InputError, match=r"other.pt is not the checkpoint in use \(relative difference 0.88"):
        loaded(tmp_path, after, before=other)
    with pytest.raises(InputError, match=r"part.pt lacks 9 parameters of the pair: 0.bias"):
        loaded(tmp_path, after, before=part)


def test_check_checkpoint() -> None:
    check_checkpoint(Manifest(), "00ff")
    check_checkpoint(Manifest(checkpoint_sha256="00FF"), "00ff")
    with pytest.raises(
        InputError, match=r"made with checkpoint aaaaaaaaaaaa\.\.\., the checkpoint in use is 00ff"
    ):
        check_checkpoint(Manifest(checkpoint_sha256="a" * 64), "00ff")


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**16), layout=st.sampled_from(["dict", "list", "prefixed", "npz", "vector"]))
def test_every_layout_gives_the_same_update(tmp_path: Path, seed: int, layout: str) -> None:
    victim = victim_of(plain_network(seed))
    update = gradient_of(victim)
    values = {
        "dict": dict(update),
        "list": list(update.values()),
        "prefixed": {f"module.{name}": t for name, t in update.items()},
        "vector": update.flat(),
    }
    path = tmp_path / ("a.npz" if layout == "npz" else "a.pt")
    if layout == "npz":
        np.savez(path, *[t.numpy() for t in update.values()])
    else:
        torch.save(values[layout], path)
    shared = load_update(path, victim, overrides=Manifest(kind="gradient"))
    assert_same(shared.update, update)
    assert_same(shared.raw, copy.copy(update))
    assert isinstance(shared.update, Update)


def test_a_deltas_rounding_is_that_of_the_weights_it_was_computed_from(tmp_path: Path) -> None:
    """A small step between large weights: float32 holds the delta to a few digits only."""
    update = gradient_of(VICTIM)
    rate = 1e-4
    exact = update.map(torch.Tensor.double) * rate
    before = Update({name: VICTIM.params[name].detach().clone() for name in update})
    rounded = before - (before.map(torch.Tensor.double) - exact).to(torch.float32)
    stated = Manifest(kind="delta", sign="before-minus-after", learning_rate=rate)
    shared = loaded(tmp_path, dict(rounded), stated)
    error = float((rounded.map(torch.Tensor.double) - exact).norm() / exact.norm())
    assert error > 1e-6
    assert error < shared.rounding < 4 * error
