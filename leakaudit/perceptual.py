"""LPIPS, the learned perceptual distance; apart from the other metrics because it imports torchvision."""

from __future__ import annotations

import contextlib
import functools
import io
import socket
import warnings
from collections.abc import Iterator
from typing import Literal

import lpips
import torch
import torch.nn.functional as F
from torch import Tensor

from leakaudit.errors import Unmeasurable
from leakaudit.formats.phrases import first_line

LpipsNet = Literal["squeeze", "alex"]

_LPIPS_SIZE = 32
_DOWNLOAD_SECONDS = 10.0


def lpips_distance(reconstruction: Tensor, truth: Tensor, net: LpipsNet) -> Tensor:
    """LPIPS v0.1 of (N, C, H, W) pixels in [0, 1], (N,) float32.

    Grey images are repeated to three channels; a shorter side below 32 pixels is scaled up to 32
    (bilinear), the least the trunks take.  Nothing else is resized.

    Raises `Unmeasurable` for other numbers of channels, and where the trunk's weights cannot be had.
    """
    if truth.shape[1] not in (1, 3):
        raise Unmeasurable(f"LPIPS needs 1 or 3 channels, got {truth.shape[1]}")
    model = lpips_model(net)
    if isinstance(model, str):
        raise Unmeasurable(model)
    device = truth.device
    with torch.no_grad():
        pair = [_lpips_input(images) for images in (reconstruction, truth)]
        return model(*pair, normalize=True).flatten().to(device)


def _lpips_input(images: Tensor) -> Tensor:
    images = images.cpu().float().expand(-1, 3, -1, -1)
    shorter = min(images.shape[-2:])
    if shorter >= _LPIPS_SIZE:
        return images
    size = [max(_LPIPS_SIZE, round(side * _LPIPS_SIZE / shorter)) for side in images.shape[-2:]]
    return F.interpolate(images, size=size, mode="bilinear", align_corners=False)


@functools.cache
def lpips_model(net: LpipsNet) -> lpips.LPIPS | str:
    """Built once a process; the reason when the trunk's weights cannot be had."""
    try:
        with _quiet_download():
            return lpips.LPIPS(net=net, verbose=False).requires_grad_(False)
    except (OSError, RuntimeError, EOFError) as error:
        return f"the LPIPS weights ({net}) cannot be had: {first_line(error)}; they are sought in TORCH_HOME"


@contextlib.contextmanager
def _quiet_download() -> Iterator[None]:
    """torchvision may fetch the trunk: without its chatter, and without waiting long for a dead network."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_DOWNLOAD_SECONDS)
    try:
        silence = io.StringIO()
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(silence),
            contextlib.redirect_stderr(silence),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        socket.setdefaulttimeout(before)
