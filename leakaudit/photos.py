"""The few public-domain photos that ship with leakaudit: for the demo, controls and chance levels."""

from __future__ import annotations

import torch
from torch import Tensor

from leakaudit.data import control_photos, photo_folder
from leakaudit.models.spaces import Pixels
from leakaudit.resampling import resized

__all__ = ["distractors", "photo_folder"]

CROPS = 12
"""Crops taken of every photo for the pool, besides the whole."""


def distractors(space: Pixels) -> Tensor:
    """(P, C, H, W) pixels in [0, 1]: each photo and its mirror image, whole and in crops of 60 %."""
    batch = control_photos((space.shape[0], 128, 128))
    generator = torch.Generator().manual_seed(0)
    images = []
    for photo in batch.pixels:
        images.append(photo)
        for top, left in torch.randint(0, 52, (CROPS, 2), generator=generator).tolist():
            images.append(photo[:, top : top + 76, left : left + 76])
    height, width = space.shape[1:]
    pool = torch.stack([resized(image, height, width, "bilinear") for image in images]).clamp(0, 1)
    return torch.cat([pool, pool.flip(-1)])
