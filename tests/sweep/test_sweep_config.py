"""What a sweep is: the TOML file, the options over it, and one line for everything that is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from leakaudit.errors import InputError
from leakaudit.rounds import Round
from leakaudit.sweep.config import build_config, read_config
from leakaudit.sweep.protocols import canonical, round_of

WHOLE = """
model = "resnet20"
checkpoint = "weights/m.pt"
data = "photos"
protocol = ["fedsgd", "fedavg:steps=5"]
defense = "top-k:keep=0.3,0.1"
attack = ["auto"]
adversary = ["adaptive"]
examples = 16
seeds = 3
fail_on = "ssim>0.5"
baseline = "baseline.json"
bounds = false

[utility]
steps = 40
curves = "curves.csv"
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "audit.toml"
    path.write_text(text)
    return path


def test_a_file_speaks_of_files_beside_it(tmp_path: Path) -> None:
    sweep = build_config(read_config(written(tmp_path, WHOLE)))
    assert sweep.checkpoint == tmp_path / "weights/m.pt"
    assert sweep.data == str(tmp_path / "photos")
    assert sweep.baseline == tmp_path / "baseline.json"
    assert sweep.utility.curves == tmp_path / "curves.csv"
    assert (sweep.model, sweep.images, sweep.seeds) == ("resnet20", 16, 3)
    assert sweep.protocols == ("fedsgd", "fedavg:steps=5")
    assert sweep.defenses == ("top-k:keep=0.3,0.1",)
    assert (sweep.bounds.on, sweep.utility.on, sweep.utility.steps) == (False, True, 40)


def test_models_that_are_files_lie_beside_the_file_too(tmp_path: Path) -> None:
    (tmp_path / "bert").mkdir()
    for given, expected in (
        ("net.py:make", f"{tmp_path}/net.py:make"),
        ("hf:bert", f"hf:{tmp_path}/bert"),
        ("hf:someone/bert", "hf:someone/bert"),
        ("lenet:init=uniform", "lenet:init=uniform"),
        ("package.module:make", "package.module:make"),
    ):
        path = written(tmp_path, f'model = "{given}"\ndata = "torchvision:CIFAR10"')
        assert read_config(path) == {"model": expected, "data": "torchvision:CIFAR10"}


def test_options_win_over_the_file_table_by_table(tmp_path: Path) -> None:
    over = {"seeds": 1, "defenses": ["clip"], "utility": {"seeds": 2}}
    sweep = build_config(read_config(written(tmp_path, WHOLE)), over=over)
    assert (sweep.seeds, sweep.images, sweep.defenses) == (1, 16, ("clip",))
    assert (sweep.utility.steps, sweep.utility.seeds) == (40, 2)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ('modell = "lenet"', "unknown key 'modell', did you mean 'model'?"),
        (
            'model = "lenet"\n[utility]\nstep = 3',
            "table utility has an unknown key 'step', did you mean 'steps'?",
        ),
        ('model = "lenet"\nprotocol = "a"\nprotocols = ["b"]', "says protocols twice"),
        ("model = ", "is not TOML"),
        ("\xff", "is not TOML"),
    ],
)
def test_files_that_cannot_be_used(text: str, part: str, tmp_path: Path) -> None:
    path = tmp_path / "audit.toml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError) as refused:
        read_config(path)
    assert part in str(refused.value)
    assert str(path) in str(refused.value)
    with pytest.raises(InputError, match="cannot read"):
        read_config(tmp_path / "nowhere.toml")


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"images": 0}, "images=0"),
        ({"seeds": "many"}, "seeds='many'"),
        ({"budget": -1}, "budget=-1"),
        ({"budget": float("inf")}, "budget=inf"),
        ({"quantile": 1.5}, "quantile=1.5"),
        ({"adversaries": ["omniscient"]}, "adversaries.0='omniscient'"),
        ({"engine": "spark"}, "engine='spark'"),
        ({"mode": "test"}, "mode='test'"),
        ({"workers": -1}, "workers=-1"),
        ({"bounds": {"prior": 1.0}}, "bounds.prior=1.0"),
        ({"utility": {"holdout": 0}}, "utility.holdout=0"),
    ],
)
def test_values_out_of_range(change: dict[str, Any], part: str) -> None:
    with pytest.raises(InputError) as refused:
        build_config({"model": "lenet", "data": "photos"}, over=change)
    assert part in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_sweep_needs_a_model() -> None:
    with pytest.raises(InputError, match="no model given"):
        build_config({"data": "photos"})


# ------------------------------------------------------------------ protocols


def test_protocols_make_rounds() -> None:
    assert round_of("fedsgd") == Round(1)
    assert round_of("fedsgd:batch_size=8") == Round(8)
    assert round_of("fedavg:steps=5") == Round(1, 5, None, 0.01)
    assert round_of("fedavg:epochs=2,examples=4,batch_size=2,learning_rate=0.1") == Round(4, 4, 2, 0.1)
    assert canonical(" fedsgd : batch_size=1".replace(" :", ":")) == "fedsgd"
    assert canonical("fedavg:steps=5,learning_rate=0.01") == "fedavg"


@pytest.mark.parametrize(
    ("spec", "part"),
    [
        ("fedsdg", "unknown protocol 'fedsdg', did you mean 'fedsgd'?"),
        ("fedavg:step=3", "has no option 'step', did you mean 'steps'?"),
        ("fedsgd:batch_size=0", "num_examples must be at least 1"),
        ("fedavg:examples=4,batch_size=1,steps=2", "would use only 2 of the 4 examples"),
        ("fedavg:examples=2,batch_size=5", "local_batch_size must be between 1 and 2"),
    ],
)
def test_protocols_that_make_none(spec: str, part: str) -> None:
    with pytest.raises(InputError) as refused:
        canonical(spec)
    assert part in str(refused.value)
