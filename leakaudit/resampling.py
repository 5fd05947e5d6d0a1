"""Cropping, resizing and greying pixels as torchvision's v2 transforms do, to the bit, without importing torchvision.

Every command on images needs these four lines of arithmetic; torchvision takes longer to import than all of torch,
because its operators load the compiler.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor


def centre(image: Tensor, height: int, width: int) -> Tensor:
    """The middle of (..., H, W), at most as large as the image."""
    top, left = (
        round((have - want) / 2) for have, want in zip(image.shape[-2:], (height, width), strict=True)
    )
    return image[..., top : top + height, left : left + width]


def resized(image: Tensor, height: int, width: int, mode: Literal["bilinear", "bicubic"]) -> Tensor:
    """(C, H, W) floats, antialiased; bicubic overshoots the range of the input."""
    if tuple(image.shape[-2:]) == (height, width):
        return image
    return F.interpolate(image[None], (height, width), mode=mode, align_corners=False, antialias=True)[0]


def grey(image: Tensor) -> Tensor:
    """Luma of ITU-R 601 of (3, H, W), as (1, H, W)."""
    red, green, blue = image.unbind(-3)
    return red.mul(0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114).unsqueeze(-3)


def pixels_of(image: Image.Image) -> Tensor:
    """An 8-bit picture as (C, H, W) uint8."""
    values = np.array(image, copy=True)
    return torch.as_tensor(values).view(image.height, image.width, -1).permute(2, 0, 1)
