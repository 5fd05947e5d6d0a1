"""Piecewise linear networks made smooth while they are called: ReLU and max-pooling with round corners.

The gradients of such a network jump wherever an activation switches.  With the corners rounded they do
not, and descents that sharpen them in stages (a homotopy) end where those on the real network cannot
get to (docs/recursive.md).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from leakaudit.attacks.head import rms

RELUS = {torch.relu, torch.relu_, Tensor.relu, Tensor.relu_, F.relu, F.relu_}
POOLS = {torch.max_pool2d, F.max_pool2d}
FLOOR = 1e-3
"""Least rms of a layer's values to measure sharpness by."""


class RoundCorners(TorchFunctionMode):
    """Within it, relu(z) is softplus(b z) / b and a maximum is a softmax-weighted mean, b = sharpness / rms(z).

    Args:
        sharpness: above 0; the larger, the nearer to the real network.

    Attributes:
        met: how many corners were rounded.
    """

    def __init__(self, sharpness: float) -> None:
        super().__init__()
        self.sharpness = sharpness
        self.met = 0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        options = kwargs or {}
        if func in RELUS:
            self.met += 1
            return F.softplus(args[0], beta=self._slope(args[0]), threshold=30.0)
        if func in POOLS and not options.get("ceil_mode", False) and not options.get("return_indices", False):
            self.met += 1
            plain = {name: options[name] for name in ("stride", "padding", "dilation") if name in options}
            return smooth_max_pool2d(args[0], *args[1:5], slope=self._slope(args[0]), **plain)
        return func(*args, **options)

    def _slope(self, z: Tensor) -> float:
        return self.sharpness / max(rms(z), FLOOR)


Size = int | tuple[int, int]


def smooth_max_pool2d(
    x: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    dilation: Size = 1,
    *,
    slope: float,
) -> Tensor:
    """As `max_pool2d` of (N, C, H, W), each window's numbers weighted by softmax(slope * number)."""
    kernel, steps = _pair(kernel_size), _pair(stride or kernel_size)
    (down, across), (apart_down, apart_across) = _pair(padding), _pair(dilation)
    least = float(x.detach().min()) - 100.0 / slope
    padded = F.pad(x, (across, across, down, down), value=least)
    windows = F.unfold(padded.flatten(0, 1)[:, None], kernel, (apart_down, apart_across), stride=steps)
    height = (padded.shape[2] - apart_down * (kernel[0] - 1) - 1) // steps[0] + 1
    pooled: Tensor = (windows * (slope * windows).softmax(1)).sum(1)
    return pooled.reshape(*x.shape[:2], height, -1)


def _pair(size: Size) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
