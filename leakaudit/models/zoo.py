"""Models by name: our own, torchvision's, and the user's own factory.

    lenet:activation=gelu,init=uniform
    resnet20
    torchvision:squeezenet1_1,weights=IMAGENET1K_V1
    hf:sentence-transformers/all-MiniLM-L6-v2
    path/to/file.py:factory          installed_package.module:factory

A user's code runs only when its spec is passed; nothing else is imported or executed.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from leakaudit import spec as specs
from leakaudit.errors import InputError
from leakaudit.formats.checkpoint import load_checkpoint, read_state_dict
from leakaudit.formats.manifest import Normalisation
from leakaudit.formats.phrases import first_line
from leakaudit.models import vision
from leakaudit.models.spaces import Pixels
from leakaudit.models.victim import Mode, Victim
from leakaudit.models.vision import Activation, Shape
from leakaudit.plugins import Registry

Init = Literal["default", "uniform"]

NORMALISATIONS: dict[str, Normalisation] = {
    "none": Normalisation(mean=(0.0,), std=(1.0,)),
    "mnist": Normalisation(mean=(0.1307,), std=(0.3081,)),
    "cifar10": Normalisation(mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616)),
    "cifar100": Normalisation(mean=(0.5071, 0.4865, 0.4409), std=(0.2673, 0.2564, 0.2762)),
    "imagenet": Normalisation(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
}
"""Channel means and standard deviations of well-known training sets, pixels in [0, 1].

"none" says that the model sees the pixels as they are.  The akamaster CIFAR ResNets use "imagenet".
"""

LANGUAGE = "hf:"
"""What specs of language models begin with."""

COMMON_SIZES = (32, 28, 64, 96, 128, 160, 224, 256, 384, 512)
"""Input heights tried, after the model's own, when a checkpoint is to tell the input shape."""


@dataclass(frozen=True)
class ModelInfo:
    """What a model is and takes by default; `num_classes` None: only its code knows."""

    name: str
    input_shape: Shape
    num_classes: int | None
    description: str
    citation: str


@dataclass(frozen=True)
class Options:
    """`init`: "default" is the architecture's own, "uniform" is DLG's: all in (-0.5, 0.5)."""

    activation: Activation = "relu"
    init: Init = "default"


@dataclass(frozen=True)
class WidthOptions(Options):
    """`width`: channels of the first layer."""

    width: int = 64

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ValueError(f"width must be at least 1, got {self.width}")


@dataclass(frozen=True)
class MLPOptions(Options):
    """`width` and number of hidden layers."""

    width: int = 1024
    layers: int = 3

    def __post_init__(self) -> None:
        if self.width < 1 or self.layers < 0:
            raise ValueError(
                f"width must be at least 1 and layers at least 0, got {self.width} and {self.layers}"
            )


@dataclass(frozen=True)
class ResNetOptions(Options):
    """`strides=false`: all strides are 1, as in DLG's ResNet experiments."""

    strides: bool = True


@dataclass(frozen=True)
class CifarResNetOptions(WidthOptions, ResNetOptions):
    """`width`: channels of the first layer; 64 for the ResNet20-4 of Geiping et al. 2020."""

    width: int = 16


@dataclass(frozen=True)
class Entry:
    """A registered architecture: its description, its options, and how options become a module."""

    info: ModelInfo
    options: Options
    build: Callable[[Any, int, Shape], nn.Module]


def _lenet(options: Options, num_classes: int, shape: Shape) -> nn.Module:
    return vision.LeNet(num_classes, shape, options.activation)


def _convnet(options: WidthOptions, num_classes: int, shape: Shape) -> nn.Module:
    return vision.ConvNet(num_classes, shape, options.activation, options.width)


def _mlp(options: MLPOptions, num_classes: int, shape: Shape) -> nn.Module:
    return vision.mlp(num_classes, shape, options.activation, options.width, options.layers)


def _resnet18(options: ResNetOptions, num_classes: int, shape: Shape) -> nn.Module:
    return vision.resnet18(num_classes, shape, options.activation, options.strides)


