"""What defenses on the inputs share: they are of images, and photographs are smooth in places."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from leakaudit.errors import InputError
from leakaudit.models.spaces import Pixels
from leakaudit.models.victim import Victim


def require_images(victim: Victim, defense: str) -> None:
    """`InputError` for a model that takes text."""
    if not isinstance(victim.space, Pixels):
        raise InputError(
            f"{defense} is for images, and model {victim.name} takes text; accepted: an image model"
        )


def slopes(pixels: Tensor, width: float = 1e-2) -> Tensor:
    """(..., H, W): length of the difference to the right and lower neighbours, over all channels of
    (..., C, H, W) pixels in [0, 1].

    Smoothed by `width` (Rudin, Osher and Fatemi 1992; vectorial as in Bresson and Chan 2008).
    """
    across, down = pixels.diff(dim=-1), pixels.diff(dim=-2)
    squares = F.pad(across, (0, 1)).square() + F.pad(down, (0, 0, 0, 1)).square()
    return (squares.sum(-3) + width**2).sqrt() - width
