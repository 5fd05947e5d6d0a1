"""What an installed package adds: a fake distribution on the path, used as a user would."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tiny_audits import Runner, runner, words

from leakaudit import api
from leakaudit.attacks.registry import ATTACKS, medium_of_attack
from leakaudit.defenses import DEFENSES
from leakaudit.defenses.naming import parse_defense
from leakaudit.errors import InputError
from leakaudit.formats.reading import read_file
from leakaudit.models.zoo import MODEL_PLUGINS, load_victim
from leakaudit.plugins import Registry

CODE = '''
"""Third-party parts."""
from dataclasses import dataclass

from torch import nn

from leakaudit.defenses import Defense
from leakaudit.defenses.base import after


@dataclass(frozen=True)
class Half(Defense):
    """Share only a part (Nobody 2020)."""

    part: float = 0.5

    def wrap(self, client, generator):
        return after(client, lambda update: update * self.part)


@dataclass(frozen=True)
class Guess:
    """Guesses grey."""

    level: float = 0.5
    restarts: int = 1

    def applies(self, view):
        return None

    def run(self, view, generator, monitor):
        count = view.round.num_examples
        x = view.victim.space.encode(view.victim.space.sample(count, generator) * 0 + self.level)
        y = view.victim.probe_labels(count)
        monitor.start(1)
        monitor.step(view.residual(x, y), x, y)
        return monitor.result()


def tiny(num_classes=4, input_shape=(3, 32, 32)):
    return nn.Sequential(
        nn.Conv2d(3, 4, 5, stride=4), nn.Sigmoid(), nn.Flatten(), nn.Linear(4 * 7 * 7, num_classes)
    )


number = 3
'''

ENTRY_POINTS = """
[leakaudit.defenses]
half = fake_parts:Half
broken = fake_parts_missing:Thing
absent = fake_parts:nothing
three = fake_parts:number
clip = fake_parts:Half

[leakaudit.attacks]
guess = fake_parts:Guess
three = fake_parts:number

[leakaudit.models]
tinynet = fake_parts:tiny
three = fake_parts:number
"""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the path that holds the distribution "fake-parts"."""
    site = tmp_path / "site"
    info = site / "fake_parts-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fake-parts\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    (site / "fake_parts.py").write_text(CODE)
    monkeypatch.syspath_prepend(site)
    monkeypatch.delitem(sys.modules, "fake_parts", raising=False)
    for registry in (DEFENSES, ATTACKS, MODEL_PLUGINS):
        monkeypatch.setattr(registry, "_loaded", {})
    return site


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Runner:
    return runner(monkeypatch, capsys, tmp_path)


def test_a_package_adds_a_defense_an_attack_and_a_model(installed: Path, tmp_path: Path) -> None:
    photos = Path(__file__).parents[1] / "examples" / "photos"
    assert load_victim("tinynet").num_classes == 4
    files = {name: tmp_path / f"{name}.safetensors" for name in ("plain", "update", "model", "truth")}
    common = {"num_classes": 10, "normalisation": "cifar10", "checkpoint": files["model"]}
    api.capture_update(
        "tinynet", photos, files["plain"], save_model=files["model"], **{**common, "checkpoint": None}
    )
    api.capture_update(
        "tinynet",
        photos,
        files["update"],
        truth=files["truth"],
        defenses=["half:part=0.25+clip:max_grad_norm=100"],
        **common,
    )
    plain, halved = read_file(files["plain"]), read_file(files["update"])
    assert halved.manifest.defenses == ("half:part=0.25", "clip:max_grad_norm=100.0")
    assert halved.manifest.model == "tinynet"
    for name, tensor in plain.tensors.items():
        assert float((halved.tensors[name] - 0.25 * tensor).abs().max()) < 1e-6
    result = api.attack(
        files["update"],
        checkpoint=files["model"],
        truth=files["truth"],
        attacks=["guess:level=0.4"],
        metrics=["mse"],
        policy="mse<0.001",
        controls=False,
        out=tmp_path / "run",
    )
    assert result.trials[0].attack == "guess"
    assert result.trials[0].status == "done"
    assert result.trials[0].residual is not None
    assert medium_of_attack("guess") == "images"