def _cifar_resnet(depth: int) -> Entry:
    def build(options: CifarResNetOptions, num_classes: int, shape: Shape) -> nn.Module:
        return vision.CifarResNet(
            num_classes, shape, options.activation, options.strides, (depth - 2) // 6, options.width
        )

    info = ModelInfo(
        name=f"resnet{depth}",
        input_shape=(3, 32, 32),
        num_classes=10,
        description=f"CIFAR ResNet with {depth} layers, option A shortcuts, akamaster's names",
        citation="He et al. 2016, section 4.2",
    )
    return Entry(info, CifarResNetOptions(), build)


MODELS: dict[str, Entry] = {
    "lenet": Entry(
        ModelInfo(
            "lenet",
            (3, 32, 32),
            100,
            "three 5x5 convolutions of 12 channels and one linear layer, sigmoid",
            "Zhu, Liu and Han 2019 (DLG)",
        ),
        Options(activation="sigmoid"),
        _lenet,
    ),
    "convnet": Entry(
        ModelInfo(
            "convnet",
            (3, 32, 32),
            10,
            "eight 3x3 convolutions with BatchNorm, 64 to 256 channels",
            "Geiping et al. 2020 (Inverting Gradients)",
        ),
        WidthOptions(),
        _convnet,
    ),
    "resnet20": _cifar_resnet(20),
    "resnet32": _cifar_resnet(32),
    "resnet56": _cifar_resnet(56),
    "resnet18": Entry(
        ModelInfo(
            "resnet18",
            (3, 32, 32),
            100,
            "torchvision's ResNet-18 with a CIFAR stem (3x3 convolution, no max-pooling)",
            "He et al. 2016; strides=false as in Zhu, Liu and Han 2019",
        ),
        ResNetOptions(),
        _resnet18,
    ),
    "mlp": Entry(
        ModelInfo(
            "mlp",
            (3, 32, 32),
            10,
            "fully connected, three hidden layers of 1024 units",
            "Geiping et al. 2020 (its code)",
        ),
        MLPOptions(),
        _mlp,
    ),
}


class Source(Protocol):
    """Where a model comes from."""

    @property
    def info(self) -> ModelInfo: ...

    def build(self, num_classes: int | None, shape: Shape, seed: int) -> nn.Module:
        """A module on the CPU; called with the global generator already seeded."""

    def skeleton(self, num_classes: int | None, shape: Shape) -> nn.Module:
        """A module with the same names and shapes, its values of no account."""


@dataclass(frozen=True)
class _Registered:
    entry: Entry
    options: Options

    @property
    def info(self) -> ModelInfo:
        return self.entry.info

    def build(self, num_classes: int | None, shape: Shape, seed: int) -> nn.Module:
        module = self.entry.build(self.options, num_classes or _default_classes(self.info), shape)
        if self.options.init == "uniform":
            vision.initialise_uniform(module, torch.Generator().manual_seed(seed))
        return module

    def skeleton(self, num_classes: int | None, shape: Shape) -> nn.Module:
        with torch.device("meta"):
            return self.entry.build(self.options, num_classes or _default_classes(self.info), shape)


@dataclass(frozen=True)
class _Factory:
    text: str
    function: Callable[..., object]
    folder: Path | None

    @property
    def info(self) -> ModelInfo:
        return ModelInfo(self.text, (3, 32, 32), None, "the user's own", "")

    def build(self, num_classes: int | None, shape: Shape, seed: int) -> nn.Module:
        arguments = self._arguments(num_classes, shape)
        try:
            with _importing_from(self.folder):
                module = self.function(**arguments)
        except Exception as error:  # the user's own code may raise anything
            raise InputError(
                f"model {self.text} failed: {type(error).__name__}: {first_line(error)}"
            ) from error
        if not isinstance(module, nn.Module):
            raise InputError(
                f"model {self.text} returned a {type(module).__name__}, expected a torch.nn.Module"
            )
        return module

    def skeleton(self, num_classes: int | None, shape: Shape) -> nn.Module:
        with _seeded(0):
            return self.build(num_classes, shape, 0)

    def _arguments(self, num_classes: int | None, shape: Shape) -> dict[str, object]:
        """What the factory asks for by name, of the things we can give."""
        try:
            parameters = inspect.signature(self.function).parameters
        except (TypeError, ValueError):
            return {}
        offered = {"num_classes": num_classes, "input_shape": shape}
        arguments: dict[str, object] = {
            name: value for name, value in offered.items() if name in parameters and value is not None
        }
        needed = [
            name
            for name, parameter in parameters.items()
            if parameter.default is parameter.empty
            and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
            and name not in arguments
        ]
        if needed == ["num_classes"]:
            raise InputError(f"model {self.text} needs the number of classes; it was not given")
        if needed:
            raise InputError(
                f"model {self.text} needs arguments ({', '.join(needed)}); a factory may take num_classes and"
                " input_shape, everything else needs a default"
            )
        return arguments


