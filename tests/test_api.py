"""Everything the commands do, as a few lines of Python."""

from __future__ import annotations

import ast
import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_audits import CLASSES, FACTORIES, SHAPE, build, private_batch, timeless
from torch import nn

import leakaudit
from leakaudit.data import photo_folder
from leakaudit.formats.manifest import Manifest
from leakaudit.policy import parse_policy

STATED = Manifest(input_shape=SHAPE, num_classes=CLASSES, num_examples=1, loss="cross-entropy")


def test_the_public_list_is_explicit_and_documented() -> None:
    assert leakaudit.__all__ == sorted(leakaudit.__all__)
    for name in leakaudit.__all__:
        thing = getattr(leakaudit, name)
        assert thing.__doc__, name
        assert name in (leakaudit.__doc__ or ""), name
    with pytest.raises(AttributeError, match="no attribute 'atack'"):
        leakaudit.atack  # noqa: B018


def test_names_for_type_checkers_are_the_same_as_at_run_time() -> None:
    source = ast.parse(Path(leakaudit.__file__).read_text())
    block = next(node for node in source.body if isinstance(node, ast.If))
    stated = {
        alias.name: statement.module
        for statement in block.body
        if isinstance(statement, ast.ImportFrom)
        for alias in statement.names
    }
    assert stated == leakaudit._HOMES


def test_no_module_hides_a_public_function() -> None:
    """Importing `leakaudit.NAME` would put the module in the function's place."""
    modules = {path.stem for path in Path(leakaudit.__file__).parent.iterdir()}
    assert not modules & set(leakaudit.__all__)


def gradient_file(folder: Path, name: str = "mlp") -> nn.Module:
    """One line in a training loop."""
    model = build(name).eval()
    x, y = private_batch()
    nn.functional.cross_entropy(model(x), y).backward()
    leakaudit.save_update(folder / "shared.safetensors", model, batch_size=1)
    return model


def test_save_in_a_training_loop_then_attack(tmp_path: Path) -> None:
    model = gradient_file(tmp_path)
    result = leakaudit.attack(tmp_path / "shared.safetensors", model, manifest=STATED, attacks=["linear"])
    assert result.verdict.status == "leaks"
    assert result.exit_code == 1
    assert result.folder is not None
    assert timeless(leakaudit.read_run(result.folder)) == timeless(result)
    assert "<iframe" in result._repr_html_()
    assert {row.name: row.status for row in result.knowledge}["normalisation"] == "unknown"


def two_local_steps(folder: Path) -> nn.Module:
    """The model before, and before.pt and after.pt in the folder."""
    model = build("mlp").eval()
    before = copy.deepcopy(model)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.5)
    x, y = private_batch()
    for _ in range(2):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimiser.step()
    torch.save(before.state_dict(), folder / "before.pt")
    torch.save(model.state_dict(), folder / "after.pt")
    return before


def test_a_pair_of_checkpoints(tmp_path: Path) -> None:
    before = two_local_steps(tmp_path)
    stated = STATED.model_copy(update={"learning_rate": 0.5, "local_steps": 2})
    stated = Manifest.model_validate(stated.model_dump(exclude_none=True))
    result = leakaudit.attack(
        tmp_path / "after.pt", before, before=tmp_path / "before.pt", manifest=stated, attacks=["linear"]
    )
    assert result.best_trial is not None
    assert result.best_trial.residual is not None
    assert result.best_trial.residual < 1e-3
    assert result.round.local_steps == 2


def saved_delta(folder: Path, steps: int, rate: float = 0.5) -> nn.Module:
    """delta.safetensors as the README saves it, of two examples; the model before."""
    before = build("mlp").eval()
    model = copy.deepcopy(before)
    optimiser = torch.optim.SGD(model.parameters(), lr=rate)
    x, y = (torch.cat([part, part.flip(0)]) for part in private_batch())
    x[1] = 1 - x[1]
    for _ in range(steps):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimiser.step()
    leakaudit.save_update(
        folder / "delta.safetensors", model, before=before.state_dict(), learning_rate=rate,
        local_steps=steps, batch_size=2,
    )  # fmt: skip
    return before


@pytest.mark.parametrize(("steps", "status"), [(1, "known"), (2, "unknown")])
def test_a_delta_that_states_its_local_batch_only(tmp_path: Path, steps: int, status: str) -> None:
    before = saved_delta(tmp_path, steps)
    result = leakaudit.attack(
        tmp_path / "delta.safetensors", before, manifest=STATED.model_copy(update={"num_examples": None}),
        attacks=["inverting-gradients:iterations=2"], controls=False,
    )  # fmt: skip
    assert (result.round.num_examples, result.round.local_batch_size) == (2, 2)
    assert {row.name: row.status for row in result.knowledge}["batch_size"] == status


def test_a_local_batch_larger_than_the_hint_is_no_traceback(tmp_path: Path) -> None:
    """The rank says one example where the file says batches of four: nothing but a matter of belief."""
    gradient_file(tmp_path)
    stated = Manifest.model_validate(
        {**STATED.model_dump(exclude_none=True), "kind": "delta", "sign": "before-minus-after",
         "learning_rate": 1.0, "local_batch_size": 4, "num_examples": None}
    )  # fmt: skip
    tensors = load_file(tmp_path / "shared.safetensors")
    save_file(tensors, tmp_path / "bare.safetensors")
    result = leakaudit.attack(
        tmp_path / "bare.safetensors",
        build("mlp").eval(),
        manifest=stated,
        attacks=["linear"],
        controls=False,
    )
    assert result.round.num_examples in (1, 4)