def test_the_names_of_packages_are_known_without_importing_them(installed: Path) -> None:
    assert "half" in DEFENSES
    assert {"half", "broken"} < set(DEFENSES)
    assert "fake_parts" not in sys.modules
    with pytest.raises(InputError, match="unknown defense 'hallf', did you mean 'half'"):
        parse_defense("hallf")
    with pytest.raises(InputError, match="unknown model 'tinynett', did you mean 'tinynet'"):
        load_victim("tinynett")
    assert "fake_parts" not in sys.modules


def test_a_name_of_ours_is_never_replaced(installed: Path) -> None:
    ((_, clip),) = parse_defense("clip")
    assert type(clip).__module__ == "leakaudit.defenses.clipping"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "broken",
            "defense 'broken' of fake-parts .* cannot be loaded: ModuleNotFoundError: No module named",
        ),
        ("absent", "defense 'absent' of fake-parts .* cannot be loaded: AttributeError"),
        (
            "three",
            "defense 'three' of fake-parts .* cannot be used: it is a int; accepted: a frozen dataclass",
        ),
    ],
)
def test_a_broken_package_is_one_line_when_it_is_asked_for(installed: Path, name: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as refused:
        parse_defense(name)
    assert "\n" not in str(refused.value)
    assert parse_defense("half")


def test_models_and_attacks_of_another_kind(installed: Path) -> None:
    with pytest.raises(InputError, match=r"attack 'three' .* accepted: a frozen dataclass with restarts"):
        ATTACKS["three"]
    with pytest.raises(InputError, match=r"model 'three' .* accepted: a factory of torch.nn.Module"):
        load_victim("three")
    with pytest.raises(InputError, match="model 'tinynet' has no option 'width=3'; options: none"):
        load_victim("tinynet:width=3")


def test_the_list_shows_what_is_installed_and_says_what_is_broken(installed: Path, run: Runner) -> None:
    shown = run("list", "defenses")
    assert shown.code == 0
    assert "half Share only a part (Nobody 2020). part=0.5" in words(shown.out)
    assert "defense 'broken' of fake-parts (fake_parts_missing:Thing) cannot be loaded" in words(shown.out)
    assert "defense 'clip' of fake-parts (fake_parts:Half) is not used: the name is ours" in words(shown.out)
    assert "Traceback" not in shown.out + shown.err
    assert "guess images Guesses grey. level=0.5 restarts=1" in words(run("list", "attacks").out)
    models = run("list", "models")
    assert "tinynet 3x32x32" in words(models.out)
    assert "model 'three' of fake-parts" in words(models.out)
    asked = run("capture", "--model", "lenet", "--data", ".", "--defense", "broken", "--out", "a.safetensors")
    assert asked.code == 2
    assert len(asked.err.strip().splitlines()) == 1


def test_help_does_not_look_for_packages(installed: Path) -> None:
    script = (
        "import sys\n"
        f"sys.path.insert(0, {str(installed)!r})\n"
        "from leakaudit.cli import main\n"
        "sys.argv = ['leakaudit', '--help']\n"
        "try:\n    main()\nexcept SystemExit as ended:\n    assert not ended.code\n"
        "assert not {'fake_parts', 'torch', 'leakaudit.plugins'} & sys.modules.keys()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_metadata_that_cannot_be_read_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreadable(**_: str) -> None:
        raise ValueError("not metadata")

    monkeypatch.setattr("leakaudit.plugins.entry_points", unreadable)
    registry: Registry[int] = Registry("leakaudit.none", "number", lambda _, loaded: 1, {"one": 1})
    assert (list(registry), len(registry), "two" in registry) == (["one"], 1, False)
    assert registry.usable() == ({"one": 1}, [])
    with pytest.raises(KeyError):
        registry["two"]