def _plugin(name: str, loaded: object) -> Source:
    """What an installed package offers as the model `name`; `ValueError` unless it makes one."""
    if isinstance(loaded, Entry):
        return _Registered(loaded, loaded.options)
    if not callable(loaded):
        raise ValueError(
            f"it is a {type(loaded).__name__}; accepted: a factory of torch.nn.Module, which may take"
            " num_classes and input_shape, or a leakaudit.models.zoo.Entry"
        )
    return _Factory(name, loaded, None)


MODEL_PLUGINS: Registry[Source] = Registry("leakaudit.models", "model", _plugin, {})
"""Models of installed packages by name."""


def resolve(spec: str) -> Source:
    """The model that `spec` names, not built yet.

    Raises `InputError` for an unknown name or option, or a factory that cannot be imported.
    """
    name, _, rest = spec.partition(":")
    if name.strip() in MODELS:
        name = name.strip()
        options = specs.parse(spec, {key: entry.options for key, entry in MODELS.items()}, "model")
        return _Registered(MODELS[name], options)
    if name.strip() in MODEL_PLUGINS:
        return _with_options(MODEL_PLUGINS[name.strip()], name.strip(), rest)
    if name.strip() == "torchvision":
        from leakaudit.models.torchvision_models import (
            torchvision_source,  # seconds, which our own do without
        )

        return torchvision_source(rest)
    target, _, function = spec.rpartition(":")
    if target.endswith(".py") or (target and function.strip().isidentifier()):
        return _factory_source(target.strip(), function.strip(), spec)
    names = [*MODELS, *MODEL_PLUGINS]
    known = ", ".join([*names, "torchvision:NAME", "path/to/file.py:factory", "package.module:factory"])
    raise InputError(f"unknown model {spec!r}{specs.suggest(name.strip(), names)}; known: {known}")


def _with_options(source: Source, name: str, options: str) -> Source:
    """The model of a package with the options given; only an `Entry` has any."""
    if isinstance(source, _Registered):
        return replace(source, options=specs.parse(f"{name}:{options}", {name: source.options}, "model"))
    if options.strip():
        raise InputError(f"model {name!r} has no option {options.strip()!r}; options: none")
    return source


def build_model(
    spec: str, *, num_classes: int | None = None, input_shape: Shape | None = None, seed: int = 0
) -> nn.Module:
    """The model that `spec` names, freshly initialised from `seed`, in train mode on the CPU.

    Args:
        num_classes, input_shape: None for the model's own (`model_info`).
        seed: the same seed gives the same parameters; torch's global generator is left alone.

    Raises `InputError` for a spec, a number of classes or an input shape that cannot be used.
    """
    source = resolve(spec)
    return _build(source, num_classes, input_shape or source.info.input_shape, seed)


def model_info(spec: str) -> ModelInfo:
    """Description and defaults of the model that `spec` names; `InputError` for an unknown one."""
    return resolve(spec).info