def test_unknown_steps_are_tried_within_the_budget(tmp_path: Path) -> None:
    before = two_local_steps(tmp_path)
    stated = Manifest.model_validate({**STATED.model_dump(exclude_none=True), "learning_rate": 0.5})
    result = leakaudit.attack(
        tmp_path / "after.pt", before, before=tmp_path / "before.pt", manifest=stated,
        attacks=["inverting-gradients"], budget=0.2, controls=False,
    )  # fmt: skip
    finding = next(finding for finding in result.findings if finding.name == "hypotheses")
    assert finding.severity == "warning"
    assert "The budget did not allow to compare all" in finding.text
    assert finding.text in " ".join(result.verdict.reasons)
    assert sum(trial.seconds for trial in result.trials) < 0.6
    assert len(result.trials) == 1


def test_a_module_needs_its_shapes(tmp_path: Path) -> None:
    model = gradient_file(tmp_path)
    with pytest.raises(leakaudit.InputError, match="input_shape and num_classes are needed with a module"):
        leakaudit.attack(tmp_path / "shared.safetensors", model)


def test_audit_captures_and_attacks(tmp_path: Path) -> None:
    (tmp_path / "models.py").write_text(FACTORIES)
    result = leakaudit.audit(
        f"{tmp_path}/models.py:mlp",
        photo_folder(),
        num_examples=1,
        input_shape=SHAPE,
        num_classes=CLASSES,
        attacks=["linear"],
        normalisation="cifar10",
        out=tmp_path / "out",
    )
    assert result.verdict.status == "leaks"
    assert result.truth_known
    assert result.folder == tmp_path / "out"
    assert {"shared.safetensors", "truth.safetensors", "model.safetensors", "result.json", "report.html"} <= {
        path.name for path in (tmp_path / "out").iterdir()
    }


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_audit_writes_nothing_into_the_folder_of_another(tmp_path: Path) -> None:
    (tmp_path / "models.py").write_text(FACTORIES)
    out = tmp_path / "out"

    def audit(seed: int, force: bool = False, attack: str = "linear") -> leakaudit.AuditResult:
        return leakaudit.audit(
            f"{tmp_path}/models.py:mlp", photo_folder(), input_shape=SHAPE, num_classes=CLASSES,
            attacks=[attack], seed=seed, out=out, force=force,
        )  # fmt: skip

    with pytest.raises(leakaudit.InputError, match="unknown attack"):
        audit(0, attack="liner")
    assert not out.exists()
    first = audit(0)
    before = contents(out)
    with pytest.raises(leakaudit.InputError, match="holds the run of another update"):
        audit(1)
    assert contents(out) == before
    assert timeless(audit(0)) == timeless(first)
    assert audit(1, force=True).files != first.files
    (out / "result.json").unlink()
    before = contents(out)
    with pytest.raises(leakaudit.InputError, match=r"shared\.safetensors holds something else"):
        audit(0)
    assert contents(out) == before


def test_capture_update_says_what_it_did(tmp_path: Path) -> None:
    lines = leakaudit.capture_update(
        "mlp:width=8,layers=1",
        photo_folder(),
        tmp_path / "shared.safetensors",
        truth=tmp_path / "truth.safetensors",
        input_shape=SHAPE,
        num_classes=4,
        num_examples=3,
        batch_size=2,
        epochs=2,
        learning_rate=0.1,
    )
    assert any("delta of 3 examples, 4 local steps, eval mode" in line for line in lines)
    victim = leakaudit.load_victim("mlp:width=8,layers=1", input_shape=SHAPE, num_classes=4)
    shared = leakaudit.load_update(tmp_path / "shared.safetensors", victim)
    assert shared.has_scale
    assert (shared.manifest.local_steps, shared.manifest.local_batch_size) == (4, 2)


def test_the_policys_metrics_are_always_measured(tmp_path: Path) -> None:
    from leakaudit.api import _check_names
    from leakaudit.media.base import metrics_of
    from leakaudit.media.images import IMAGES
    from leakaudit.media.text import TEXT

    assert metrics_of(["mse"], parse_policy("psnr>3,lpips<0.1"), IMAGES) == ("mse", "psnr", "lpips")
    assert metrics_of(None, parse_policy("psnr>3"), IMAGES)[0] == "mse"
    assert metrics_of(["bag-f1"], parse_policy("rouge-l>0.5"), TEXT) == ("bag-f1", "rouge-l")
    with pytest.raises(leakaudit.InputError, match="unknown metric 'msse', did you mean 'mse'"):
        _check_names(None, ["msse"])
    with pytest.raises(leakaudit.InputError, match="metric bag-f1 does not measure images"):
        metrics_of(["bag-f1"], parse_policy("never"), IMAGES)


def test_seeds_are_forked_not_set(tmp_path: Path) -> None:
    model = gradient_file(tmp_path, "smooth")
    state = torch.random.get_rng_state()
    leakaudit.attack(
        tmp_path / "shared.safetensors",
        model,
        manifest=STATED,
        attacks=["idlg:iterations=2,restarts=1"],
        controls=False,
    )
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(p.grad is not None for p in model.parameters()), "the user's module is left alone"
