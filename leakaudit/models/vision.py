"""Image classifiers of the gradient-inversion literature, with a choice of activation.

Every constructor takes `num_classes` and `input_shape` (channels, height, width) and
returns a module that maps (B, C, H, W) floats to (B, num_classes) logits.  Parameters
have the names of the published code, so its checkpoints load unchanged.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leakaudit.errors import InputError

Shape = tuple[int, int, int]
Activation = Literal["relu", "sigmoid", "gelu", "silu", "tanh", "softplus"]

ACTIVATIONS: dict[Activation, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "sigmoid": nn.Sigmoid,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "softplus": nn.Softplus,
}


class LeNet(nn.Module):
    """The LeNet of "Deep Leakage from Gradients" (Zhu, Liu and Han 2019).

    Three 5x5 convolutions of 12 channels, the first two with stride 2, and one fully
    connected layer.  Names as in the authors' models/vision.py: body.0, 2, 4 and fc.0.
    Deviation: any input size; the authors' 768 features belong to 32x32.
    """

    def __init__(self, num_classes: int, input_shape: Shape, activation: Activation = "sigmoid") -> None:
        super().__init__()
        channels, height, width = input_shape
        act = ACTIVATIONS[activation]
        self.body = nn.Sequential(
            nn.Conv2d(channels, 12, kernel_size=5, stride=2, padding=2),
            act(),
            nn.Conv2d(12, 12, kernel_size=5, stride=2, padding=2),
            act(),
            nn.Conv2d(12, 12, kernel_size=5, stride=1, padding=2),
            act(),
        )
        features = 12 * -(-height // 4) * -(-width // 4)
        self.fc = nn.Sequential(nn.Linear(features, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(x).flatten(1))


class ConvNet(nn.Module):
    """The ConvNet of "Inverting Gradients" (Geiping et al. 2020), 64 channels in its experiments.

    Eight 3x3 convolutions with BatchNorm, 3x3 max-pooling after the sixth and the eighth,
    one fully connected layer.  Names as in the authors' inversefed/nn/models.py
    (model.conv0 ... model.linear).  Deviation: any input size of at least 9x9.
    """

    def __init__(
        self, num_classes: int, input_shape: Shape, activation: Activation = "relu", width: int = 64
    ) -> None:
        super().__init__()
        channels, height, length = input_shape
        if min(height, length) < 9:
            raise InputError(f"convnet needs inputs of at least 9x9 pixels, got {height}x{length}")
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        incoming = channels
        for index, factor in enumerate((1, 2, 2, 4, 4, 4, 4, 4)):
            layers[f"conv{index}"] = nn.Conv2d(incoming, factor * width, kernel_size=3, padding=1)
            layers[f"bn{index}"] = nn.BatchNorm2d(factor * width)
            layers[f"{activation}{index}"] = ACTIVATIONS[activation]()
            if index == 5:
                layers["pool0"] = nn.MaxPool2d(3)
            incoming = factor * width
        layers["pool1"] = nn.MaxPool2d(3)
        layers["flatten"] = nn.Flatten()
        layers["linear"] = nn.Linear(incoming * (height // 3 // 3) * (length // 3 // 3), num_classes)
        self.model = nn.Sequential(layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


class PadShortcut(nn.Module):
    """Option A of He et al. 2016, section 3.3: subsample, and fill the new channels with zeros."""

    def __init__(self, incoming: int, outgoing: int, stride: int) -> None:
        super().__init__()
        self.padding = (outgoing - incoming) // 2
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, self.padding, self.padding))


class CifarBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm and a parameter-free shortcut."""

    def __init__(self, incoming: int, outgoing: int, stride: int, activation: Activation) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(incoming, outgoing, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outgoing)
        self.act1 = ACTIVATIONS[activation]()
        self.conv2 = nn.Conv2d(outgoing, outgoing, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outgoing)
        same = stride == 1 and incoming == outgoing
        self.shortcut = nn.Identity() if same else PadShortcut(incoming, outgoing, stride)
        self.act2 = ACTIVATIONS[activation]()

    def forward(self, x: Tensor) -> Tensor:
        out = self.act1(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out)) + self.shortcut(x)
        return self.act2(out)


