"""An attack that depends on the truth is a defect: overwrite it after capture and expect the same result."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from tiny_audits import CLASSES, SPACE, private_batch, victim_of

from leakaudit.capture import capture, write_captured
from leakaudit.data import PrivateBatch
from leakaudit.execution import Outcome, Plan, run_attacks
from leakaudit.formats.loading import load_update
from leakaudit.models.victim import Victim
from leakaudit.rounds import Round
from leakaudit.subject import Sources, open_update
from leakaudit.threat import View, see

SPECS = (
    "linear",
    "levenberg-marquardt:iterations=6,warm_start=0,restarts=1",
    "dlg:iterations=4,restarts=1",
    "idlg:iterations=4,restarts=1",
    "inverting-gradients:iterations=15",
)


def truth(count: int) -> PrivateBatch:
    x, y = private_batch(count)
    return PrivateBatch(SPACE.decode(x).clamp(0, 1), y, tuple(f"{i}.png" for i in range(count)))


def attack(view: View, folder: Path) -> list[Outcome]:
    outcomes, _ = run_attacks(view, Plan(attacks=SPECS, seed=4), folder)
    assert len(outcomes) >= len(SPECS) - 1
    return outcomes


@pytest.mark.parametrize("model", ["mlp", "smooth"])
@pytest.mark.parametrize("round", [Round(1), Round(2, 3, learning_rate=0.1)], ids=["fedsgd", "fedavg"])
def test_nothing_changes_when_the_truth_is_overwritten(model: str, round: Round, tmp_path: Path) -> None:
    victim = victim_of(model)
    batch = truth(round.num_examples)
    captured = capture(victim, batch, round)
    write_captured(tmp_path / "shared.safetensors", captured)
    shared = load_update(tmp_path / "shared.safetensors", victim)
    with_truth = attack(see(victim, shared), tmp_path / "with")

    batch.pixels.fill_(float("nan"))
    batch.labels.fill_(-1)
    without_truth = attack(see(victim, shared), tmp_path / "without")

    assert len(with_truth) == len(without_truth)
    for left, right in zip(with_truth, without_truth, strict=True):
        assert left.best is not None, left.reason
        assert right.best is not None
        assert torch.equal(left.best.found.x, right.best.found.x), left.chosen.name
        assert torch.equal(left.best.found.y, right.best.found.y)
        assert left.verification == right.verification


def test_no_view_holds_a_tensor_of_the_truth(tmp_path: Path) -> None:
    """After opening a file no object reachable from the view shares memory, or values, with the batch."""
    victim = victim_of("smooth")
    batch = truth(1)
    write_captured(tmp_path / "shared.safetensors", capture(victim, batch, Round(1)))
    torch.save(victim.module.state_dict(), tmp_path / "model.pt")
    overrides = capture(victim, batch, Round(1)).manifest
    opened = open_update(
        Sources(tmp_path / "shared.safetensors", victim.module, tmp_path / "model.pt", manifest=overrides)
    )
    reachable = reachable_tensors(opened.view)
    assert len(reachable) > 6
    inputs = SPACE.encode(batch.pixels)
    for tensor in reachable:
        assert tensor.untyped_storage().data_ptr() != batch.pixels.untyped_storage().data_ptr()
        assert tensor.numel() != inputs.numel() or not torch.equal(
            tensor.reshape(-1).cpu(), inputs.reshape(-1)
        )


def reachable_tensors(root: object) -> list[torch.Tensor]:
    """Tensors that the garbage collector finds from `root`, not through modules, types and functions."""
    seen: dict[int, object] = {}
    todo, found = [root], []
    while todo:
        item = todo.pop()
        if id(item) in seen or isinstance(item, (type, type(gc), type(reachable_tensors))):
            continue
        seen[id(item)] = item
        if isinstance(item, torch.Tensor):
            found.append(item.detach())
        else:
            todo += gc.get_referents(item)
    return found


def test_labels_are_not_told_unless_asked() -> None:
    victim: Victim = victim_of("smooth")
    captured = capture(victim, truth(2), Round(2))
    assert "label" not in captured.manifest.to_json()
    assert victim.num_classes == CLASSES
