"""Models by name: specs, seeds, the user's own factories, and shapes read from checkpoints."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from leakaudit.errors import InputError
from leakaudit.formats.checkpoint import save_checkpoint
from leakaudit.formats.manifest import Normalisation
from leakaudit.models.zoo import (
    MODELS,
    NORMALISATIONS,
    build_model,
    load_victim,
    model_info,
    parse_normalisation,
)

DATA = Path(__file__).parents[2].parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="shared data are absent")

FACTORY = """
import torch
from beside import WIDTH
def net(num_classes=5, input_shape=(3, 32, 32)):
    size = input_shape[0] * input_shape[1] * input_shape[2]
    hidden = torch.nn.Linear(size, WIDTH)
    return torch.nn.Sequential(torch.nn.Flatten(), hidden, torch.nn.Linear(WIDTH, num_classes))
def fixed():
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 4))
def needs_classes(num_classes):
    return net(num_classes)
def needs_more(depth, width=3):
    return net()
def text():
    return "model"
def broken():
    raise RuntimeError("no GPU\\nhere")
number = 3
"""


@pytest.fixture
def factory(tmp_path: Path) -> Path:
    (tmp_path / "beside.py").write_text("WIDTH = 6\n")
    path = tmp_path / "own model.py"
    path.write_text(FACTORY)
    return path


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("name", [*MODELS, "lenet:init=uniform", "torchvision:squeezenet1_1"])
def test_a_seed_fixes_the_parameters_and_leaves_the_global_generator_alone(name: str) -> None:
    before = torch.get_rng_state()
    assert same(build_model(name, seed=3), build_model(name, seed=3))
    assert not same(build_model(name, seed=3), build_model(name, seed=4))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_global_generator_does_not_change_the_parameters() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        first = build_model("resnet20")
        torch.rand(100)
        assert same(first, build_model("resnet20"))


@pytest.mark.parametrize("name", MODELS)
def test_every_registered_model_describes_itself_and_runs_at_its_defaults(name: str) -> None:
    info = model_info(name)
    assert info.name == name
    assert info.description
    assert info.citation
    victim = load_victim(name)
    assert victim.num_classes == info.num_classes
    assert victim.space.shape == info.input_shape
    head = victim.classifier()
    assert head is not None
    assert victim.params[head.weight].shape[0] == info.num_classes


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("lenett", "did you mean 'lenet'"),
        ("lenett:activation=relu", "did you mean 'lenet'"),
        ("", "unknown model ''"),
        ("lenet:activatio=relu", "did you mean 'activation'"),
        ("lenet:activation=rel", "did you mean 'relu'"),
        ("convnet:width=0", "width must be at least 1, got 0"),
        ("mlp:layers=-1", "layers at least 0"),
        ("torchvision:", "has no classifier ''"),
        ("torchvision:resnet_18", "did you mean 'resnet18'"),
        ("torchvision:resnet18,weights=IMAGENET1K_V3", "did you mean 'IMAGENET1K_V"),
        ("torchvision:resnet18,image_size=3", "unexpected keyword argument 'image_size'"),
        ("absent/model.py:net", "does not exist"),
        ("absent_package.models:net", "nor an installed module"),
        ("json:absent", "has no factory 'absent'"),
        ("torch.nn:Linear", "needs arguments"),
    ],
)
def test_a_spec_that_cannot_be_used_is_one_clear_line(spec: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        build_model(spec)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("classes", [0, 1, -3])
def test_too_few_classes_are_refused(classes: int) -> None:
    with pytest.raises(InputError, match=f"at least 2, got {classes}"):
        build_model("lenet", num_classes=classes)


def test_a_factory_gets_the_classes_and_the_shape_it_asks_for(factory: Path) -> None:
    victim = load_victim(f"{factory}:net", num_classes=9, input_shape=(1, 4, 4))
    assert [tuple(p.shape) for p in victim.params.values()] == [(6, 16), (6,), (9, 6), (9,)]
    assert load_victim(f"{factory}:net").num_classes == 5
    assert load_victim(f"{factory}:fixed", input_shape=(3, 2, 2)).num_classes == 4


def test_a_factory_is_seeded_like_any_other_model(factory: Path) -> None:
    before = torch.get_rng_state()
    assert same(build_model(f"{factory}:net", seed=1), build_model(f"{factory}:net", seed=1))
    assert not same(build_model(f"{factory}:net", seed=1), build_model(f"{factory}:net", seed=2))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_factory_of_an_installed_module(factory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(factory.parent))
    factory.rename(factory.with_name("own_model.py"))
    assert isinstance(build_model("own_model:net"), nn.Sequential)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("nett", "has no factory 'nett', did you mean 'net'?"),
        ("number", "has no factory 'number'"),
        ("text", "returned a str, expected a torch.nn.Module"),
        ("broken", "failed: RuntimeError: no GPU"),
        ("needs_classes", "needs the number of classes"),
        ("needs_more", "needs arguments (depth)"),
    ],
)
def test_a_factory_that_does_not_work_is_one_clear_line(factory: Path, function: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        build_model(f"{factory}:{function}")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("import absent_thing\n", "ModuleNotFoundError"),
        ("def (:\n", "SyntaxError"),
        ("1 / 0\n", "ZeroDivision"),
    ],
)
def test_a_file_that_cannot_be_imported_says_why(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "own.py"
    path.write_text(text)
    with pytest.raises(InputError, match=f"cannot be imported: {reason}"):
        build_model(f"{path}:net")


@pytest.mark.parametrize(
    ("spec", "classes", "shape"),
    [
        ("lenet", 10, (1, 28, 28)),
        ("lenet", 100, (3, 64, 64)),
        ("lenet:activation=gelu", 2, (3, 32, 32)),
        ("convnet:width=4", 17, (3, 32, 32)),
        ("convnet:width=4", 10, (1, 96, 96)),
        ("resnet20", 100, (1, 32, 32)),
        ("resnet18", 5, (3, 32, 32)),
        ("mlp:width=8", 3, (1, 28, 28)),
        ("torchvision:squeezenet1_1", 10, (3, 224, 224)),
    ],
)
def test_classes_and_input_shape_are_read_from_the_checkpoint(
    tmp_path: Path, spec: str, classes: int, shape: tuple[int, int, int]
) -> None:
    path = tmp_path / "model.safetensors"
    module = build_model(spec, num_classes=classes, input_shape=shape, seed=9)
    save_checkpoint(module, path)
    victim = load_victim(spec, checkpoint=path)
    assert (victim.num_classes, victim.space.shape) == (classes, shape)
    assert all(torch.equal(victim.params[name], p) for name, p in module.named_parameters())


def test_classes_of_a_factorys_checkpoint_are_read_too(factory: Path, tmp_path: Path) -> None:
    save_checkpoint(build_model(f"{factory}:net", num_classes=7), tmp_path / "own.safetensors")
    assert load_victim(f"{factory}:net", checkpoint=tmp_path / "own.safetensors").num_classes == 7


def test_what_the_user_states_beats_the_checkpoint(tmp_path: Path) -> None:
    save_checkpoint(build_model("lenet", num_classes=10), tmp_path / "m.safetensors")
    with pytest.raises(InputError, match=r"fc\.0\.weight is 10x768 where the model has 12x768"):
        load_victim("lenet", checkpoint=tmp_path / "m.safetensors", num_classes=12)


def test_normalisation_is_an_option_and_never_guessed() -> None:
    assert load_victim("resnet20").space.mean is None
    victim = load_victim("lenet", normalisation=NORMALISATIONS["none"])
    assert (victim.space.mean, victim.space.std) == ((0.0,) * 3, (1.0,) * 3)
    with pytest.raises(InputError, match="normalisation has 3 channels, the input has 1"):
        load_victim("lenet", input_shape=(1, 28, 28), normalisation=NORMALISATIONS["cifar10"])


def test_normalisations_are_parsed() -> None:
    assert parse_normalisation("imagenet") == NORMALISATIONS["imagenet"]
    assert parse_normalisation("0.5/0.25") == Normalisation(mean=(0.5,), std=(0.25,))
    assert parse_normalisation("0.1,0.2,0.3/1,2,3") == Normalisation(mean=(0.1, 0.2, 0.3), std=(1, 2, 3))


@pytest.mark.parametrize("text", ["cifar", "0.5", "0.5,0.5/1", "a/b", "0.5/0", "0.5/-1", "", "/"])
def test_a_normalisation_that_cannot_be_used_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="unknown normalisation"):
        parse_normalisation(text)


@pytest.mark.slow
def test_a_vision_transformer_at_another_resolution() -> None:
    victim = load_victim("torchvision:vit_b_16,image_size=32", num_classes=10)
    assert victim.space.shape == (3, 32, 32)
    with pytest.raises(InputError, match="Wrong image height"):
        load_victim("torchvision:vit_b_16", input_shape=(3, 32, 32))


@needs_data
def test_torchvision_weights_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(DATA / "torch_home"))
    spec = "torchvision:squeezenet1_1,weights=IMAGENET1K_V1"
    victim = load_victim(spec, normalisation=NORMALISATIONS["imagenet"])
    stored = torch.load(
        DATA / "torch_home/hub/checkpoints/squeezenet1_1-b8a52dc0.pth", weights_only=True, map_location="cpu"
    )
    assert all(torch.equal(victim.params[name], tensor) for name, tensor in stored.items())
    with pytest.raises(InputError, match="expected value 1000 but got 10"):
        build_model(spec, num_classes=10)


@needs_data
@pytest.mark.slow
def test_the_cifar10_resnet_reproduces_its_accuracy() -> None:
    """455 of the first 500 test images; 91.73 % of all 10,000 is published."""
    stored = np.load(DATA / "images/cifar10/cifar10_test_first2000.npz")
    images = torch.from_numpy(stored["images"][:500]).permute(0, 3, 1, 2) / 255
    labels = torch.from_numpy(stored["labels"][:500]).long()
    victim = load_victim(
        "resnet20",
        checkpoint=DATA / "models/cifar10_resnet/resnet20-12fca82f.th",
        normalisation=NORMALISATIONS["imagenet"],
    )
    with torch.no_grad():
        right = [
            (victim.logits(victim.params, victim.space.encode(x)).argmax(1) == y).sum()
            for x, y in zip(images.split(100), labels.split(100), strict=True)
        ]
    assert int(sum(right)) == 455


@needs_data
@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("resnet20", "resnet20-12fca82f.th"),
        ("resnet32", "resnet32-d509ac18.th"),
        ("resnet56", "resnet56-4bfd9763.th"),
    ],
)
def test_the_cifar10_checkpoints_load_unchanged(name: str, file: str) -> None:
    path = DATA / "models/cifar10_resnet" / file
    victim = load_victim(name, checkpoint=path)
    stored = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    assert victim.num_classes == 10
    loaded = victim.params | victim.buffers
    assert all(torch.equal(loaded[key.removeprefix("module.")], tensor) for key, tensor in stored.items())