class CifarResNet(nn.Module):
    """The CIFAR ResNet of He et al. 2016, section 4.2, with 6 n + 2 layers and option A shortcuts.

    Names as in github akamaster/pytorch_resnet_cifar10, whose checkpoints load unchanged;
    initialised as there (He et al. 2015, fan in).  With `strides=False` all strides are 1,
    as in DLG's ResNet experiments.  `width=64`, four times that of the original, is the ResNet20-4
    of "Inverting Gradients" (Geiping et al. 2020), but for the projections in its shortcuts.
    """

    def __init__(
        self,
        num_classes: int,
        input_shape: Shape,
        activation: Activation = "relu",
        strides: bool = True,
        blocks: int = 3,
        width: int = 16,
    ) -> None:
        super().__init__()
        stride = 2 if strides else 1
        narrow, middle, wide = width, 2 * width, 4 * width
        self.conv1 = nn.Conv2d(input_shape[0], narrow, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(narrow)
        self.act1 = ACTIVATIONS[activation]()
        self.layer1 = _stage(narrow, narrow, 1, blocks, activation)
        self.layer2 = _stage(narrow, middle, stride, blocks, activation)
        self.layer3 = _stage(middle, wide, stride, blocks, activation)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(wide, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        out = self.act1(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        return self.linear(self.avgpool(out).flatten(1))


def _stage(incoming: int, outgoing: int, stride: int, blocks: int, activation: Activation) -> nn.Sequential:
    first = CifarBlock(incoming, outgoing, stride, activation)
    return nn.Sequential(first, *(CifarBlock(outgoing, outgoing, 1, activation) for _ in range(blocks - 1)))


def resnet18(
    num_classes: int, input_shape: Shape, activation: Activation = "relu", strides: bool = True
) -> nn.Module:
    """torchvision's ResNet-18 with a CIFAR stem: 3x3 convolution of stride 1, no max-pooling.

    Names as in torchvision.  With `strides=False` all strides are 1: the DLG authors
    (Zhu, Liu and Han 2019, section 4.1) "change activation ReLU to Sigmoid and remove
    strides".  Deviation: global average pooling, where their code pools 4x4.
    """
    from torchvision.models import ResNet, resnet  # seconds, which the other models do without

    model = resnet.resnet18(weights=None, num_classes=num_classes)
    model.conv1 = nn.Conv2d(input_shape[0], 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()
    for module in model.modules():
        if isinstance(module, ResNet | resnet.BasicBlock):
            module.relu = ACTIVATIONS[activation]()
        if isinstance(module, nn.Conv2d) and not strides:
            module.stride = (1, 1)
    return model


def mlp(
    num_classes: int,
    input_shape: Shape,
    activation: Activation = "relu",
    width: int = 1024,
    layers: int = 3,
) -> nn.Module:
    """Fully connected network: `layers` hidden layers of `width` units.

    The default is the MLP of Geiping et al. 2020's code, with its names (linear0 ... linear3).
    """
    channels, height, length = input_shape
    parts: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    incoming = channels * height * length
    for index in range(layers):
        parts[f"linear{index}"] = nn.Linear(incoming, width)
        parts[f"{activation}{index}"] = ACTIVATIONS[activation]()
        incoming = width
    parts[f"linear{layers}"] = nn.Linear(incoming, num_classes)
    return nn.Sequential(parts)


def initialise_uniform(module: nn.Module, generator: torch.Generator) -> None:
    """DLG's own initialisation: every parameter uniform in (-0.5, 0.5), in module order, in place.

    With `generator` seeded by 1234 a `LeNet` gets the very numbers of the authors'
    main.py (`torch.manual_seed(1234); net.apply(weights_init)`).
    """
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.uniform_(-0.5, 0.5, generator=generator)
