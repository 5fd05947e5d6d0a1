"""torchvision's classifiers by name, `torchvision:squeezenet1_1,weights=IMAGENET1K_V1`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torchvision
from torch import nn

from leakaudit import spec as specs
from leakaudit.errors import InputError
from leakaudit.formats.phrases import first_line
from leakaudit.models.vision import Shape
from leakaudit.models.zoo import ModelInfo, Source


@dataclass(frozen=True)
class TorchvisionOptions:
    """Attributes:
    weights: torchvision's name for pretrained weights, such as IMAGENET1K_V1.
    image_size: input height of a model that is built for one (the vision transformers).
    """

    weights: str | None = None
    image_size: int | None = None


@dataclass(frozen=True)
class _Torchvision:
    name: str
    options: TorchvisionOptions

    @property
    def info(self) -> ModelInfo:
        crops = torchvision.models.get_model_weights(self.name).DEFAULT.transforms().crop_size
        size = self.options.image_size or crops[0]
        return ModelInfo(
            f"torchvision:{self.name}", (3, size, size), 1000, "torchvision classifier", "torchvision"
        )

    def build(self, num_classes: int | None, shape: Shape, seed: int) -> nn.Module:
        return self._make(num_classes, self._weights())

    def skeleton(self, num_classes: int | None, shape: Shape) -> nn.Module:
        with torch.device("meta"):
            return self._make(num_classes, None)

    def _weights(self) -> Any:
        if self.options.weights is None:
            return None
        known = torchvision.models.get_model_weights(self.name).__members__
        if self.options.weights not in known:
            raise InputError(
                f"torchvision:{self.name} has no weights {self.options.weights!r}"
                f"{specs.suggest(self.options.weights, known)}; known: {', '.join(known)}"
            )
        return known[self.options.weights]

    def _make(self, num_classes: int | None, weights: Any) -> nn.Module:
        arguments: dict[str, Any] = {"num_classes": num_classes or 1000}
        if self.options.image_size is not None:
            arguments["image_size"] = self.options.image_size
        if self.name in ("googlenet", "inception_v3"):  # else they warn that their default will change
            arguments["init_weights"] = weights is None
        try:
            return torchvision.models.get_model(self.name, weights=weights, progress=False, **arguments)
        except (ValueError, TypeError, OSError, RuntimeError, AssertionError) as error:
            raise InputError(f"torchvision:{self.name} cannot be built: {first_line(error)}") from error


def torchvision_source(text: str) -> Source:
    """The model of `NAME,option=value`; `InputError` for a name that torchvision does not have."""
    name, _, options = text.partition(",")
    name, known = name.strip().lower(), torchvision.models.list_models(torchvision.models)
    if name not in known:
        raise InputError(
            f"torchvision has no classifier {name!r}{specs.suggest(name, known)};"
            " torchvision.models.list_models(torchvision.models) lists them"
        )
    return _Torchvision(
        name, specs.parse(f"{name}:{options}", {name: TorchvisionOptions()}, "torchvision model")
    )
