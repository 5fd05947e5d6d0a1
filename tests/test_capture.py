from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from leakaudit.capture import capture, steps_of_epochs, write_captured
from leakaudit.data import PrivateBatch, save_truth
from leakaudit.defenses import Clip, Defense, GaussianNoise, TopK
from leakaudit.errors import InputError
from leakaudit.formats.checkpoint import parameters_sha256
from leakaudit.formats.loading import SharedUpdate, check_checkpoint, load_update
from leakaudit.formats.reading import read_file, read_safetensors
from leakaudit.models.spaces import Pixels
from leakaudit.models.victim import Mode, Victim
from leakaudit.rounds import Round
from leakaudit.update import Update

SPACE = Pixels((1, 6, 6), (0.4,), (0.2,))


def network() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Sigmoid(), nn.Flatten(), nn.Linear(144, 5)
        )


def victim(mode: Mode = "train", reduction: str = "mean") -> Victim:
    return Victim.of(network(), SPACE, 5, mode, reduction=reduction, name="small")


def batch(count: int = 4) -> PrivateBatch:
    pixels = torch.rand(count, 1, 6, 6, generator=torch.Generator().manual_seed(3))
    return PrivateBatch(pixels, torch.arange(count) % 5, tuple(f"secret-{i}.png" for i in range(count)))


def through_file(path: Path, round: Round, mode: Mode = "train", **options: bool) -> SharedUpdate:
    captured = capture(victim(mode), batch(round.num_examples), round, **options)
    write_captured(path / "shared.safetensors", captured)
    return load_update(path / "shared.safetensors", victim(mode))


def assert_close(left: Update, right: Update, tolerance: float = 1e-6) -> None:
    assert list(left) == list(right)
    assert float((left - right).norm() / right.norm()) < tolerance


def sgd(round: Round, mode: Mode, reduction: str = "mean") -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """The same round in plain PyTorch: the trained module, and its weights before."""
    module, data = network().train(mode == "train"), batch(round.num_examples)
    before = copy.deepcopy(dict(module.named_parameters()))
    optimiser = torch.optim.SGD(module.parameters(), lr=round.learning_rate)
    for step in range(round.local_steps):
        rows = round.batch(step)
        optimiser.zero_grad()
        logits = module((data.pixels[rows] - 0.4) / 0.2)
        nn.functional.cross_entropy(logits, data.labels[rows], reduction=reduction).backward()
        optimiser.step()
    return module, {name: tensor.detach() for name, tensor in before.items()}


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_fedsgd_is_the_gradient_of_plain_pytorch(tmp_path: Path, mode: Mode, reduction: str) -> None:
    module = network().train(mode == "train")
    data = batch()
    loss = nn.functional.cross_entropy(module((data.pixels - 0.4) / 0.2), data.labels, reduction=reduction)
    loss.backward()
    captured = capture(victim(mode, reduction), data, Round(4))
    assert_close(
        captured.update, Update({n: p.grad for n, p in module.named_parameters() if p.grad is not None})
    )
    manifest = captured.manifest
    assert (manifest.kind, manifest.sign, manifest.learning_rate) == ("gradient", None, None)
    assert (manifest.mode, manifest.loss, manifest.reduction) == (mode, "cross-entropy", reduction)
    write_captured(tmp_path / "a.safetensors", captured)
    assert_close(load_update(tmp_path / "a.safetensors", victim(mode)).update, captured.update, 1e-12)


