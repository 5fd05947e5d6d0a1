"""torchvision's data sets as sources of private images, `torchvision:CIFAR10,root=data,split=test`."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torchvision
from PIL import Image

from leakaudit import spec as specs
from leakaudit.data import ImageSource, Shape, pixels_in
from leakaudit.errors import InputError
from leakaudit.formats.phrases import first_line


@dataclass(frozen=True)
class _SetOptions:
    """`split`: "train", "test" or what else the data set calls its parts."""

    root: str = "data"
    split: str = "test"
    download: bool = False


def torchvision_set(text: str, shape: Shape, classes: int | None) -> ImageSource:
    """The data set of `NAME,root=FOLDER,split=test,download=false`; `InputError` for what is none of images."""
    name, _, options = text.partition(",")
    sets = [n for n in torchvision.datasets.__all__ if inspect.isclass(getattr(torchvision.datasets, n))]
    registry = dict.fromkeys(sets, _SetOptions())
    chosen = specs.parse(f"{name}:{options}", registry, "torchvision data set")
    dataset = _build_set(name.strip(), chosen, shape, classes)
    try:
        count = len(dataset)
    except TypeError as error:
        raise InputError(f"torchvision:{name} has no length; accepted: image classification sets") from error

    def example(row: int) -> tuple[Image.Image, int]:
        try:
            image, label = dataset[row]
            if isinstance(image, Image.Image):
                return image, int(label)
        except (TypeError, ValueError, OSError, RuntimeError) as error:
            raise InputError(f"torchvision:{name}[{row}] cannot be used: {first_line(error)}") from error
        raise InputError(f"torchvision:{name} is no image classification set")

    class_names = getattr(dataset, "classes", None)
    return ImageSource(
        count=count,
        image=lambda row: pixels_in(example(row)[0]),
        name=lambda row: f"{name}[{row}]",
        label=lambda row: example(row)[1],
        class_names=tuple(map(str, class_names)) if isinstance(class_names, (list, tuple)) else None,
    )


def _build_set(name: str, options: _SetOptions, shape: Shape, classes: int | None) -> Any:
    """Give the data set what its constructor takes; constructors differ, so they are asked."""
    make = getattr(torchvision.datasets, name)
    offered = {
        "root": options.root,
        "train": options.split == "train",
        "split": options.split,
        "download": options.download,
        "image_size": shape,
        "num_classes": classes or 10,
    }
    taken = inspect.signature(make).parameters
    try:
        return make(**{key: value for key, value in offered.items() if key in taken})
    except Exception as error:  # constructors check files in their own ways
        where = f"torchvision:{name},root={options.root}"
        raise InputError(f"{where} cannot be opened: {first_line(error)}") from error