def load_victim(
    spec: str,
    *,
    checkpoint: str | Path | None = None,
    num_classes: int | None = None,
    input_shape: Shape | None = None,
    normalisation: Normalisation | None = None,
    mode: Mode = "eval",
    loss: str = "cross-entropy",
    reduction: str = "mean",
    seed: int = 0,
    task: str | None = None,
    lora: str | None = None,
) -> Victim:
    """The model under audit: built, loaded from its checkpoint, and wrapped.

    Args:
        task, lora: of a language model, `hf:NAME_OR_FOLDER`; see `leakaudit.models.language`.
        checkpoint: file for `leakaudit.formats.checkpoint`; None for fresh parameters from `seed`.
        num_classes, input_shape: when None, what the checkpoint's shapes say (`infer_shapes`),
            or the model's own.
        normalisation: what the model expects of its pixels; None is unknown, and never guessed.
            One number serves all channels.

    Raises `InputError` for anything that does not fit together.
    """
    if spec.startswith(LANGUAGE):
        from leakaudit.models.pretrained import load_language_victim  # transformers, which images do without

        return load_language_victim(
            spec,
            task,
            checkpoint=checkpoint,
            lora=lora,
            num_classes=num_classes,
            mode=mode,
            loss=loss,
            reduction=reduction,
            seed=seed,
        )
    if task is not None or lora is not None:
        raise InputError(f"task and lora are of language models; {spec} takes images")
    source = resolve(spec)
    if checkpoint is not None:
        skeleton = source.skeleton(num_classes, input_shape or source.info.input_shape)  # for its names
        state = read_state_dict(checkpoint, skeleton)
        num_classes, input_shape = infer_shapes(source, state, num_classes, input_shape)
    shape = input_shape or source.info.input_shape
    module = _build(source, num_classes, shape, seed)
    if checkpoint is not None:
        load_checkpoint(module, checkpoint)
    return Victim.of(
        module,
        pixels(shape, normalisation),
        num_classes or source.info.num_classes or _count_outputs(module, shape, spec),
        mode,
        loss,
        reduction,
        name=spec,
    )


def pixels(shape: Shape, normalisation: Normalisation | None) -> Pixels:
    """The input space; `InputError` when the normalisation has another number of channels."""
    if normalisation is None:
        return Pixels(shape)
    mean, std = (
        values * shape[0] if len(values) == 1 else values
        for values in (normalisation.mean, normalisation.std)
    )
    try:
        return Pixels(shape, mean, std)
    except ValueError as error:
        raise InputError(str(error)) from error


def parse_normalisation(text: str) -> Normalisation:
    """A name of `NORMALISATIONS`, or MEAN/STD with a number a channel: "0.5,0.5,0.5/0.25,0.25,0.25".

    Raises `InputError` for anything else.
    """
    if text in NORMALISATIONS:
        return NORMALISATIONS[text]
    mean, slash, std = text.partition("/")
    try:
        if not slash:
            raise ValueError
        numbers = [tuple(float(number) for number in part.split(",")) for part in (mean, std)]
        if len(numbers[0]) != len(numbers[1]):
            raise ValueError
        return Normalisation(mean=numbers[0], std=numbers[1])
    except ValueError as error:
        raise InputError(
            f"unknown normalisation {text!r}{specs.suggest(text, NORMALISATIONS)};"
            f" accepted: {', '.join(NORMALISATIONS)}, or MEAN/STD such as 0.5,0.5,0.5/0.25,0.25,0.25"
        ) from error


def infer_shapes(
    source: Source,
    state: Mapping[str, Tensor],
    num_classes: int | None = None,
    input_shape: Shape | None = None,
) -> tuple[int | None, Shape | None]:
    """(num_classes, input_shape) under which the model takes `state`, as far as its shapes tell.

    Found by comparison with the model at its defaults: rows where the default number of
    classes stood, columns where the default channels stood, then square inputs of
    `COMMON_SIZES`, in colour and grey, until all shapes fit.  The first that fits is taken:
    a model whose shapes do not depend on the size gets its default.  What is given is kept;
    what cannot be told is None.
    """
    info = source.info
    skeleton = source.skeleton(num_classes, input_shape or info.input_shape)
    differing = _differing(skeleton, state)
    default = info.num_classes or _count_outputs(skeleton, input_shape or info.input_shape, info.name)
    classes = num_classes or _one(
        found[0]
        for wanted, found in differing
        if len(wanted) == len(found) > 0 and wanted[0] == default != found[0]
    )
    if input_shape is not None:
        return classes, input_shape
    channels = _one(
        found[1]
        for wanted, found in differing
        if len(wanted) == len(found) == 4 and wanted[1] == info.input_shape[0] != found[1]
    )
    for shape in _candidate_shapes(info.input_shape, channels):
        try:
            if not _differing(source.skeleton(classes, shape), state):
                return classes, shape
        except InputError:
            continue
    return classes, None