@pytest.mark.parametrize(("steps", "size"), [(3, None), (5, 2), (4, 3)])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_fedavg_is_the_parameter_difference_of_plain_pytorch(
    tmp_path: Path, steps: int, size: int | None, mode: Mode
) -> None:
    round = Round(4, steps, size, learning_rate=0.2)
    shared = through_file(tmp_path, round, mode, include_buffers=True)
    module, before = sgd(round, mode)
    difference = Update({n: before[n] - p.detach() for n, p in module.named_parameters()})
    assert_close(shared.raw, difference, 1e-5)
    assert_close(shared.update, difference / 0.2, 1e-5)
    assert shared.has_scale
    for name, tensor in module.named_buffers():
        torch.testing.assert_close(shared.buffers[name], tensor, rtol=1e-5, atol=1e-6)
    assert (shared.manifest.sign, shared.manifest.learning_rate) == ("before-minus-after", 0.2)
    assert (shared.manifest.local_steps, shared.manifest.local_batch_size) == (steps, size)


@settings(max_examples=10, deadline=None)
@given(rate=st.floats(1e-3, 1.0), count=st.integers(1, 5))
def test_one_step_of_fedavg_is_fedsgd(
    tmp_path_factory: pytest.TempPathFactory, rate: float, count: int
) -> None:
    """FedAvg(1): the delta of one plain step, divided by its rate, equals the captured gradient."""
    folder = tmp_path_factory.mktemp("capture")
    gradient = through_file(folder, Round(count, 1, learning_rate=rate), "eval")
    module, before = sgd(Round(count, 1, learning_rate=rate), "eval")
    torch.save(module.state_dict(), folder / "after.pt")
    torch.save(network().state_dict(), folder / "before.pt")
    pair = load_update(
        folder / "after.pt",
        victim("eval"),
        before=folder / "before.pt",
        overrides=gradient.manifest.model_copy(update={"kind": None, "learning_rate": rate}),
    )
    assert_close(pair.update, gradient.update, 1e-4 + 10 * pair.rounding)
    assert gradient.update.keys() == before.keys()


def test_two_epochs_of_batches_are_as_many_steps() -> None:
    assert steps_of_epochs(2, 10, 4) == 6
    assert steps_of_epochs(3, 10) == 3
    with pytest.raises(InputError, match="epochs=0"):
        steps_of_epochs(0, 10)


@pytest.mark.parametrize(("steps", "size", "used"), [(1, 1, 1), (1, 3, 3), (3, 1, 3)])
def test_every_example_leaves_a_trace_or_is_refused(steps: int, size: int, used: int) -> None:
    with pytest.raises(InputError, match=f"would use only {used} of the 4 examples") as refused:
        capture(victim("eval"), batch(), Round(4, steps, size))
    needed = int(re.findall(r"at least (\d) local steps", str(refused.value))[0])
    assert capture(victim("eval"), batch(), Round(4, needed, size)).manifest.num_examples == 4
    with pytest.raises(InputError):
        capture(victim("eval"), batch(), Round(4, needed - 1, size))


def test_buffers_only_on_request_and_unmoved_in_eval_mode(tmp_path: Path) -> None:
    assert through_file(tmp_path, Round(4)).buffers == {}
    still = through_file(tmp_path, Round(4), "eval", include_buffers=True).buffers
    assert int(still["1.num_batches_tracked"]) == 0
    assert torch.equal(still["1.running_mean"], torch.zeros(4))
    assert int(through_file(tmp_path, Round(4), include_buffers=True).buffers["1.num_batches_tracked"]) == 1


def test_the_manifest_says_how_and_nothing_private(tmp_path: Path) -> None:
    captured = capture(victim(), batch(), Round(4))
    write_captured(tmp_path / "shared.safetensors", captured)
    save_truth(tmp_path / "truth.safetensors", batch())
    content = (tmp_path / "shared.safetensors").read_bytes()
    assert b"secret" not in content
    assert b"label" not in content
    assert b"secret-0.png" in (tmp_path / "truth.safetensors").read_bytes()
    assert set(read_safetensors(tmp_path / "shared.safetensors")[0]) == set(victim().params)
    manifest = read_file(tmp_path / "shared.safetensors").manifest
    assert manifest.normalisation is not None
    assert manifest.normalisation.mean == SPACE.mean
    assert (manifest.input_shape, manifest.num_classes, manifest.model) == ((1, 6, 6), 5, "small")
    assert manifest.defenses == ()
    check_checkpoint(manifest, parameters_sha256(network()))
    with pytest.raises(InputError, match="pass the checkpoint the client downloaded"):
        check_checkpoint(manifest, parameters_sha256({n: t + 1 for n, t in victim().params.items()}))