def _candidate_shapes(default: Shape, channels: int | None) -> Iterator[Shape]:
    """The default, then other sizes, then other channels unless `channels` is known."""
    for depth in (default[0], 1, 3) if channels is None else (channels,):
        for side in (default[1], *COMMON_SIZES):
            yield depth, side, side


def _build(source: Source, num_classes: int | None, shape: Shape, seed: int) -> nn.Module:
    if num_classes is not None and num_classes < 2:
        raise InputError(f"number of classes must be at least 2, got {num_classes}")
    if len(shape) != 3 or min(shape) < 1:
        raise InputError(f"input shape must be three positive numbers (channels, height, width), got {shape}")
    with _seeded(seed):
        return source.build(num_classes, shape, seed)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """torch's CPU generator, which initialisers draw from, set to `seed` and put back afterwards."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        yield


def _default_classes(info: ModelInfo) -> int:
    assert info.num_classes is not None
    return info.num_classes


def _differing(module: nn.Module, state: Mapping[str, Tensor]) -> list[tuple[torch.Size, torch.Size]]:
    """(the model's shape, the file's) of every entry in both whose shapes differ."""
    return [
        (tensor.shape, state[name].shape)
        for name, tensor in module.state_dict().items()
        if name in state and tensor.shape != state[name].shape
    ]


def _one(numbers: Iterator[int]) -> int | None:
    """The number they all agree on, or None."""
    distinct = set(numbers)
    return distinct.pop() if len(distinct) == 1 else None


def _count_outputs(module: nn.Module, shape: Shape, spec: str) -> int:
    try:
        with torch.no_grad():
            output = module.eval()(torch.zeros(2, *shape))
    except Exception as error:  # the user's own code may raise anything
        raise InputError(
            f"model {spec} cannot take inputs of shape {shape}: {first_line(error)}; state theirs by --input-shape"
        ) from error
    if not isinstance(output, Tensor) or output.dim() != 2:
        raise InputError(f"model {spec} does not return class scores of shape (batch, classes)")
    return output.shape[1]


def _factory_source(target: str, function: str, spec: str) -> Source:
    if target.endswith(".py"):
        path = Path(target)
        module, folder = _import_file(path), path.resolve().parent
    else:
        module, folder = _import_module(target, spec), None
    if not callable(getattr(module, function, None)):
        names = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise InputError(f"{target} has no factory {function!r}{specs.suggest(function, names)}")
    return _Factory(spec, getattr(module, function), folder)


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise InputError(f"model file {path} does not exist")
    name = "_leakaudit_model_" + re.sub(r"\W", "_", str(path.resolve()))
    located = importlib.util.spec_from_file_location(name, path)
    assert located is not None
    assert located.loader is not None
    module = importlib.util.module_from_spec(located)
    sys.modules[name] = module
    try:
        with _importing_from(path.resolve().parent):
            located.loader.exec_module(module)
    except Exception as error:  # the user's own code may raise anything
        del sys.modules[name]
        raise InputError(f"model file {path} cannot be imported: {_describe(error)}") from error
    return module


def _import_module(target: str, spec: str) -> ModuleType:
    try:
        return importlib.import_module(target)
    except ModuleNotFoundError as error:
        if error.name is not None and (target == error.name or target.startswith(error.name + ".")):
            raise InputError(
                f"unknown model {spec!r}{specs.suggest(target, MODELS)}; {target!r} is neither a model"
                f" ({', '.join(MODELS)}, torchvision) nor an installed module"
            ) from error
        raise InputError(f"model module {target} cannot be imported: {_describe(error)}") from error
    except Exception as error:  # the user's own code may raise anything
        raise InputError(f"model module {target} cannot be imported: {_describe(error)}") from error


@contextmanager
def _importing_from(folder: Path | None) -> Iterator[None]:
    """Imports find files beside the user's own, as they do under `python file.py`."""
    before = list(sys.path)
    if folder is not None:
        sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path[:] = before


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"