def test_an_unknown_normalisation_stays_unknown() -> None:
    plain = Victim.of(network(), Pixels((1, 6, 6)), 5)
    assert capture(plain, batch(), Round(4)).manifest.normalisation is None


def test_frozen_layers_do_not_train(tmp_path: Path) -> None:
    module = network()
    module[0].requires_grad_(False)
    frozen = Victim.of(module, SPACE, 5, "train")
    captured = capture(frozen, batch(), Round(4, 3, learning_rate=0.1))
    assert list(captured.update) == frozen.trainable()
    write_captured(tmp_path / "a.safetensors", captured)
    assert_close(load_update(tmp_path / "a.safetensors", frozen).update, captured.update, 1e-6)


def test_defenses_are_applied_in_order_and_recorded() -> None:
    chain: list[tuple[str, Defense]] = [
        ("clip:max_grad_norm=0.5", Clip(max_grad_norm=0.5)),
        ("gaussian-noise:std=0.01", GaussianNoise(std=0.01)),
    ]
    plain = capture(victim(), batch(), Round(4))
    noisy = capture(victim(), batch(), Round(4), defenses=chain, seed=1)
    assert noisy.manifest.defenses == ("clip:max_grad_norm=0.5", "gaussian-noise:std=0.01")
    assert noisy.manifest.noise_std == 0.01
    noise = noisy.update - plain.update * min(1.0, 0.5 / float(plain.update.norm()))
    assert float(noise.flat().std()) == pytest.approx(0.01, rel=0.1)
    again = capture(victim(), batch(), Round(4), defenses=chain, seed=1)
    other = capture(victim(), batch(), Round(4), defenses=chain, seed=2)
    assert torch.equal(noisy.update.flat(), again.update.flat())
    assert not torch.equal(noisy.update.flat(), other.update.flat())


def test_noise_that_is_changed_afterwards_has_no_known_size() -> None:
    chain: list[tuple[str, Defense]] = [("a", GaussianNoise(std=0.01)), ("b", TopK())]
    assert capture(victim(), batch(), Round(4), defenses=chain).manifest.noise_std is None


def test_capture_leaves_the_victim_alone() -> None:
    target = victim()
    before = {name: tensor.clone() for name, tensor in {**target.params, **target.buffers}.items()}
    capture(target, batch(), Round(4, 3, learning_rate=0.5), include_buffers=True)
    assert all(torch.equal(t, before[n]) for n, t in {**target.params, **target.buffers}.items())


def test_mistakes(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="takes 3 examples, the batch holds 4"):
        capture(victim(), batch(), Round(3))
    wrong = PrivateBatch(torch.rand(1, 3, 6, 6), torch.tensor([0]), ("a",))
    with pytest.raises(InputError, match=r"images of shape \(3, 6, 6\) for inputs of \(1, 6, 6\)"):
        capture(victim(), wrong, Round(1))
    wrong = PrivateBatch(torch.rand(1, 1, 6, 6), torch.tensor([5]), ("a",))
    with pytest.raises(InputError, match="label 5 for a model of 5 classes"):
        capture(victim(), wrong, Round(1))
    with pytest.raises(InputError, match="not finite after 40 steps with learning_rate=3e\\+38"):
        capture(victim("eval"), batch(), Round(4, 40, learning_rate=3e38))
    with pytest.raises(InputError, match=r"saved as .safetensors, got 'a.pt'"):
        write_captured(tmp_path / "a.pt", capture(victim(), batch(), Round(4)))
    assert not list(tmp_path.iterdir())
